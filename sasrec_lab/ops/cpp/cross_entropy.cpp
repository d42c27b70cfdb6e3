// Cross-entropy over items from states. T tokens, D dim, V items.

#include <cmath>
#include <memory>

#include "mask.h"
#include "products.h"
#include "threads.h"

constexpr double TOO_LARGE = 1e30;  // for a sum of exponentials, some of which may have been cut at e^88

// The R tokens of the current chunk, and what their scores are computed from.
struct Chunk {
    int64_t D, R, stride, wide;
    const float *table, *biases;  // (V, D), and (V,) or null
    std::vector<float> columns, target_score, shift, share, scaled;
    std::vector<int32_t> excluded_items;  // the item that does not count for a token; empty if all count
    Mask mask;  // without items if all count

    vec relative(int64_t item, int64_t r, vec score) const {
        score -= load(&shift[r]);
        if (biases) score += biases[item];
        if (excluded_items.empty()) return score;
        ivec out;
        memcpy(&out, &excluded_items[r], sizeof out);
        return out == int32_t(item) ? all(-1e30f) : score;
    }
};

// Packs the states of the chunk's tokens `first`, the beginning of a tile, to `last` - 1, and scores their targets.
static void take(Chunk& chunk, const float* states, const float* targets, int64_t first, int64_t last) {
    const int64_t D = chunk.D;
    pack_states(states, chunk.R, D, first, last, chunk.columns.data());
    score_pairs(
        last - first, D, chunk.columns.data(), chunk.R, [&](int64_t i) { return first + i; },
        [&](int64_t i) { return targets + (first + i) * D; },
        [&](int64_t i, float score) { chunk.target_score[first + i] = chunk.shift[first + i] = score; });
}

// total (lanes,) = use(total, weights (V, stride) of an item), for the items first to last - 1.
template <typename Use>
static void add_rows(const Chunk& chunk, int64_t first, int64_t last, const float* weights, std::vector<float>& total,
                     const Use& use) {
    for (int64_t item = first; item < last; item++)
        for (int64_t r = 0; r < chunk.R; r += W)
            store(&total[r], use(load(&total[r]), load(weights + item * chunk.stride + r)));
}

// weights (V, stride) = e^(score - shift) of the items first to last - 1; adds their sum for each token to `sums`.
// Not inlined, because g++ 12 runs out of registers in the caller.
[[gnu::noinline]] static void exponentials(const Chunk& chunk, int64_t first, int64_t last, float* weights,
                                           std::vector<float>& part, double* sums) {
    std::fill(part.begin(), part.end(), 0.0f);
    score(chunk.table, first, last, chunk.D, chunk.columns.data(), chunk.R, [&](int64_t item, int64_t r, auto& scores) {
        constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
        for (int n = 0; n < N; n++, r += W) {
            vec sum = load(&part[r]);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const vec x = chunk.relative(item + m, r, scores[m][n]), e = exponential(x > 88.0f ? all(88.0f) : x);
                store(weights + (item + m) * chunk.stride + r, e);
                sum += e;
            }
            store(&part[r], sum);
        }
    });
    if (chunk.mask.items) {
        chunk.mask.each(first, last, chunk.R, [&](int64_t item, int64_t r) { weights[item * chunk.stride + r] = 0; });
        std::fill(part.begin(), part.end(), 0.0f);
        add_rows(chunk, first, last, weights, part, [](vec a, vec b) { return a + b; });
    }
    for (int64_t r = 0; r < chunk.R; r++) sums[r] += part[r];
}

