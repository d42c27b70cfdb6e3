// The loops of training and ranking that torch has no call for, in single precision on the CPU; each has a plain twin in
// torch beside the Python function that calls it. Compiled at start where there is a compiler, see kernels.py.
//
// Sequences s = 0 .. B - 1 lie one after the other: tokens offsets[s] .. offsets[s + 1] - 1 of arrays (T, D), D = heads * d.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __AVX512F__
constexpr int W = 16;  // floats in a register
constexpr int NR = 4;  // registers of a product's tile in a row: MR * NR + NR + 1 of the 32 or 16 there are
#else
constexpr int W = 8;
constexpr int NR = 2;
#endif
constexpr int MR = 6;  // rows of a tile

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

static inline vec load(const float* p) { vec x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
static inline vec all(float x) { return vec{} + x; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline float sum(vec x) { float s = 0; for (int i = 0; i < W; i++) s += x[i]; return s; }
static inline float largest(vec x) { float s = x[0]; for (int i = 1; i < W; i++) s = std::max(s, x[i]); return s; }

// e^x for x <= 88, relative error below 2e-7; anything below -87 counts as -87. Coefficients: Taylor's to the sixth power
// on [-ln 2 / 2, ln 2 / 2].
static inline vec exponential(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;  // NaN stays
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vec n = (x * 1.44269504f + magic) - magic;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// Independent 32-bit generators side by side (Marsaglia 2003, xorshift), started from splitmix64.
struct Random {
    uvec state;
    Random(uint64_t seed, uint64_t stream) {
        for (int i = 0; i < W; i++) {
            const uint64_t x = seed + (stream * W + i + 1) * 0x9E3779B97F4A7C15u;  // no two lanes of a call alike
            uint64_t z = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
            state[i] = uint32_t(z ^ (z >> 31)) | 1u;
        }
    }
    uvec next() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    }
};

// Products

template <int M, int N>
static void tile(int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                 int64_t c_row) {
    vec total[M][N] = {};
    for (int64_t k = 0; k < K; k++, a += a_col, b += b_row) {
        vec row[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) row[n] = load(b + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec x = all(a[m * a_row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) total[m][n] += x * row[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(c + m * c_row + n * W, total[m][n]);
}

template <int N>
static void tile_of_rows(int M, int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                         float* c, int64_t c_row) {
    switch (M) {
        case 1: return tile<1, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 2: return tile<2, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 3: return tile<3, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 4: return tile<4, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 5: return tile<5, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        default: return tile<6, N>(K, a, a_row, a_col, b, b_row, c, c_row);
    }
}

// c (M, N) = a (M, K) b (K, N) for M up to MR; N is rounded up to whole registers, so rows of b and c must reach so far.
static void rows_product(int M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b,
                         int64_t b_row, float* c, int64_t c_row) {
    int64_t n = 0;
    for (; n + (NR - 1) * W < N; n += NR * W) tile_of_rows<NR>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    const int64_t left = (N - n + W - 1) / W;  // fewer than NR registers
    if (left == 3) tile_of_rows<3>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    if (left == 2) tile_of_rows<2>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    if (left == 1) tile_of_rows<1>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
}

// Attention

static void pack_rows(const float* x, int64_t L, int64_t d, int64_t stride, float* out, int64_t width) {
    for (int64_t i = 0; i < L; i++) {
        memcpy(out + i * width, x + i * stride, d * sizeof(float));
        for (int64_t c = d; c < width; c++) out[i * width + c] = 0;
    }
}

static void pack_columns(const float* x, int64_t L, int64_t d, int64_t stride, float* out, int64_t width) {
    for (int64_t c = 0; c < d; c++) {
        for (int64_t i = 0; i < L; i++) out[c * width + i] = x[i * stride + c];
        for (int64_t i = L; i < width; i++) out[c * width + i] = 0;
    }
}

static void unpack_rows(const float* x, int64_t rows, int64_t d, int64_t width, float scale, float* out, int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < d; c++) out[i * stride + c] = scale * x[i * width + c];
}

// Scores to weights in place: softmax of the first `count` times `scale`, zeros from there to `width`.
static void softmax_row(float* row, int64_t count, int64_t width, float scale) {
    const int64_t end = round_up(count, W);
    std::fill(row + count, row + end, -1e30f);
    vec most = load(row);
    for (int64_t j = W; j < end; j += W) most = larger(most, load(row + j));
    const float shift = largest(most) * scale;
    vec total = {};
    for (int64_t j = 0; j < end; j += W) {
        const vec e = exponential(load(row + j) * scale - shift);
        store(row + j, e);
        total += e;
    }
    const float share = 1 / sum(total);
    for (int64_t j = 0; j < end; j += W) store(row + j, load(row + j) * share);
    std::fill(row + count, row + width, 0.0f);
}

// The negative sign marks a weight as dropped.
static void mark_dropped(float* row, int64_t count, uint32_t threshold, Random& random) {
    for (int64_t j = 0; j < count; j += W) {
        const uvec dropped = (uvec)(random.next() < threshold) << 31;
        uvec bits;
        memcpy(&bits, row + j, sizeof bits);
        bits ^= dropped;
        memcpy(row + j, &bits, sizeof bits);
    }
}

static inline int64_t weights_of(int64_t L) { return L * round_up(L, W); }

extern "C" {

// Floats that `weights` must hold for each head.
int64_t weights_size(const int64_t* offsets, int64_t B) {
    int64_t size = 0;
    for (int64_t s = 0; s < B; s++) size += weights_of(offsets[s + 1] - offsets[s]);
    return size;
}

// out (T, D) = dropout(softmax(scale * q k' over the past)) v. `weights` keeps the softmax, a negative sign where dropped.
void attention(const float* q, const float* k, const float* v, const int64_t* offsets, int64_t B, int64_t D,
               int64_t heads, double scale, double rate, uint64_t seed, float* out, float* weights) {
    const int64_t d = D / heads, wide = round_up(d, W);
    const float kept = 1 / (1 - rate);
    const uint32_t threshold = uint32_t(rate * 4294967296.0);
    std::vector<int64_t> first(B + 1, 0);
    for (int64_t s = 0; s < B; s++) first[s + 1] = first[s] + heads * weights_of(offsets[s + 1] - offsets[s]);
#pragma omp parallel
    {
        std::vector<float> k_columns, v_rows, block, out_block(MR * wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * heads; task++) {
            const int64_t s = task / heads, h = task % heads, L = offsets[s + 1] - offsets[s], ld = round_up(L, W);
            const int64_t start = offsets[s] * D + h * d;
            float* P = weights + first[s] + h * weights_of(L);
            k_columns.resize(d * ld), v_rows.resize(L * wide), block.resize(MR * ld);
            pack_columns(k + start, L, d, D, k_columns.data(), ld);
            pack_rows(v + start, L, d, D, v_rows.data(), wide);
            Random random(seed, task);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), past = i + rows;
                rows_product(rows, past, d, q + start + i * D, D, 1, k_columns.data(), ld, P + i * ld, ld);
                const float* used = P + i * ld;
                for (int64_t m = 0; m < rows; m++) softmax_row(P + (i + m) * ld, i + m + 1, round_up(past, W), scale);
                if (threshold) {
                    for (int64_t m = 0; m < rows; m++) {
                        float* row = P + (i + m) * ld;
                        mark_dropped(row, i + m + 1, threshold, random);
                        for (int64_t j = 0; j < past; j += W)
                            store(&block[m * ld + j], larger(load(row + j), vec{}) * kept);
                    }
                    used = block.data();
                }
                rows_product(rows, wide, past, used, ld, 1, v_rows.data(), wide, out_block.data(), wide);
                unpack_rows(out_block.data(), rows, d, wide, 1, out + start + i * D, D);
            }
        }
    }
}

void attention_backward(const float* q, const float* k, const float* v, const float* out, const float* grad,
                        const float* weights, const int64_t* offsets, int64_t B, int64_t D, int64_t heads, double scale,
                        double rate, float* q_grad, float* k_grad, float* v_grad) {
    const int64_t d = D / heads, wide = round_up(d, W);
    const float kept = 1 / (1 - rate);
    std::vector<int64_t> first(B + 1, 0);
    for (int64_t s = 0; s < B; s++) first[s + 1] = first[s] + heads * weights_of(offsets[s + 1] - offsets[s]);
#pragma omp parallel
    {
        std::vector<float> v_columns, q_rows, k_rows, grad_rows, used, scores, tile_out(MR * wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * heads; task++) {
            const int64_t s = task / heads, h = task % heads, L = offsets[s + 1] - offsets[s], ld = round_up(L, W);
            const int64_t start = offsets[s] * D + h * d;
            const float* P = weights + first[s] + h * weights_of(L);
            v_columns.resize(d * ld), q_rows.resize(L * wide), k_rows.resize(L * wide), grad_rows.resize(L * wide);
            used.resize(L * ld), scores.resize(L * ld);
            pack_columns(v + start, L, d, D, v_columns.data(), ld);
            pack_rows(q + start, L, d, D, q_rows.data(), wide);
            pack_rows(k + start, L, d, D, k_rows.data(), wide);
            pack_rows(grad + start, L, d, D, grad_rows.data(), wide);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), past = i + rows;
                float* S = &scores[i * ld];
                rows_product(rows, past, d, &grad_rows[i * wide], wide, 1, v_columns.data(), ld, S, ld);
                for (int64_t m = 0; m < rows; m++) {
                    const int64_t token = start + (i + m) * D;
                    float mean = 0;  // of the weights' gradient, weighted: equals grad * out
#pragma omp simd reduction(+ : mean)
                    for (int64_t c = 0; c < d; c++) mean += grad[token + c] * out[token + c];
                    for (int64_t j = 0; j < past; j += W) {
                        const vec p = load(P + (i + m) * ld + j), used_p = larger(p, vec{}) * kept;
                        const vec size = larger(p, -p);
                        store(&used[(i + m) * ld + j], used_p);
                        store(S + m * ld + j, used_p * load(S + m * ld + j) - size * mean);
                    }
                }
                rows_product(rows, wide, past, S, ld, 1, k_rows.data(), wide, tile_out.data(), wide);
                unpack_rows(tile_out.data(), rows, d, wide, float(scale), q_grad + start + i * D, D);
            }
            for (int64_t j = 0; j < L; j += MR) {
                const int64_t columns = std::min<int64_t>(MR, L - j), at = j * ld + j;
                rows_product(columns, wide, L - j, &scores[at], 1, ld, &q_rows[j * wide], wide, tile_out.data(), wide);
                unpack_rows(tile_out.data(), columns, d, wide, scale, k_grad + start + j * D, D);
                rows_product(columns, wide, L - j, &used[at], 1, ld, &grad_rows[j * wide], wide, tile_out.data(), wide);
                unpack_rows(tile_out.data(), columns, d, wide, 1, v_grad + start + j * D, D);
            }
        }
    }
}

// out (B, D): attention of each sequence's newest token alone, whose queries are q (B, D).
void newest_attention(const float* q, const float* k, const float* v, const int64_t* offsets, int64_t B, int64_t D,
                      int64_t heads, double scale, float* out) {
    const int64_t d = D / heads;
#pragma omp parallel
    {
        std::vector<float> row;
#pragma omp for schedule(dynamic, 4)
        for (int64_t s = 0; s < B; s++) {
            const int64_t L = offsets[s + 1] - offsets[s];
            row.resize(round_up(L, W));
            for (int64_t h = 0; h < heads; h++) {
                const float *query = q + s * D + h * d, *keys = k + offsets[s] * D + h * d;
                const float* values = v + offsets[s] * D + h * d;
                float* result = out + s * D + h * d;
                for (int64_t j = 0; j < L; j++) {
                    float score = 0;
#pragma omp simd reduction(+ : score)
                    for (int64_t c = 0; c < d; c++) score += query[c] * keys[j * D + c];
                    row[j] = score;
                }
                softmax_row(row.data(), L, L, scale);
                std::fill(result, result + d, 0.0f);
                for (int64_t j = 0; j < L; j++)
                    for (int64_t c = 0; c < d; c++) result[c] += row[j] * values[j * D + c];
            }
        }
    }
}

// counts (R,): how many of a row's V scores are not below its bound; NaN is not.
void count_not_below(const float* scores, int64_t R, int64_t V, const float* bounds, int64_t* counts) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < R; r++) {
        const float* row = scores + r * V;
        const vec bound = all(bounds[r]);
        const int64_t whole = V / W * W;
        ivec below = {};  // minus one for each
        for (int64_t j = 0; j < whole; j += W) below += load(row + j) < bound;
        int64_t count = V;
        for (int i = 0; i < W; i++) count += below[i];
        for (int64_t j = whole; j < V; j++) count -= row[j] < bounds[r];
        counts[r] = count;
    }
}

