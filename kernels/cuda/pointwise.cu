// The memory-bound steps between the products, one pass each: add + RMSNorm + quantise, SwiGLU + quantise, quantise, rotary
// embedding, latent norm and cache write, embedding, row gather and scatter.
//
// A thread holds eight neighbouring elements (16 bytes of BF16); sixteen threads hold the 128 that share a scale, so amax is
// four shuffles. Scales are written with the rows innermost, [k / 128][ld], as the GEMM's bulk copies read them.
// A NaN or infinity in a row makes the row's norm, and through the scale (amax keeps NaN) its block, NaN: it shows.
#include "ptx.cuh"

struct Eight {
    float v[8];
};

DEVICE Eight unpack_bf16(uint4 raw) {
    return {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y),
            bf16_low(raw.z), bf16_high(raw.z), bf16_low(raw.w), bf16_high(raw.w)};
}
DEVICE Eight load_bf16(const u16* from) { return unpack_bf16(*(const uint4*)from); }
DEVICE void store_bf16(u16* to, const Eight& x) {
    *(uint4*)to = uint4{pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]), pack_bf16(x.v[4], x.v[5]),
                        pack_bf16(x.v[6], x.v[7])};
}
// What a later kernel reads from BF16 memory: rounding before quantising gives the same bits with or without fusing.
DEVICE void round_bf16(Eight& x) {
#pragma unroll
    for (u32 i = 0; i < 8; i += 2) {  // in pairs: single conversions run at a quarter of the rate
        u32 pair = pack_bf16(x.v[i], x.v[i + 1]);
        x.v[i] = bf16_low(pair);
        x.v[i + 1] = bf16_high(pair);
    }
}

// x / divisor to the last bit, without a division's branches: the product with the reciprocal, corrected by its remainder. An
// infinite divisor (given as 0 with inverse 0) gives 0, and NaN for an infinite x.
DEVICE float divide(float x, float divisor, float inverse) {
    float quotient = x * inverse, rest = fmaf(-quotient, divisor, x);
    return rest == 0.0f ? quotient : fmaf(rest, inverse, quotient);  // -0 stays -0
}

// Quantises the 128 elements of this thread's sixteen as DeepSeek-V3's inference/kernel.py does: scale = max(amax, 1e-4) / 448,
// or the next power of two. All 32 lanes call it.
DEVICE void quantise_block(const Eight& x, u8* to, float* scale_to, bool power_of_two, bool valid) {
    float infinity = __int_as_float(0x7f800000), amax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) amax = max_nan(amax, fabsf(x.v[i]));
#pragma unroll
    for (u32 step = 1; step < 16; step *= 2) amax = max_nan(amax, __shfl_xor_sync(0xffffffff, amax, step));
    amax = max_nan(amax, 1e-4f);
    float scale = amax == infinity ? amax : divide(amax, 448.0f, 1.0f / 448.0f);
    if (power_of_two) {
        u32 bits = __float_as_uint(scale);
        scale = __uint_as_float((bits & 0x7f800000u) + ((bits & 0x7fffffu) != 0 ? 0x800000u : 0));
    }
    if (!valid) return;
    float inverse = reciprocal(scale), divisor = scale == infinity ? 0.0f : scale, y[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) y[i] = divide(x.v[i], divisor, inverse);
    *(uint2*)to = uint2{pack_e4m3(y[0], y[1]) | (u32)pack_e4m3(y[2], y[3]) << 16,
                        pack_e4m3(y[4], y[5]) | (u32)pack_e4m3(y[6], y[7]) << 16};
    if ((threadIdx.x & 15) == 0) *scale_to = scale;
}

// The sum over a block of threads, the same order every time.
DEVICE float block_sum(float x, float* scratch) {
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    u32 warps = blockDim.x >> 5;
    if (warps == 1) return x;
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = (threadIdx.x & 31) < warps ? scratch[threadIdx.x & 31] : 0.0f;
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}

struct NormArgs {
    u16* residual;        // [rows][ld] BF16; read, and written when there is a delta
    const u16* delta;     // [rows][cols] BF16 to add first, or null
    const float* weight;  // [cols]
    u16* out;             // [rows][cols] BF16, or null
    u8* quantised;        // [rows][cols] E4M3, or null
    float* scales;        // [cols / 128][ld_scales]
    u32 cols, ld, ld_scales, power_of_two;
    float eps;
};