// Computes by how much each token's largest score exceeds its shift, if it does. Overwrites `weights` (V, stride) if some
// items do not count.
static void excess(const Chunk& chunk, int64_t first, int64_t last, float* weights, std::vector<float>& most) {
    if (chunk.mask.items) {
        score(chunk.table, first, last, chunk.D, chunk.columns.data(), chunk.R,
              [&](int64_t item, int64_t r, auto& scores) {
                  constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
                  for (int n = 0; n < N; n++, r += W)
                      for (int m = 0; m < M; m++)
                          store(weights + (item + m) * chunk.stride + r, chunk.relative(item + m, r, scores[m][n]));
              });
        chunk.mask.each(first, last, chunk.R,
                        [&](int64_t item, int64_t r) { weights[item * chunk.stride + r] = -1e30f; });
        add_rows(chunk, first, last, weights, most, larger);
        return;
    }
    score(chunk.table, first, last, chunk.D, chunk.columns.data(), chunk.R, [&](int64_t item, int64_t r, auto& scores) {
        constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
        for (int n = 0; n < N; n++, r += W)
            for (int m = 0; m < M; m++)
                store(&most[r], larger(load(&most[r]), chunk.relative(item + m, r, scores[m][n])));
    });
}

// expected (R, wide) += weights' @ table and table_grad = or += weights @ scaled, of the items first to last - 1.
template <bool ADD>
static void add_products(const Chunk& chunk, int64_t first, int64_t last, const float* weights, std::vector<float>& rows,
                   std::vector<float>& grads, float* expected, float* table_grad) {
    const int64_t D = chunk.D, wide = chunk.wide, stride = chunk.stride, count = last - first;
    const float *vectors = chunk.table + first * D, *weight = weights + first * stride;
    if (wide != D) {
        copy_rows(vectors, count, D, D, rows.data(), wide);
        vectors = rows.data();
    }
    table_grad += first * D;
    for (int64_t i = 0; i < count; i += MR) {
        const int64_t M = std::min<int64_t>(MR, count - i);
        const float *a = weight + i * stride, *b = chunk.scaled.data();
        if (wide == D) {
            rows_product<ADD>(M, D, chunk.R, a, stride, 1, b, D, table_grad + i * D, D);
            continue;
        }
        rows_product(M, wide, chunk.R, a, stride, 1, b, wide, grads.data(), wide);
        for (int64_t m = 0; m < M; m++)
            for (int64_t c = 0; c < D; c++) {
                float& out = table_grad[(i + m) * D + c];
                out = grads[m * wide + c] + (ADD ? out : 0);
            }
    }
    for (int64_t r = 0; r < chunk.R; r += MR)
        rows_product<true>(std::min<int64_t>(MR, chunk.R - r), wide, count, weight + r, 1, stride, vectors, wide,
                           expected + r * wide, wide);
}

