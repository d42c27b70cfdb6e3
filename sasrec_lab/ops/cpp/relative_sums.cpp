// Sums over each token and the earlier ones of its sequence, weighted by their distance or by the time between them.
//
// Sequence s = 0 .. B - 1 has the tokens offsets[s] .. offsets[s + 1] - 1 of arrays (T, D). `by_distance` has the element
// `reach` - distance, and a register of zeros behind them; `by_time` has one for each bucket. Either may be null, with what
// belongs to it.

#include "gaps.h"
#include "softmax.h"
#include "threads.h"

namespace {

// Writes the weights by time of the queries i .. i + rows - 1 and the keys up to each; zeros follow up to the last query's.
void look_up(const float* by_time, const uint8_t* buckets, int64_t width, int64_t i, int64_t rows, float* weights, int64_t ld) {
    for (int64_t m = 0; m < rows; m++) {
        const uint8_t* __restrict places = buckets + (i + m) * width;
        float* __restrict row = weights + m * ld;
        const int64_t count = i + m + 1;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) row[j] = by_time[places[j]];
        std::fill(row + count, row + i + rows, 0.0f);
    }
}

}  // namespace

extern "C" {

// Of each kind of weights, out (T, D) = weights v.
void relative_sums(const float* v, const int64_t* offsets, int64_t B, int64_t D, const float* by_distance, int64_t reach,
                   const float* by_time, const uint8_t* buckets, float* out_by_distance, float* out_by_time) {
    const int64_t wide = round_up(D, W);
    const std::vector<int64_t> first = first_pairs(offsets, B);
    parallel([&](const Team& team) {
        std::vector<float> v_rows, weights, out_block(MR * wide);
        team.take_turns(B, 1, [&](int64_t s) {
            const int64_t L = offsets[s + 1] - offsets[s], ld = round_up(L, W), start = offsets[s] * D;
            v_rows.resize(L * wide), weights.resize(MR * ld);
            copy_rows(v + start, L, D, D, v_rows.data(), wide);
            const auto write = [&](int64_t i, int64_t rows, const float* a, int64_t a_row, float* out) {
                rows_product(rows, wide, i + rows, a, a_row, 1, v_rows.data(), wide, out_block.data(), wide);
                unpack_rows(out_block.data(), rows, D, wide, 1, out + start + i * D, D);
            };
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i);
                if (by_distance) write(i, rows, by_distance + reach - i, -1, out_by_distance);  // a row is the last, shifted
                if (!by_time) continue;
                look_up(by_time, buckets + first[s], pairs_width(L), i, rows, weights.data(), ld);
                write(i, rows, weights.data(), ld, out_by_time);
            }
        });
    });
}

// The gradient of v from those of the outputs; those of the weights are added to `distance_grad` and `time_grad`.
void relative_sums_backward(const float* v, const float* grad_by_distance, const float* grad_by_time, const int64_t* offsets,
                            int64_t B, int64_t D, const float* by_distance, int64_t reach, const float* by_time,
                            const uint8_t* buckets, int64_t num_buckets, float* v_grad, float* distance_grad,
                            float* time_grad) {
    const int64_t wide = round_up(D, W);
    const std::vector<int64_t> first = first_pairs(offsets, B);
    // for each sequence, by j - i + L - 1 and by bucket: added up in their order, whichever threads had them
    const auto sums_of = [&](int64_t s) { return offsets[s] + W * s; };
    std::vector<float> distance_sums(by_distance ? sums_of(B) : 0, 0.0f), time_sums(by_time ? B * num_buckets : 0);
    parallel([&](const Team& team) {
        std::vector<float> v_columns, distance_rows, time_rows, weights, S, tile_out(MR * wide), lanes(num_buckets * W);
        team.take_turns(B, 1, [&](int64_t s) {
            const int64_t L = offsets[s + 1] - offsets[s], ld = round_up(L, W), start = offsets[s] * D;
            v_columns.resize(D * ld), distance_rows.resize(L * wide), time_rows.resize(L * wide);
            weights.resize(L * ld), S.resize(MR * ld);
            pack_columns(v + start, L, D, D, v_columns.data(), ld);
            if (by_distance) copy_rows(grad_by_distance + start, L, D, D, distance_rows.data(), wide);
            if (by_time) copy_rows(grad_by_time + start, L, D, D, time_rows.data(), wide);
            std::fill(lanes.begin(), lanes.end(), 0.0f);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), seen = i + rows;
                if (by_distance) {
                    rows_product(rows, seen, D, &distance_rows[i * wide], wide, 1, v_columns.data(), ld, S.data(), ld);
                    for (int64_t m = 0; m < rows; m++) {
                        const int64_t count = i + m + 1;
                        std::fill(&S[m * ld] + count, &S[m * ld] + round_up(count, W), 0.0f);
                        add_row(&S[m * ld], count, &distance_sums[sums_of(s) + L - count]);
                    }
                }
                if (!by_time) continue;
                look_up(by_time, buckets + first[s], pairs_width(L), i, rows, &weights[i * ld], ld);
                rows_product(rows, seen, D, &time_rows[i * wide], wide, 1, v_columns.data(), ld, S.data(), ld);
                for (int64_t m = 0; m < rows; m++) {
                    const uint8_t* places = buckets + first[s] + (i + m) * pairs_width(L);
                    // neighbors often have the same bucket: lanes of their own need not wait for each other's sums
                    for (int64_t j = 0; j < i + m + 1; j++) lanes[places[j] * W + j % W] += S[m * ld + j];
                }
            }
            for (int64_t j = 0; j < L; j += MR) {
                const int64_t columns = std::min<int64_t>(MR, L - j), queries = L - j;
                std::fill(tile_out.begin(), tile_out.end(), 0.0f);
                if (by_distance)
                    rows_product<true>(columns, wide, queries, by_distance + reach, 1, -1, &distance_rows[j * wide], wide,
                                       tile_out.data(), wide);
                if (by_time)
                    rows_product<true>(columns, wide, queries, &weights[j * ld + j], 1, ld, &time_rows[j * wide], wide,
                                       tile_out.data(), wide);
                unpack_rows(tile_out.data(), columns, D, wide, 1, v_grad + start + j * D, D);
            }
            for (int64_t b = 0; by_time && b < num_buckets; b++) time_sums[s * num_buckets + b] = sum(load(&lanes[b * W]));
        });
    });
    for (int64_t s = 0; s < B; s++) {
        const int64_t L = offsets[s + 1] - offsets[s];
        for (int64_t t = 0; by_distance && t < L; t++) distance_grad[reach - L + 1 + t] += distance_sums[sums_of(s) + t];
        for (int64_t b = 0; by_time && b < num_buckets; b++) time_grad[b] += time_sums[s * num_buckets + b];
    }
}
}
