#pragma once

#include <cstdint>

// Items that do not count for the tokens of a group, except as a token's target; a negative number is none.
struct Mask {
    const int64_t *items, *owners, *targets;  // (groups, width), (R,) the group of each token, (R,)
    int64_t width;

    // Calls use(item, begin, end) for each item of first to last - 1 that does not count for the group of tokens begin to
    // end - 1 of R, even if it is the target of one of them.
    template <typename Use>
    void each_group(int64_t first, int64_t last, int64_t R, const Use& use) const {
        for (int64_t begin = 0, end; begin < R; begin = end) {
            for (end = begin; end < R && owners[end] == owners[begin];) end++;
            const int64_t* row = items + owners[begin] * width;
            for (int64_t i = 0; i < width; i++)
                if (row[i] >= first && row[i] < last) use(row[i], begin, end);
        }
    }

    // Calls use(item, r) for each pair of one of R tokens and one of the items first to last - 1 that does not count for it.
    template <typename Use>
    void each(int64_t first, int64_t last, int64_t R, const Use& use) const {
        each_group(first, last, R, [&](int64_t item, int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                if (targets[r] != item) use(item, r);
        });
    }
};
