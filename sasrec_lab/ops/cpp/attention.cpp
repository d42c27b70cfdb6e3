// Self-attention within each sequence: of each token to itself and earlier ones (causal), or to all.
//
// Sequence s = 0 .. B - 1 has the tokens offsets[s] .. offsets[s + 1] - 1 of arrays (T, D), where D = heads * d.

#include <cstdint>

#include "gaps.h"
#include "random.h"
#include "softmax.h"
#include "threads.h"

// Marks dropped weights by a negative sign.
static void mark_dropped(float* row, int64_t count, uint32_t threshold, Random& random) {
    for (int64_t j = 0; j < count; j += W) {
        const uvec dropped = (uvec)(random.next() < threshold) << 31;
        uvec bits;
        memcpy(&bits, row + j, sizeof bits);
        bits ^= dropped;
        memcpy(row + j, &bits, sizeof bits);
    }
}

// days^beta, of the logarithms of days: finite however large they are.
static inline vec power(vec logarithms, float beta) {
    const vec x = logarithms * beta;
    return exponential(x > 87.0f ? all(87.0f) : x);
}

// Subtracts c days^beta from the row.
static void subtract_decay(const float* logarithms, float c, float beta, int64_t count, float* row) {
    for (int64_t j = 0; j < count; j += W) store(row + j, load(row + j) - c * power(load(logarithms + j), beta));
}

// Floats of one sequence's weights in one head.
static inline int64_t weights_of(int64_t L) { return L * round_up(L, W); }

extern "C" {

// Returns the number of floats in `weights` for each head.
int64_t weights_size(const int64_t* offsets, int64_t B) {
    int64_t size = 0;
    for (int64_t s = 0; s < B; s++) size += weights_of(offsets[s + 1] - offsets[s]);
    return size;
}

// out (T, D) = dropout(softmax(scale * q k')) v over the past if `causal`, else over the sequence. `weights` stores the
// softmax for the backward pass, negative if dropped; it may be null. So may `biases` (heads, columns), of which element
// reach + j - i is added to the product of query i and key j; rows are a register longer than that needs. `logarithms` by
// gaps.cpp may be null too; if not, the softmax is of scale * q k' - c days^beta.
void attention(const float* q, const float* k, const float* v, const int64_t* offsets, int64_t B, int64_t D,
               int64_t heads, int64_t causal, double scale, double rate, const float* biases, int64_t columns, int64_t reach,
               const float* logarithms, double c, double beta, uint64_t seed, float* out, float* weights) {
    const int64_t d = D / heads, wide = round_up(d, W);
    const float kept = 1 / (1 - rate);
    const uint32_t threshold = threshold_of(rate);
    std::vector<int64_t> first(B + 1, 0);
    for (int64_t s = 0; s < B; s++) first[s + 1] = first[s] + heads * weights_of(offsets[s + 1] - offsets[s]);
    const std::vector<int64_t> pairs = first_pairs(offsets, logarithms ? B : 0);
    parallel([&](const Team& team) {
        std::vector<float> k_columns, v_rows, block, own_block, out_block(MR * wide);
        team.take_turns(B * heads, 1, [&](int64_t task) {
            const int64_t s = task / heads, h = task % heads, L = offsets[s + 1] - offsets[s], ld = round_up(L, W);
            const int64_t start = offsets[s] * D + h * d;
            k_columns.resize(d * ld), v_rows.resize(L * wide), block.resize(MR * ld), own_block.resize(MR * ld);
            pack_columns(k + start, L, d, D, k_columns.data(), ld);
            copy_rows(v + start, L, d, D, v_rows.data(), wide);
            Random random(seed, task);
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), seen = causal ? i + rows : L;
                float* P = weights ? weights + first[s] + h * weights_of(L) + i * ld : own_block.data();
                rows_product(rows, seen, d, q + start + i * D, D, 1, k_columns.data(), ld, P, ld);
                const float* used = P;
                const auto count = [&](int64_t m) { return causal ? i + m + 1 : L; };
                for (int64_t m = 0; m < rows; m++) {
                    if (biases) add_row(biases + h * columns + reach - i - m, count(m), P + m * ld);
                    if (logarithms) {
                        const float* own = logarithms + pairs[s] + (i + m) * pairs_width(L);
                        subtract_decay(own, float(c / scale), float(beta), count(m), P + m * ld);
                    }
                    softmax_row(P + m * ld, count(m), round_up(seen, W), scale);
                }
                if (threshold) {
                    for (int64_t m = 0; m < rows; m++) {
                        float* row = P + m * ld;
                        mark_dropped(row, count(m), threshold, random);
                        for (int64_t j = 0; j < seen; j += W)
                            store(&block[m * ld + j], larger(load(row + j), vec{}) * kept);
                    }
                    used = block.data();
                }
                rows_product(rows, wide, seen, used, ld, 1, v_rows.data(), wide, out_block.data(), wide);
                unpack_rows(out_block.data(), rows, d, wide, 1, out + start + i * D, D);
            }
        });
    });
}

