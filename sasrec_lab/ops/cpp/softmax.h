// Shared by the kernels of attention: transposed keys, rows of heads, and the softmax of a row of scores.

#pragma once

#include "products.h"

// Transposes x (L, d), its rows `stride` apart, to out (d, width), with zeros from L to `width`, whole registers.
static void pack_columns(const float* x, int64_t L, int64_t d, int64_t stride, float* out, int64_t width) {
    for (int64_t begin = 0; begin < width; begin += W) {
        const int64_t count = std::min<int64_t>(W, L - begin);
        for (int64_t c = 0; c < d; c++) {
            float* column = out + c * width + begin;
            for (int64_t i = 0; i < count; i++) column[i] = x[(begin + i) * stride + c];
            for (int64_t i = std::max<int64_t>(count, 0); i < W; i++) column[i] = 0;
        }
    }
}

// Copies scale * x (rows, d), its rows `width` apart, to out, whose rows are `stride` apart.
static void unpack_rows(const float* x, int64_t rows, int64_t d, int64_t width, float scale, float* out, int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < d; c++) out[i * stride + c] = scale * x[i * width + c];
}

// Adds x (count,) to the row, and whatever follows there in the last register.
static void add_row(const float* x, int64_t count, float* row) {
    for (int64_t j = 0; j < count; j += W) store(row + j, load(row + j) + load(x + j));
}

// Replaces scores by weights: the softmax of the first `count` times `scale`, and zeros from there to `width`.
static void softmax_row(float* row, int64_t count, int64_t width, float scale) {
    const int64_t end = round_up(count, W);
    ivec lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    const ivec behind = lanes >= int32_t(count - (end - W));
    vec most = behind ? all(-__builtin_inff()) : load(row + end - W);
    store(row + end - W, most);
    for (int64_t j = 0; j < end - W; j += W) most = larger(most, load(row + j));
    const float shift = largest(most);
    vec total = {};
    for (int64_t j = 0; j < end; j += W) {
        const vec e = exponential((load(row + j) - shift) * scale);  // 0 for the largest, however large
        store(row + j, e);
        total += e;
    }
    const float share = 1 / sum(total);
    for (int64_t j = 0; j < end; j += W) store(row + j, load(row + j) * share);
    for (int64_t j = end; j < width; j += W) store(row + j, vec{});
}