extern "C" {

// p = softmax of states @ table' + biases over all items except the token's excluded one (V for none) and, with
// `has_target_column`, over one column more: the target, whose vector is in `targets` (T, D). Writes the target's log p
// (T,), p @ table (T, D) and (token_weights * p)' @ states (V, D). Biases and excluded items may be null. Nor do the items
// `masked` (groups, width) of a token's group `owners` (T,) count, except `target_items` (T,); the three may be null.
//
// `rows` tokens at a time. Scores leave the registers as e^(score - target's score), which needs no maximum first and is
// proportional to p; a second pass uses them for both products, so each is written once and read once. If a target's score
// is so far below the token's largest that this exceeds single precision, the largest score replaces it as the shift.
void softmax_products(const float* states, int64_t T, int64_t D, const float* table, int64_t V, const float* biases,
                      const int64_t* excluded, const float* targets, int64_t has_target_column, const int64_t* masked,
                      const int64_t* owners, const int64_t* target_items, int64_t width, const float* token_weights, int64_t rows, float* log_p, float* expected, float* table_grad) {
    const int64_t threads = omp_get_max_threads(), wide = round_up(D, W), lanes = round_up(rows, W);
    const int64_t panel = panel_size(V, threads);
    Chunk chunk{D, 0, (lanes / 16 | 1) * 16, wide, table, biases, {}, {}, {}, {}, {}, {}, {}};  // stride: odd in cache lines
    chunk.columns.resize(lanes * D), chunk.scaled.resize(lanes * wide);
    for (std::vector<float>* each : {&chunk.target_score, &chunk.shift, &chunk.share}) each->resize(lanes);
    if (excluded) chunk.excluded_items.resize(lanes);
    const std::unique_ptr<float[]> weights(new float[V * chunk.stride]);
    std::vector<std::vector<double>> sums(threads, std::vector<double>(lanes));
    std::vector<std::vector<float>> products(threads, std::vector<float>(lanes * wide)),
        part(threads, std::vector<float>(lanes));
    std::atomic<bool> too_large{false};
    parallel([&](const Team& team) {
        const int64_t me = team.me;
        std::vector<float> item_rows(wide == D ? 0 : panel * wide), item_grads(MR * wide);
        for (int64_t begin = 0; begin < T; begin += rows) {
            const int64_t R = std::min(rows, T - begin);
            if (me == 0) {
                too_large = false;
                chunk.R = R;
                if (excluded) std::copy(excluded + begin, excluded + begin + R, chunk.excluded_items.begin());
                if (masked) chunk.mask = {masked, owners + begin, target_items + begin, width};
            }
            team.wait();
            team.share(R, TILE, [&](int64_t first) {
                take(chunk, states + begin * D, targets + begin * D, first, std::min(R, first + TILE));
            });
            team.wait();
            for (bool again : {false, true}) {
                if (again) {
                    std::fill(part[me].begin(), part[me].end(), 0.0f);
                    team.share(V, panel, [&](int64_t first) {
                        excess(chunk, first, std::min(V, first + panel), weights.get(), part[me]);
                    });
                    team.wait();
                    team.share(R, 1, [&](int64_t r) {
                        float most = 0;
                        for (int64_t t = 0; t < threads; t++) most = std::max(most, part[t][r]);
                        chunk.shift[r] += most;
                    });
                    team.wait();
                }
                std::fill(sums[me].begin(), sums[me].end(), 0.0);
                team.share(V, panel, [&](int64_t first) {
                    exponentials(chunk, first, std::min(V, first + panel), weights.get(), part[me], sums[me].data());
                });
                team.wait();
                team.share(R, 1, [&](int64_t r) {
                    const double below = double(chunk.target_score[r]) - chunk.shift[r];
                    double total = has_target_column ? std::exp(below) : 0;
                    for (int64_t t = 0; t < threads; t++) total += sums[t][r];
                    if (!(total < TOO_LARGE)) too_large = true;
                    log_p[begin + r] = below - std::log(total);
                    chunk.share[r] = 1 / total;
                    const float scale = token_weights[begin + r] / total;
                    for (int64_t c = 0; c < wide; c++)
                        chunk.scaled[r * wide + c] = c < D ? scale * states[(begin + r) * D + c] : 0;
                });
                team.wait();
                if (!too_large) break;
            }
            std::fill(products[me].begin(), products[me].end(), 0.0f);
            team.share(V, panel, [&](int64_t first) {
                const auto pass = begin ? add_products<true> : add_products<false>;
                pass(chunk, first, std::min(V, first + panel), weights.get(), item_rows, item_grads, products[me].data(),
                     table_grad);
            });
            team.wait();
            team.share(R, 1, [&](int64_t r) {
                for (int64_t c = 0; c < D; c++) {
                    float total = 0;
                    for (int64_t t = 0; t < threads; t++) total += products[t][r * wide + c];
                    expected[(begin + r) * D + c] = total * chunk.share[r];
                }
            });
        }
    });
}

// Replaces logits (R, V) by their softmax; log_p (R,) = the target's logit - log sum e^logit.
void softmax_and_log_p(float* logits, int64_t R, int64_t V, const int64_t* targets, float* log_p) {
    const auto turn = [&](int64_t r) {
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
    };
    parallel([&](const Team& team) { team.share(R, 1, turn); });
}
}
