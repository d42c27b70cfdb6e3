// Ranks by counting, and top-k lists. U states, D dim, V items. Row i of a table is item i + 1. Seen pairs, sorted by
// state, say which user has seen which item.

#include "products.h"
#include "threads.h"

struct Seen {
    const int64_t *rows, *items;
    int64_t count;

    // Returns the first pair of a state from `row` on.
    int64_t first_pair(int64_t row) const { return std::lower_bound(rows, rows + count, row) - rows; }
};

struct Listed {
    float score;
    int32_t item;
};

// Orders by score, the highest first, and equal scores by item, the lowest first.
static bool ahead(const Listed& a, const Listed& b) {
    return a.score > b.score || (a.score == b.score && a.item < b.item);
}

// Returns bits: bit i is a[i] > b[i].
static inline uint32_t above(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)(a > b));
#else
    const ivec larger = a > b;
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= uint32_t(larger[i] & 1) << i;
    return bits;
#endif
}

// Writes the k best items of R states from `begin` on to items and scores (R, k). Scores above the k-th best so far are
// collected in a buffer, which is reduced to the k best whenever it is full.
static void best_of_rows(const float* states, int64_t begin, int64_t R, int64_t D, const float* table, int64_t V,
                         const Seen& seen, int64_t k, int64_t* items, float* scores) {
    const int64_t room = 2 * k + 16, padded = round_up(R, W);
    std::vector<float> columns(padded * D), bounds(padded, __builtin_inff());
    std::fill(bounds.begin(), bounds.begin() + R, -__builtin_inff());
    std::vector<Listed> candidates(R * room);
    std::vector<int32_t> counts(R);
    pack_states(states + begin * D, R, D, 0, R, columns.data());
    std::vector<int64_t> sorted_seen(seen.items + seen.first_pair(begin), seen.items + seen.first_pair(begin + R));
    std::vector<int64_t> places(R + 1);
    for (int64_t r = 0; r <= R; r++) places[r] = seen.first_pair(begin + r) - seen.first_pair(begin);
    for (int64_t r = 0; r < R; r++) std::sort(sorted_seen.data() + places[r], sorted_seen.data() + places[r + 1]);
    const auto keep_best = [&](int64_t r) {
        Listed *first = &candidates[r * room], *last = first + counts[r];
        const auto is_seen = [&](const Listed& listed) {
            return std::binary_search(sorted_seen.data() + places[r], sorted_seen.data() + places[r + 1], listed.item);
        };
        last = std::remove_if(first, last, is_seen);
        if (last - first >= k) {
            std::nth_element(first, first + k - 1, last, ahead);
            last = first + k;
            bounds[r] = first[k - 1].score;  // later items of this score have a higher index
        }
        counts[r] = last - first;
    };
    const int64_t panel = panel_size(V, 1);
    for (int64_t first = 0; first < V; first += panel)
        score(table, first, std::min(V, first + panel), D, columns.data(), R, [&](int64_t row, int64_t r, auto& made) {
            constexpr int M = sizeof made / sizeof made[0], N = sizeof made[0] / sizeof(vec);
            for (int n = 0; n < N; n++)
                for (int m = 0; m < M; m++)
                    for (uint32_t bits = above(made[m][n], load(&bounds[r + n * W])); bits; bits &= bits - 1) {
                        const int lane = __builtin_ctz(bits);
                        const int64_t own = r + n * W + lane;
                        candidates[own * room + counts[own]++] = {made[m][n][lane], int32_t(row + m + 1)};
                        if (counts[own] == room) keep_best(own);
                    }
        });
    for (int64_t r = 0; r < R; r++) {
        keep_best(r);
        Listed* first = &candidates[r * room];
        std::sort(first, first + counts[r], ahead);
        std::fill(first + counts[r], first + k, Listed{-__builtin_inff(), 0});
        for (int64_t i = 0; i < k; i++) items[r * k + i] = first[i].item, scores[r * k + i] = first[i].score;
    }
}

extern "C" {

// counts (U,): how many unseen items do not score below the target, including the target if unseen; NaN is not below.
void count_not_below(const float* states, int64_t U, int64_t D, const float* table, int64_t V, const int64_t* targets,
                     const int64_t* seen_rows, const int64_t* seen_items, int64_t seen_count, int64_t* counts) {
    const int64_t threads = omp_get_max_threads(), panel = panel_size(V, threads), most = round_up(U, W);
    const Seen seen{seen_rows, seen_items, seen_count};
    std::vector<float> columns(most * D), bounds(most);
    std::vector<std::vector<int32_t>> below(threads, std::vector<int32_t>(most));  // minus their number
    const auto row = [&](int64_t item) { return table + (item - 1) * D; };
    parallel([&](const Team& team) {
        std::vector<int32_t>& mine = below[team.me];
        team.share(U, TILE, [&](int64_t begin) {
            const int64_t end = std::min(U, begin + TILE);
            pack_states(states, U, D, begin, end, columns.data());
            score_pairs(
                end - begin, D, columns.data(), U, [&](int64_t i) { return begin + i; },
                [&](int64_t i) { return row(targets[begin + i]); },
                [&](int64_t i, float score) { bounds[begin + i] = score; });
        });
        team.wait();
        team.share(V, panel, [&](int64_t first) {
            score(table, first, std::min(V, first + panel), D, columns.data(), U, [&](int64_t, int64_t r, auto& scores) {
                constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
                for (int n = 0; n < N; n++, r += W) {
                    ivec count;
                    memcpy(&count, &mine[r], sizeof count);
                    for (int m = 0; m < M; m++) count += scores[m][n] < load(&bounds[r]);
                    memcpy(&mine[r], &count, sizeof count);
                }
            });
        });
        team.wait();
        team.share(U, 1, [&](int64_t u) {
            counts[u] = V;
            for (int64_t t = 0; t < threads; t++) counts[u] += below[t][u];
            const int64_t first = seen.first_pair(u);
            score_pairs(
                seen.first_pair(u + 1) - first, D, columns.data(), U, [&](int64_t) { return u; },
                [&](int64_t i) { return row(seen_items[first + i]); },
                [&](int64_t, float score) { counts[u] -= !(score < bounds[u]); });
        });
    });
}

// Writes the k best unseen items of each state and their scores (U, k), best first, of equal scores the lower index first;
// 0 and -inf if there are fewer. Scores of -inf and NaN never count.
void best_items(const float* states, int64_t U, int64_t D, const float* table, int64_t V, int64_t k,
                const int64_t* seen_rows, const int64_t* seen_items, int64_t seen_count, int64_t* items, float* scores) {
    const int64_t threads = omp_get_max_threads(), fair = round_up((U + threads - 1) / threads, TILE);
    const int64_t rows = std::min<int64_t>(4 * TILE, fair);  // states per pass over the table
    const Seen seen{seen_rows, seen_items, seen_count};
    const auto list = [&](int64_t begin) {
        best_of_rows(states, begin, std::min(rows, U - begin), D, table, V, seen, k, items + begin * k, scores + begin * k);
    };
    parallel([&](const Team& team) { team.take_turns(U, rows, list); });
}
}
