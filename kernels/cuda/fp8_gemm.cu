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
// MC = 2 pairs the CTAs of two neighbouring weight tiles: each fetches half of their common tokens and multicasts it, since with
// many tokens it is the way from L2 (5.5 to 5.9 TB/s seen) that bounds the kernel.
// GROUPED: one weight matrix per group. Contiguous: tokens of group g are rows starts[g] .. starts[g + 1], without padding.
// Masked: counts[g] rows from g * group_stride. The arrays live on the device: a graph replays with new counts.
#include "wgmma.cuh"

struct GemmArgs {
    const float* w_scale;  // [groups][ceil(n / 128)][k / 128]
    const float* x_scale;  // [k / 128][ld_scale], one value per token row
    u16* out;              // [rows][ld_out] BF16
    const int* counts;     // masked: [groups] tokens of each group; else null
    const int* starts;     // contiguous: [groups + 1] first row of each group; else null
    u32 m, n, k, groups, group_stride;
    u32 ld_scale;          // a multiple of 4
    u32 ld_out, stream_weights;
};

constexpr u32 STAGE_TOKENS = 32;           // tokens per step of the epilogue
constexpr u32 STAGE_PITCH = 64 * 2 + 16;   // bytes per token there: 64 rows and a pad against bank conflicts

struct Tile {
    u32 group, row, first, tokens;  // weight row inside the group, first token inside the group, valid tokens
};

// Where tile `index` lies. Token tiles of one weight tile are neighbours, in windows of 8, so that weights come from HBM once.
template <u32 T, u32 ROWS>
struct Walk {
    u32 group = 0, base = 0;
    DEVICE bool find(u32 index, const GemmArgs& args, const int* counts, Tile& tile) {
        u32 row_tiles = ceil_div(args.n, ROWS);
        for (; group < args.groups; ++group) {
            u32 count = (u32)counts[group];
            u32 token_tiles = ceil_div(count, T), tiles = token_tiles * row_tiles;
            if (index < base + tiles) {
                u32 local = index - base, window = local / (8 * row_tiles);
                local -= window * 8 * row_tiles;
                u32 width = min_u32(8, token_tiles - 8 * window);
                // Few tiles share the tokens evenly; many take T each.
                u32 per = token_tiles < 8 ? ceil_div(ceil_div(count, token_tiles), 16) * 16 : T;
                tile.group = group;
                tile.row = local / width * ROWS;
                tile.first = (8 * window + local % width) * per;
                tile.tokens = min_u32(per, count - tile.first);
                return true;
            }
            base += tiles;
        }
        return false;
    }
};

// Adds a block's product to the sums with its scales, then gives the ring's stage back.
template <int N, bool GROUPED, u32 MC>
DEVICE void promote(float (&acc)[N / 2], const float (&part)[N / 2], float weight_scale, u32 scales, u32 empty, u32 rank) {
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
    if (MC == 2 && lane == 1) mbar_arrive_at(empty, rank ^ 1);  // it writes here too
}

template <int N>
DEVICE void start_block(float (&part)[N / 2], u32 a, u32 b) {
    pin(part);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < 4; ++k) Fp8<N>::mma(part, k_major(a) + 2 * k, k_major(b) + 2 * k, k);
    wgmma_commit();
}

