// One row times weights that wait in shared memory: of a small layer's gate and its down product, which together do not
// fit into registers. product.cu's other form, with its ways to ask a tensor core.
//
// A warp more than compute has them copied, a few pieces at a time: more at once fill the memory's queues, in which then
// everybody's next number stands, too. A layer's kernels so are all there before it is their turn, each with its weights.
//
// Given: COLUMNS, ACROSS (warps that share the columns), BANDS (of them, that share the rows), ROWS (of a program; half of
// them a gate's, half its up's), AT_ONCE (rows of a piece), DEPTH (pieces under way), LATE (0, or: the next kernel begins
// when so many pieces have come), LEAST (programs that an SM's registers are enough for), ADDED, and what row.cuh is.

constexpr int STEPS = COLUMNS / 32 / ACROSS, SETS = (STEPS + 3) / 4, TILES = (ROWS + 8 * BANDS - 1) / (8 * BANDS);

#include "row.cuh"

constexpr int SHARE = ACT ? ROWS / 2 : ROWS, WARPS = ACROSS * BANDS;  // and one that copies
constexpr int COPIES = (SHARE + AT_ONCE - 1) / AT_ONCE, PIECES = (ACT ? 2 : 1) * COPIES;
static_assert(COLUMNS % (32 * ACROSS) == 0, "columns have no rest");
static_assert(PIECES <= 32 && 4 * SHARE <= 32 * WARPS, "a lane for each piece, four for each result");

// Over lanes that stand beside each other, four at a time.
__device__ __forceinline__ float sum4(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS + 32, LEAST) stored(const __grid_constant__ Args a) {
    SHARED_MEMORY(memory, ROWS * COLUMNS);  // the weights
    __shared__ __align__(16) float sums[ACROSS][8 * BANDS * TILES][4], squares[ACROSS][4];
    __shared__ __align__(8) u64 come[PIECES];
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, line = lane / 4;
    const u32 across = warp % ACROSS, band = warp / ACROSS;
    if (!LATE) let_next_begin();
    // The last program begins so early that it has all its rows: some are then computed twice.
    const int row = min((int)blockIdx.x * SHARE, a.sizes[0] - SHARE);
    if (warp == WARPS) {
        const auto rows_of = [](int piece) { return min(AT_ONCE, SHARE - piece % COPIES * AT_ONCE); };
        const auto copy = [&](int piece) {
            const int its = piece % COPIES * AT_ONCE;
            fetch(memory + (piece / COPIES * SHARE + its) * COLUMNS,
                  a.weights[piece / COPIES] + (long long)(row + its) * COLUMNS, rows_of(piece) * COLUMNS * 2, &come[piece]);
        };
        if (lane < PIECES) expect(&come[lane], rows_of(lane) * COLUMNS * 2);
        __syncwarp();
        if (lane < DEPTH && lane < PIECES) copy(lane);
        if (lane == 0)
            for (int i = 0; i < PIECES; i++) {
                wait_for(&come[i]);
                if (LATE == i + 1) let_next_begin();
                if (i + DEPTH < PIECES) copy(i + DEPTH);
            }
        __syncwarp();
        __syncthreads();  // all have come
        __syncthreads();
        return;
    }
    const u32 column = (across * STEPS * 4 + lane % 4) * 8;
    const u32 pair = line / 2, odd = line % 2, begin = column + 32 * step_of(line);
    uint4 gain[NORM ? SETS : 1];
#pragma unroll
    for (int s = 0; s < SETS && NORM; s++) gain[s] = now(a.norm + begin + 32 * first_of(s));
    const u32 mine = thread / 4;  // of the results: four threads put one together
    u32 bias = 0, its_bias = 0, added = 0;
    if (mine < SHARE) {
        if (a.biases[0]) bias = now_one(a.biases[0] + row + mine);
        if (ACT && a.biases[1]) its_bias = now_one(a.biases[1] + row + mine);
    }
    wait_for_last();
    u32 any = 0;
    uint4 x[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        x[s] = now((const u16 *)a.x + begin + 32 * first_of(s));
        if (s) any |= x[s].x;
    }
    x[0].y |= any & blockIdx.y;
    if (ADDED && mine < SHARE) added = now_one(a.added + row + mine);
    x[0].x |= (any | added) & blockIdx.y;  // (0 of it) all is asked for before the first of it is needed
    float square[4] = {};
    uint2 four[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) four[s] = four_of(s, line, x[s], gain[NORM ? s : 0], square);
    if (NORM && band == 0 && lane % 9 == 0) squares[across][lane / 9] = square[0] + square[3];
    __syncthreads();  // all weights have come
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const u16 *from = memory + min((band * TILES + t) * 8 + line, ROWS - 1) * COLUMNS + column;
        float d[2][4] = {};
        // Of two steps odd rows read the second first: in the same one neighbours would meet in a bank. A step's numbers
        // then stand in the first sum of even rows and the second of odd ones, or the other way round.
#pragma unroll
        for (int s = 0; s < SETS; s++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = 4 * s + i, p = j - first_of(s);
                if (j >= STEPS || (p % 2 && i)) continue;
                const bool two = p % 2 == 0 && i < 3 && j + 1 < STEPS, its = pair == p || (two && pair == p + 1);
                const uint4 one = *(const uint4 *)(from + 32 * (j + (two && odd)));
                const uint4 other = two ? *(const uint4 *)(from + 32 * (j + !odd)) : one;
                multiply(d[0], one.x, one.y, one.z, one.w, its ? four[s].x : 0, its ? four[s].y : 0);
                multiply(d[1], other.x, other.y, other.z, other.w, its ? four[s].x : 0, its ? four[s].y : 0);
            }
        }
        const bool swapped = (lane + line) % 2;
        sums[across][(band * TILES + t) * 8 + line][lane % 4] = swapped ? d[1][0] + d[1][3] : d[0][0] + d[0][3];
    }
    __syncthreads();
    float sum = 0, up = 0, all = 0;
#pragma unroll
    for (int i = 0; i < ACROSS; i++) {
        if (NORM) all += squares[i][lane % 4];
        sum += sums[i][min(mine, SHARE - 1)][lane % 4];
        if (ACT) up += sums[i][min(SHARE + mine, ROWS - 1)][lane % 4];
    }
    sum = sum4(sum), up = ACT ? sum4(up) : 0;
    const float scale = NORM ? rsqrtf(sum4(all) * (1.0f / COLUMNS) + a.eps) : 1.0f;
    if (mine < SHARE && lane % 4 == 0) a.out[row + mine] = finished(sum, up, scale, bias, its_bias, added);
}