// One block of threads a row; cols a multiple of 128 up to 8192.
extern "C" __global__ void __launch_bounds__(1024) add_norm(const NormArgs args) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, col = threadIdx.x * 8;
    bool valid = col < args.cols;
    float weight[8], mean = reciprocal((float)args.cols);
    if (valid) {  // does not depend on the kernel before this one
#pragma unroll
        for (u32 i = 0; i < 8; i += 4) *(float4*)(weight + i) = __ldg((const float4*)(args.weight + col + i));
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    Eight x = {};
    if (valid) {
        u16* at = args.residual + (u64)row * args.ld + col;
        // Both loads on their way before either is used: no branch between them, in which the compiler would hide the second. Minus
        // zeros in place of no delta change nothing.
        uint4 raw = *(const uint4*)at, none = {0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u};
        uint4 more = *(const uint4*)(args.delta ? args.delta + (u64)row * args.cols + col : at);
        if (!args.delta) more = none;
        x = unpack_bf16(raw);
        Eight delta = unpack_bf16(more);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x.v[i] += delta.v[i];
        round_bf16(x);
        if (args.delta) store_bf16(at, x);
    }
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) squares += x.v[i] * x.v[i];
    float inverse = reciprocal_root_approx(block_sum(squares, scratch) * mean + args.eps);
    if (valid) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x.v[i] = x.v[i] * inverse * weight[i];
        round_bf16(x);
        if (args.out) store_bf16(args.out + (u64)row * args.cols + col, x);
    }
    if (args.quantised)
        quantise_block(x, args.quantised + (u64)row * args.cols + col, args.scales + (u64)(col / 128) * args.ld_scales + row,
                       args.power_of_two, valid);
}

struct ActArgs {
    const u16* x;       // quantise: [rows][cols]; swiglu: [rows][2 * cols], gate then up
    u16* out;           // [rows][cols] BF16, or null
    u8* quantised;      // [rows][cols] E4M3, or null
    float* scales;      // [cols / 128][ld_scales]
    const int* counts;  // masked groups: rows used of each group of group_rows; null: all rows
    u32 rows, cols, ld_scales, group_rows, power_of_two;
};

// Rows of the grid's y: a row, or for masked groups a row that the group uses.
template <bool SWIGLU>
DEVICE void activate(const ActArgs& args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 col = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    for (u32 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        if (args.counts && row % args.group_rows >= (u32)args.counts[row / args.group_rows]) continue;
        bool valid = col < args.cols;
        Eight x = {};
        if (valid) {
            if (SWIGLU) {
                const u16* at = args.x + (u64)row * 2 * args.cols + col;
                x = load_bf16(at);
                Eight up = load_bf16(at + args.cols);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) x.v[i] = x.v[i] * reciprocal_approx(1.0f + __expf(-x.v[i])) * up.v[i];
                round_bf16(x);
            } else {
                x = load_bf16(args.x + (u64)row * args.cols + col);
            }
            if (args.out) store_bf16(args.out + (u64)row * args.cols + col, x);
        }
        if (args.quantised)
            quantise_block(x, args.quantised + (u64)row * args.cols + col,
                           args.scales + (u64)(col / 128) * args.ld_scales + row, args.power_of_two, valid);
    }
}
extern "C" __global__ void __launch_bounds__(256) swiglu(const ActArgs args) { activate<true>(args); }
extern "C" __global__ void __launch_bounds__(256) quantise(const ActArgs args) { activate<false>(args); }

// Neighbours (2i, 2i + 1) turn by the angle whose cosine and sine stand at 2i and 2i + 1 of the position's row of the table.
DEVICE u32 rotate(u32 pair, float2 turn) {
    float a = bf16_low(pair), b = bf16_high(pair);
    return pack_bf16(a * turn.x - b * turn.y, a * turn.y + b * turn.x);
}