// One warpgroup's share of a tile: acc[t] over k-blocks [k0, k1). TWO: two blocks are in flight, so that the additions
// of one hide behind the product of the next; where the registers do not suffice for that, the other warpgroup helps.
template <int N, u32 STAGES, bool GROUPED, bool TWO, u32 MC>
DEVICE void multiply(float (&acc)[N / 2], u32 k0, u32 k1, const float* w_scale, u32 ring, u32 stage_bytes, u32 w_offset,
                     u32 x_offset, u32 scales, u32 scale_bytes, u32 full, u32 empty, u32& step, u32 rank) {
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
        promote<N, GROUPED, MC>(acc, part, weight_scale, scales + s * scale_bytes, empty + 8 * s, rank);
    };
    u32 blocks = __shfl_sync(0xffffffff, k1 - k0, 0);  // uniform, and known to be
    const float* w = w_scale + k0;
    if constexpr (TWO) {
        float even[N / 2], odd[N / 2];
        start(even, step);
        u32 i = 0;
        for (; i + 2 < blocks; i += 2) {
            float first = __ldg(w + i), second = __ldg(w + i + 1);
            start(odd, step + i + 1);
            wgmma_wait<1>();
            finish(even, step + i, first);
            start(even, step + i + 2);
            wgmma_wait<1>();
            finish(odd, step + i + 1, second);
        }
        if (i + 2 == blocks) {
            float first = __ldg(w + i), second = __ldg(w + i + 1);
            start(odd, step + i + 1);
            wgmma_wait<1>();
            finish(even, step + i, first);
            wgmma_wait<0>();
            finish(odd, step + i + 1, second);
        } else {
            float first = __ldg(w + i);
            wgmma_wait<0>();
            finish(even, step + i, first);
        }
    } else {
        float part[N / 2];
        for (u32 i = 0; i < blocks; ++i) {
            float scale = __ldg(w + i);
            start(part, step + i);
            wgmma_wait<0>();
            finish(part, step + i, scale);
        }
    }
    step += blocks;
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
                *(uint4*)(out + (u64)(c * CHUNK + token) * ld_out + row) =
                    load_shared_16(stage + token * STAGE_PITCH + row * 2);
        }
        named_sync(barrier, 128);
    }
}

