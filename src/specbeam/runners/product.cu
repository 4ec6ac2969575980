// One row times weights, as matvec.py says: with the norm before them, the gate's activation and the sum behind them.
//
// A program has a tile of rows, a warp of it some of the columns of all of them. It holds all its weights in registers
// before the row is there, and then has little left to do: each warp reads its part of the row once, tensor cores
// multiply and add up, and one barrier joins the warps. As the next kernel may begin at once, the weights of several
// kernels are on their way together.
//
// How a tensor core is asked (multiply in primitives.cuh): a [16, 16] has eight rows of weights twice, with half of the
// columns in its upper and half in its lower eight rows, as a lane's sixteen bytes come from memory; b [16, 8] has the
// row's numbers of those halves in one of four pairs of columns, and 0 in the others: of four steps each has a pair of
// its own, so that a lane needs the row's numbers of one step in four. A row's sum is then over four lanes.
//
// Behind attention the row is in PARTS parts (attend.cu), of which each warp makes its part of the row.
//
// Given: COLUMNS, WARPS, ROWS (of a program, a multiple of 8; half of them a gate's, half its up's), WEIGHTS, NORM,
// ADDED, PARTS (or 0), DIM (of a head, with parts); and what row.cuh is.

constexpr int STEPS = COLUMNS / 32 / WARPS, TILES = ROWS / 8, SETS = (STEPS + 3) / 4;

#include "row.cuh"

constexpr int APART = TILES >= 4 ? 1 : 4 / TILES;  // sums: what a tensor core adds to it has to wait for
static_assert(COLUMNS % (32 * WARPS) == 0 && ROWS % 8 == 0, "tiles have no rest");

__device__ __forceinline__ float sum4(const float *x) {
    const float4 four = *(const float4 *)x;
    return (four.x + four.y) + (four.z + four.w);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) product(const __grid_constant__ Args a) {
    __shared__ __align__(16) float sums[WARPS][ROWS][4], squares[WARPS][4];
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, line = lane / 4;
    let_next_begin();
    // Which of the weights this program has rows of.
    int which = 0, tile = blockIdx.x, base = 0;
#pragma unroll
    for (int i = 0; i + 1 < WEIGHTS && !ACT; i++) {
        const int tiles = (a.sizes[i] + ROWS - 1) / ROWS;
        if (which == i && tile >= tiles) which++, tile -= tiles, base += a.sizes[i];
    }
    const int size = which == 2 ? a.sizes[2] : which ? a.sizes[1] : a.sizes[0];
    constexpr int SHARE = ACT ? ROWS / 2 : ROWS;  // of one weight
    // The last program of a weight begins so early that it has all its rows: some are then computed twice.
    const int row = min(tile * SHARE, size - SHARE);
    const u16 *weight = which == 2 ? a.weights[2] : which ? a.weights[1] : a.weights[0];
    const u32 column = (warp * STEPS * 4 + lane % 4) * 8;
    uint4 w[TILES][STEPS];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const u32 its = t * 8 + line;
        const u16 *from = (its < SHARE ? weight : a.weights[1]) + (long long)(row + its % SHARE) * COLUMNS + column;
#pragma unroll
        for (int j = 0; j < STEPS; j++) w[t][j] = once(from + 32 * j);
    }
    const u32 pair = line / 2, begin = column + 32 * step_of(line);
    uint4 gain[NORM ? SETS : 1];
#pragma unroll
    for (int s = 0; s < SETS && NORM; s++) gain[s] = now(a.norm + begin + 32 * first_of(s));
    const u16 *biases = which == 2 ? a.biases[2] : which ? a.biases[1] : a.biases[0];
    u32 bias = 0, bias2 = 0, plus = 0;
    if (thread < SHARE) {
        if (biases) bias = now_one(biases + row + thread);
        if (ACT && a.biases[1]) bias2 = now_one(a.biases[1] + row + thread);
    }
    wait_for_last();
    u32 any = 0;
#if PARTS
    uint2 said[SETS][PARTS], numbers[SETS][PARTS][2];  // the largest score and the sum; a lane's two words of numbers
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        const int at = begin + 32 * first_of(s);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const float *its = (const float *)a.x + p * COLUMNS + at + 2 * (line % 2);
            said[s][p] = now_two((const float *)a.x + PARTS * COLUMNS + (p * COLUMNS + at) / DIM * 2);
            numbers[s][p][0] = now_two(its), numbers[s][p][1] = now_two(its + 4);
            any |= numbers[s][p][0].x | numbers[s][p][1].x;
        }
    }
    u32 &needs_all = said[0][0].x;
#else
    uint4 x[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        x[s] = now((const u16 *)a.x + begin + 32 * first_of(s));
        if (s) any |= x[s].x;
    }
    u32 &needs_all = x[0].x;
    x[0].y |= any & blockIdx.y;
#endif
    if (ADDED && thread < SHARE) plus = now_one(a.added + row + thread);
    // They are asked for together, not each when it is needed, as the first needs all (0 of them).
    needs_all |= (any | plus) & blockIdx.y;
    float d[TILES][APART][4] = {}, square[4] = {};
#pragma unroll
    for (int s = 0; s < SETS; s++) {
#if PARTS
        float high = -1e30f, sum = 0, four[4] = {};
#pragma unroll
        for (int p = 0; p < PARTS; p++) high = fmaxf(high, __uint_as_float(said[s][p].x));
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const float weight = power(__uint_as_float(said[s][p].x) - high);
            sum += weight * __uint_as_float(said[s][p].y);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                four[2 * i] += weight * __uint_as_float(numbers[s][p][i].x);
                four[2 * i + 1] += weight * __uint_as_float(numbers[s][p][i].y);
            }
        }
        const float whole = __fdividef(1.0f, sum);
        const u32 first = pair_of(four[0] * whole, four[1] * whole), second = pair_of(four[2] * whole, four[3] * whole);
#else
        const uint2 four = four_of(s, line, x[s], gain[NORM ? s : 0], square);
        const u32 first = four.x, second = four.y;
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int j = 4 * s + i;
            if (j >= STEPS) continue;
            const bool mine = pair == j - first_of(s);
#pragma unroll
            for (int t = 0; t < TILES; t++)
                multiply(d[t][j % APART], w[t][j].x, w[t][j].y, w[t][j].z, w[t][j].w, mine ? first : 0,
                         mine ? second : 0);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {  // the upper half is in a pair's first column, the lower half in its second
        float sum = 0;
#pragma unroll
        for (int i = 0; i < APART; i++) sum += d[t][i][0] + d[t][i][3];
        sums[warp][t * 8 + line][lane % 4] = sum;
    }
    if (NORM && lane % 9 == 0) squares[warp][lane / 9] = square[0] + square[3];  // the row times itself: a diagonal
    __syncthreads();
    if (thread < SHARE) {
        float sum = 0, sum2 = 0, all = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            sum += sum4(sums[i][thread]);
            if (NORM) all += sum4(squares[i]);
            if (ACT) sum2 += sum4(sums[i][SHARE + thread]);
        }
        const float scale = NORM ? rsqrtf(all * (1.0f / COLUMNS) + a.eps) : 1.0f;
        a.out[base + row + thread] = finished(sum, sum2, scale, bias, bias2, plus);
    }
}
