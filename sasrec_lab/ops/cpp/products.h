// Registers, and matrix products that compute a tile of registers at a time, in single precision.
//
// cpp/ has the loops that torch has no call for. ops/*.py declares each exported function next to its form in torch, which
// runs without a compiler.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int W = 16;  // floats in a register
constexpr int NR = 4;  // registers in a row of a product's tile: it needs MR * NR + NR + 1 of the 32 or 16 there are
#else
constexpr int W = 8;
constexpr int NR = 2;
#endif
constexpr int MR = 6;  // rows of a tile
constexpr int TILE = NR * W;

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

static inline vec load(const float* p) { vec x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
static inline vec all(float x) { return x - vec{}; }  // "+" would compile to an addition, because of -0
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
// a b + total with one rounding, where the processor can. Left to the compiler, some loops would round twice and others not
// (g++ on AMD's), so that the same item would have two scores.
static inline vec add_product(vec total, vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    return total + a * b;
#endif
}
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Reduces all lanes to one number, one half by the other half: lane after lane, each step would wait for the last.
template <typename Use>
static inline float folded(vec x, const Use& use) {
    float lanes[W];
    memcpy(lanes, &x, sizeof x);
    const auto fold = [&](auto half) {
        typedef float part __attribute__((vector_size(sizeof(float) * decltype(half)::value)));
        part low, high;
        memcpy(&low, lanes, sizeof low), memcpy(&high, lanes + decltype(half)::value, sizeof high);
        low = use(low, high);
        memcpy(lanes, &low, sizeof low);
    };
    if constexpr (W == 16) fold(std::integral_constant<int, 8>());
    fold(std::integral_constant<int, 4>()), fold(std::integral_constant<int, 2>());
    return use(lanes[0], lanes[1]);
}
static inline float sum(vec x) { return folded(x, [](auto a, auto b) { return a + b; }); }
static inline float largest(vec x) { return folded(x, [](auto a, auto b) { return a > b ? a : b; }); }

static inline float dot(const float* a, const float* b, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}

// e^x for x <= 88, with a relative error below 4e-6, and 1e-6 near 0; 0 below -87. The polynomial approximates 2^r on
// [-1/2, 1/2] with the least relative error among those that give 1 at 0.
static inline vec exponential(vec x) {
    const ivec below = x < -87.0f;  // NaN is not below and stays
    x = below ? all(-87.0f) : x;
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the last bits
    const vec shifted = x * 1.44269504f + magic;
    const vec r = x * 1.44269504f - (shifted - magic);
    vec p = all(0.001326472731f);
    p = p * r + 0.009671512991f;
    p = p * r + 0.05550733581f;
    p = p * r + 0.2402224243f;
    p = p * r + 0.6931470037f;
    p = p * r + 1.0f;
    ivec bits, power;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&power, &shifted, sizeof power);
    bits += power << 23;
    bits &= ~below;
    memcpy(&p, &bits, sizeof p);
    return p;
}

// total = a (M, K) b (K, N registers), summed in the order of K for any M and N.
template <int M, int N>
static inline void multiply(int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                            vec (&total)[M][N]) {
    for (int64_t k = 0; k < K; k++, a += a_col, b += b_row) {
        vec row[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) row[n] = load(b + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec x = all(a[m * a_row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) total[m][n] = add_product(total[m][n], x, row[n]);
        }
    }
}

template <bool ADD, int M, int N>
static void tile(int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                 int64_t c_row) {
    if (ADD)
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) __builtin_prefetch(c + m * c_row + n * W, 1);
    vec total[M][N] = {};
    multiply<M, N>(K, a, a_row, a_col, b, b_row, total);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            float* out = c + m * c_row + n * W;
            store(out, ADD ? load(out) + total[m][n] : total[m][n]);
        }
}

template <bool ADD, int N>
static void tile_of_rows(int M, int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                         float* c, int64_t c_row) {
    switch (M) {
        case 1: return tile<ADD, 1, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 2: return tile<ADD, 2, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 3: return tile<ADD, 3, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 4: return tile<ADD, 4, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        case 5: return tile<ADD, 5, N>(K, a, a_row, a_col, b, b_row, c, c_row);
        default: return tile<ADD, 6, N>(K, a, a_row, a_col, b, b_row, c, c_row);
    }
}

