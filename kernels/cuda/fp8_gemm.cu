// FP8 GEMM with block scales: out[t][n] = sum_kb (sum_{k in kb} x[t][k] w[n][k]) * x_scale[kb][t] * w_scale[n/128][kb].
//
// Weights are the 64-row operand of wgmma and tokens its N side, so that a decode step with few tokens wastes nothing and a
// group of 90 tokens costs 96 columns, not 128. A CTA computes ROWS = 64 * WGS weight rows x up to T tokens:
//   - one thread feeds a ring of STAGES buffers through TMA: ROWS x 128 weights, T x 128 activations, T scales per k-block;
//   - each of WGS warpgroups multiplies its 64 rows over one k-block into fresh accumulators, then adds them, scaled, to the
//     sums in float32 (the tensor cores keep about 14 bits; DeepSeek-V3 report 3.3.2). One warpgroup's additions hide behind the
//     others' products.
// KS > 1 cuts K over a cluster of KS CTAs; their partial sums meet through distributed shared memory, always added in rank
// order, so the bits do not depend on timing. KS = 1 runs a persistent grid that walks the tiles.
// DEEP = 2 gives every 64 rows two warpgroups that take alternate blocks of K: with few tokens a lone warpgroup is bound by the
// latency of its chain of waits and products, about 490 cycles a block. The odd blocks' sum is added to the even blocks' at the end.
// GROUPED: one weight matrix per group. Contiguous: tokens of group g are rows starts[g] .. starts[g + 1], without padding.
// Masked: counts[g] rows from g * group_stride. The arrays live on the device: a graph replays with new counts.
#include "fp8.cuh"

constexpr u32 STAGE_TOKENS = 32;           // tokens per step of the epilogue
constexpr u32 STAGE_PITCH = 64 * 2 + 16;   // bytes per token there: 64 rows and a pad against bank conflicts

// Adds a block's product to the sums with its scales, then gives the ring's stage back.
template <int N, bool GROUPED>
DEVICE void promote(float (&acc)[N / 2], const float (&part)[N / 2], float weight_scale, u32 scales, u32 empty) {
    u32 lane = threadIdx.x & 31, scale = scales + (lane & 3) * 8;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        float2 x;
        if (GROUPED) {  // rows start anywhere, so a pair may straddle 8 bytes
            x.x = load_shared_float(scale + 32 * j);
            x.y = load_shared_float(scale + 32 * j + 4);
        } else {
            x = load_shared_float2(scale + 32 * j);
        }
        x.x *= weight_scale;
        x.y *= weight_scale;
        acc[4 * j] += part[4 * j] * x.x;
        acc[4 * j + 1] += part[4 * j + 1] * x.y;
        acc[4 * j + 2] += part[4 * j + 2] * x.x;
        acc[4 * j + 3] += part[4 * j + 3] * x.y;
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(empty);
}

// One warpgroup's share of a tile: acc[t] over every STEP-th of its k-blocks. TWO: two blocks are in flight, so that the additions
// of one hide behind the product of the next; where the registers do not suffice for that, the other warpgroup helps.
template <int N, u32 STAGES, u32 STEP, bool GROUPED, bool TWO>
DEVICE void multiply(float (&acc)[N / 2], u32 blocks, const float* w, u32 ring, u32 stage_bytes, u32 w_offset, u32 x_offset,
                     u32 scales, u32 scale_bytes, u32 full, u32 empty, u32 step, float held) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
    auto start = [&](float (&part)[N / 2], u32 at) {
        u32 s = at % STAGES;
        mbar_wait(full + 8 * s, at / STAGES & 1);
        start_block<N>(part, ring + s * stage_bytes + w_offset, ring + s * stage_bytes + x_offset);
    };
    auto finish = [&](float (&part)[N / 2], u32 at, float weight_scale) {
        u32 s = at % STAGES;
        pin(part);
        promote<N, GROUPED>(acc, part, weight_scale, scales + s * scale_bytes, empty + 8 * s);
    };
    blocks = __shfl_sync(0xffffffff, blocks, 0);  // uniform, and known to be
    if (blocks == 0) return;
    // A lane holds the weight scale of one of 32 blocks; the next 32 are on their way.
    u32 lane = threadIdx.x & 31;
    auto load = [&](u32 i) { return __ldg(w + min_u32(i + lane, blocks - 1) * STEP); };
    float next = load(32);
    auto scale_of = [&](u32 i) {
        if (i > 0 && i % 32 == 0) held = next, next = load(i + 32);
        return __shfl_sync(0xffffffff, held, i % 32);
    };
    if constexpr (TWO) {
        float even[N / 2], odd[N / 2];
        start(even, step);
        u32 i = 0;
        for (; i + 2 < blocks; i += 2) {
            float first = scale_of(i), second = scale_of(i + 1);
            start(odd, step + (i + 1) * STEP);
            wgmma_wait<1>();
            finish(even, step + i * STEP, first);
            start(even, step + (i + 2) * STEP);
            wgmma_wait<1>();
            finish(odd, step + (i + 1) * STEP, second);
        }
        if (i + 2 == blocks) {
            float first = scale_of(i), second = scale_of(i + 1);
            start(odd, step + (i + 1) * STEP);
            wgmma_wait<1>();
            finish(even, step + i * STEP, first);
            wgmma_wait<0>();
            finish(odd, step + (i + 1) * STEP, second);
        } else {
            float first = scale_of(i);
            wgmma_wait<0>();
            finish(even, step + i * STEP, first);
        }
    } else {
        float part[N / 2];
        for (u32 i = 0; i < blocks; ++i) {
            float scale = scale_of(i);
            start(part, step + i * STEP);
            wgmma_wait<0>();
            finish(part, step + i * STEP, scale);
        }
    }
}

