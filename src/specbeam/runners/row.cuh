// What one row times weights is given, and how its numbers come about: of product.cu and stored.cu.
//
// Given: STEPS (of a warp, 32 columns each), NORM, PLUS (Gemma's norm: 1 more), ACT (0: no gate).

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

// Four steps at a time, the last four of all (some then come once more) at the end.
__device__ __forceinline__ int first_of(int set) { return STEPS < 4 ? 0 : min(4 * set, STEPS - 4); }
// Which of four a lane of this line has the row's numbers of.
__device__ __forceinline__ u32 step_of(u32 line) { return STEPS < 4 ? min((int)line / 2, STEPS - 1) : line / 2; }

// Of eight of the row's numbers the four that a lane of this line gives a tensor core, normed but for the scale, which is
// applied to the sums; their squares are added to `square`.
__device__ __forceinline__ uint2 four_of(int s, u32 line, const uint4 &x, const uint4 &gain, float *square) {
    const u32 pair = line / 2, odd = line % 2;
    u32 first = odd ? x.y : x.x, second = odd ? x.w : x.z;
    if (NORM) {
        const bool there = first_of(s) + pair >= 4 * s && first_of(s) + pair < STEPS;
        multiply(square, x.x, x.y, x.z, x.w, there ? first : 0, there ? second : 0);
        first = gained(first, odd ? gain.y : gain.x), second = gained(second, odd ? gain.w : gain.z);
    }
    return make_uint2(first, second);
}

// Of sums of products (up: of the other half of a gate) what comes out.
__device__ __forceinline__ u16 finished(float sum, float up, float scale, u32 bias, u32 its_bias, u32 added) {
    float result = rounded(sum * scale + later(bias));
    if (ACT) result = rounded(activate(result)) * rounded(up * scale + later(its_bias));
    return narrow(result + later(added));
}
