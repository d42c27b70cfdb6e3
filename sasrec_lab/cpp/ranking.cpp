// Ranks by counting, and the best items. U states, D dim, V items; items are numbered from 1, so row i of a table is item
// i + 1. Seen pairs say which state (in order) has had which item.

#include <omp.h>

#include "products.h"

struct Seen {
    const int64_t *rows, *items;
    int64_t count;

    // Where the pairs of states from `row` on begin.
    int64_t place(int64_t row) const { return std::lower_bound(rows, rows + count, row) - rows; }
};

struct Listed {
    float score;
    int64_t item;
};

// A higher score first, and of equal ones the lower item.
static bool ahead(const Listed& a, const Listed& b) {
    return a.score > b.score || (a.score == b.score && a.item < b.item);
}

static bool any(ivec x) {
    uint64_t halves[W / 2], all_of_it = 0;
    memcpy(halves, &x, sizeof x);
    for (uint64_t half : halves) all_of_it |= half;
    return all_of_it;
}

// The k best items of the states from `begin` on, R of them, in heaps whose first is the worst.
static void best_of_rows(const float* states, int64_t begin, int64_t R, int64_t D, const float* table, int64_t V,
                         const Seen& seen, int64_t k, std::vector<std::vector<Listed>>& heaps) {
    const float none = -__builtin_inff();
    std::vector<float> columns(round_up(R, W) * D), bounds(round_up(R, W), none);
    std::vector<std::vector<int64_t>> had(R);
    pack_states(states + begin * D, R, D, columns.data());
    for (int64_t r = 0; r < R; r++) {
        heaps[r].clear();
        had[r].assign(seen.items + seen.place(begin + r), seen.items + seen.place(begin + r + 1));
        std::sort(had[r].begin(), had[r].end());
    }
    const auto offer = [&](int64_t r, Listed listed) {
        std::vector<Listed>& heap = heaps[r];
        if (!(listed.score > bounds[r]) || std::binary_search(had[r].begin(), had[r].end(), listed.item)) return;
        if (int64_t(heap.size()) == k) {
            std::pop_heap(heap.begin(), heap.end(), ahead);
            heap.pop_back();
        }
        heap.push_back(listed);
        std::push_heap(heap.begin(), heap.end(), ahead);
        if (int64_t(heap.size()) == k) bounds[r] = heap.front().score;  // later items of this score have higher numbers
    };
    const int64_t panel = panel_size(V, 1);
    for (int64_t first = 0; first < V; first += panel)
        score(table, first, std::min(V, first + panel), D, columns.data(), R, [&](int64_t row, int64_t r, auto& scores) {
            constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
            ivec above = {};
            for (int n = 0; n < N; n++)
                for (int m = 0; m < M; m++) above |= scores[m][n] > load(&bounds[r + n * W]);
            if (!any(above)) return;
            for (int m = 0; m < M; m++)
                for (int64_t i = 0; i < N * W && r + i < R; i++)
                    offer(r + i, {scores[m][i / W][i % W], row + m + 1});
        });
}

extern "C" {

// counts (U,): how many unseen items do not score below the target, the target among them if unseen; NaN is not below.
void count_not_below(const float* states, int64_t U, int64_t D, const float* table, int64_t V, const int64_t* targets,
                     const int64_t* seen_rows, const int64_t* seen_items, int64_t seen_count, int64_t* counts) {
    const int64_t threads = omp_get_max_threads(), panel = panel_size(V, threads), most = round_up(U, W);
    const Seen seen{seen_rows, seen_items, seen_count};
    std::vector<float> columns(most * D), bounds(most);
    std::vector<std::vector<int32_t>> below(threads);  // minus one for each
    pack_states(states, U, D, columns.data());
    const auto score_of = [&](int64_t u, int64_t item) {
        return score_of_one(table + (item - 1) * D, D, columns.data(), U, u);
    };
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t>& mine = below[omp_get_thread_num()];
        mine.resize(most);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < U; u++) bounds[u] = score_of(u, targets[u]);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < V; first += panel)
            score(table, first, std::min(V, first + panel), D, columns.data(), U, [&](int64_t, int64_t r, auto& scores) {
                constexpr int M = sizeof scores / sizeof scores[0], N = sizeof scores[0] / sizeof(vec);
                for (int n = 0; n < N; n++, r += W) {
                    ivec count;
                    memcpy(&count, &mine[r], sizeof count);
                    for (int m = 0; m < M; m++) count += scores[m][n] < load(&bounds[r]);
                    memcpy(&mine[r], &count, sizeof count);
                }
            });
#pragma omp for schedule(static)
        for (int64_t u = 0; u < U; u++) {
            counts[u] = V;
            for (int64_t t = 0; t < threads; t++) counts[u] += below[t][u];
            for (int64_t i = seen.place(u); i < seen_count && seen_rows[i] == u; i++)
                counts[u] -= !(score_of(u, seen_items[i]) < bounds[u]);
        }
    }
}

// The k best unseen items of each state, best first and of equal ones the lower number first, and their scores (U, k); 0
// and -inf where there are fewer. A score of -inf or NaN is none.
void best_items(const float* states, int64_t U, int64_t D, const float* table, int64_t V, int64_t k,
                const int64_t* seen_rows, const int64_t* seen_items, int64_t seen_count, int64_t* items, float* scores) {
    const int64_t threads = omp_get_max_threads(), fair = round_up((U + threads - 1) / threads, TILE);
    const int64_t rows = std::min<int64_t>(4 * TILE, fair);  // so many share a look at the table
    const Seen seen{seen_rows, seen_items, seen_count};
#pragma omp parallel num_threads(threads)
    {
        std::vector<std::vector<Listed>> heaps(rows);
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < U; begin += rows) {
            const int64_t R = std::min(rows, U - begin);
            best_of_rows(states, begin, R, D, table, V, seen, k, heaps);
            for (int64_t r = 0; r < R; r++) {
                std::sort_heap(heaps[r].begin(), heaps[r].end(), ahead);
                heaps[r].resize(k, {-__builtin_inff(), 0});
                for (int64_t i = 0; i < k; i++) {
                    items[(begin + r) * k + i] = heaps[r][i].item;
                    scores[(begin + r) * k + i] = heaps[r][i].score;
                }
            }
        }
    }
}
}
