// A transformer block of one head without gradients. T tokens of B sequences, D dim, F width of the feed-forward.
//
// A thread takes some sequences through the whole block, so that only the block's input and output leave the core's own
// cache. Rows there are padded with zeros.

#include <cmath>

#include "softmax.h"
#include "threads.h"

namespace {

constexpr int64_t TOKENS = 48;  // at least, of the sequences that a thread takes together

int64_t wide_for(int64_t dim) { return round_up(dim, 16); }  // floats of a padded row, as in ops/block.py

enum Norm : int64_t { SASREC, PRE, POST };  // in the order of ops/block.py

struct Rows {
    std::vector<float> values;
    int64_t wide = 0;

    void resize(int64_t rows, int64_t dim) {
        wide = wide_for(dim);
        values.resize(std::max<size_t>(values.size(), rows * wide));
    }
    float* operator[](int64_t row) { return values.data() + row * wide; }
};

// y = x w + b. `parameters` are the rows of w (in, wide) and then b.
struct Linear {
    const float* parameters;
    int64_t in, out;

    // Calls use(row, column, a register of y) for all of y.
    template <typename Use>
    void operator()(Rows& x, int64_t count, const Use& use) const {
        const int64_t wide = wide_for(out);
        const auto columns = [&](auto registers, int64_t column) {
            constexpr int N = decltype(registers)::value;
            const auto rows = [&](auto several, int64_t row) {
                constexpr int M = decltype(several)::value;
                vec total[M][N] = {};
                multiply(in, x[row], x.wide, 1, parameters + column, wide, total);
                for (int n = 0; n < N; n++) {
                    const vec bias = load(parameters + in * wide + column + n * W);
                    for (int m = 0; m < M; m++) use(row + m, column + n * W, total[m][n] + bias);
                }
            };
            int64_t row = 0;
            for (; row + MR <= count; row += MR) rows(std::integral_constant<int, MR>(), row);
            for (; row < count; row++) rows(std::integral_constant<int, 1>(), row);
        };
        int64_t column = 0;
        for (; column + TILE <= wide; column += TILE) columns(std::integral_constant<int, NR>(), column);
        for (; column < wide; column += W) columns(std::integral_constant<int, 1>(), column);
    }
};

struct LayerNorm {
    const float* parameters;  // (2, wide): weight and bias
    int64_t D;
    float eps;

    void operator()(Rows& x, int64_t count, Rows& out) const {
        for (int64_t row = 0; row < count; row++) (*this)(x[row], out[row]);
    }

    void operator()(const float* x, float* out) const {
        const int64_t wide = wide_for(D);
        const float *weight = parameters, *bias = parameters + wide;
        vec total = {}, squares = {};
        for (int64_t c = 0; c < wide; c += W) total += load(x + c);
        const float mean = sum(total) / D;
        for (int64_t c = 0; c < wide; c += W) store(out + c, load(x + c) - mean);
        std::fill(out + D, out + wide, 0.0f);
        for (int64_t c = 0; c < wide; c += W) squares += load(out + c) * load(out + c);
        const float scale = 1 / std::sqrt(sum(squares) / D + eps);
        for (int64_t c = 0; c < wide; c += W) store(out + c, load(out + c) * scale * load(weight + c) + load(bias + c));
    }
};

// Overwrites the queries of a sequence's tokens with averages of x (L, D) over the tokens up to each.
struct Attention {
    int64_t D;
    float scale;
    std::vector<float> columns, weights;

    void all(float* queries, const float* x, int64_t L, int64_t wide) {
        const int64_t width = round_up(L, W);
        columns.resize(D * width), weights.resize(MR * width);
        pack_columns(x, L, D, wide, columns.data(), width);
        for (int64_t i = 0; i < L; i += MR) {
            const int64_t rows = std::min<int64_t>(MR, L - i), past = i + rows;
            float* own = queries + i * wide;
            rows_product(rows, past, D, own, wide, 1, columns.data(), width, weights.data(), width);
            for (int64_t m = 0; m < rows; m++) softmax_row(&weights[m * width], i + m + 1, round_up(past, W), scale);
            rows_product(rows, wide, past, weights.data(), width, 1, x, wide, own, wide);
        }
    }

