// Dropout without a mask.

#include "random.h"
#include "threads.h"

constexpr int64_t BLOCK = 4096;  // elements per random generator

extern "C" {

// out (n,) = x, each element times zero with probability `rate`, else times 1 / (1 - rate). The seed and an element's index
// determine whether it is dropped, so the same call also serves the backward pass.
void dropout(const float* x, int64_t n, double rate, uint64_t seed, float* out) {
    const vec kept = all(1 / (1 - rate));
    const uvec threshold = uvec{} + threshold_of(rate);
    const auto drop = [&](int64_t begin) {
        Random random(seed, begin / BLOCK);
        const int64_t end = std::min(n, begin + BLOCK), whole = begin + (end - begin) / W * W;
        for (int64_t i = begin; i < whole; i += W) store(out + i, load(x + i) * (random.next() < threshold ? vec{} : kept));
        if (whole < end) {
            const vec factors = random.next() < threshold ? vec{} : kept;
            for (int64_t i = whole; i < end; i++) out[i] = x[i] * factors[i - whole];
        }
    };
    parallel([&](const Team& team) { team.share(n, BLOCK, drop); });
}
}
