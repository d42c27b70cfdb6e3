// The divergence between the softmax distributions of two passes, and its gradients by their logits. T tokens, V items.

#include <cmath>

#include "products.h"
#include "threads.h"

typedef uint16_t half __attribute__((vector_size(2 * W)));  // W numbers of bfloat16

static inline vec widened(const float* x) { return load(x); }
static inline vec widened(const uint16_t* x) {
    half bits;
    memcpy(&bits, x, sizeof bits);
    return (vec)(__builtin_convertvector(bits, uvec) << 16);
}
static inline void round_to(float* out, vec x) { store(out, x); }
static inline void round_to(uint16_t* out, vec x) {
    const uvec bits = (uvec)x, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const half kept = __builtin_convertvector(x == x ? nearest : nearest | 0x7fc0, half);  // NaN stays one
    memcpy(out, &kept, sizeof kept);
}

static inline float at(const float* row, int64_t j) { return row[j]; }
static inline float at(const uint16_t* row, int64_t j) {
    const uint32_t bits = uint32_t(row[j]) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

// Calls each(x, y) for a register after another of two rows (V,), the last ones filled up with -inf.
template <typename Number, typename Each>
static inline void each_register(Number* a, Number* b, int64_t V, const Each& each) {
    const int64_t whole = V / W * W, size = (V - whole) * sizeof(Number);
    for (int64_t j = 0; j < whole; j += W) each(a + j, b + j);
    if (!size) return;
    Number rest[2][W];
    for (Number* row : rest)
        for (int64_t j = 0; j < W; j++) row[j] = sizeof(Number) == 4 ? Number(-__builtin_inff()) : Number(0xff80);
    memcpy(rest[0], a + whole, size), memcpy(rest[1], b + whole, size);
    each(rest[0], rest[1]);
    memcpy(a + whole, rest[0], size), memcpy(b + whole, rest[1], size);
}

// Overwrites the logits (V,) of two passes by the gradients; writes both log p of the target and the divergence.
template <typename Number>
static void turn(Number* a, Number* b, int64_t V, int64_t target, float factor, float* log_p, float* log_q,
                 float* divergence) {
    vec most[2] = {all(-__builtin_inff()), all(-__builtin_inff())};
    each_register(a, b, V, [&](const Number* x, const Number* y) {
        most[0] = larger(widened(x), most[0]), most[1] = larger(widened(y), most[1]);
    });
    const float shift = largest(most[0]), other_shift = largest(most[1]);
    const auto relative = [&](const Number* x, const Number* y, vec& d, vec& e, vec& f) {
        const vec first = widened(x) - shift, second = widened(y) - other_shift;
        d = first - second;
        d = d == d ? d : vec{};  // of an item that does not count, whose logits are -inf
        e = exponential(first), f = exponential(second);
    };
    vec totals[4] = {};  // of both passes' exponentials, and of those times the difference
    each_register(a, b, V, [&](const Number* x, const Number* y) {
        vec d, e, f;
        relative(x, y, d, e, f);
        totals[0] += e, totals[1] += f;
        totals[2] = add_product(totals[2], e, d), totals[3] = add_product(totals[3], f, d);
    });
    const float total = sum(totals[0]), other_total = sum(totals[1]), share = 1 / total, other_share = 1 / other_total;
    const float mean = sum(totals[2]) * share, other_mean = sum(totals[3]) * other_share;
    *log_p = at(a, target) - shift - std::log(total);
    *log_q = at(b, target) - other_shift - std::log(other_total);
    *divergence = (mean - other_mean) / 2;
    each_register(a, b, V, [&](Number* x, Number* y) {
        vec d, p, q;
        relative(x, y, d, p, q);
        p *= share, q *= other_share;
        round_to(x, p * (1 + factor + factor * (d - mean)) - factor * q);
        round_to(y, q * (1 + factor - factor * (d - other_mean)) - factor * p);
    });
}

template <typename Number>
static void turn_all(Number* logits, int64_t T, int64_t V, const int64_t* targets, float factor, float* log_p,
                     float* divergence) {
    parallel([&](const Team& team) {
        team.share(T, 1, [&](int64_t t) {
            turn(logits + t * V, logits + (T + t) * V, V, targets[t], factor, log_p + t, log_p + T + t, divergence + t);
        });
    });
}

extern "C" {

// Overwrites logits (2, T, V) of two passes by the gradients of mean cross-entropy + factor * divergence, times 2, without the
// targets' -1; writes log p of the targets (2, T) and the divergence (T,), as ops/divergence.py defines them.
void two_pass_gradients(float* logits, int64_t T, int64_t V, const int64_t* targets, double factor, float* log_p,
                        float* divergence) {
    turn_all(logits, T, V, targets, factor, log_p, divergence);
}

// The same of logits in bfloat16, to which the gradients are rounded.
void two_pass_gradients_bf16(uint16_t* logits, int64_t T, int64_t V, const int64_t* targets, double factor, float* log_p,
                             float* divergence) {
    turn_all(logits, T, V, targets, factor, log_p, divergence);
}
}
