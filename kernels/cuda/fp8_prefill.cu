// FP8 GEMM with block scales for many tokens: the same product as fp8_gemm.cu, dense and grouped.
//
// Here tokens are the 64-row operand of wgmma and weights its N side: a thread then needs two activation scales and one weight
// scale for a whole block of products, where the other kernel reads two from shared memory for every four products. What bounds
// large products is the way into the tensor cores: L2 gives a multiprocessor 34 bytes a cycle, shared memory takes and gives 128.
// A tile of 128 UNITS tokens x N weights therefore is as large as the registers allow (UNITS = 2, N = 128: 128 sums and 64
// fresh products a thread), and two CTAs of a cluster share one operand (each fetches half of it and multicasts it):
//
//   bytes a cycle at the tensor cores' full rate     128 x 128    256 x 128    256 x 128 sharing tokens
//   L2 to shared memory                                 64           48             32
//   shared memory, written and read                    160          144            144
//
//   - one thread feeds a ring of STAGES buffers through TMA: tokens, weights and the tokens' scales of a block of 128 of K;
//   - two warpgroups of 64 UNITS tokens each multiply 64 x N over a block into fresh accumulators, then add them, scaled, to
//     the sums in float32. They start their products in turns, so that one always adds while another multiplies.
// The grid is persistent and walks the tiles; the feeder runs ahead through the end of a tile, whose output leaves through TMA
// while the next one is computed.
#include "fp8.cuh"

enum Share : u32 { ALONE, TOKENS, WEIGHTS };

constexpr u32 BOX_BYTES = 16 * 128;  // a warp's 16 tokens x 64 columns on their way out

// Sums of one warpgroup's UNITS x 64 tokens x N weights over all blocks. SLOTS: turns of a block, the longer side's units.
template <u32 MINE, u32 WGS, u32 UNITS, int N, u32 STAGES, u32 SHARE>
DEVICE void multiply(float (&acc)[MINE ? MINE : 1][N / 2], u32 slots, u32 blocks, const float* w_scale, const float* w_scale_next,
                     bool late, u32 ring, u32 stage_bytes, u32 x_offset, u32 w_offset, u32 scales, u32 scale_bytes, u32 full,
                     u32 empty, u32& step, u32 warpgroup, u32 rank) {
    constexpr u32 CHUNKS = N == 128 ? 1 : N / 64;  // of columns with a weight scale each
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (u32 u = 0; u < MINE; ++u)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) acc[u][i] = 0.0f;
    float w_first = __ldg(w_scale), w_second = CHUNKS > 1 ? __ldg(w_scale_next) : 0.0f;
    blocks = __shfl_sync(0xffffffff, blocks, 0);  // uniform, and known to be
    for (u32 i = 0; i < blocks; ++i, ++step) {
        float w[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) w[c] = c == 0 ? w_first : c == 1 && !late ? w_first : w_second;
        u32 next = min_u32(i + 1, blocks - 1), s = step % STAGES, stage = ring + s * stage_bytes;
        w_first = __ldg(w_scale + next);
        if (CHUNKS > 1) w_second = __ldg(w_scale_next + next);
        mbar_wait(full + 8 * s, step / STAGES & 1);
        auto release = [&] {
            __syncwarp();
            if (lane == 0) mbar_arrive(empty + 8 * s);
            if (SHARE != ALONE && lane == 1) mbar_arrive_at(empty + 8 * s, rank ^ 1);  // it writes here too
        };
#pragma unroll
        for (u32 u = 0; u < MINE; ++u) {
            float part[N / 2];
            named_sync(1 + warpgroup, 256);
            start_block<N>(part, stage + x_offset + u * 64 * 128, stage + w_offset);
            named_arrive(1 + (warpgroup + 1) % WGS, 256);
            u32 at = scales + s * scale_bytes + u * 64 * 4;
            float x0 = load_shared_float(at), x1 = load_shared_float(at + 32);
            wgmma_wait<0>();
            pin(part);
            if (u + 1 == MINE) release();
            float x0_w[CHUNKS], x1_w[CHUNKS];
#pragma unroll
            for (u32 c = 0; c < CHUNKS; ++c) x0_w[c] = x0 * w[c], x1_w[c] = x1 * w[c];
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                u32 c = CHUNKS == 1 ? 0 : j / 8;
                acc[u][4 * j] += part[4 * j] * x0_w[c];
                acc[u][4 * j + 1] += part[4 * j + 1] * x0_w[c];
                acc[u][4 * j + 2] += part[4 * j + 2] * x1_w[c];
                acc[u][4 * j + 3] += part[4 * j + 3] * x1_w[c];
            }
        }
        if (MINE == 0) release();
        if (MINE < UNITS && slots > MINE) {
            named_sync(1 + warpgroup, 256);
            named_arrive(1 + (warpgroup + 1) % WGS, 256);
        }
    }
}