struct RopeArgs {
    const u16* q;         // [rows][heads][from_width]
    u16* to;              // [rows][heads][to_width]; may be q itself
    const float* table;   // [positions][rope]
    const int* positions;  // [rows]
    u32 rows, heads, from_width, from_column, to_width, to_column, rope;
};

// One thread a pair. Rotates in place, or on the way into the absorbed query [latent | rope].
extern "C" __global__ void __launch_bounds__(256) rope(const RopeArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 pairs = args.rope / 2;
    u64 total = (u64)args.rows * args.heads * pairs;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (u64)gridDim.x * blockDim.x) {
        u32 pair = (u32)(i % pairs);
        u64 head = i / pairs;
        float2 turn = *(const float2*)(args.table + (u64)args.positions[head / args.heads] * args.rope + 2 * pair);
        u32 x = *(const u32*)(args.q + head * args.from_width + args.from_column + 2 * pair);
        *(u32*)(args.to + head * args.to_width + args.to_column + 2 * pair) = rotate(x, turn);
    }
}

struct CacheArgs {
    const u16* kv;         // [rows][ld]: latent, then rope, from the fused projection's output
    const float* weight;   // [latent]
    const float* table;    // [positions][rope]
    const int* positions;  // [rows]
    const int* slots;      // [rows] block * 64 + offset, or -1
    u16* cache;            // [blocks][layers][64][latent + rope]
    u32 ld, latent, rope, layers, layer;
    float eps;
};

// One block of threads a row: threads of the latent normalise, those after it rotate; latent and rope multiples of 8.
extern "C" __global__ void __launch_bounds__(256) cache_write(const CacheArgs args) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, col = threadIdx.x * 8, width = args.latent + args.rope;
    float weight[8] = {};
    if (col < args.latent) {  // does not depend on the kernel before this one
#pragma unroll
        for (u32 i = 0; i < 8; i += 4) *(float4*)(weight + i) = __ldg((const float4*)(args.weight + col + i));
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    int slot = args.slots[row];
    if (slot < 0) return;
    Eight x = {};
    if (col < width) x = load_bf16(args.kv + (u64)row * args.ld + col);
    float squares = 0.0f;
    if (col < args.latent) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) squares += x.v[i] * x.v[i];
    }
    float inverse = reciprocal_root_approx(block_sum(squares, scratch) * reciprocal((float)args.latent) + args.eps);
    u16* to = args.cache + (((u64)(slot / 64) * args.layers + args.layer) * 64 + slot % 64) * width + col;
    if (col < args.latent) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x.v[i] = x.v[i] * inverse * weight[i];
        store_bf16(to, x);
    } else if (col < width) {
        const float* table = args.table + (u64)args.positions[row] * args.rope + (col - args.latent);
        uint4 out;
        out.x = rotate(pack_bf16(x.v[0], x.v[1]), *(const float2*)(table));
        out.y = rotate(pack_bf16(x.v[2], x.v[3]), *(const float2*)(table + 2));
        out.z = rotate(pack_bf16(x.v[4], x.v[5]), *(const float2*)(table + 4));
        out.w = rotate(pack_bf16(x.v[6], x.v[7]), *(const float2*)(table + 6));
        *(uint4*)to = out;
    }
}

struct RowArgs {
    const uint4* from;
    uint4* to;
    const int* index;  // [rows]
    u32 words;         // 16-byte words of a row
    u32 limit;         // rows of the indexed side: an index outside it leaves its row alone
};

// to[i] = from[index[i]]: embedding (tokens index the table), rows that need logits.
extern "C" __global__ void __launch_bounds__(256) gather_rows(const RowArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 from = (u32)args.index[blockIdx.x];
    if (from >= args.limit) return;
    for (u32 i = threadIdx.x; i < args.words; i += blockDim.x)
        args.to[(u64)blockIdx.x * args.words + i] = args.from[(u64)from * args.words + i];
}
// to[index[i]] = from[i].
extern "C" __global__ void __launch_bounds__(256) scatter_rows(const RowArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 to = (u32)args.index[blockIdx.x];
    if (to >= args.limit) return;
    for (u32 i = threadIdx.x; i < args.words; i += blockDim.x)
        args.to[(u64)to * args.words + i] = args.from[(u64)blockIdx.x * args.words + i];
}
