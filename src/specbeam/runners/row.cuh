// What one row times weights is given, and how its numbers come about: of product.cu and stored.cu.
//
// Given: NORM, PLUS (Gemma's norm: 1 more), ACT (0: no gate).

#pragma once

#include "primitives.cuh"

struct Args {
    const void *x;
    const u16 *norm, *added;
    u16 *out;
    const u16 *weights[3], *biases[3];  // biases: or null
    int sizes[3];
    float eps;
};

__device__ __forceinline__ float activate(float x) {
    if (ACT == 1) return __fdividef(x, 1.0f + power(-1.44269504f * x));
    if (ACT == 2) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    if (ACT == 3) {
        const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x * (1.0f - __fdividef(1.0f, power(2.88539008f * inner) + 1.0f));
    }
    return fmaxf(x, 0.0f);
}

__device__ __forceinline__ u32 pair_of(float x, float y) { return narrow(x) | (u32)narrow(y) << 16; }

__device__ __forceinline__ u32 gained(u32 x, u32 gain) {
    return PLUS ? pair_of(low(x) * (1.0f + low(gain)), high(x) * (1.0f + high(gain))) : times(x, gain);
}

// Of sums of products (up: of the other half of a gate) what comes out.
__device__ __forceinline__ u16 finished(float sum, float up, float scale, u32 bias, u32 its_bias, u32 added) {
    float result = rounded(sum * scale + later(bias));
    if (ACT) result = rounded(activate(result)) * rounded(up * scale + later(its_bias));
    return narrow(result + later(added));
}
