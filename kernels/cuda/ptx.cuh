// Names for the single PTX instructions that the kernels are made of, so that no CUDA header is needed: NVRTC compiles
// each kernel file in about a second instead of half a minute.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// A CUtensorMap, opaque to the kernels; passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u8 bytes[128];
};

#define DEVICE __device__ __forceinline__

// ---- numbers -------------------------------------------------------------------------------------------------------

DEVICE float bf16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Adds eight bf16 values times 0 to four pairs of sums: those stay 0, of either sign, but where a value is infinite or NaN.
DEVICE void add_not_finite_bf16(u32 (&sums)[4], uint4 x) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sums[0]) : "r"(x.x), "r"(0));
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sums[1]) : "r"(x.y), "r"(0));
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sums[2]) : "r"(x.z), "r"(0));
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sums[3]) : "r"(x.w), "r"(0));
}
// Two floats to two bf16 (round to nearest even), `low` in the low half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
DEVICE u16 to_bf16(float x) {
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
}
DEVICE u32 pack_f16(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
DEVICE float2 unpack_f16(u32 pair) {
    float2 out;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(out.x), "=f"(out.y)
        : "r"(pair));
    return out;
}
// Two floats to two E4M3 bytes (nearest even, saturating to 448; NaN stays NaN), `low` in the low byte.
DEVICE u16 pack_e4m3(float low, float high) {
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}
DEVICE float exp2_approx(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
DEVICE float reciprocal_approx(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
DEVICE float reciprocal_root_approx(float x) {
    float out;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
// 1 / x for x that is not near 0, rounded to nearest but in rare cases; no branch, unlike a division. 1 / infinity is 0.
DEVICE float reciprocal(float x) {
    float r = reciprocal_approx(x), rest = x == __int_as_float(0x7f800000) ? 0.0f : fmaf(-x, r, 1.0f);
    return fmaf(r, rest, r);
}
// The larger of two, NaN if either is NaN: a broken input must show in the output.
DEVICE float max_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

// ---- threads -------------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE bool elect_one() {
    u32 chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}
// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads.
DEVICE void named_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Whether `x` holds for any of the threads that meet.
DEVICE bool named_any(u32 id, u32 threads, bool x) {
    u32 any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbarrier.cta.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"((u32)x)
                 : "memory");
    return any != 0;
}
DEVICE void named_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <u32 N>
DEVICE void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <u32 N>
DEVICE void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Programmatic dependent launch: wait for the kernels before this one (and their writes); let the next one start. In this order,
// so that one kernel at a time waits on the multiprocessors.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
// A barrier of the cluster in two halves. It does not make memory visible, which would cost a device-wide memory barrier: it is
// for barriers just initialised (after mbar_init_done) and for what has been read.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_meet() {
    cluster_arrive();
    cluster_wait();
}
// Address, in the shared memory of CTA `rank` of the cluster, of what lies at `address` in one's own.
DEVICE u32 peer_address(u32 address, u32 rank) {
    u32 out;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
    return out;
}
// Writes 16 bytes into another CTA of the cluster and counts them at a barrier there; both addresses are the peer's.
DEVICE void send_float4(u32 address, float a, float b, float c, float d, u32 bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar)
                 : "memory");
}

// ---- mbarriers and the bulk copy engine ----------------------------------------------------------------------------

DEVICE void mbar_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
DEVICE void mbar_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives at the same barrier of CTA `rank` of the cluster. Without `.release.cluster`: that becomes a device-wide memory
// barrier and an L1 invalidation (a microsecond), and what the arrival orders is reads that have already returned.
DEVICE void mbar_arrive_at(u32 bar, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
        "r"(rank)
        : "memory");
}
DEVICE void mbar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void mbar_wait(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
    } while (!done);
}
// Ordinary writes to shared memory become visible to the tensor cores and the copy engine.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"((u64)map) : "memory");
}

// L2 policies as the bulk copies take them.
constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;
constexpr u64 EVICT_LAST = 0x14F0000000000000ull;

DEVICE void tma_2d(u32 dst, const TensorMap* map, u32 bar, int x, int y, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
        "l"((u64)map), "r"(bar), "r"(x), "r"(y), "l"(policy)
        : "memory");
}
DEVICE void tma_3d(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
        "l"((u64)map), "r"(bar), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}
DEVICE void tma_4d(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z, int w, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"((u64)map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
        : "memory");
}
// The same box to the same place in every CTA of `mask`, each told at its own barrier.
DEVICE void tma_2d_multicast(u32 dst, const TensorMap* map, u32 bar, int x, int y, u16 mask, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(dst),
        "l"((u64)map), "r"(bar), "r"(x), "r"(y), "h"(mask), "l"(policy)
        : "memory");
}
// From shared memory (written before a fence_async) to memory; rows and columns beyond the tensor are not written. Stores of a
// thread since its last commit are a group.
DEVICE void tma_store_2d(const TensorMap* map, u32 src, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"((u64)map), "r"(src), "r"(x),
                 "r"(y)
                 : "memory");
}
DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's groups have been read from shared memory; until they are in memory.
DEVICE void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void store_finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// A plain run of bytes (16-byte aligned, a multiple of 16).
DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"((u64)src), "r"(bytes), "r"(bar)
                 : "memory");
}

// ---- matrices in shared memory -------------------------------------------------------------------------------------

DEVICE void store_global_16(void* to, uint4 v) {  // as four stores, if left to the compiler where registers are scarce
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"((u64)to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8x8 b16 matrices, each written transposed; lane l gives the address of row l%8 of matrix l/8.
DEVICE void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
DEVICE void stmatrix_x2_trans(u32 address, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
DEVICE void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
DEVICE uint4 load_shared_16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
DEVICE float2 load_shared_float2(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
DEVICE float load_shared_float(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
DEVICE float4 load_shared_float4(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
DEVICE void store_shared_float(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
DEVICE void store_shared_float4(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEVICE void store_shared_16(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// Descriptor of an operand whose rows are 128 bytes, swizzled by TMA's 128-byte mode, 8 rows = 1024 bytes apart.
// K-major operands (rows along M or N, k inside the 128 bytes): one k-step advances the address inside the row.
DEVICE u64 k_major(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// MN-major operands (rows along k, 64 bf16 of N inside the 128 bytes): `next` = bytes to the next 64 of N.
DEVICE u64 n_major(u32 address, u32 next) {
    return (u64)((address & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | (64ull << 32) | (1ull << 62);
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads or writes of accumulators across an asynchronous product.
template <int N>
DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
