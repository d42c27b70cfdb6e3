// Matrix products of bfloat16 with sums in single precision, on processors with AMX or with AVX-512's instructions for
// bfloat16; elsewhere HAS_BF16 is not defined. A tile, of AMX, is a register of 16 rows of 64 bytes.

#pragma once

#if defined(__AVX512BF16__)
#define HAS_BF16
#endif
#if defined(HAS_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#endif

#include <memory>

#include "products.h"

#ifdef HAS_BF16

typedef uint16_t bf16;

constexpr int64_t ROWS = 16;         // of a tile
constexpr int64_t BLOCK = 2 * ROWS;  // rows and columns of a product made at a time

// A matrix whose rows are an odd number of cache lines apart, so that neighboring rows do not share a cache's places.
template <typename Number>
struct Matrix {
    static constexpr int64_t LINE = 64 / sizeof(Number);
    int64_t rows, stride;
    std::unique_ptr<Number[]> numbers;
    Number* first;

    Matrix(int64_t rows, int64_t columns)
        : rows(rows), stride((round_up(columns, LINE) / LINE | 1) * LINE), numbers(new Number[rows * stride + LINE]),
          first(reinterpret_cast<Number*>((reinterpret_cast<uintptr_t>(numbers.get()) + 63) / 64 * 64)) {}
    Number* at(int64_t row, int64_t column) { return first + row * stride + column; }
    int64_t bytes() const { return stride * sizeof(Number); }
    void clear() { std::fill(first, first + rows * stride, Number(0)); }
};

static inline bf16 rounded(float x) {
    if (x != x) return 0x7fc0;  // the bits of some NaNs would be rounded to a number
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float widened(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

#ifdef HAS_TILES

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void begin_products() {
    const TileConfig config;
    asm volatile("" ::"r"(&config) : "memory");  // g++ 12 knows only of the first 8 bytes that are read
    _tile_loadconfig(&config);
}
static void end_products() { _tile_release(); }

constexpr int64_t COLUMNS = 32;  // of a tile of bfloat16

// out (32, 32) = or += a (32, K) b (K, 32), for K a multiple of 32. A row of `b` is two rows of the matrix, whose numbers
// alternate.
template <bool ADD>
static inline void block_product(int64_t K, const bf16* a, int64_t a_bytes, const uint32_t* b, int64_t b_bytes, float* out,
                                 int64_t out_bytes) {
    float* const lower = out + ROWS * (out_bytes / sizeof(float));
    const bf16* const a_lower = a + ROWS * (a_bytes / sizeof(bf16));
    asm volatile("" ::: "memory");  // g++ 12 does not know that tiles read memory
    if (ADD) {
        _tile_loadd(0, out, out_bytes);
        _tile_loadd(1, out + ROWS, out_bytes);
        _tile_loadd(2, lower, out_bytes);
        _tile_loadd(3, lower + ROWS, out_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += COLUMNS, b += COLUMNS / 2 * (b_bytes / sizeof(uint32_t))) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + ROWS, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a_lower + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + ROWS, out_bytes);
    _tile_stored(2, lower, out_bytes);
    _tile_stored(3, lower + ROWS, out_bytes);
    asm volatile("" ::: "memory");
}

#else

static void begin_products() {}
static void end_products() {}

// The same in vector registers, for eight rows at a time.
template <bool ADD>
static inline void block_product(int64_t K, const bf16* a, int64_t a_bytes, const uint32_t* b, int64_t b_bytes, float* out,
                                 int64_t out_bytes) {
    constexpr int64_t HEIGHT = 8;
    const int64_t a_stride = a_bytes / sizeof(bf16), b_stride = b_bytes / sizeof(uint32_t), stride = out_bytes / sizeof(float);
    for (int64_t m = 0; m < BLOCK; m += HEIGHT, a += HEIGHT * a_stride, out += HEIGHT * stride) {
        __m512 left[HEIGHT], right[HEIGHT];
        for (int64_t i = 0; i < HEIGHT; i++) {
            left[i] = ADD ? _mm512_load_ps(out + i * stride) : _mm512_setzero_ps();
            right[i] = ADD ? _mm512_load_ps(out + i * stride + W) : _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < K / 2; k++) {
            const __m512bh b_left = (__m512bh)_mm512_load_si512(b + k * b_stride);
            const __m512bh b_right = (__m512bh)_mm512_load_si512(b + k * b_stride + W);
            for (int64_t i = 0; i < HEIGHT; i++) {
                int32_t pair;
                memcpy(&pair, a + i * a_stride + 2 * k, sizeof pair);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                left[i] = _mm512_dpbf16_ps(left[i], both, b_left);
                right[i] = _mm512_dpbf16_ps(right[i], both, b_right);
            }
        }
        for (int64_t i = 0; i < HEIGHT; i++) {
            _mm512_store_ps(out + i * stride, left[i]);
            _mm512_store_ps(out + i * stride + W, right[i]);
        }
    }
}

#endif

#endif
