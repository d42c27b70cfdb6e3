// Cross-entropy over items from states, with products in bfloat16 and sums in single precision. T tokens, D dim, V items.

#include <cmath>

#include "mask.h"
#include "products_bf16.h"
#include "threads.h"

#ifdef HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef HAS_BF16

constexpr int64_t PANEL = 8 * BLOCK;  // items whose exponentials are used while they are in the cache
constexpr double TOO_LARGE = 1e30;    // for a sum of exponentials, some of which may have been cut at e^88

// The items, rounded once, and the R tokens of the current chunk; `wide`, `lanes` and `height` are D, the tokens of a
// chunk and V rounded up to whole blocks, with zeros behind.
struct HalfChunk {
    int64_t D, V, R = 0, wide, height, lanes;
    const float* biases;             // (V,) or null
    Matrix<bf16> items, by_column;   // (height, wide) the table, (wide, height)
    Matrix<uint32_t> states;         // (wide / 2, lanes) pairs of columns
    Matrix<uint32_t> scaled;         // (lanes / 2, wide) pairs of tokens
    Matrix<bf16> weights;            // (height, lanes) e^(score - shift)
    Matrix<float> gradient;          // (height, wide)
    std::vector<float> target_score, shift;
    std::vector<int32_t> excluded_items;  // the item that does not count for a token; empty if all count
    Mask mask{};                          // without items if all count
    std::vector<__mmask16> hidden;        // (V, lanes / W) a bit for each token for which the item is masked

    HalfChunk(int64_t V, int64_t D, int64_t rows, const float* biases)
        : D(D), V(V), wide(round_up(D, BLOCK)), height(round_up(V, BLOCK)), lanes(round_up(rows, BLOCK)), biases(biases),
          items(height, wide), by_column(wide, height), states(wide / 2, lanes), scaled(lanes / 2, wide),
          weights(height, lanes), gradient(height, wide), target_score(lanes), shift(lanes) {
        if (wide != D || height != V) items.clear(), by_column.clear(), states.clear();
    }

    vec relative(int64_t item, int64_t r, vec score) const {
        score -= load(&shift[r]);
        if (biases) score += biases[item];
        if (mask.items)
            score = (vec)_mm512_mask_mov_ps((__m512)score, hidden[(item * lanes + r) / W], (__m512)all(-1e30f));
        if (excluded_items.empty()) return score;
        ivec out;
        memcpy(&out, &excluded_items[r], sizeof out);
        return out == int32_t(item) ? all(-1e30f) : score;
    }
};

// What a thread works in.
struct Desk {
    Matrix<float> scores{BLOCK, BLOCK};
    Matrix<uint32_t> pairs;      // (PANEL / 2, lanes) weights of two items each
    Matrix<float> expected;      // (wide, lanes)
    std::vector<float> part;     // (lanes,)
    std::vector<double> sums;    // (lanes,)
    explicit Desk(const HalfChunk& chunk)
        : pairs(PANEL / 2, chunk.lanes), expected(chunk.wide, chunk.lanes), part(chunk.lanes), sums(chunk.lanes) {}
};

// Rounds the items `first` to `last` - 1 of the table.
static void take_items(HalfChunk& chunk, const float* table, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
        for (int64_t c = 0; c < chunk.D; c++) *chunk.items.at(i, c) = rounded(table[i * chunk.D + c]);
    for (int64_t c = 0; c < chunk.D; c++)
        for (int64_t i = first; i < last; i++) *chunk.by_column.at(c, i) = *chunk.items.at(i, c);
}

// Marks the tokens for which the items `first` to `last` - 1 are masked.
static void hide_items(HalfChunk& chunk, int64_t first, int64_t last) {
    const auto word = [&](int64_t item, int64_t r) -> __mmask16& { return chunk.hidden[(item * chunk.lanes + r) / W]; };
    std::fill(&word(first, 0), &word(first, 0) + (last - first) * chunk.lanes / W, 0);
    chunk.mask.each_group(first, last, chunk.R, [&](int64_t item, int64_t begin, int64_t end) {
        for (int64_t r = begin / W * W; r < end; r += W)
            word(item, r) |= (1 << std::min<int64_t>(W, end - r)) - (1 << std::max<int64_t>(0, begin - r));
    });
    for (int64_t r = 0; r < chunk.R; r++)
        if (const int64_t item = chunk.mask.targets[r]; item >= first && item < last) word(item, r) &= ~(1 << r % W);
}

static inline uint32_t pair(bf16 a, bf16 b) { return a | uint32_t(b) << 16; }