// Sends one warp's 16 tokens x N on their way: through its own part of shared memory, in the layout of the 128-byte swizzle. WHOLE:
// there is room for all, the copy engine takes it away while the next tile is computed; else 64 columns at a time, by hand. A
// group's last tokens go by hand too, since the rows behind them are another group's.
template <int N, bool WHOLE>
DEVICE void store_rows(const float (&acc)[N / 2], u32 stage, const TensorMap& out_map, const GemmArgs& args, u32 token, u32 column,
                       u32 tokens) {
    u32 lane = threadIdx.x & 31, row = (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
    for (u32 c = 0; c < N / 64; ++c) {
        u32 box = stage + (WHOLE ? c * BOX_BYTES : 0);
#pragma unroll
        for (u32 p = 0; p < 4; ++p) {
            const float* d = acc + 32 * c + 8 * p;
            stmatrix_x4(box + row * 128 + ((2 * p + (lane >> 4)) ^ (row & 7)) * 16, pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]),
                        pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7]));
        }
        if (WHOLE) fence_async();
        __syncwarp();
        if (WHOLE && tokens >= 16) {
            if (elect_one()) tma_store_2d(&out_map, box, column + 64 * c, token);
            continue;
        }
#pragma unroll
        for (u32 p = 0; p < 4; ++p) {
            u32 r = (lane >> 3) + 4 * p;
            if (r < tokens && column + 64 * c < args.n)
                store_global_16(args.out + (u64)(token + r) * args.ld_out + column + 64 * c + (lane & 7) * 8,
                                load_shared_16(box + r * 128 + ((lane & 7) ^ (r & 7)) * 16));
        }
        __syncwarp();
    }
}