// Writes one warpgroup's 64 rows x `tokens` through its own corner of shared memory, 128 bytes of a token at a time.
template <int N>
DEVICE void store_tile(const float (&acc)[N / 2], u32 stage, u32 barrier, u16* out, u32 ld_out, u32 tokens, u32 rows) {
    u32 t = threadIdx.x & 127, lane = t & 31, warp = t >> 5;
    constexpr u32 CHUNK = N % STAGE_TOKENS == 0 ? STAGE_TOKENS : 16;
    u32 write = stage + ((lane >> 4) * 8 + (lane & 7)) * STAGE_PITCH + (16 * warp + (lane >> 3 & 1) * 8) * 2;
#pragma unroll
    for (u32 c = 0; c < N / CHUNK; ++c) {
#pragma unroll
        for (u32 p = 0; p < CHUNK / 16; ++p) {
            const float* d = acc + 4 * (c * CHUNK / 8 + 2 * p);
            stmatrix_x4_trans(write + 16 * p * STAGE_PITCH, pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]),
                              pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7]));
        }
        named_sync(barrier, 128);
        for (u32 token = t >> 3; token < CHUNK; token += 16) {
            u32 row = (t & 7) * 8;
            if (c * CHUNK + token < tokens && row < rows)
                store_global_16(out + (u64)(c * CHUNK + token) * ld_out + row,
                                load_shared_16(stage + token * STAGE_PITCH + row * 2));
        }
        named_sync(barrier, 128);
    }
}

// Sums of a cluster of KS CTAs: CTA r gets the columns (tokens) of groups of 8 from first(r) on; the others send it theirs, thread
// to thread, and it adds all in rank order. Nobody waits for more than its own share.
template <int N, u32 KS>
struct Reduce {
    static constexpr u32 GROUPS = N / 8, MOST = (GROUPS + KS - 1) / KS;  // of 8 columns; of a CTA
    DEVICE static constexpr u32 first(u32 rank) { return GROUPS * rank / KS; }
    template <u32 THREADS>
    DEVICE static constexpr u32 buffer_bytes() { return (KS - 1) * MOST * THREADS * 16; }
    template <u32 THREADS>
    DEVICE static u32 incoming_bytes(u32 rank) { return (KS - 1) * (first(rank + 1) - first(rank)) * THREADS * 16; }