// Rounds a block of the chunk's tokens, from `first` on, and scores their targets.
static void take_tokens(HalfChunk& chunk, const float* states, const float* targets, int64_t first) {
    const int64_t D = chunk.D, last = std::min(chunk.R, first + BLOCK);
    const auto state = [&](int64_t r, int64_t c) { return r < last && c < D ? states[r * D + c] : 0; };
    for (int64_t c = 0; c < D; c += 2)
        for (int64_t r = first; r < first + BLOCK; r++)
            *chunk.states.at(c / 2, r) = pair(rounded(state(r, c)), rounded(state(r, c + 1)));
    for (int64_t r = first; r < first + BLOCK; r++) {
        float score = 0;
        if (r < last)
#pragma omp simd reduction(+ : score)
            for (int64_t c = 0; c < D; c++)
                score += widened(rounded(states[r * D + c])) * widened(rounded(targets[r * D + c]));
        chunk.target_score[r] = chunk.shift[r] = score;
    }
}

// Rounds the states times `share` of a block of tokens from `first` on; 0 behind the last.
static void take_scaled(HalfChunk& chunk, const float* states, const std::vector<float>& share, int64_t first) {
    const int64_t D = chunk.D;
    const auto scaled = [&](int64_t r, int64_t c) { return r < chunk.R ? rounded(share[r] * states[r * D + c]) : bf16(0); };
    for (int64_t r = first; r < first + BLOCK; r += 2)
        for (int64_t c = 0; c < D; c++) *chunk.scaled.at(r / 2, c) = pair(scaled(r, c), scaled(r + 1, c));
}

// Scores the items `first` to `last` - 1 for all tokens: calls use(item, r) for each block of scores, which begins there.
template <typename Use>
static void half_scores(HalfChunk& chunk, Desk& desk, int64_t first, int64_t last, const Use& use) {
    for (int64_t item = first; item < last; item += BLOCK)
        for (int64_t r = 0; r < chunk.R; r += BLOCK) {
            block_product<false>(chunk.wide, chunk.items.at(item, 0), chunk.items.bytes(), chunk.states.at(0, r),
                                 chunk.states.bytes(), desk.scores.at(0, 0), desk.scores.bytes());
            use(item, r);
        }
}

// Writes e^(score - shift) of the items first to last - 1 in both forms, adds their sums and their products with the table.
static void half_exponentials(HalfChunk& chunk, Desk& desk, int64_t first, int64_t last) {
    std::fill(desk.part.begin(), desk.part.end(), 0.0f);
    short order[32];
    for (short i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    __m512i in_turns;
    memcpy(&in_turns, order, sizeof order);
    half_scores(chunk, desk, first, last, [&](int64_t item, int64_t r) {
        for (int64_t n = 0; n < BLOCK; n += W) {
            vec sum = load(&desk.part[r + n]);
            for (int64_t m = 0; m < BLOCK; m += 2) {
                vec e[2];
                for (int64_t i = 0; i < 2; i++) {
                    const int64_t j = item + m + i;
                    const vec x = chunk.relative(std::min(j, chunk.V - 1), r + n, load(desk.scores.at(m + i, n)));
                    e[i] = j < chunk.V ? exponential(x > 88.0f ? all(88.0f) : x) : vec{};
                    sum += e[i];
                }
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)e[1], (__m512)e[0]);
                memcpy(chunk.weights.at(item + m, r + n), &both, sizeof both / 2);
                memcpy(chunk.weights.at(item + m + 1, r + n), (const char*)&both + sizeof both / 2, sizeof both / 2);
                const __m512i mixed = _mm512_permutexvar_epi16(in_turns, both);
                memcpy(desk.pairs.at((item - first + m) / 2, r + n), &mixed, sizeof mixed);
            }
            store(&desk.part[r + n], sum);
        }
    });
    for (int64_t r = 0; r < chunk.R; r++) desk.sums[r] += desk.part[r];
    for (int64_t c = 0; c < chunk.wide; c += BLOCK)
        for (int64_t r = 0; r < chunk.R; r += BLOCK)
            block_product<true>(round_up(last - first, BLOCK), chunk.by_column.at(c, first), chunk.by_column.bytes(),
                                desk.pairs.at(0, r), desk.pairs.bytes(), desk.expected.at(c, r), desk.expected.bytes());
}

// Computes by how much each token's largest score exceeds its shift, if it does.
static void half_excess(HalfChunk& chunk, Desk& desk, int64_t first, int64_t last) {
    half_scores(chunk, desk, first, last, [&](int64_t item, int64_t r) {
        for (int64_t m = 0; m < BLOCK && item + m < chunk.V; m++)
            for (int64_t n = 0; n < BLOCK; n += W)
                store(&desk.part[r + n], larger(load(&desk.part[r + n]),
                                                chunk.relative(item + m, r + n, load(desk.scores.at(m, n)))));
    });
}

// gradient = or += weights @ scaled, of the items first to last - 1.
template <bool ADD>
static void half_gradient(HalfChunk& chunk, int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item += BLOCK)
        for (int64_t c = 0; c < chunk.wide; c += BLOCK)
            block_product<ADD>(round_up(chunk.R, BLOCK), chunk.weights.at(item, 0), chunk.weights.bytes(),
                               chunk.scaled.at(0, c), chunk.scaled.bytes(), chunk.gradient.at(item, c),
                               chunk.gradient.bytes());
}

