// Where the pairs of a query and a key are that gaps.cpp writes: for each sequence a row for each query.

#pragma once

#include "products.h"

// Elements of a row of pairs, the same for any processor, as in ops/layout.py.
static inline int64_t pairs_width(int64_t L) { return round_up(L, 16); }

// Returns the first pair of each sequence, and the number of all.
static std::vector<int64_t> first_pairs(const int64_t* offsets, int64_t B) {
    std::vector<int64_t> first(B + 1, 0);
    for (int64_t s = 0; s < B; s++) {
        const int64_t L = offsets[s + 1] - offsets[s];
        first[s + 1] = first[s] + L * pairs_width(L);
    }
    return first;
}
