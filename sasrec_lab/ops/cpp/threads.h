// Threads of the OpenMP library that torch ships, by the functions that GNU's compiler calls for its pragmas. So any
// compiler works, even one without OpenMP.

#pragma once

#include <atomic>
#include <cstdint>

extern "C" {
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
}

// What each working thread knows.
struct Team {
    int64_t me, size;
    std::atomic<int64_t>& next;

    // Calls each(0), each(step), ... below n: every thread gets one contiguous share.
    template <typename Each>
    void share(int64_t n, int64_t step, const Each& each) const {
        const int64_t steps = (n + step - 1) / step, last = steps * (me + 1) / size;
        for (int64_t i = steps * me / size; i < last; i++) each(i * step);
    }

    // The same, but the next free thread takes each call. Only once per `parallel`.
    template <typename Each>
    void take_turns(int64_t n, int64_t step, const Each& each) const {
        for (int64_t i; (i = step * next++) < n;) each(i);
    }

    void wait() const { GOMP_barrier(); }
};

// Runs body(team) on every thread and waits for all. There may be fewer threads than torch has set.
template <typename Body>
static void parallel(const Body& body) {
    std::atomic<int64_t> next{0};
    const auto on_each = [&] { body(Team{omp_get_thread_num(), omp_get_num_threads(), next}); };
    const auto call = [](void* data) { (*static_cast<decltype(on_each)*>(data))(); };
    GOMP_parallel(call, const_cast<void*>(static_cast<const void*>(&on_each)), 0, 0);
}
