// Random numbers for dropout, a register of them at a time.

#pragma once

#include "products.h"

// Independent 32-bit generators side by side (Marsaglia 2003, xorshift), started from splitmix64.
struct Random {
    uvec state;
    Random(uint64_t seed, uint64_t stream) {
        for (int i = 0; i < W; i++) {
            const uint64_t x = seed + (stream * W + i + 1) * 0x9E3779B97F4A7C15u;  // hardly two lanes of a call alike
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

// A random number is below it at the rate.
static inline uint32_t threshold_of(double rate) { return uint32_t(rate * 4294967296.0); }
