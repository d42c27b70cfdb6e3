// The time from each key to the query time of each token of its sequence: its bucket, or its logarithm.
//
// Sequence s = 0 .. B - 1 has the tokens offsets[s] .. offsets[s + 1] - 1. Element j of row i of its pairs is for query i
// and key j; gaps.h has the rows' places. All layers of a model read them.

#include "gaps.h"

#include "threads.h"

// ln(x) for normal numbers, with a relative error of the order of rounding: the first terms of the series of the area tangent,
// whose argument is at most 0.172.
static inline vec logarithm(vec x) {
    ivec bits;
    memcpy(&bits, &x, sizeof bits);
    const ivec exponent = (bits - 0x3f3504f3) >> 23;  // so that x / 2^exponent is from sqrt(1/2) to sqrt(2)
    bits -= exponent << 23;
    vec m;
    memcpy(&m, &bits, sizeof m);
    const vec s = (m - 1.0f) / (m + 1.0f), square = s * s;
    vec p = all(2.0f / 9);
    p = p * square + 2.0f / 7;
    p = p * square + 2.0f / 5;
    p = p * square + 2.0f / 3;
    p = p * square + 2.0f;
    return __builtin_convertvector(exponent, vec) * 0.693147181f + p * s;
}

constexpr float SECONDS_PER_DAY = 86400;
constexpr float LOG_OF_NOTHING = -1e30f;  // finite, and so low that any power of it is zero

extern "C" {

// buckets[j] of each row: the number of `edges`, which rise, that the gap's size reaches. Zeros for j > i.
void gap_buckets(const int64_t* times, const int64_t* query_times, const int64_t* offsets, int64_t B, const int64_t* edges,
                 int64_t num_edges, uint8_t* buckets) {
    const std::vector<int64_t> first = first_pairs(offsets, B);
    parallel([&](const Team& team) {
        team.take_turns(B, 1, [&](int64_t s) {
            const int64_t L = offsets[s + 1] - offsets[s], width = pairs_width(L);
            for (int64_t i = 0; i < L; i++) {
                uint8_t* row = buckets + first[s] + i * width;
                int64_t bucket = 0;  // neighboring keys mostly have the same, or one close by
                for (int64_t j = 0; j <= i; j++) {
                    const uint64_t gap = uint64_t(query_times[offsets[s] + i]) - uint64_t(times[offsets[s] + j]);
                    const uint64_t size = int64_t(gap) < 0 ? -gap : gap;
                    while (bucket < num_edges && uint64_t(edges[bucket]) <= size) bucket++;
                    while (bucket > 0 && uint64_t(edges[bucket - 1]) > size) bucket--;
                    row[j] = uint8_t(bucket);
                }
                std::fill(row + i + 1, row + width, uint8_t(0));
            }
        });
    });
}

// logarithms[j] of each row: that of the gap in days, or of nothing if the query is not later than the key.
void gap_logarithms(const int64_t* times, const int64_t* query_times, const int64_t* offsets, int64_t B,
                    float* logarithms) {
    const std::vector<int64_t> first = first_pairs(offsets, B);
    parallel([&](const Team& team) {
        team.take_turns(B, 1, [&](int64_t s) {
            const int64_t L = offsets[s + 1] - offsets[s], width = pairs_width(L);
            for (int64_t i = 0; i < L; i++) {
                float* row = logarithms + first[s] + i * width;
                const int64_t query_time = query_times[offsets[s] + i];
                for (int64_t j = 0; j < L; j++)
                    row[j] = float(std::max<int64_t>(query_time - times[offsets[s] + j], 0)) / SECONDS_PER_DAY;
                std::fill(row + L, row + width, 0.0f);
                for (int64_t j = 0; j < width; j += W) {
                    const vec days = load(row + j);
                    store(row + j, days > 0.0f ? logarithm(days) : all(LOG_OF_NOTHING));
                }
            }
        });
    });
}
}
