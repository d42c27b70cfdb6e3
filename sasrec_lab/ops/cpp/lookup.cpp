// Products with a few items' vectors per token, which are read where the table has them. T tokens, D dim, M items per token.

#include "products.h"
#include "threads.h"

constexpr int64_t TOKENS = 8;  // that a thread takes at a time
constexpr int64_t AHEAD = 8;   // by how many items a vector is fetched before it is used

// Fetches the vector of the item that comes AHEAD of item m of a token into the cache.
static inline void fetch(const float* table, const int64_t* rows, int64_t m, int64_t M, int64_t D) {
    if (m + AHEAD >= M) return;
    const float* vector = table + rows[m + AHEAD] * D;
    for (int64_t k = 0; k < D; k += 16) __builtin_prefetch(vector + k);
}

// Calls each(t) for all tokens, shared out to the threads.
template <typename Each>
static void each_token(int64_t T, const Each& each) {
    parallel([&](const Team& team) {
        team.share(T, TOKENS, [&](int64_t first) {
            for (int64_t t = first; t < std::min(T, first + TOKENS); t++) each(t);
        });
    });
}

// Calls use(registers, k) for columns k to k + registers * W - 1, and tail(k) for those that fill no register.
template <typename Use, typename Tail>
static inline void each_column(int64_t D, const Use& use, const Tail& tail) {
    int64_t k = 0;
    for (; k + 8 * W <= D; k += 8 * W) use(std::integral_constant<int, 8>(), k);
    for (; k + 2 * W <= D; k += 2 * W) use(std::integral_constant<int, 2>(), k);
    for (; k + W <= D; k += W) use(std::integral_constant<int, 1>(), k);
    for (; k < D; k++) tail(k);
}

extern "C" {

// logits (T, M) of the items in the rows (T, M) of a table, for states (T, D).
void lookup_logits(const float* states, int64_t T, int64_t D, const float* table, const int64_t* rows, int64_t M,
                   float* logits) {
    constexpr int S = 8;  // items at a time, because each sum has to wait for its last addition
    const int64_t whole = D / W * W;
    each_token(T, [&](int64_t t) {
        const float* state = states + t * D;
        const int64_t* own = rows + t * M;
        for (int64_t m = 0; m < M; m += S) {
            const float* vectors[S];
            for (int i = 0; i < S; i++) {
                vectors[i] = table + own[std::min(m + i, M - 1)] * D;
                fetch(table, own, m + i, M, D);
            }
            vec totals[S] = {};
            for (int64_t k = 0; k < whole; k += W) {
                const vec x = load(state + k);
#pragma GCC unroll 8
                for (int i = 0; i < S; i++) totals[i] = add_product(totals[i], x, load(vectors[i] + k));
            }
            for (int i = 0; i < std::min<int64_t>(S, M - m); i++)
                logits[t * M + m + i] = sum(totals[i]) + dot(state + whole, vectors[i] + whole, D - whole);
        }
    });
}

// out (T, D) = the sum of the vectors of each token's items, times the slopes (T, M).
void lookup_mix(const float* slopes, int64_t T, int64_t D, const float* table, const int64_t* rows, int64_t M, float* out) {
    each_token(T, [&](int64_t t) {
        const float* factors = slopes + t * M;
        const int64_t* own = rows + t * M;
        each_column(
            D,
            [&](auto registers, int64_t k) {
                constexpr int N = decltype(registers)::value;
                vec total[N] = {};
                for (int64_t m = 0; m < M; m++) {
                    const vec factor = all(factors[m]);
                    const float* vector = table + own[m] * D + k;
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) total[n] = add_product(total[n], factor, load(vector + n * W));
                }
                for (int n = 0; n < N; n++) store(out + t * D + k + n * W, total[n]);
            },
            [&](int64_t k) {
                float total = 0;
                for (int64_t m = 0; m < M; m++) total += factors[m] * table[own[m] * D + k];
                out[t * D + k] = total;
            });
    });
}

// grad (V, D) = for each row of the table the sum of the states (T, D) of the tokens that look it up, times the slopes
// (T, M). A thread writes its own rows only, and adds to each in the order of the tokens, for any number of threads.
void lookup_table_grad(const float* states, const float* slopes, int64_t T, int64_t D, const int64_t* rows, int64_t M,
                       int64_t V, float* grad) {
    parallel([&](const Team& team) {
        const uint32_t me = team.me, size = team.size;
        for (int64_t v = me; v < V; v += size) std::fill(grad + v * D, grad + (v + 1) * D, 0.0f);
        for (int64_t t = 0; t < T; t++) {
            const float* state = states + t * D;
            const int64_t* own = rows + t * M;
            for (int64_t m = 0; m < M; m++) {
                if (size > 1 && uint32_t(own[m]) % size != me) continue;
                fetch(grad, own, m, M, D);
                const float slope = slopes[t * M + m];
                float* row = grad + own[m] * D;
#pragma omp simd
                for (int64_t k = 0; k < D; k++) row[k] += slope * state[k];
            }
        }
    });
}
}
