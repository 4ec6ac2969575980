// What stands before every kernel in CUDA C++ (cuda.py): pairs of bf16, and the few instructions that C++ has no word
// for, of which tests/runners/emulated.h has its own for a CPU.

#pragma once

typedef unsigned short u16;  // a bf16
typedef unsigned int u32;    // two of them, or bits
typedef unsigned long long u64;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float wide(u16 x) { return __uint_as_float((u32)x << 16); }

#ifndef EMULATED
__device__ __forceinline__ u16 narrow(float x) {
    u32 y;  // a pair at once is one instruction, one alone takes several
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(0.0f), "f"(x));
    return y;
}

// Both numbers of a pair times both of another.
__device__ __forceinline__ u32 times(u32 x, u32 y) {
    u32 z;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// Sixteen bytes that nobody reads again soon.
__device__ __forceinline__ uint4 once(const void *p) {
    uint4 v;
    asm volatile("ld.global.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Sixteen bytes, or a bf16's bits, in the order that is written: a compiler likes to ask for each where it is needed,
// one after the other (and still may, unless what comes first needs them all), and to convert a bf16 (`later` does) as
// soon as it was asked for.
__device__ __forceinline__ uint4 now(const void *p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint2 now_two(const void *p) {  // fp32
    uint2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 now_one(const u16 *p) {
    u32 bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    return bits;
}
__device__ __forceinline__ float later(u32 bits) {
    asm volatile("shl.b32 %0, %0, 16;" : "+r"(bits));
    return __uint_as_float(bits);
}

// 2 to the x.
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d [16, 8] += a [16, 16] · b [16, 8], by a warp, in bf16 and fp32 (mma.m16n8k16: PTX says which lane has what). Given
// eight of a row's numbers in each lane as a0, a2 and, the next time, a0, a2 again, and eight of another's as b0, b1
// both times, the diagonal d[i][i] is the sum over the lanes 4 i to 4 i + 3 of what belongs together: numbers go to the
// tensor core as they lie in memory.
__device__ __forceinline__ void multiply(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A program's shared memory; bytes copied into it beside the program (whole sixteens), and what knows when they have come.
#define SHARED_MEMORY(name, count) extern __shared__ __align__(128) u16 name[]
__device__ __forceinline__ u32 place(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void expect(u64 *come, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;\n\t"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(place(come)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void fetch(void *to, const void *from, u32 bytes, u64 *come) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(place(to)), "l"(from), "r"(bytes), "r"(place(come)) : "memory");
}
__device__ __forceinline__ void wait_for(u64 *come) {
    for (u32 there = 0; !there;)
        asm volatile("{.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n\tselp.u32 %0, 1, 0, p;}"
            : "=r"(there) : "r"(place(come)) : "memory");
}

// Programmatic dependent launch: the next kernel may begin; and what the kernels before did may be read.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

__device__ __forceinline__ float rounded(float x) { return wide(narrow(x)); }