    // Sends and adds; leaves this CTA's columns as BF16 [column][64 rows] at `stage`.
    template <u32 THREADS>
    DEVICE static void run(const float (&acc)[N / 2], u32 rank, u32 buffer, u32 barrier, u32 stage) {
        u32 thread = threadIdx.x, lane = thread & 31;
#pragma unroll
        for (u32 r = 0; r < KS; ++r) {
            if (r == rank) continue;
            u32 to = peer_address(buffer, r) + ((rank < r ? rank : rank - 1) * MOST * THREADS + thread) * 16;
            u32 bar = peer_address(barrier, r);
#pragma unroll
            for (u32 j = first(r); j < first(r + 1); ++j)
                send_float4(to + (j - first(r)) * THREADS * 16, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3], bar);
        }
        mbar_wait(barrier, 0);
        u32 write = stage + (lane & 7) * STAGE_PITCH + (16 * (thread >> 5 & 3) + (lane >> 3 & 1) * 8) * 2;
#pragma unroll
        for (u32 r = 0; r < KS; ++r) {
            if (r != rank) continue;
#pragma unroll
            for (u32 j = first(r); j < first(r + 1); ++j) {
                float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (u32 from = 0; from < KS; ++from) {
                    float4 part = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
                    if (from != r)
                        part = load_shared_float4(
                            buffer + (((from < r ? from : from - 1) * MOST + j - first(r)) * THREADS + thread) * 16);
                    sum.x += part.x;
                    sum.y += part.y;
                    sum.z += part.z;
                    sum.w += part.w;
                }
                stmatrix_x2_trans(write + (j - first(r)) * 8 * STAGE_PITCH, pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
            }
        }
    }
};

