// CUDA C++ on a CPU, for tests: a block's threads take turns, and each goes on until it has to wait for others.
// Shared memory is one block's after the other.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index { u32 x, y; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Meeting { u32 met = 0, turn = 0; };
struct Warp {
    Meeting meeting;
    u32 told[32], a[32][4], b[32][2];
};
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool ended = false;
};

static Index threadIdx, blockIdx;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Meeting everybody;
static ucontext_t outside;
static std::function<void()> kernel;

inline void give_way() { swapcontext(&threads[threadIdx.x].context, &outside); }
inline void meet(Meeting &meeting, u32 count) {
    const u32 turn = meeting.turn;
    if (++meeting.met == count) meeting.met = 0, meeting.turn++;
    while (meeting.turn == turn) give_way();
}
inline void __syncthreads() { meet(everybody, threads.size()); }
inline Warp &mine() { return warps[threadIdx.x / 32]; }
inline void together() { meet(mine().meeting, 32); }
inline void __syncwarp() { together(); }

inline void begin() {
    const u32 number = threadIdx.x;
    kernel();
    threads[number].ended = true;
}

// `function` by so many threads of so many blocks.
inline void emulate(u32 blocks, u32 count, std::function<void()> function) {
    kernel = function;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        threads = std::vector<Thread>(count), warps = std::vector<Warp>(count / 32), everybody = {};
        for (Thread &thread : threads) {
            thread.stack.resize(1 << 18);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &outside;
            makecontext(&thread.context, begin, 0);
        }
        for (bool going = true; going;) {
            going = false;
            for (u32 i = 0; i < count; i++)
                if (!threads[i].ended) going = true, threadIdx.x = i, swapcontext(&outside, &threads[i].context);
        }
    }
}

template <class To, class From> inline To bits(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __shfl_sync(u32, float x, int lane) {
    Warp &warp = mine();
    warp.told[threadIdx.x % 32] = bits<u32>(x);
    together();
    const float found = bits<float>(warp.told[lane % 32]);
    together();
    return found;
}
inline float __shfl_xor_sync(u32 all, float x, int other) { return __shfl_sync(all, x, (threadIdx.x % 32) ^ other); }
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline u16 narrow(float x) { return (bits<u32>(x) + 0x7fff + (bits<u32>(x) >> 16 & 1)) >> 16; }
inline float power(float x) { return std::exp2(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int min(int x, int y) { return x < y ? x : y; }
inline uint4 once(const void *p) { return *(const uint4 *)p; }
inline uint4 now(const void *p) { return *(const uint4 *)p; }
inline uint2 now_two(const void *p) { return *(const uint2 *)p; }
inline u32 now_one(const u16 *p) { return *p; }
inline float later(u32 bits) { return ::bits<float>(bits << 16); }
typedef unsigned long long u64;
#define SHARED_MEMORY(name, count) static u16 name[count]
inline void expect(u64 *come, u32 bytes) { *come = bytes; }
inline void fetch(void *to, const void *from, u32 bytes, u64 *come) { std::memcpy(to, from, bytes), *come -= bytes; }
inline void wait_for(u64 *come) {
    while (*come) give_way();
}
inline void let_next_begin() {}
inline void wait_for_last() {}

#define EMULATED
#include "primitives.cuh"

inline u32 times(u32 x, u32 y) { return narrow(low(x) * low(y)) | (u32)narrow(high(x) * high(y)) << 16; }

// PTX, mma.m16n8k16: a[row][k] is in lane row % 8 * 4 + k % 8 / 2, register row / 8 + 2 (k / 8); b[k][column] in lane
// column * 4 + k % 8 / 2, register k / 8; a lane's d are rows lane / 4 and 8 more, columns lane % 4 * 2 and the next.
inline void multiply(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp &warp = mine();
    const u32 lane = threadIdx.x % 32, a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(warp.a[lane], a, sizeof a), std::memcpy(warp.b[lane], b, sizeof b);
    together();
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            const u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
            d[i] += (k % 2 ? high(left) * high(right) : low(left) * low(right));
        }
    }
    together();
}
