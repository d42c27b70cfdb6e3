// Random numbers for dropout, one register at a time.

#pragma once

#include "products.h"

// One 32-bit generator per lane (Marsaglia 2003, xorshift), each seeded by splitmix64.
struct Random {
    uvec state;
    Random(uint64_t seed, uint64_t stream) {
        for (int i = 0; i < W; i++) {
            const uint64_t x = seed + (stream * W + i + 1) * 0x9E3779B97F4A7C15u;  // lanes of a call hardly ever coincide
            uint64_t z = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
            state[i] = uint32_t(z ^ (z >> 31)) | 1u;
        }
    }
    uvec next() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    }
};

// A random number is below the threshold with probability `rate`.
static inline uint32_t threshold_of(double rate) { return uint32_t(rate * 4294967296.0); }