template <u32 WGS, u32 DEEP, u32 T, u32 KS, u32 STAGES, bool GROUPED>
DEVICE void fp8_gemm(const TensorMap& w_map, const TensorMap& x_map, const GemmArgs& args) {
    constexpr u32 ROWS = 64 * WGS, BOX = !GROUPED && T % 64 == 0 ? 64 : T % 32 == 0 && T > 64 ? 32 : 16;  // rows of a TMA box
    constexpr u32 W_BYTES = ROWS * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES, SCALE_BYTES = T * 4 + 16;
    constexpr u32 REDUCE_BYTES = KS == 1 ? 0 : Reduce<T, KS>::template buffer_bytes<128 * WGS>();
    constexpr bool AHEAD = !GROUPED && (T <= 64 || KS > 1);  // fetches weights while the kernel before this one ends
    constexpr bool LATE = KS > 1;  // lets the next kernel start when all is fetched: measured better where few CTAs leave room
    constexpr u32 CONSUMERS = WGS * DEEP, EXCHANGE_BYTES = DEEP == 1 ? 0 : WGS * 128 * (T / 2) * 4;
    static_assert(STAGES % DEEP == 0, "a stage has one reader, who sees each of its phases");
    static_assert(KS == 1 || WGS * T * STAGE_PITCH <= STAGES * STAGE_BYTES, "the outputs of a cluster reuse the ring");
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    u32 scales = ring + STAGES * STAGE_BYTES;
    u32 epilogue = scales + STAGES * SCALE_BYTES;
    u32 full = epilogue + (KS == 1 ? WGS * STAGE_TOKENS * STAGE_PITCH : REDUCE_BYTES);
    u32 empty = full + 8 * STAGES, reduced = empty + 8 * STAGES;
    u32 exchange = (reduced + 8 + 15) / 16 * 16;
    int* counts = (int*)(shared + (exchange + EXCHANGE_BYTES - ring));
    u32 rank = KS == 1 ? 0 : cluster_rank();

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 4 * WGS);
        }
        mbar_init(reduced, 1);
        mbar_init_done();
        if (KS > 1) mbar_expect(reduced, Reduce<T, KS>::template incoming_bytes<128 * WGS>(rank));
        prefetch_map(&w_map);
        prefetch_map(&x_map);
    }
    if (!LATE) let_next_kernel_start();
    if (!AHEAD) wait_for_previous_kernel();
    if (GROUPED) {
        for (u32 g = threadIdx.x; g < args.groups; g += blockDim.x)
            counts[g] = args.starts ? args.starts[g + 1] - args.starts[g] : args.counts[g];
    } else if (threadIdx.x == 0) {
        counts[0] = (int)args.m;
    }
    __syncthreads();
    if (KS > 1) cluster_arrive();  // the barriers exist
    u32 k_blocks = args.k / 128, k0 = KS == 1 ? 0 : k_blocks * rank / KS, k1 = KS == 1 ? k_blocks : k_blocks * (rank + 1) / KS;
    u32 worker = blockIdx.x / KS, workers = gridDim.x / KS;
    u32 warpgroup = __shfl_sync(0xffffffff, threadIdx.x >> 7, 0);
    Walk<T, 16, ROWS> walk;
    Tile tile;

    if (warpgroup == CONSUMERS) {
        if (T > 64 && KS == 1) registers_down<40>();
        if (__shfl_sync(0xffffffff, threadIdx.x >> 5, 0) == 4 * CONSUMERS && elect_one()) {
            u64 w_policy = args.stream_weights ? EVICT_FIRST : EVICT_NORMAL;
            u32 step = 0;
            bool waited = !AHEAD;
            for (u32 index = worker; walk.find(index, args, counts, tile); index += workers) {
                u32 boxes = BOX >= T ? 1 : ceil_div(tile.tokens, BOX);
                u32 start = group_start<GROUPED>(args, tile.group);
                u32 x_row = start + tile.first, w_row = tile.group * args.n + tile.row;
                // Bulk copies start at multiples of 16 bytes: begin up to 3 rows early.
                u32 scale_row = x_row & ~3u, scale_bytes = ceil_div(x_row + tile.tokens - scale_row, 4) * 16;
                u32 bytes = W_BYTES + boxes * BOX * 128 + scale_bytes;
                auto load_weights = [&](u32 kb, u32 s) {
                    mbar_expect(full + 8 * s, bytes);
                    tma_2d(ring + s * STAGE_BYTES, &w_map, full + 8 * s, kb * 128, w_row, w_policy);
                };
                auto load_tokens = [&](u32 kb, u32 s) {
                    for (u32 b = 0; b < boxes; ++b)
                        tma_2d(ring + s * STAGE_BYTES + W_BYTES + b * BOX * 128, &x_map, full + 8 * s, kb * 128, x_row + b * BOX,
                               EVICT_LAST);
                    bulk_load(scales + s * SCALE_BYTES, args.x_scale + (u64)kb * args.ld_scale + scale_row, scale_bytes,
                              full + 8 * s);
                };
                u32 kb = k0;
                if (!waited) {
                    // Weights do not depend on the kernel before this one: fill the ring with them while it ends.
                    u32 ahead = min_u32(STAGES, k1 - k0);
                    for (u32 i = 0; i < ahead; ++i) load_weights(k0 + i, i);
                    wait_for_previous_kernel();
                    for (u32 i = 0; i < ahead; ++i) load_tokens(k0 + i, i);
                    waited = true;
                    kb += ahead;
                    step += ahead;
                }
                for (; kb < k1; ++kb, ++step) {
                    u32 s = step % STAGES;
                    if (step >= STAGES) mbar_wait(empty + 8 * s, (step / STAGES & 1) ^ 1);
                    load_weights(kb, s);
                    load_tokens(kb, s);
                }
            }
        }
        __syncwarp();
        if (LATE) let_next_kernel_start();
    } else {
        if (T > 64 && KS == 1) registers_up<232>();
        u32 step = 0, wg = warpgroup % WGS, odd = warpgroup / WGS;
        bool waited = !AHEAD;
        for (u32 index = worker; walk.find(index, args, counts, tile); index += workers) {
            u32 scale_rows = ceil_div(args.n, 128), scale_row = min_u32((tile.row + 64 * wg) / 128, scale_rows - 1);
            const float* w_scale = args.w_scale + (u64)(tile.group * scale_rows + scale_row) * k_blocks;
            w_scale += k0 + odd;
            u32 mine = (k1 - k0 + DEEP - 1 - odd) / DEEP;  // blocks
            float held = mine > 0 ? __ldg(w_scale + min_u32(threadIdx.x & 31, mine - 1) * DEEP) : 0.0f;
            if (!waited) wait_for_previous_kernel();
            waited = true;
            u32 start = group_start<GROUPED>(args, tile.group);
            auto run = [&]<int N>() {
                float acc[N / 2];
                constexpr bool TWO = N <= (KS == 1 ? 128 : 64);
                multiply<N, STAGES, DEEP, GROUPED, TWO>(acc, mine, w_scale, ring, STAGE_BYTES,
                                                        wg * 64 * 128, W_BYTES, scales + (start + tile.first & 3) * 4, SCALE_BYTES,
                                                        full, empty, step + odd, held);
                step += k1 - k0;
                if (DEEP == 2) {
                    u32 at = exchange + (wg * 128 + (threadIdx.x & 127)) * 16;
#pragma unroll
                    for (int j = 0; j < N / 8; ++j) {
                        if (odd)
                            store_shared_float4(at + j * WGS * 128 * 16, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
                    }
                    named_sync(8, 128 * CONSUMERS);
                    if (odd) {
                        named_sync(8, 128 * CONSUMERS);  // read before it is written again
                        return;
                    }
#pragma unroll
                    for (int j = 0; j < N / 8; ++j) {
                        float4 other = load_shared_float4(at + j * WGS * 128 * 16);
                        acc[4 * j] += other.x;
                        acc[4 * j + 1] += other.y;
                        acc[4 * j + 2] += other.z;
                        acc[4 * j + 3] += other.w;
                    }
                    named_sync(8, 128 * CONSUMERS);
                }
                if (KS == 1) {
                    u32 row = tile.row + 64 * wg;
                    store_tile<N>(acc, epilogue + wg * STAGE_TOKENS * STAGE_PITCH, 1 + wg,
                                  args.out + (u64)(start + tile.first) * args.ld_out + row, args.ld_out, tile.tokens,
                                  row < args.n ? args.n - row : 0);
                } else {
                    // The ring has been read by all: it takes the outputs on their way.
                    named_sync(1, 128 * WGS);
                    cluster_wait();
                    u32 stage = ring + wg * T * STAGE_PITCH, t = threadIdx.x & 127, column = (t & 7) * 8;
                    Reduce<N, KS>::template run<128 * WGS>(acc, rank, epilogue, reduced, stage);
                    named_sync(2 + wg, 128);
                    u32 row = tile.row + 64 * wg, from = 8 * Reduce<N, KS>::first(rank), to = 8 * Reduce<N, KS>::first(rank + 1);
                    u16* out = args.out + (u64)tile.first * args.ld_out + row + column;
                    for (u32 token = from + (t >> 3); token < min_u32(to, tile.tokens) && row < args.n; token += 16)
                        store_global_16(out + (u64)token * args.ld_out,
                                        load_shared_16(stage + (token - from) * STAGE_PITCH + column * 2));
                }
            };
            // Tensor-core time and power go with the columns multiplied: take as few as the tile has.
            if constexpr (!GROUPED || T <= 32) {
                run.template operator()<T>();
            } else {
                if (tile.tokens <= 16) run.template operator()<16>();
                else if (tile.tokens <= 32) run.template operator()<32>();
                else if (tile.tokens <= 48) run.template operator()<48>();
                else if (T == 64 || tile.tokens <= 64) run.template operator()<64>();
                else if constexpr (T > 64) {
                    if (tile.tokens <= 80) run.template operator()<80>();
                    else if (tile.tokens <= 96) run.template operator()<96>();
                    else if (tile.tokens <= 112) run.template operator()<112>();
                    else run.template operator()<T>();
                }
            }
        }
    }

    if (KS > 1 && warpgroup >= WGS) cluster_wait();  // every thread that has come must
}

