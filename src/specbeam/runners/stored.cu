// One row times weights that wait in shared memory: product.cu's other form (small.py chooses).
//
// Given: COLUMNS, ACROSS (warps that share the columns), BANDS (of them, that share the rows), ROWS (of a program; half
// of them a gate's, half its up's), AT_ONCE (rows of a copy), DEPTH (copies under way), LATE (the next kernel begins when so many copies have come), NAP (ns between two looks), WEIGHTS, NORM, PLUS, ACT, ADDED; and primitives.cuh.

constexpr int STEPS = COLUMNS / 32 / ACROSS, SETS = (STEPS + 3) / 4, TILES = (ROWS + 8 * BANDS - 1) / (8 * BANDS);
constexpr int SHARE = ACT ? ROWS / 2 : ROWS, WARPS = ACROSS * BANDS;  // and one that copies
constexpr int COPIES = (SHARE + AT_ONCE - 1) / AT_ONCE, PIECES = (ACT ? 2 : 1) * COPIES;
static_assert(4 * SHARE <= 32 * WARPS, "four threads a result");
static_assert(PIECES <= 32, "each has a lane that waits for it");
static_assert(COLUMNS % (64 * ACROSS) == 0 || COLUMNS % (32 * ACROSS) == 0, "tiles have no rest");

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