template <u32 WGS, u32 UNITS, int N, u32 SHARE, u32 STAGES, bool WHOLE, bool GROUPED>
DEVICE void fp8_prefill(const TensorMap& w_map, const TensorMap& x_map, const TensorMap& out_map, const GemmArgs& args) {
    constexpr u32 T = 64 * WGS * UNITS, PAIR = SHARE == ALONE ? 1 : 2, W_ROWS = SHARE == WEIGHTS ? N / 2 : N;  // rows of a box
    constexpr u32 X_ROWS = GROUPED ? 64 : SHARE == TOKENS ? T / 2 : T;
    constexpr u32 X_BYTES = T * 128, W_BYTES = N * 128, STAGE_BYTES = X_BYTES + W_BYTES, SCALE_BYTES = T * 4 + 16;
    extern __shared__ __align__(1024) u8 shared[];
    u32 ring = shared_address(shared);
    u32 output = ring + STAGES * STAGE_BYTES;
    u32 scales = output + (WHOLE ? T * N * 2 : 4 * WGS * BOX_BYTES);
    u32 full = scales + STAGES * SCALE_BYTES, empty = full + 8 * STAGES;
    int* counts = (int*)(shared + (empty + 8 * STAGES - ring));

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 4 * WGS * PAIR);
        }
        mbar_init_done();
        prefetch_map(&w_map);
        prefetch_map(&x_map);
        prefetch_map(&out_map);
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (GROUPED) {
        for (u32 g = threadIdx.x; g < args.groups; g += blockDim.x)
            counts[g] = args.starts ? args.starts[g + 1] - args.starts[g] : args.counts[g];
    } else if (threadIdx.x == 0) {
        counts[0] = (int)args.m;
    }
    __syncthreads();
    if (PAIR == 2) cluster_meet();  // the other's barriers exist

    u32 rank = PAIR == 1 ? 0 : cluster_rank(), worker = blockIdx.x / PAIR, workers = gridDim.x / PAIR, blocks = args.k / 128;
    u32 warpgroup = __shfl_sync(0xffffffff, threadIdx.x >> 7, 0), lane = threadIdx.x & 31;
    Walk<SHARE == WEIGHTS ? 2 * T : T, SHARE == WEIGHTS ? 128 : 64, SHARE == TOKENS ? 2 * N : N> walk;
    Tile tile;
    auto find = [&](u32 index) {
        if (!walk.find(index, args, counts, tile)) return false;
        if (SHARE == TOKENS) tile.row += rank * N;
        if (SHARE == WEIGHTS) {
            u32 half = min_u32(ceil_div(ceil_div(tile.tokens, 2), 64) * 64, tile.tokens);
            tile.first += rank * half;
            tile.tokens = rank == 0 ? half : tile.tokens - half;
        }
        return true;
    };

    if (warpgroup == WGS) {
        registers_down<56>();
        if (__shfl_sync(0xffffffff, threadIdx.x >> 5, 0) == 4 * WGS && elect_one()) {
            u64 w_policy = args.stream_weights ? EVICT_FIRST : EVICT_NORMAL;
            u32 step = 0;
            for (u32 index = worker; find(index); index += workers) {
                u32 boxes = GROUPED ? ceil_div(tile.tokens, 64) : T / X_ROWS;
                u32 x_row = group_start<GROUPED>(args, tile.group) + tile.first, w_row = tile.group * args.n + tile.row;
                // Bulk copies start at multiples of 16 bytes: begin up to 3 rows early.
                u32 scale_row = x_row & ~3u, scale_bytes = ceil_div(x_row + tile.tokens - scale_row, 4) * 16;
                if (tile.tokens == 0) scale_bytes = 0;
                u32 bytes = W_BYTES + boxes * X_ROWS * 128 + scale_bytes;
                for (u32 kb = 0; kb < blocks; ++kb, ++step) {
                    u32 s = step % STAGES, x = ring + s * STAGE_BYTES, w = x + X_BYTES, bar = full + 8 * s;
                    if (step >= STAGES) mbar_wait(empty + 8 * s, (step / STAGES & 1) ^ 1);
                    mbar_expect(bar, bytes);
                    if (SHARE == WEIGHTS)
                        tma_2d_multicast(w + rank * W_ROWS * 128, &w_map, bar, kb * 128, w_row + rank * W_ROWS, 3, w_policy);
                    else
                        tma_2d(w, &w_map, bar, kb * 128, w_row, w_policy);
                    for (u32 b = SHARE == TOKENS ? rank : 0; b < boxes; b += SHARE == TOKENS ? 2 : 1) {
                        u32 to = x + b * X_ROWS * 128, row = x_row + b * X_ROWS;
                        if (SHARE == TOKENS)
                            tma_2d_multicast(to, &x_map, bar, kb * 128, row, 3, EVICT_LAST);
                        else
                            tma_2d(to, &x_map, bar, kb * 128, row, EVICT_LAST);
                    }
                    if (scale_bytes > 0)
                        bulk_load(scales + s * SCALE_BYTES, args.x_scale + (u64)kb * args.ld_scale + scale_row, scale_bytes, bar);
                }
            }
        }
        __syncwarp();
    } else {
        registers_up<WGS == 2 ? 224 : 152>();
        u32 step = 0, warp = threadIdx.x >> 5 & 3, scale_rows = ceil_div(args.n, 128);
        if (warpgroup == WGS - 1) named_arrive(1, 256);  // the first turn is the first's
        for (u32 index = worker; find(index);) {
            index += workers;
            u32 units = __shfl_sync(0xffffffff, ceil_div(tile.tokens, 64), 0), slots = ceil_div(units, WGS);
            u32 unit = min_u32(warpgroup * slots, units), mine = min_u32(slots, units - unit);
            u32 x_row = group_start<GROUPED>(args, tile.group) + tile.first, scale_row = tile.row / 128;
            const float* w_scale = args.w_scale + (u64)tile.group * scale_rows * blocks;
            u32 x_offset = unit * 64 * 128, x_scale = scales + ((x_row & 3) + unit * 64 + 16 * warp + (lane >> 2)) * 4;
            auto run = [&]<u32 MINE>() {
                float acc[MINE ? MINE : 1][N / 2];
                multiply<MINE, WGS, UNITS, N, STAGES, SHARE>(
                    acc, slots, blocks, w_scale + (u64)min_u32(scale_row, scale_rows - 1) * blocks,
                    w_scale + (u64)min_u32(scale_row + 1, scale_rows - 1) * blocks, tile.row & 64, ring, STAGE_BYTES, x_offset,
                    X_BYTES, x_scale, SCALE_BYTES, full, empty, step, warpgroup, rank);
                if (WHOLE) store_wait();  // the tile before this one has left
                __syncwarp();
#pragma unroll
                for (u32 u = 0; u < MINE; ++u) {
                    u32 token = (unit + u) * 64 + 16 * warp;
                    if (token < tile.tokens)
                        store_rows<N, WHOLE>(
                            acc[u], output + (WHOLE ? ((threadIdx.x >> 5) * UNITS + u) * (N / 64) : threadIdx.x >> 5) * BOX_BYTES,
                            out_map, args, x_row + token, tile.row, tile.tokens - token);
                }
                if (WHOLE) store_commit();
            };
            if (UNITS == 2 && mine == 2) run.template operator()<UNITS>();
            else if (mine == 1) run.template operator()<1>();
            else run.template operator()<0>();
        }
        if (WHOLE) store_finish();
    }
    if (PAIR == 2) cluster_meet();  // nobody leaves while the other may still write here
}

#define FP8_PREFILL(WGS, UNITS, N, SHARE, STAGES, WHOLE, GROUPED, NAME)                                                \
    extern "C" __global__ void __launch_bounds__(WGS * 128 + 128, 1)                                                   \
        NAME(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,                         \
             const __grid_constant__ TensorMap out_map, const GemmArgs args) {                                         \
        fp8_prefill<WGS, UNITS, N, SHARE, STAGES, WHOLE, GROUPED>(w_map, x_map, out_map, args);                        \
    }

// Names: fp8_prefill_t<tokens>_n<weights>, then what a cluster of two shares; the launcher (src/cuda/gemm.rs) reads this list.
FP8_PREFILL(2, 2, 128, ALONE, 4, false, false, fp8_prefill_t256_n128)
FP8_PREFILL(2, 1, 192, WEIGHTS, 4, true, false, fp8_prefill_t128_n192_weights)
FP8_PREFILL(3, 1, 128, TOKENS, 4, true, true, fp8_prefill_grouped_t192_n128_tokens)
