// Causal attention with SiLU in place of the softmax, and biases by distance and time that all heads share.
//
// Sequence s = 0 .. B - 1 has the tokens offsets[s] .. offsets[s + 1] - 1 of arrays (T, heads * d) of queries and keys, and
// (T, heads * e) of values and outputs.

#include "gaps.h"
#include "softmax.h"
#include "threads.h"

namespace {

inline vec sigmoid(vec x) {
    const vec e = exponential(x > 0.0f ? -x : x);
    const vec share = 1.0f / (1.0f + e);
    return x > 0.0f ? share : e * share;
}

// Adds the table's element at each place to the row.
void add_looked_up(const float* __restrict table, const uint8_t* __restrict places, int64_t count, float* __restrict row) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) row[j] += table[places[j]];
}

// The scores before SiLU. `position_bias` has the element `reach` - distance, and is a register longer than that needs. It
// may be null, and so may `time_bias`, which has an element for each bucket.
struct Scores {
    const float *q, *k;
    const int64_t* offsets;
    int64_t heads, d;
    const float* position_bias;
    int64_t reach;
    const float* time_bias;
    const uint8_t* buckets;
    std::vector<int64_t> first;  // of each sequence's pairs in `buckets`

    int64_t length(int64_t s) const { return offsets[s + 1] - offsets[s]; }
    int64_t start(int64_t s, int64_t h) const { return (offsets[s] * heads + h) * d; }
    const uint8_t* buckets_of(int64_t s, int64_t i) const { return buckets + first[s] + i * pairs_width(length(s)); }

    // Writes those of the queries i .. i + rows - 1 and packed keys up to each; zeros follow to whole registers.
    void operator()(int64_t s, int64_t h, int64_t i, int64_t rows, const float* k_columns, int64_t ld, float* S) const {
        const int64_t seen = i + rows, D = heads * d;
        rows_product(rows, seen, d, q + start(s, h) + i * D, D, 1, k_columns, ld, S, ld);
        for (int64_t m = 0; m < rows; m++) {
            const int64_t count = i + m + 1;
            float* row = S + m * ld;
            if (position_bias) add_row(position_bias + reach - i - m, count, row);
            if (time_bias) add_looked_up(time_bias, buckets_of(s, i + m), count, row);
            std::fill(row + count, row + round_up(seen, W), 0.0f);
        }
    }
};

}  // namespace

extern "C" {

// out (T, heads * e) = SiLU(q k' + biases) v / divisor.
void pointwise(const float* q, const float* k, const float* v, const int64_t* offsets, int64_t B, int64_t heads, int64_t d,
               int64_t e, double divisor, const float* position_bias, int64_t reach, const float* time_bias,
               const uint8_t* buckets, float* out) {
    const int64_t D = heads * d, E = heads * e, wide = round_up(e, W);
    const Scores scores{q, k, offsets, heads, d, position_bias, reach, time_bias, buckets, first_pairs(offsets, B)};
    parallel([&](const Team& team) {
        std::vector<float> k_columns, v_rows, weights, out_block(MR * wide);
        team.take_turns(B * heads, 1, [&](int64_t task) {
            const int64_t s = task / heads, h = task % heads, L = scores.length(s), ld = round_up(L, W);
            const int64_t start_v = (offsets[s] * heads + h) * e;
            k_columns.resize(d * ld), v_rows.resize(L * wide), weights.resize(MR * ld);
            pack_columns(k + scores.start(s, h), L, d, D, k_columns.data(), ld);
            copy_rows(v + start_v, L, e, E, v_rows.data(), wide);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), seen = i + rows;
                scores(s, h, i, rows, k_columns.data(), ld, weights.data());
                for (int64_t m = 0; m < rows; m++)
                    for (int64_t j = 0; j < seen; j += W) {
                        const vec x = load(&weights[m * ld + j]);
                        store(&weights[m * ld + j], x * sigmoid(x));
                    }
                rows_product(rows, wide, seen, weights.data(), ld, 1, v_rows.data(), wide, out_block.data(), wide);
                unpack_rows(out_block.data(), rows, e, wide, float(1 / divisor), out + start_v + i * E, E);
            }
        });
    });
}

