// Attention of one new token of one row: a program for each query head and SLOTS slots (attended.py says what it is
// given). Their sum of weighted values, the sum of their weights and their largest score are put together by the product
// that comes next (product.cu).
//
// Nothing of a layer takes as long for as little as this: what counts is how many instructions stand one behind the
// other. Keys and values are in registers before the new ones are known, in so few that there is room for a program
// while what came before still runs; a warp has slots of its own, a slot's numbers lie in 8 lanes; the scores come out
// of a tensor core, and the warps' softmaxes are joined at the end.
//
// Given: VIEW, SLOTS, HEADS, DIM (of a head: 64 or 128), GROUP (query heads of a key head), WARPS, NORM (of query
// and key, before they are turned), PLUS (Gemma's: 1 more).

#include "primitives.cuh"

constexpr int LANES = DIM / 8, LINES = 32 / LANES;  // of a slot; slots of a warp at a time
constexpr int STEPS = SLOTS / (WARPS * LINES), PARTS = (VIEW + SLOTS - 1) / SLOTS;
constexpr bool ALL = VIEW % SLOTS == 0;  // a program's slots are all there
static_assert(SLOTS % (WARPS * LINES) == 0 && 32 * WARPS >= DIM, "its warps have as many slots, and enough threads");

struct Args {
    const u16 *q, *k, *v, *q_norm, *k_norm, *cos, *sin;
    u16 *keys, *values;
    const long long *slot;
    const unsigned char *mask;
    float *out;  // [PARTS, HEADS, DIM], and then [PARTS, HEADS, 2]: the largest score (of 2), the weights' sum
    long long key_head, key_slot, value_head, value_slot;
    float scale, eps;
};

// A head's numbers are normed as transformers rounds them: Llama's norm before its weight, Gemma's after it.
__device__ __forceinline__ float normed(float x, float scale, float weight) {
    if (!NORM) return x;
    return PLUS ? rounded(x * scale * (1.0f + weight)) : rounded(rounded(x * scale) * weight);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(const __grid_constant__ Args a) {
    __shared__ __align__(16) u16 fresh[2][DIM];  // the new query and key
    __shared__ __align__(16) float mean[WARPS][DIM];
    __shared__ __align__(16) float best[WARPS], total[WARPS];
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = blockIdx.x % PARTS;
    const u32 head = blockIdx.x / PARTS, its = head / GROUP, dim = lane % LANES * 8, line = lane / LANES;
    const auto slot_of = [=](int j) -> int { return part * SLOTS + (j * WARPS + warp) * LINES + line; };
    let_next_begin();
    u16 *keys = a.keys + its * a.key_head, *values = a.values + its * a.value_head;
    uint4 key[STEPS], value[STEPS];
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        const int slot = slot_of(j);
        key[j] = value[j] = make_uint4(0, 0, 0, 0);
        if (ALL || slot < VIEW) {
            key[j] = *(const uint4 *)(keys + slot * a.key_slot + dim);
            value[j] = *(const uint4 *)(values + slot * a.value_slot + dim);
        }
    }
    // Of query and key, one behind the other, a thread turns some numbers. It needs those that are turned with them, too.
    constexpr int TURNS = (2 * DIM + 32 * WARPS - 1) / (32 * WARPS);
    const auto number = [=](int i) { return min(i * 32 * WARPS + thread, 2 * DIM - 1); };
    const auto place = [=](int i) { return number(i) % DIM; };
    const auto across = [=](int i) { return (number(i) + DIM / 2) % DIM; };
    const u16 *q = a.q + head * DIM, *k = a.k + its * DIM;
    u32 weight[TURNS][2] = {};
#pragma unroll
    for (int i = 0; i < TURNS && NORM; i++) {
        const u16 *norm = number(i) < DIM ? a.q_norm : a.k_norm;
        weight[i][0] = now_one(norm + place(i)), weight[i][1] = now_one(norm + across(i));
    }
    // These were there before the forward's first kernel of these began (cuda.py).
    u32 raw[TURNS][4];
#pragma unroll
    for (int i = 0; i < TURNS; i++) raw[i][2] = now_one(a.cos + place(i)), raw[i][3] = now_one(a.sin + place(i));
    const int here = (int)*a.slot;
    bool seen[STEPS];
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        const int slot = slot_of(j);
        seen[j] = (ALL || slot < VIEW) && a.mask[slot];
    }
    wait_for_last();
    u32 every[2][NORM ? DIM / 32 : 1];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u16 *from = number(i) < DIM ? q : k;
        raw[i][0] = now_one(from + place(i)), raw[i][1] = now_one(from + across(i));
    }
#pragma unroll
    for (int i = 0; i < DIM / 32 && NORM; i++)  // by every warp for itself, as nobody then waits for another
        every[0][i] = now_one(q + lane + 32 * i), every[1][i] = now_one(k + lane + 32 * i);
    const uint4 new_value = now(a.v + its * DIM + dim);
    u32 any = new_value.x;