// Over lanes that stand beside each other, four at a time.
__device__ __forceinline__ float sum4(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS + 32, LEAST) stored(const __grid_constant__ Args a) {
#ifdef EMULATED
    static u16 memory[ROWS * COLUMNS];
#else
    extern __shared__ __align__(128) u16 memory[];  // [ROWS, COLUMNS]
#endif
    __shared__ __align__(16) float sums[ACROSS][8 * BANDS * TILES][4], squares[ACROSS][4];
    __shared__ __align__(8) u64 come[PIECES];
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, line = lane / 4;
    const u32 across = warp % ACROSS, band = warp / ACROSS;
    if (!LATE) let_next_begin();
    int which = 0, tile = blockIdx.x, base = 0;
#pragma unroll
    for (int i = 0; i + 1 < WEIGHTS && !ACT; i++) {
        const int tiles = (a.sizes[i] + ROWS - 1) / ROWS;
        if (which == i && tile >= tiles) which++, tile -= tiles, base += a.sizes[i];
    }
    const int size = which == 2 ? a.sizes[2] : which ? a.sizes[1] : a.sizes[0];
    const int row = min(tile * SHARE, size - SHARE);
    if (warp == WARPS) {
        const u16 *weight = which == 2 ? a.weights[2] : which ? a.weights[1] : a.weights[0];
        const auto copy = [&](int i) {
            const int its = i % COPIES * AT_ONCE, many = min(AT_ONCE, SHARE - its);
            fetch(memory + (i / COPIES * SHARE + its) * COLUMNS,
                  (i < COPIES ? weight : a.weights[1]) + (long long)(row + its) * COLUMNS, many * COLUMNS * 2, &come[i]);
        };
        if (lane < PIECES) expect(&come[lane], min(AT_ONCE, SHARE - lane % COPIES * AT_ONCE) * COLUMNS * 2);
        together_now();
        if (lane < DEPTH && lane < PIECES) copy(lane);
        if (lane == 0)
            for (int i = 0; i < PIECES; i++) {
                wait_for(&come[i], NAP);
                if (LATE == i + 1) let_next_begin();
                if (i + DEPTH < PIECES) copy(i + DEPTH);
            }
        together_now();
        __syncthreads();
        __syncthreads();
        return;
    }
    const u32 column = (across * STEPS * 4 + lane % 4) * 8;
    const u32 pair = line / 2, odd = line % 2, begin = column + 32 * (STEPS < 4 ? min(pair, STEPS - 1) : pair);
    const auto first_of = [](int set) { return STEPS < 4 ? 0 : min(4 * set, STEPS - 4); };
    uint4 gain[NORM ? SETS : 1];
#pragma unroll
    for (int s = 0; s < SETS && NORM; s++) gain[s] = now(a.norm + begin + 32 * first_of(s));
    const u16 *biases = which == 2 ? a.biases[2] : which ? a.biases[1] : a.biases[0];
    const u32 mine = thread / 4;  // of the results: four threads put one together
    u32 bias = 0, bias2 = 0, plus = 0;
    if (mine < SHARE) {
        if (biases) bias = now_one(biases + row + mine);
        if (ACT && a.biases[1]) bias2 = now_one(a.biases[1] + row + mine);
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
    if (ADDED && mine < SHARE) plus = now_one(a.added + row + mine);
    x[0].x |= (any | plus) & blockIdx.y;
    float square[4] = {};
    u32 first[SETS], second[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        first[s] = odd ? x[s].y : x[s].x, second[s] = odd ? x[s].w : x[s].z;
        if (NORM) {  // its scale is applied to the sums
            const bool there = first_of(s) + pair >= 4 * s && first_of(s) + pair < STEPS;
            multiply(square, x[s].x, x[s].y, x[s].z, x[s].w, there ? first[s] : 0, there ? second[s] : 0);
            first[s] = gained(first[s], odd ? gain[s].y : gain[s].x);
            second[s] = gained(second[s], odd ? gain[s].w : gain[s].z);
        }
    }
    if (NORM && band == 0 && lane % 9 == 0) squares[across][lane / 9] = square[0] + square[3];
    __syncthreads();  // all weights have come
    float scale = 1;
    if (NORM) {
        float all = 0;
#pragma unroll
        for (int i = 0; i < ACROSS; i++) all += squares[i][lane % 4];
        scale = rsqrtf(sum4(all) * (1.0f / COLUMNS) + a.eps);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int its = min((band * TILES + t) * 8 + line, ROWS - 1);
        const u16 *from = memory + its * COLUMNS + column;
        float d[2][4] = {};
        // Lanes of neighbouring rows read steps that are neighbours, the other way round: else they would meet in a bank.
        // A step's numbers then stand in the one sum of even, in the other of odd rows.
#pragma unroll
        for (int s = 0; s < SETS; s++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = 4 * s + i, p = j - first_of(s);
                if (j >= STEPS || (p % 2 && i)) continue;
                const bool two = p % 2 == 0 && i < 3 && j + 1 < STEPS;
                const bool its_own = pair == p || (two && pair == p + 1);
                const uint4 one = *(const uint4 *)(from + 32 * (j + (two && odd)));
                const uint4 other = two ? *(const uint4 *)(from + 32 * (j + !odd)) : one;
                multiply(d[0], one.x, one.y, one.z, one.w, its_own ? first[s] : 0, its_own ? second[s] : 0);
                multiply(d[1], other.x, other.y, other.z, other.w, its_own ? first[s] : 0, its_own ? second[s] : 0);
            }
        }
        const bool second_sum = (lane + line) % 2;
        sums[across][(band * TILES + t) * 8 + line][lane % 4] = second_sum ? d[1][0] + d[1][3] : d[0][0] + d[0][3];
    }
    __syncthreads();
    float sum = 0, sum2 = 0;
#pragma unroll
    for (int i = 0; i < ACROSS; i++) {
        sum += sums[i][min(mine, SHARE - 1)][lane % 4];
        if (ACT) sum2 += sums[i][min(SHARE + mine, ROWS - 1)][lane % 4];
    }
    sum = sum4(sum), sum2 = ACT ? sum4(sum2) : 0;
    if (mine < SHARE && lane % 4 == 0) {
        float result = rounded(sum * scale + later(bias));
        if (ACT) result = rounded(activate(result)) * rounded(sum2 * scale + later(bias2));
        a.out[base + row + mine] = narrow(result + later(plus));
    }
}