    void newest(float* query, const float* x, int64_t L, int64_t wide) {
        weights.resize(round_up(L, W));
        for (int64_t j = 0; j < L; j++) weights[j] = dot(query, x + j * wide, D);
        softmax_row(weights.data(), L, L, scale);
        rows_product(1, wide, L, weights.data(), L, 1, x, wide, query, wide);
    }
};

// Returns the first sequence of each group, and B.
std::vector<int64_t> groups_of(const int64_t* offsets, int64_t B) {
    std::vector<int64_t> firsts;
    for (int64_t s = 0, tokens = TOKENS; s < B; tokens += offsets[s + 1] - offsets[s], s++)
        if (tokens >= TOKENS) firsts.push_back(s), tokens = 0;
    firsts.push_back(B);
    return firsts;
}

}  // namespace

extern "C" {

// out: the states (T, D) of all tokens x (T, D), or with `only_newest` those (B, D) of each sequence's newest token.
//
// query (D + 1, wide) is the product of the query's and the key's matrices, so that the tokens themselves replace the keys.
// value (D + 1, wide) includes the output's matrix and is applied to the weighted average of the tokens.
void block(const float* x, const int64_t* offsets, int64_t B, int64_t D, int64_t F, int64_t norm, int64_t residual,
           double eps, const float* attention_norm, const float* query, const float* value,
           const float* feed_forward_norm, const float* inner, const float* outer, int64_t only_newest, float* out) {
    const LayerNorm first_norm{attention_norm, D, float(eps)}, second_norm{feed_forward_norm, D, float(eps)};
    const Linear to_query{query, D, D}, to_value{value, D, D}, to_inner{inner, D, F}, to_outer{outer, F, D};
    const std::vector<int64_t> groups = groups_of(offsets, B);
    parallel([&](const Team& team) {
        Rows tokens, normed, base, queries, hidden;
        Attention attention{D, 1 / std::sqrt(float(D)), {}, {}};
        team.take_turns(groups.size() - 1, 1, [&](int64_t g) {
            const int64_t begin = groups[g], end = groups[g + 1], start = offsets[begin];
            const int64_t count = offsets[end] - start, rows = only_newest ? end - begin : count;
            for (Rows* each : {&tokens, &normed, &base, &queries}) each->resize(count, D);
            hidden.resize(rows, F);
            const auto take = [&](Rows& from, Rows& to) {  // all rows, or those of the newest tokens
                if (!only_newest) memcpy(to[0], from[0], count * to.wide * sizeof(float));
                for (int64_t row = 0; only_newest && row < rows; row++)
                    memcpy(to[row], from[offsets[begin + row + 1] - 1 - start], to.wide * sizeof(float));
            };
            const auto plus = [&](int64_t row, int64_t column, vec change) {
                store(base[row] + column, residual ? load(base[row] + column) + change : change);
            };

            copy_rows(x + start * D, count, D, D, tokens[0], tokens.wide);
            if (norm == PRE) first_norm(tokens, count, normed), std::swap(tokens, normed);
            // from here on `tokens` are compared and averaged; for PRE the unnormalized ones are in `normed`
            take(tokens, base);
            if (norm == SASREC) first_norm(base, rows, base);
            to_query(base, rows, [&](int64_t row, int64_t column, vec y) { store(queries[row] + column, y); });
            if (norm == PRE) take(normed, base);
            for (int64_t s = begin; s < end; s++) {
                const int64_t at = offsets[s] - start, L = offsets[s + 1] - offsets[s];
                if (only_newest)
                    attention.newest(queries[s - begin], tokens[at], L, tokens.wide);
                else
                    attention.all(queries[at], tokens[at], L, tokens.wide);
            }
            to_value(queries, rows, plus);
            if (norm == POST) first_norm(base, rows, base);
            if (norm == SASREC) second_norm(base, rows, base);
            Rows& into = norm == PRE ? normed : base;
            if (norm == PRE) second_norm(base, rows, normed);
            to_inner(into, rows, [&](int64_t row, int64_t column, vec y) {
                store(hidden[row] + column, y < 0.0f ? vec{} : y);  // NaN is not below and stays
            });
            to_outer(hidden, rows, plus);
            if (norm == POST) second_norm(base, rows, base);
            copy_rows(base[0], rows, D, base.wide, out + (only_newest ? begin : start) * D, D);
        });
    });
}
}