template <u32 WGS, u32 T, u32 KS, u32 MC, u32 STAGES, bool GROUPED>
DEVICE void fp8_gemm(const TensorMap& w_map, const TensorMap& x_map, const GemmArgs& args) {
    constexpr u32 ROWS = 64 * WGS, BOX = !GROUPED && T % 64 == 0 ? 64 : T % 32 == 0 && T > 64 ? 32 : 16;  // rows of a TMA box
    constexpr u32 W_BYTES = ROWS * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES, SCALE_BYTES = T * 4 + 16;
    constexpr u32 PITCH = ROWS + 4;  // floats per token of a partial sum
    static_assert(KS == 1 || MC == 1, "a cluster shares K or tokens");
    static_assert(KS == 1 || T * PITCH * 4 <= STAGES * STAGE_BYTES, "partial sums reuse the ring");
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    u32 scales = ring + STAGES * STAGE_BYTES;
    u32 epilogue = scales + STAGES * SCALE_BYTES;
    u32 full = epilogue + (KS == 1 ? WGS * STAGE_TOKENS * STAGE_PITCH : 0);
    u32 empty = full + 8 * STAGES;
    int* counts = (int*)(shared + (empty + 8 * STAGES - ring));

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 4 * WGS * MC);
        }
        mbar_init_done();
        prefetch_map(&w_map);
        prefetch_map(&x_map);
    }
    let_next_kernel_start();
    if (GROUPED) {
        wait_for_previous_kernel();
        for (u32 g = threadIdx.x; g < args.groups; g += blockDim.x)
            counts[g] = args.starts ? args.starts[g + 1] - args.starts[g] : args.counts[g];
    } else if (threadIdx.x == 0) {
        counts[0] = (int)args.m;
    }
    __syncthreads();
    if (MC == 2) cluster_sync();  // the other's barriers exist

    u32 rank = KS * MC == 1 ? 0 : cluster_rank();
    u32 k_blocks = args.k / 128, k0 = KS == 1 ? 0 : k_blocks * rank / KS, k1 = KS == 1 ? k_blocks : k_blocks * (rank + 1) / KS;
    u32 worker = blockIdx.x / (KS * MC), workers = gridDim.x / (KS * MC);
    u32 warpgroup = __shfl_sync(0xffffffff, threadIdx.x >> 7, 0), lane = threadIdx.x & 31;
    Walk<T, ROWS * MC> walk;
    Tile tile;

    if (warpgroup == WGS) {
        if (T > 64 && KS == 1) registers_down<56>();
        if (threadIdx.x == WGS * 128) {
            u64 w_policy = args.stream_weights ? EVICT_FIRST : EVICT_NORMAL;
            u32 step = 0;
            bool waited = GROUPED;
            for (u32 index = worker; walk.find(index, args, counts, tile); index += workers) {
                u32 boxes = ceil_div(tile.tokens, BOX);
                u32 start = !GROUPED ? 0 : args.starts ? (u32)args.starts[tile.group] : tile.group * args.group_stride;
                u32 x_row = start + tile.first, w_row = tile.group * args.n + tile.row + (MC == 2 ? rank * ROWS : 0);
                // Bulk copies start at multiples of 16 bytes: begin up to 3 rows early.
                u32 scale_row = x_row & ~3u, scale_bytes = ceil_div(x_row + tile.tokens - scale_row, 4) * 16;
                u32 bytes = W_BYTES + boxes * BOX * 128 + scale_bytes;
                auto load_weights = [&](u32 kb, u32 s) {
                    mbar_expect(full + 8 * s, bytes);
                    tma_2d(ring + s * STAGE_BYTES, &w_map, full + 8 * s, kb * 128, w_row, w_policy);
                };
                auto load_tokens = [&](u32 kb, u32 s) {
                    for (u32 b = MC == 2 ? rank : 0; b < boxes; b += MC) {
                        u32 to = ring + s * STAGE_BYTES + W_BYTES + b * BOX * 128;
                        if (MC == 2)
                            tma_2d_multicast(to, &x_map, full + 8 * s, kb * 128, x_row + b * BOX, 3, EVICT_LAST);
                        else
                            tma_2d(to, &x_map, full + 8 * s, kb * 128, x_row + b * BOX, EVICT_LAST);
                    }
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
    } else {
        if (T > 64 && KS == 1) registers_up<224>();
        wait_for_previous_kernel();
        u32 step = 0, wg = warpgroup;
        for (u32 index = worker; walk.find(index, args, counts, tile); index += workers) {
            if (MC == 2) tile.row += rank * ROWS;
            u32 scale_rows = ceil_div(args.n, 128), scale_row = min_u32((tile.row + 64 * wg) / 128, scale_rows - 1);
            const float* w_scale = args.w_scale + (u64)(tile.group * scale_rows + scale_row) * k_blocks;
            u32 start = !GROUPED ? 0 : args.starts ? (u32)args.starts[tile.group] : tile.group * args.group_stride;
            auto run = [&]<int N>() {
                float acc[N / 2];
                multiply<N, STAGES, GROUPED, N <= (KS == 1 ? 128 : 64), MC>(acc, k0, k1, w_scale, ring, STAGE_BYTES, wg * 64 * 128, W_BYTES,
                                             scales + (start + tile.first & 3) * 4, SCALE_BYTES, full, empty, step, rank);
                if (KS == 1) {
                    u32 row = tile.row + 64 * wg;
                    store_tile<N>(acc, epilogue + wg * STAGE_TOKENS * STAGE_PITCH, 1 + wg,
                                  args.out + (u64)(start + tile.first) * args.ld_out + row, args.ld_out, tile.tokens,
                                  row < args.n ? args.n - row : 0);
                } else {
                    // The whole ring has been read: it now takes the partial sums, [token][row].
                    named_sync(1, 128 * WGS);
                    u32 at = ring + ((lane & 3) * 2 * PITCH + 64 * wg + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2)) * 4;
#pragma unroll
                    for (int j = 0; j < N / 8; ++j) {
                        store_shared_float(at + 8 * j * PITCH * 4, acc[4 * j]);
                        store_shared_float(at + (8 * j + 1) * PITCH * 4, acc[4 * j + 1]);
                        store_shared_float(at + 8 * j * PITCH * 4 + 32, acc[4 * j + 2]);
                        store_shared_float(at + (8 * j + 1) * PITCH * 4 + 32, acc[4 * j + 3]);
                    }
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
                    else if (T == 128 || tile.tokens <= 128) run.template operator()<128>();
                    else run.template operator()<T>();
                }
            }
        }
    }

    if (MC == 2) cluster_sync();  // nobody leaves while the other may still write here
    if (KS > 1) {
        cluster_sync();
        // One tile per cluster: `tile` was found by every role except idle lanes, so find it again.
        Walk<T, ROWS> again;
        again.find(worker, args, counts, tile);
        u32 quads = tile.tokens * (ROWS / 4);
        for (u32 q = rank * blockDim.x + threadIdx.x; q < quads; q += KS * blockDim.x) {
            u32 token = q / (ROWS / 4), row = q % (ROWS / 4) * 4;
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (u32 r = 0; r < KS; ++r) {
                float4 part = load_peer_float4(peer_address(ring + (token * PITCH + row) * 4, r));
                sum.x += part.x;
                sum.y += part.y;
                sum.z += part.z;
                sum.w += part.w;
            }
            if (tile.row + row < args.n) {
                uint2 packed = {pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w)};
                *(uint2*)(args.out + (u64)(tile.first + token) * args.ld_out + tile.row + row) = packed;
            }
        }
        cluster_sync();
    }
}