// Gradients of q, k and v from that of `out`, and if not null those of `position_bias` and the `num_buckets` of `time_bias`,
// which are added to theirs.
void pointwise_backward(const float* q, const float* k, const float* v, const float* grad, const int64_t* offsets, int64_t B,
                        int64_t heads, int64_t d, int64_t e, double divisor, const float* position_bias, int64_t reach,
                        const float* time_bias, const uint8_t* buckets, int64_t num_buckets, float* q_grad, float* k_grad,
                        float* v_grad, float* position_grad, float* time_grad) {
    const int64_t D = heads * d, E = heads * e, wide = round_up(d, W), wide_v = round_up(e, W);
    const float scale = float(1 / divisor);
    const Scores scores{q, k, offsets, heads, d, position_bias, reach, time_bias, buckets, first_pairs(offsets, B)};
    // for each task, by j - i + L - 1 and by bucket: added up in the order of tasks, whichever threads had them
    const auto sums_of = [&](int64_t s, int64_t h) {
        return heads * (offsets[s] + W * s) + h * (scores.length(s) + W);
    };
    std::vector<float> position_sums(position_grad ? heads * (offsets[B] + W * B) : 0, 0.0f);
    std::vector<float> time_sums(time_grad ? B * heads * num_buckets : 0);
    parallel([&](const Team& team) {
        std::vector<float> k_columns, v_columns, q_rows, k_rows, grad_rows, weights, scores_grad;
        std::vector<float> tile_out(MR * std::max(wide, wide_v)), lanes(num_buckets * W);
        team.take_turns(B * heads, 1, [&](int64_t task) {
            const int64_t s = task / heads, h = task % heads, L = scores.length(s), ld = round_up(L, W);
            const int64_t start = scores.start(s, h), start_v = (offsets[s] * heads + h) * e;
            k_columns.resize(d * ld), v_columns.resize(e * ld), weights.resize(L * ld), scores_grad.resize(L * ld);
            q_rows.resize(L * wide), k_rows.resize(L * wide), grad_rows.resize(L * wide_v);
            pack_columns(k + start, L, d, D, k_columns.data(), ld);
            pack_columns(v + start_v, L, e, E, v_columns.data(), ld);
            copy_rows(q + start, L, d, D, q_rows.data(), wide);
            copy_rows(k + start, L, d, D, k_rows.data(), wide);
            copy_rows(grad + start_v, L, e, E, grad_rows.data(), wide_v);
            std::fill(lanes.begin(), lanes.end(), 0.0f);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), seen = i + rows;
                float *P = &weights[i * ld], *S = &scores_grad[i * ld];
                scores(s, h, i, rows, k_columns.data(), ld, P);
                rows_product(rows, seen, e, &grad_rows[i * wide_v], wide_v, 1, v_columns.data(), ld, S, ld);
                for (int64_t m = 0; m < rows; m++) {
                    const int64_t count = i + m + 1;
                    float *own = P + m * ld, *own_grad = S + m * ld;
                    std::fill(own_grad + count, own_grad + round_up(seen, W), 0.0f);
                    for (int64_t j = 0; j < seen; j += W) {
                        const vec x = load(own + j), y = sigmoid(x);
                        store(own + j, x * y);
                        store(own_grad + j, load(own_grad + j) * y * (1.0f + x * (1.0f - y)));
                    }
                    if (position_grad) add_row(own_grad, count, &position_sums[sums_of(s, h) + L - count]);
                    const uint8_t* places = time_grad ? scores.buckets_of(s, i + m) : nullptr;
                    // neighbors often have the same bucket: lanes of their own need not wait for each other's sums
                    for (int64_t j = 0; places && j < count; j++) lanes[places[j] * W + j % W] += own_grad[j];
                }
                rows_product(rows, wide, seen, S, ld, 1, k_rows.data(), wide, tile_out.data(), wide);
                unpack_rows(tile_out.data(), rows, d, wide, scale, q_grad + start + i * D, D);
            }
            for (int64_t j = 0; j < L; j += MR) {
                const int64_t columns = std::min<int64_t>(MR, L - j), queries = L - j, corner = j * ld + j;
                rows_product(columns, wide, queries, &scores_grad[corner], 1, ld, &q_rows[j * wide], wide, tile_out.data(),
                             wide);
                unpack_rows(tile_out.data(), columns, d, wide, scale, k_grad + start + j * D, D);
                rows_product(columns, wide_v, queries, &weights[corner], 1, ld, &grad_rows[j * wide_v], wide_v,
                             tile_out.data(), wide_v);
                unpack_rows(tile_out.data(), columns, e, wide_v, scale, v_grad + start_v + j * E, E);
            }
            for (int64_t b = 0; time_grad && b < num_buckets; b++) time_sums[task * num_buckets + b] = sum(load(&lanes[b * W]));
        });
    });
    for (int64_t task = 0; task < B * heads; task++) {
        const int64_t s = task / heads, L = scores.length(s);
        for (int64_t t = 0; position_grad && t < L; t++)
            position_grad[reach - L + 1 + t] += scale * position_sums[sums_of(s, task % heads) + t];
        for (int64_t b = 0; time_grad && b < num_buckets; b++) time_grad[b] += scale * time_sums[task * num_buckets + b];
    }
}
}
