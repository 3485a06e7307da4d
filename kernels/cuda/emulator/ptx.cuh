// ptx.cuh for the host: the same names, so that the kernels compile with a host compiler and run on emulated threads (see
// emulator.cpp). Asynchronous work (copies, products) is done at once: addresses, layouts, arithmetic and barrier protocols
// are checked here, races are not.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n)
#define __shared__ static
#define DEVICE inline

struct alignas(64) TensorMap {
    u8 bytes[128];
};
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Three { u32 x, y, z; };

using std::max;
using std::min;

// ---- what emulator.cpp offers --------------------------------------------------------------------------------------

extern Three threadIdx, blockIdx, blockDim, gridDim;
namespace emulator {
u8* shared_memory();                                   // of the running thread's block
u8* at(u32 address);                                   // shared memory by address, a peer's included
u32 rank();                                            // of the running block in its cluster
void meet_warp(u64 value, u64 (&values)[32], u32& present);  // every lane's value, once all lanes have come
void meet_block();
void meet_cluster();
void meet_named(u32 id, u32 threads, bool wait);
// Calls `once` when all 128 threads of the warpgroup have come, with what each brought.
void meet_warpgroup(void* mine, void (*once)(void** all, void* context), void* context);
void barrier_init(u32 bar, u32 arrivals);
void barrier_arrive(u32 bar, u32 expect_bytes);
void barrier_complete(u32 bar, u32 bytes);
void barrier_wait(u32 bar, u32 parity);
void store_box(u32 from, const TensorMap* map, int x, int y);
void copy_box(u32 to, const TensorMap* map, u32 bar, const int* at, u32 dims, u32 mask);
}  // namespace emulator

// ---- CUDA's own functions ------------------------------------------------------------------------------------------

inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
inline float __expf(float x) { return expf(x); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T, class U> inline T atomicAdd(T* p, U v) { T old = *p; *p += v; return old; }
template <class T> inline T atomicMax(T* p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <class T> inline T atomicMin(T* p, T v) { T old = *p; *p = std::min(old, v); return old; }

template <class T>
inline u64 to_bits(T x) { u64 bits = 0; memcpy(&bits, &x, sizeof x); return bits; }
template <class T>
inline T from_bits(u64 bits) { T x; memcpy(&x, &bits, sizeof x); return x; }
template <class T>
inline T shuffle(T x, u32 from) {
    u64 values[32];
    u32 present;
    emulator::meet_warp(to_bits(x), values, present);
    return from_bits<T>(values[from & 31]);
}
template <class T> inline T __shfl_sync(u32, T x, u32 from) { return shuffle(x, from); }
template <class T> inline T __shfl_xor_sync(u32, T x, u32 step) { return shuffle(x, (threadIdx.x & 31) ^ step); }
template <class T>
inline T __shfl_up_sync(u32, T x, u32 step) {
    u32 lane = threadIdx.x & 31;
    return shuffle(x, lane >= step ? lane - step : lane);
}
template <class F>
inline u32 reduce(u32 x, F combine) {
    u64 values[32];
    u32 present, out = 0;
    bool first = true;
    emulator::meet_warp(x, values, present);
    for (u32 i = 0; i < 32; ++i)
        if (present >> i & 1) out = first ? (u32)values[i] : combine(out, (u32)values[i]), first = false;
    return out;
}
inline u32 __reduce_max_sync(u32, u32 x) { return reduce(x, [](u32 a, u32 b) { return a > b ? a : b; }); }
inline u32 __reduce_min_sync(u32, u32 x) { return reduce(x, [](u32 a, u32 b) { return a < b ? a : b; }); }
inline u32 __reduce_add_sync(u32, u32 x) { return reduce(x, [](u32 a, u32 b) { return a + b; }); }
inline u32 __ballot_sync(u32, bool x) {
    u64 values[32];
    u32 present, out = 0;
    emulator::meet_warp(x, values, present);
    for (u32 i = 0; i < 32; ++i) out |= (u32)((present >> i & 1) && values[i]) << i;
    return out;
}
inline bool __any_sync(u32, bool x) { return __ballot_sync(~0u, x) != 0; }
inline void __syncwarp() { __ballot_sync(~0u, false); }
inline void __syncthreads() { emulator::meet_block(); }

// ---- ptx.cuh's names -----------------------------------------------------------------------------------------------

inline u16 to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }
inline float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline void add_not_finite_bf16(u32 (&sums)[4], uint4 x) {
    for (u32 pair : {x.x, x.y, x.z, x.w})
        if ((pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u) sums[0] = 0x7fff;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline u32 pack_f16(float low, float high) {
    _Float16 pair[] = {(_Float16)low, (_Float16)high};
    u32 out;
    memcpy(&out, pair, 4);
    return out;
}
inline float2 unpack_f16(u32 pair) {
    _Float16 both[2];
    memcpy(both, &pair, 4);
    return {(float)both[0], (float)both[1]};
}
inline u8 to_e4m3(float x) {
    u8 sign = __float_as_uint(x) >> 24 & 0x80;
    float magnitude = fabsf(x);
    if (x != x) return 0x7f;
    if (magnitude >= 464.0f) return sign | 0x7e;
    if (magnitude < 1.0f / 64) return sign | (u8)nearbyintf(magnitude * 512.0f);
    u32 bits = __float_as_uint(magnitude), rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
    return sign | (u8)std::min(rounded - (120u << 3), 0x7eu);
}
inline float from_e4m3(u8 x) {
    float mantissa = x & 7, value = x >> 3 & 15 ? ldexpf(8 + mantissa, (x >> 3 & 15) - 10) : ldexpf(mantissa, -9);
    if ((x & 0x7f) == 0x7f) value = NAN;
    return x & 0x80 ? -value : value;
}
inline u16 pack_e4m3(float low, float high) { return to_e4m3(low) | (u16)to_e4m3(high) << 8; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float reciprocal_root_approx(float x) { return 1.0f / sqrtf(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }
inline u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
inline u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - emulator::shared_memory()); }
inline bool elect_one() { return threadIdx.x % 32 == 0; }
inline void named_sync(u32 id, u32 threads) { emulator::meet_named(id, threads, true); }
inline bool named_any(u32 id, u32 threads, bool x) {
    static bool any[16];  // one block runs at a time
    any[id] |= x;
    named_sync(id, threads);
    bool result = any[id];
    named_sync(id, threads);
    any[id] = false;
    named_sync(id, threads);
    return result;
}
inline void named_arrive(u32 id, u32 threads) { emulator::meet_named(id, threads, false); }
template <u32 N> inline void registers_down() {}
template <u32 N> inline void registers_up() {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline u32 cluster_rank() { return emulator::rank(); }
inline void cluster_meet() { emulator::meet_cluster(); }
inline void cluster_arrive() {}
inline void cluster_wait() { emulator::meet_cluster(); }
inline u32 peer_address(u32 address, u32 rank) { return address | (rank + 1) << 24; }
inline void mbar_init(u32 bar, u32 arrivals) { emulator::barrier_init(bar, arrivals); }
inline void mbar_init_done() {}
inline void mbar_arrive(u32 bar) { emulator::barrier_arrive(bar, 0); }
inline void mbar_arrive_at(u32 bar, u32 rank) { emulator::barrier_arrive(peer_address(bar, rank), 0); }
inline void send_float4(u32 address, float a, float b, float c, float d, u32 bar) {
    *(float4*)emulator::at(address) = {a, b, c, d};
    emulator::barrier_complete(bar, 16);
}
inline void mbar_expect(u32 bar, u32 bytes) { emulator::barrier_arrive(bar, bytes); }
inline void mbar_wait(u32 bar, u32 parity) { emulator::barrier_wait(bar, parity); }
inline void fence_async() {}
inline void prefetch_map(const TensorMap*) {}
constexpr u64 EVICT_NORMAL = 0, EVICT_FIRST = 1, EVICT_LAST = 2;
inline void tma_2d(u32 dst, const TensorMap* map, u32 bar, int x, int y, u64) {
    int at[] = {x, y};
    emulator::copy_box(dst, map, bar, at, 2, 0);
}
inline void tma_2d_multicast(u32 dst, const TensorMap* map, u32 bar, int x, int y, u16 mask, u64) {
    int at[] = {x, y};
    emulator::copy_box(dst, map, bar, at, 2, mask);
}
inline void tma_4d(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z, int w, u64) {
    int at[] = {x, y, z, w};
    emulator::copy_box(dst, map, bar, at, 4, 0);
}
inline void tma_store_2d(const TensorMap* map, u32 src, int x, int y) { emulator::store_box(src, map, x, y); }
inline void store_commit() {}
inline void store_wait() {}
inline void store_finish() {}
inline void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
    if (dst % 16 || bytes % 16 || (u64)src % 16) fprintf(stderr, "emulator: misaligned bulk copy\n"), abort();
    memcpy(emulator::at(dst), src, bytes);
    emulator::barrier_complete(bar, bytes);
}

// Stores four 8x8 matrices of b16; lane l names row l % 8 of matrix l / 8.
inline void store_matrices(u32 address, const u32 (&regs)[4], bool transposed, u32 matrices = 4) {
    u64 rows[32];
    u32 present, lane = threadIdx.x & 31;
    emulator::meet_warp(address, rows, present);
    for (u32 m = 0; m < matrices; ++m)
        for (u32 half = 0; half < 2; ++half) {
            u32 r = lane / 4, c = 2 * (lane % 4) + half;
            if (transposed) std::swap(r, c);
            ((u16*)emulator::at((u32)rows[8 * m + r]))[c] = (u16)(regs[m] >> (16 * half));
        }
}
inline void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) { store_matrices(address, {a, b, c, d}, true); }
inline void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) { store_matrices(address, {a, b, c, d}, false); }
inline void stmatrix_x2_trans(u32 address, u32 a, u32 b) { store_matrices(address, {a, b, 0, 0}, true, 2); }
inline uint4 load_shared_16(u32 address) { return *(uint4*)emulator::at(address); }
inline float2 load_shared_float2(u32 address) { return *(float2*)emulator::at(address); }
inline float load_shared_float(u32 address) { return *(float*)emulator::at(address); }
inline float4 load_shared_float4(u32 address) { return *(float4*)emulator::at(address); }
inline void store_shared_float(u32 address, float v) { *(float*)emulator::at(address) = v; }
inline void store_global_16(void* to, uint4 v) {
    if ((u64)to % 16) fprintf(stderr, "emulator: misaligned store\n"), abort();
    *(uint4*)to = v;
}
inline void store_shared_float4(u32 address, float a, float b, float c, float d) { *(float4*)emulator::at(address) = {a, b, c, d}; }
inline void store_shared_16(u32 address, u32 a, u32 b, u32 c, u32 d) { *(uint4*)emulator::at(address) = {a, b, c, d}; }

inline u64 k_major(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
inline u64 n_major(u32 address, u32 next) {
    return (u64)((address & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | (64ull << 32) | (1ull << 62);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N> inline void wgmma_wait() {}
template <int N> inline void pin(float (&)[N]) {}