#define FP8_GEMM(WGS, T, KS, MC, STAGES, GROUPED, NAME)                                                                \
    extern "C" __global__ void __launch_bounds__(WGS * 128 + 128, 1)                                                   \
        NAME(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const GemmArgs args) {  \
        fp8_gemm<WGS, T, KS, MC, STAGES, GROUPED>(w_map, x_map, args);                                                 \
    }

// Names: fp8_gemm_r<rows>_t<tokens>, then k<CTAs that share K> or x<CTAs that share tokens>; the launcher
// (src/cuda/gemm.rs) reads this list. README.md has each one's time.
// Decode, dense.
FP8_GEMM(1, 64, 1, 1, 12, false, fp8_gemm_r64_t64_k1)
FP8_GEMM(1, 64, 2, 1, 13, false, fp8_gemm_r64_t64_k2)
FP8_GEMM(1, 64, 3, 1, 13, false, fp8_gemm_r64_t64_k3)
FP8_GEMM(2, 64, 1, 1, 8, false, fp8_gemm_r128_t64_k1)
FP8_GEMM(2, 64, 2, 1, 9, false, fp8_gemm_r128_t64_k2)
FP8_GEMM(3, 64, 1, 1, 6, false, fp8_gemm_r192_t64_k1)
FP8_GEMM(2, 128, 2, 1, 6, false, fp8_gemm_r128_t128_k2)
FP8_GEMM(2, 128, 4, 1, 6, false, fp8_gemm_r128_t128_k4)
// Prefill, dense.
FP8_GEMM(2, 128, 1, 1, 6, false, fp8_gemm_r128_t128_k1)
FP8_GEMM(2, 192, 1, 1, 5, false, fp8_gemm_r128_t192_k1)
FP8_GEMM(2, 128, 1, 2, 6, false, fp8_gemm_r128_t128_x2)
// Grouped, masked and contiguous.
FP8_GEMM(2, 16, 1, 1, 11, true, fp8_gemm_grouped_r128_t16)
FP8_GEMM(2, 64, 1, 1, 8, true, fp8_gemm_grouped_r128_t64)
FP8_GEMM(2, 128, 1, 1, 6, true, fp8_gemm_grouped_r128_t128)
FP8_GEMM(2, 160, 1, 1, 5, true, fp8_gemm_grouped_r128_t160)
FP8_GEMM(2, 160, 1, 2, 5, true, fp8_gemm_grouped_r128_t160_x2)