#pragma unroll
    for (int i = 0; i < TURNS; i++) any |= raw[i][0] | raw[i][1];
    raw[0][0] |= any & blockIdx.y;  // (0 of it) all is asked for before the first of it is needed
    float scales[2] = {1, 1};
    if (NORM) {
        every[0][0] |= any & blockIdx.y;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < DIM / 32; i++) sum += later(every[n][i]) * later(every[n][i]);
#pragma unroll
            for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
            scales[n] = rsqrtf(sum * (1.0f / DIM) + a.eps);
        }
    }
    // Turned by its position, each step rounded as transformers rounds it.
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const float one = normed(later(raw[i][0]), (number(i) < DIM ? scales[0] : scales[1]), later(weight[i][0]));
        const float other = normed(later(raw[i][1]), (number(i) < DIM ? scales[0] : scales[1]), later(weight[i][1]));
        const u16 turned = narrow(rounded(one * later(raw[i][2]))
                                  + rounded((place(i) < DIM / 2 ? -other : other) * later(raw[i][3])));
        fresh[number(i) / DIM][place(i)] = turned;
    }
    __syncthreads();
    const uint4 query = *(const uint4 *)(fresh[0] + dim), new_key = *(const uint4 *)(fresh[1] + dim);
    float d[STEPS][4];
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        if (slot_of(j) == here) key[j] = new_key, value[j] = new_value;
        d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
    }
    // Eight pieces of the query times eight of keys: on the diagonal is what belongs together, LANES / 4 a slot.
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        multiply(d[j], query.x, 0, query.y, 0, key[j].x, key[j].y);
        multiply(d[j], query.z, 0, query.w, 0, key[j].z, key[j].w);
    }
    if (head % GROUP == 0 && part == 0 && thread < LANES) {  // of a group's programs one writes
        *(uint4 *)(keys + here * a.key_slot + dim) = new_key;
        *(uint4 *)(values + here * a.value_slot + dim) = new_value;
    }
    const bool diagonal = lane % 4 == lane / 8, odd = lane / 4 % 2;
    const float scale = a.scale * 1.44269504f;
    float score[STEPS], most = -1e30f;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        float sum = diagonal ? (odd ? d[j][1] : d[j][0]) : 0.0f;
        sum += __shfl_xor_sync(~0u, sum, 4);
        if (LANES > 8) sum += __shfl_xor_sync(~0u, sum, 9);
        sum = __shfl_sync(~0u, sum, line * (LANES + LANES / 8)) * scale;
        score[j] = seen[j] ? sum : -1e30f;
        most = fmaxf(most, score[j]);
    }
#pragma unroll
    for (int i = LANES; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    float all = 0, sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        const float weight = seen[j] ? power(score[j] - most) : 0.0f;
        all += weight;
        sum[0] += weight * low(value[j].x), sum[1] += weight * high(value[j].x);
        sum[2] += weight * low(value[j].y), sum[3] += weight * high(value[j].y);
        sum[4] += weight * low(value[j].z), sum[5] += weight * high(value[j].z);
        sum[6] += weight * low(value[j].w), sum[7] += weight * high(value[j].w);
    }
#pragma unroll
    for (int i = LANES; i < 32; i *= 2) {
        all += __shfl_xor_sync(~0u, all, i);
#pragma unroll
        for (int n = 0; n < 8; n++) sum[n] += __shfl_xor_sync(~0u, sum[n], i);
    }
    if (line == 0) {
        *(float4 *)&mean[warp][dim] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *(float4 *)&mean[warp][dim + 4] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    if (lane == 0) best[warp] = most, total[warp] = all;
    __syncthreads();
    constexpr int SHARES = 32 * WARPS / DIM < 4 ? 32 * WARPS / DIM : 4;  // threads of one number
    if (thread < SHARES * DIM) {
        const int n = thread / SHARES, share = thread % SHARES;
        float high = best[0], norm = 0, result = 0;
#pragma unroll
        for (int w = 1; w < WARPS; w++) high = fmaxf(high, best[w]);
#pragma unroll
        for (int w = 0; w < WARPS / SHARES; w++) {
            const float weight = power(best[w * SHARES + share] - high);
            norm += weight * total[w * SHARES + share], result += weight * mean[w * SHARES + share][n];
        }
#pragma unroll
        for (int i = SHARES / 2; i; i /= 2)
            norm += __shfl_xor_sync(~0u, norm, i), result += __shfl_xor_sync(~0u, result, i);
        float *out = a.out + (part * HEADS + head) * DIM, *said = a.out + (PARTS * DIM + 2 * part) * HEADS + 2 * head;
        if (share == 0) out[n] = result;
        if (thread == 0) said[0] = high, said[1] = norm;
    }
}