// The k best of each row so far, best first and of equal ones the lower item first, brought up to date by the scores
// (R, V) of the items before + 1, before + 2, ...: best_scores and best_items (R, k). An item of 0 is none, -inf counts as
// none. The k best lie in the k blocks with the highest maxima, so the k-th highest maximum is a bound: what is below it
// is looked at once.
void take_best(const float* scores, int64_t R, int64_t V, int64_t before, int64_t k, float* best_scores,
               int64_t* best_items) {
    constexpr int64_t BLOCK = 4 * W;
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    const float none = -__builtin_inff();
    struct Item { float score; int64_t number; };
    const auto ahead = [](const Item& a, const Item& b) {
        return a.score > b.score || (a.score == b.score && a.number < b.number);
    };
#pragma omp parallel
    {
        std::vector<float> maxima(blocks), sorted(blocks);
        std::vector<Item> found;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; r++) {
            const float* row = scores + r * V;
            for (int64_t b = 0; b < blocks; b++) {
                const float* from = row + b * BLOCK;
                if ((b + 1) * BLOCK > V)
                    maxima[b] = *std::max_element(from, row + V);
                else
                    maxima[b] = largest(larger(larger(load(from), load(from + W)),
                                               larger(load(from + 2 * W), load(from + 3 * W))));
            }
            float bound = best_scores[r * k + k - 1];
            if (k <= blocks) {
                sorted = maxima;
                std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
                bound = std::max(bound, sorted[k - 1]);
            }
            found.clear();
            for (int64_t i = 0; i < k && best_items[r * k + i]; i++)
                found.push_back({best_scores[r * k + i], best_items[r * k + i]});
            for (int64_t b = 0; b < blocks; b++) {
                if (!(maxima[b] >= bound)) continue;
                for (int64_t j = b * BLOCK; j < std::min(V, (b + 1) * BLOCK); j++)
                    if (row[j] >= bound && row[j] > none) found.push_back({row[j], before + j + 1});
            }
            const int64_t n = std::min<int64_t>(k, found.size());
            std::partial_sort(found.begin(), found.begin() + n, found.end(), ahead);
            for (int64_t i = 0; i < n; i++) {
                best_scores[r * k + i] = found[i].score;
                best_items[r * k + i] = found[i].number;
            }
        }
    }
}

// Logits (R, V) to their softmax in place; log_p (R,) = the target's logit - log sum e^logit.
void softmax_and_log_p(float* logits, int64_t R, int64_t V, const int64_t* targets, float* log_p) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < R; r++) {
        float* row = logits + r * V;
        const float target = row[targets[r]];
        const int64_t whole = V / W * W;
        vec most = all(row[0]);
        for (int64_t j = 0; j < whole; j += W) most = larger(most, load(row + j));
        float shift = largest(most);
        for (int64_t j = whole; j < V; j++) shift = std::max(shift, row[j]);
        vec total = {};
        for (int64_t j = 0; j < whole; j += W) {
            const vec e = exponential(load(row + j) - shift);
            store(row + j, e);
            total += e;
        }
        float rest[W];
        std::fill(rest, rest + W, -1e30f);
        std::copy(row + whole, row + V, rest);
        store(rest, exponential(load(rest) - shift));
        float all_of_it = sum(total);
        for (int64_t j = whole; j < V; j++) all_of_it += row[j] = rest[j - whole];
        const float share = 1 / all_of_it;
        for (int64_t j = 0; j < V; j++) row[j] *= share;
        log_p[r] = (target - shift) - __builtin_logf(all_of_it);
    }
}
}