#define FP8_GEMM(WGS, DEEP, T, KS, STAGES, GROUPED, NAME)                                                              \
    extern "C" __global__ void __launch_bounds__(WGS * DEEP * 128 + (T > 64 && KS == 1 ? 128 : 32), 1)                 \
        NAME(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const GemmArgs args) {  \
        fp8_gemm<WGS, DEEP, T, KS, STAGES, GROUPED>(w_map, x_map, args);                                         \
    }

// Names: fp8_gemm_r<rows>_t<tokens>, k<CTAs that share K>, d2 for two warpgroups on alternate blocks; the launcher
// (src/cuda/gemm.rs) reads this list. README.md has each one's time.
// Dense.
FP8_GEMM(1, 2, 64, 1, 12, false, fp8_gemm_r64_t64_k1_d2)
FP8_GEMM(1, 2, 64, 2, 12, false, fp8_gemm_r64_t64_k2_d2)
FP8_GEMM(2, 1, 64, 2, 8, false, fp8_gemm_r128_t64_k2)
FP8_GEMM(3, 1, 64, 1, 6, false, fp8_gemm_r192_t64_k1)
FP8_GEMM(2, 1, 128, 2, 5, false, fp8_gemm_r128_t128_k2)
FP8_GEMM(2, 1, 128, 1, 6, false, fp8_gemm_r128_t128_k1)
// Grouped, masked and contiguous.
FP8_GEMM(2, 1, 16, 1, 11, true, fp8_gemm_grouped_r128_t16)
FP8_GEMM(2, 1, 64, 1, 8, true, fp8_gemm_grouped_r128_t64)
FP8_GEMM(2, 1, 128, 1, 6, true, fp8_gemm_grouped_r128_t128)