#endif

extern "C" {

// Returns 1 if the processor has products of bfloat16 that this process may use, else 0. Where the system denies tiles, there
// are none, because only one form is compiled.
int64_t has_bf16_products() {
#if defined(HAS_TILES)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#elif defined(HAS_BF16)
    return 1;
#else
    return 0;
#endif
}

// softmax_products of cross_entropy.cpp, with states, table and probabilities rounded to bfloat16 for the three products.
// Only where has_bf16_products() is 1.
void softmax_products_bf16(const float* states, int64_t T, int64_t D, const float* table, int64_t V, const float* biases,
                           const int64_t* excluded, const float* targets, int64_t has_target_column,
                           const int64_t* masked, const int64_t* owners, const int64_t* target_items, int64_t width,
                           const float* token_weights, int64_t rows, float* log_p, float* expected, float* table_grad) {
#ifdef HAS_BF16
    const int64_t threads = omp_get_max_threads();
    HalfChunk chunk(V, D, rows, biases);
    if (excluded) chunk.excluded_items.resize(chunk.lanes);
    if (masked) chunk.hidden.resize(V * chunk.lanes / W);
    std::vector<Desk> desks;
    for (int64_t t = 0; t < threads; t++) desks.emplace_back(chunk);
    std::vector<float> totals(chunk.lanes), share(chunk.lanes);
    std::atomic<bool> too_large{false};
    parallel([&](const Team& team) {
        const int64_t me = team.me;
        Desk& desk = desks[me];
        begin_products();
        team.share(V, BLOCK, [&](int64_t first) { take_items(chunk, table, first, std::min(V, first + BLOCK)); });
        for (int64_t begin = 0; begin < T; begin += rows) {
            const int64_t R = std::min(rows, T - begin);
            if (me == 0) {
                too_large = false;
                chunk.R = R;
                if (excluded) std::copy(excluded + begin, excluded + begin + R, chunk.excluded_items.begin());
                if (masked) chunk.mask = {masked, owners + begin, target_items + begin, width};
            }
            team.wait();
            if (masked)
                team.share(V, PANEL, [&](int64_t first) { hide_items(chunk, first, std::min(V, first + PANEL)); });
            team.share(round_up(R, BLOCK), BLOCK, [&](int64_t first) {
                take_tokens(chunk, states + begin * D, targets + begin * D, first);
            });
            team.wait();
            for (bool again : {false, true}) {
                if (again) {
                    std::fill(desk.part.begin(), desk.part.end(), 0.0f);
                    team.share(V, PANEL,
                               [&](int64_t first) { half_excess(chunk, desk, first, std::min(V, first + PANEL)); });
                    team.wait();
                    team.share(R, 1, [&](int64_t r) {
                        float most = 0;
                        for (int64_t t = 0; t < team.size; t++) most = std::max(most, desks[t].part[r]);
                        chunk.shift[r] += most;
                    });
                    team.wait();
                }
                std::fill(desk.sums.begin(), desk.sums.end(), 0.0);
                desk.expected.clear();
                team.share(V, PANEL,
                           [&](int64_t first) { half_exponentials(chunk, desk, first, std::min(V, first + PANEL)); });
                team.wait();
                team.share(R, 1, [&](int64_t r) {
                    const double below = double(chunk.target_score[r]) - chunk.shift[r];
                    double total = has_target_column ? std::exp(below) : 0;
                    for (int64_t t = 0; t < team.size; t++) total += desks[t].sums[r];
                    if (!(total < TOO_LARGE)) too_large = true;
                    const double log_share = below - std::log(total);  // of one product, which rounds unlike the sum's
                    log_p[begin + r] = log_share > 0 && !has_target_column ? 0 : log_share;
                    totals[r] = 1 / total;
                    share[r] = token_weights[begin + r] / total;
                });
                team.wait();
                if (!too_large) break;
            }
            team.share(round_up(R, BLOCK), BLOCK,
                       [&](int64_t first) { take_scaled(chunk, states + begin * D, share, first); });
            team.share(R, ROWS, [&](int64_t first) {
                for (int64_t c = 0; c < D; c++)
                    for (int64_t r = first; r < std::min(R, first + ROWS); r++) {
                        float total = 0;
                        for (int64_t t = 0; t < team.size; t++) total += *desks[t].expected.at(c, r);
                        expected[(begin + r) * D + c] = total * totals[r];
                    }
            });
            team.wait();
            team.share(V, BLOCK, [&](int64_t first) {
                (begin ? half_gradient<true> : half_gradient<false>)(chunk, first, std::min(V, first + BLOCK));
            });
            team.wait();
        }
        team.share(V, 1, [&](int64_t i) {
            memcpy(table_grad + i * D, chunk.gradient.at(i, 0), D * sizeof(float));
        });
        end_products();
    });
#endif
}
}
