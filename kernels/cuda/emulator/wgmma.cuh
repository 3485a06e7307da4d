// wgmma.cuh for the host: products of a warpgroup from the same descriptors, in float32.
#pragma once
#include "ptx.cuh"

namespace emulator {
// One operand's element: `index` along M or N, `k` along K, `size` bytes; the 128-byte swizzle as the hardware applies it.
inline const u8* element(u64 descriptor, u32 index, u32 k, u32 size, bool n_contiguous) {
    u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
    u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4, address;
    if (n_contiguous) address = start + index / 64 * leading + k / 8 * stride + k % 8 * 128 + index % 64 * 2;
    else address = start + index / 8 * stride + index % 8 * 128 + k * size;
    return shared_memory() + (address ^ (address >> 7 & 7) << 4);
}

struct Product {
    float* d;
    const u32* a_registers;  // or null
    u64 a, b;
    u32 add;
};

template <int N, bool FP8, bool B_N>
inline void multiply(void** all, void*) {
    constexpr u32 K = FP8 ? 32 : 16, SIZE = FP8 ? 1 : 2;
    auto load = [](const u8* p) { return FP8 ? from_e4m3(*p) : bf16_to_float(*(const u16*)p); };
    const Product& first = *(Product*)all[0];
    static float a[64][K], b[N][K];
    for (u32 m = 0; m < 64; ++m)
        for (u32 k = 0; k < K; ++k) {
            if (first.a_registers) {
                u32 thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2;
                u32 pair = ((Product*)all[thread])->a_registers[(m % 16 / 8) + 2 * (k / 8)];
                a[m][k] = k % 2 ? bf16_high(pair) : bf16_low(pair);
            } else {
                a[m][k] = load(element(first.a, m, k, SIZE, false));
            }
        }
    for (u32 n = 0; n < N; ++n)
        for (u32 k = 0; k < K; ++k) b[n][k] = load(element(first.b, n, k, SIZE, B_N));
    for (u32 thread = 0; thread < 128; ++thread) {
        const Product& product = *(Product*)all[thread];
        for (u32 i = 0; i < N / 2; ++i) {
            u32 m = thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8, n = 8 * (i >> 2) + 2 * (thread & 3) + (i & 1);
            float sum = product.add ? product.d[i] : 0.0f;
            for (u32 k = 0; k < K; ++k) sum += a[m][k] * b[n][k];
            product.d[i] = sum;
        }
    }
}
}  // namespace emulator

template <int N, bool FP8, bool B_N>
struct FromShared {
    static void mma(float (&d)[N / 2], u64 a, u64 b, u32 add) {
        emulator::Product mine = {d, nullptr, a, b, add};
        emulator::meet_warpgroup(&mine, emulator::multiply<N, FP8, B_N>, nullptr);
    }
};
template <int N> struct Fp8 : FromShared<N, true, false> {};
template <int N> struct Bf16 : FromShared<N, false, false> {};
template <int N> struct Bf16N : FromShared<N, false, true> {};
template <int N>
struct Bf16RegN {
    static void mma(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 add) {
        emulator::Product mine = {d, a, 0, b, add};
        emulator::meet_warpgroup(&mine, emulator::multiply<N, false, true>, nullptr);
    }
};