// c (M, N) = or += a (M, K) b (K, N) for M up to MR. N is rounded up to whole registers, so rows of b and c must be that
// long.
template <bool ADD = false>
static void rows_product(int M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b,
                         int64_t b_row, float* c, int64_t c_row) {
    int64_t n = 0;
    for (; n + (NR - 1) * W < N; n += TILE) tile_of_rows<ADD, NR>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    const int64_t left = (N - n + W - 1) / W;  // fewer than NR registers
    if (left == 3) tile_of_rows<ADD, 3>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    if (left == 2) tile_of_rows<ADD, 2>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
    if (left == 1) tile_of_rows<ADD, 1>(M, K, a, a_row, a_col, b + n, b_row, c + n, c_row);
}

// Copies x (L, d), its rows `stride` apart, to out (L, width), with zeros from d to `width`.
static inline void copy_rows(const float* x, int64_t L, int64_t d, int64_t stride, float* out, int64_t width) {
    if (d == stride && d == width) {
        memcpy(out, x, L * width * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < L; i++) {
        memcpy(out + i * width, x + i * stride, d * sizeof(float));
        for (int64_t c = d; c < width; c++) out[i * width + c] = 0;
    }
}

// Packs states (R, D) in transposed blocks of TILE states, and of W if fewer are left: element k of the state in lane i of
// the block that begins with state r is columns[r * D + k * width + i]. Zeros fill the last register. Packs only the states
// from `first`, the beginning of a tile, to `last` - 1.
static inline void pack_states(const float* states, int64_t R, int64_t D, int64_t first, int64_t last, float* columns) {
    for (int64_t r = first; r < last;) {
        const int64_t width = round_up(R, W) - r >= TILE ? TILE : W;
        for (int64_t k = 0; k < D; k++)
            for (int64_t i = 0; i < width; i++)
                columns[r * D + k * width + i] = r + i < R ? states[(r + i) * D + k] : 0;
        r += width;
    }
}

// Scores the items `first` to `last` - 1, rows of `table`, for all R packed states, a tile of registers at a time: calls
// use(item, r, scores of M items by N registers of states from r on).
template <typename Use>
static inline void score(const float* table, int64_t first, int64_t last, int64_t D, const float* columns, int64_t R,
                         const Use& use) {
    const auto block = [&](auto registers, int64_t r) {
        constexpr int N = decltype(registers)::value;
        const auto items = [&](auto rows, int64_t item) {
            vec scores[decltype(rows)::value][N] = {};
            multiply(D, table + item * D, D, 1, columns + r * D, N * W, scores);
            use(item, r, scores);
        };
        int64_t item = first;
        for (; item + MR <= last; item += MR) items(std::integral_constant<int, MR>(), item);
        for (; item < last; item++) items(std::integral_constant<int, 1>(), item);
    };
    int64_t r = 0;
    for (; r + TILE <= round_up(R, W); r += TILE) block(std::integral_constant<int, NR>(), r);
    for (; r < R; r += W) block(std::integral_constant<int, 1>(), r);
}

// Scores pairs of one of R packed states and an item, to the last bit as `score` does: calls use(pair, score).
//
// Several pairs at a time, because each sum has to wait for its last addition.
template <typename State, typename Item, typename Use>
static inline void score_pairs(int64_t pairs, int64_t D, const float* columns, int64_t R, const State& state,
                               const Item& item, const Use& use) {
    constexpr int M = 8;
    const int64_t whole = round_up(R, W) / TILE * TILE;
    for (int64_t first = 0; first < pairs; first += M) {
        const float *rows[M], *places[M];
        int64_t widths[M], lanes[M];
        vec scores[M] = {};
        for (int m = 0; m < M; m++) {
            const int64_t pair = std::min(first + m, pairs - 1), r = state(pair), width = r < whole ? TILE : W;
            const int64_t begin = r / width * width, lane = r - begin;
            rows[m] = item(pair), widths[m] = width, lanes[m] = lane % W;
            places[m] = columns + begin * D + lane / W * W;
        }
        for (int64_t k = 0; k < D; k++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                scores[m] = add_product(scores[m], all(rows[m][k]), load(places[m] + k * widths[m]));
        for (int m = 0; m < std::min<int64_t>(M, pairs - first); m++) use(first + m, scores[m][lanes[m]]);
    }
}

// Items that a thread takes at a time: their rows and results fit a core's second-level cache, and all threads get about
// as many.
static inline int64_t panel_size(int64_t items, int64_t threads) {
    const int64_t rounds = (items + 192 * threads - 1) / (192 * threads);
    return std::max<int64_t>(MR, round_up((items + threads * rounds - 1) / (threads * rounds), MR));
}
