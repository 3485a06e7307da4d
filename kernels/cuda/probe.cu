// Not part of the network: what the device program needs to test and time the kernels. Random contents made on the device,
// a digest of an output (are two runs equal bit for bit?), a copy as the ruler of a run, the clock the chip runs at.
#include "ptx.cuh"

DEVICE u32 mix(u64 x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return (u32)(x ^ x >> 33);
}
// About normal with deviation 1: the sum of four uniform numbers.
DEVICE float normal(u64 seed, u64 i) {
    u32 a = mix(seed + 2 * i), b = mix(seed + 2 * i + 1);
    float sum = (float)(a & 0xffff) + (float)(a >> 16) + (float)(b & 0xffff) + (float)(b >> 16);
    return (sum * (1.0f / 65536.0f) - 2.0f) * 1.7320508f;
}

enum Kind : u32 { BF16_NORMAL, FP8_NORMAL, F32_SCALE, F32_NORMAL };

// `len` elements of `kind`, times `scale` (F32_SCALE: between scale / 2 and 3 scale / 2).
extern "C" __global__ void fill(u8* out, u64 len, u32 kind, float scale, u64 seed) {
    seed = (u64)mix(seed) << 32 | mix(~seed);
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (u64)gridDim.x * blockDim.x) {
        if (kind == BF16_NORMAL) ((u16*)out)[i] = to_bf16(normal(seed, i) * scale);
        else if (kind == FP8_NORMAL) out[i] = (u8)pack_e4m3(normal(seed, i) * scale, 0.0f);
        else if (kind == F32_SCALE) ((float*)out)[i] = scale * (0.5f + (mix(seed + i) >> 8) * (1.0f / 16777216.0f));
        else ((float*)out)[i] = normal(seed, i) * scale;
    }
}

// result[0] += a sum over words that depends on every word and its place and not on the order of adding.
extern "C" __global__ void digest(const u32* words, u64 len, u64* result) {
    u64 sum = 0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (u64)gridDim.x * blockDim.x)
        sum += (u64)mix((u64)words[i] << 32 ^ i) * (2 * i + 1);
    atomicAdd(result, sum);
}

// The ruler: reads and writes `len` 16-byte words.
extern "C" __global__ void copy(const uint4* from, uint4* to, u64 len) {
    u64 step = (u64)gridDim.x * blockDim.x, i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < len; i += 4 * step) {
        uint4 a = __ldcs(from + i), b = __ldcs(from + i + step), c = __ldcs(from + i + 2 * step),
              d = __ldcs(from + i + 3 * step);
        __stcs(to + i, a);
        __stcs(to + i + step, b);
        __stcs(to + i + 2 * step, c);
        __stcs(to + i + 3 * step, d);
    }
    for (; i < len; i += step) to[i] = from[i];
}

// result = {cycles, nanoseconds} over about 20 us.
extern "C" __global__ void clock_rate(u64* result) {
    u64 start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now == start);
    start = now;
    i64 first = clock64();
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now < start + 20000);
    result[0] = (u64)(clock64() - first);
    result[1] = now - start;
}