// Gradients of q, k and v from that of `out`, and if not null those of scale * biases, which are added to `biases_grad`, and
// of (c, beta), which are written to `decay_grad`.
void attention_backward(const float* q, const float* k, const float* v, const float* out, const float* grad,
                        const float* weights, const int64_t* offsets, int64_t B, int64_t D, int64_t heads, int64_t causal,
                        double scale, double rate, float* biases_grad, int64_t columns, int64_t reach, const float* logarithms,
                        double c, double beta, float* q_grad, float* k_grad, float* v_grad, float* decay_grad) {
    const int64_t d = D / heads, wide = round_up(d, W);
    const float kept = 1 / (1 - rate);
    std::vector<int64_t> first(B + 1, 0);
    for (int64_t s = 0; s < B; s++) first[s + 1] = first[s] + heads * weights_of(offsets[s + 1] - offsets[s]);
    // for each task, by j - i + L - 1: added up in the order of tasks, whichever threads had them
    const auto sums_of = [&](int64_t s, int64_t h) {
        return heads * (2 * offsets[s] + W * s) + h * (2 * (offsets[s + 1] - offsets[s]) + W);
    };
    std::vector<float> sums(biases_grad ? heads * (2 * offsets[B] + W * B) : 0, 0.0f);
    std::vector<float> decay_sums(logarithms ? 2 * B * heads : 0);
    const std::vector<int64_t> pairs = first_pairs(offsets, logarithms ? B : 0);
    parallel([&](const Team& team) {
        std::vector<float> v_columns, q_rows, k_rows, grad_rows, used, scores, tile_out(MR * wide);
        team.take_turns(B * heads, 1, [&](int64_t task) {
            const int64_t s = task / heads, h = task % heads, L = offsets[s + 1] - offsets[s], ld = round_up(L, W);
            const int64_t start = offsets[s] * D + h * d;
            const float* P = weights + first[s] + h * weights_of(L);
            v_columns.resize(d * ld), q_rows.resize(L * wide), k_rows.resize(L * wide), grad_rows.resize(L * wide);
            used.resize(L * ld), scores.resize(L * ld);
            pack_columns(v + start, L, d, D, v_columns.data(), ld);
            copy_rows(q + start, L, d, D, q_rows.data(), wide);
            copy_rows(k + start, L, d, D, k_rows.data(), wide);
            copy_rows(grad + start, L, d, D, grad_rows.data(), wide);
            vec c_sum = {}, beta_sum = {};
            for (int64_t i = 0; i < L; i += MR) {
                const int64_t rows = std::min<int64_t>(MR, L - i), seen = causal ? i + rows : L;
                float* S = &scores[i * ld];
                rows_product(rows, seen, d, &grad_rows[i * wide], wide, 1, v_columns.data(), ld, S, ld);
                for (int64_t m = 0; m < rows; m++) {
                    const int64_t token = start + (i + m) * D;
                    const float mean = dot(grad + token, out + token, d);  // weighted mean of the weights' gradient
                    for (int64_t j = 0; j < seen; j += W) {
                        const vec p = load(P + (i + m) * ld + j), used_p = larger(p, vec{}) * kept;
                        const vec size = larger(p, -p);
                        store(&used[(i + m) * ld + j], used_p);
                        store(S + m * ld + j, used_p * load(S + m * ld + j) - size * mean);
                    }
                    if (biases_grad) {
                        float* sum = &sums[sums_of(s, h) + L - 1 - i - m];
                        for (int64_t j = 0; j < seen; j += W) store(sum + j, load(sum + j) + load(S + m * ld + j));
                    }
                    for (int64_t j = 0; logarithms && j < seen; j += W) {
                        const vec own = load(logarithms + pairs[s] + (i + m) * pairs_width(L) + j);
                        const vec change = load(S + m * ld + j) * power(own, float(beta));
                        c_sum += change, beta_sum += change * own;
                    }
                }
                rows_product(rows, wide, seen, S, ld, 1, k_rows.data(), wide, tile_out.data(), wide);
                unpack_rows(tile_out.data(), rows, d, wide, float(scale), q_grad + start + i * D, D);
            }
            for (int64_t j = 0; j < L; j += MR) {
                const int64_t columns = std::min<int64_t>(MR, L - j), i = causal ? j : 0, queries = L - i;
                rows_product(columns, wide, queries, &scores[i * ld + j], 1, ld, &q_rows[i * wide], wide, tile_out.data(),
                             wide);
                unpack_rows(tile_out.data(), columns, d, wide, scale, k_grad + start + j * D, D);
                rows_product(columns, wide, queries, &used[i * ld + j], 1, ld, &grad_rows[i * wide], wide, tile_out.data(),
                             wide);
                unpack_rows(tile_out.data(), columns, d, wide, 1, v_grad + start + j * D, D);
            }
            if (logarithms) decay_sums[2 * task] = sum(c_sum), decay_sums[2 * task + 1] = sum(beta_sum);
        });
    });
    for (int64_t task = 0; biases_grad && task < B * heads; task++) {
        const int64_t s = task / heads, h = task % heads, L = offsets[s + 1] - offsets[s];
        float* total = biases_grad + h * columns + reach - L + 1;
        for (int64_t t = 0; t < 2 * L - 1; t++) total[t] += sums[sums_of(s, h) + t];
    }
    double of_c = 0, of_beta = 0;
    for (int64_t task = 0; logarithms && task < B * heads; task++)
        of_c -= decay_sums[2 * task], of_beta -= c * decay_sums[2 * task + 1];
    if (logarithms) decay_grad[0] = float(of_c), decay_grad[1] = float(of_beta);
}
}
