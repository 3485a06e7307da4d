// MLA decode, absorbed form: every query row (a head of one of up to four query tokens) attends to one latent of 576 BF16
// values per cached token; its first 512 are the value too. Softmax in float32, output o_lat [row][512] BF16.
//
// Work is cut into parts by mla_plan (once per step, for all layers): a part is a run of 64-token blocks, of one or several
// sequences. CTA (row tile, part): 64 query rows against that run. Two warpgroups take the even and the odd block of a pair:
//   - each computes the scores of its own block from shared memory (Q 64x576 and one K block per warpgroup, nine 64x64 tiles
//     with a barrier each, so that products start with the first tile);
//   - each owns 256 of the 512 output columns, so each needs both blocks' probabilities: its own from registers, the other's
//     through shared memory, in the rope tile of the K block, which is not part of V and is free once the scores are known;
//   - the even block comes first in the online softmax, the odd one second, for both: the odd warpgroup adds the even block
//     while its own scores are computed and exponentiated, so one's softmax hides behind the other's products, and the even
//     block's buffer is free half a pair before the odd one's: its reload hides too.
// A third warpgroup gives up its registers; its warps refill a half of a K block each, as soon as the half's
// last reader is done.
// Results leave through Q's place in shared memory as whole rows. A sequence cut into several parts leaves normalised partials
// in FP16 (each row's half divided by its largest magnitude: half the traffic, and eight times finer than the output's BF16)
// with log-sum-exps and magnitudes; mla_combine adds them in part order.
// The plan and the lengths are read, and the first block is fetched, while the kernel before this one ends; Q and blocks with tokens
// of this step wait for it. Then comes Q, through the warps of the odd block, which has time.
#include "mla.cuh"
#include "wgmma.cuh"

static_assert(2 * 232 + 40 <= 3 * (65536 / 384 / 8 * 8), "setmaxnreg would wait for registers for ever");
constexpr u32 TILES = 9, TILE = 64 * 64 * 2;

// Starts the scores of one block, s = Q K^T over 576, tile by tile as they arrive.
DEVICE void start_scores(float (&s)[32], u32 q, u32 k, u32 full, u32 parity) {
    pin(s);
    wgmma_fence();
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        mbar_wait(full + 8 * tile, parity);
        u64 a = k_major(q + tile * TILE), b = k_major(k + tile * TILE);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) Bf16<64>::mma(s, a + 2 * j, b + 2 * j, tile | j);
    }
    wgmma_commit();
}

// Probabilities to the 64x64 tile at `tile`, as TMA would have swizzled them.
DEVICE void store_probabilities(u32 tile, const u32 (&p)[4][4]) {
    u32 lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
        stmatrix_x4(tile + row * 128 + ((2 * k + (lane >> 4)) ^ (row & 7)) * 16, p[k][0], p[k][1], p[k][2], p[k][3]);
}

DEVICE void pack_probabilities(u32 (&p)[4][4], const float (&s)[32]) {
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) p[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

DEVICE void rescale(float (&o)[128], const float (&by)[2]) {
    if (!__any_sync(0xffffffff, by[0] != 1.0f || by[1] != 1.0f)) return;
#pragma unroll
    for (u32 i = 0; i < 128; ++i) o[i] *= by[i >> 1 & 1];
}

// The rows of K from `valid` on hold whatever the cache holds there; as V they meet probability 0, and 0 * NaN is NaN.
DEVICE void clear_tail(u32 k, u32 valid) {
    u32 t = threadIdx.x & 127;
    for (u32 i = t; i < (64 - valid) * 64; i += 128)  // 8 tiles x 8 words of 16 bytes a row
        store_shared_16(k + (i & 7) * TILE + (valid + (i >> 6)) * 128 + (i >> 3 & 7) * 16, 0, 0, 0, 0);
    fence_async();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    mla_decode(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map, const MlaArgs args) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 q = shared_address(shared), k0 = q + TILES * TILE, k1 = k0 + TILES * TILE;
    u32 full = k1 + TILES * TILE;  // [2][9]
    u32 empty = full + 18 * 8;     // K0 left, K1 right, K0 right with its rope tile, K1 left with its rope tile
    u32 q_full = empty + 4 * 8, q_empty = q_full + 8;
    float* exchange = (float*)(shared + (q_empty + 8 - q));
    float *max0 = exchange, *max1 = exchange + 64, *sum0 = exchange + 128, *sum1 = exchange + 192;

    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 18; ++i) mbar_init(full + 8 * i, 1);
        for (u32 i = 0; i < 4; ++i) mbar_init(empty + 8 * i, 4);
        mbar_init(q_full, 1);
        mbar_init(q_empty, 8);
        mbar_init_done();
        prefetch_map(&q_map);
        prefetch_map(&kv_map);
    }
    __syncthreads();

    u32 rows = args.queries * args.heads, row_tiles = ceil_div(rows, 64);
    u32 row_tile = blockIdx.x % row_tiles;
    Part part = args.parts[blockIdx.x / row_tiles];
    if (part.first_seq < 0) {
        wait_for_previous_kernel();
        return;
    }
    // Through a shuffle, so that the compiler knows the roles to be uniform in a warp.
    u32 warp = __shfl_sync(0xffffffff, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wg = warp >> 2;

    if (wg == 2) {
        registers_down<40>();
        if (elect_one()) {  // not lane == 0: the compiler would wrap every copy in a loop over differing registers
            // One warp for each half of a K block, so that none waits for another's readers: K0 left, K1 right, K0 right with
            // its rope tile, K1 left with its rope tile. Each is free when one warpgroup has used it as V.
            u32 half = warp - 8, buffer = half & 1, k = buffer ? k1 : k0;
            bool right = half == 1 || half == 2, rope = half >= 2;
            u32 first = right ? 4 : 0, loads = 0, segments = 0;
            auto load_q = [&](int seq, u32 from, u32 to) {
                for (u32 t = from; t < to; ++t)
                    tma_2d(q + t * TILE, &q_map, q_full, t * 64, seq * rows + row_tile * 64, EVICT_NORMAL);
            };
            bool early = buffer == 0 && part.first_block < part.settled;
            if (!early) wait_for_previous_kernel();
            if (half == 1) mbar_expect(q_full, TILES * TILE), load_q(part.first_seq, 0, 5);
            if (half == 3) load_q(part.first_seq, 5, TILES);
            for (int seq = part.first_seq; seq <= part.last_seq; ++seq) {
                int begin = seq == part.first_seq ? part.first_block : 0;
                int end = seq == part.last_seq ? part.end_block : (int)ceil_div((u32)args.lengths[seq], 64);
                if (begin >= end) continue;
                const int* table = args.block_table + (u64)seq * args.max_blocks;
                int id = seq == part.first_seq ? (buffer ? part.ids[1] : part.ids[0]) : begin + (int)buffer < end ? table[begin + buffer] : 0;
                for (int b = begin + (int)buffer; b < end; b += 2, ++loads) {
                    int next = b + 2 < end ? table[b + 2] : 0;
                    if (loads) mbar_wait(empty + 8 * half, (loads & 1) ^ 1);
                    for (u32 t = first; t < first + 4 + rope; ++t) {
                        u32 tile = t < first + 4 ? t : 8, bar = full + 8 * (9 * buffer + tile);
                        mbar_expect(bar, TILE);
                        tma_4d(k + tile * TILE, &kv_map, bar, tile * 64, 0, args.layer, id, EVICT_FIRST);
                    }
                    id = next;
                    if (early && loads == 0) wait_for_previous_kernel();
                    if (half == 0 && b == begin && segments++) {  // behind the block, which may be free long before
                        mbar_wait(q_empty, segments & 1);
                        mbar_expect(q_full, TILES * TILE);
                        load_q(seq, 0, TILES);
                    }
                }
            }
        }
        return;
    }

    registers_up<232>();
    u32 row = (warp & 3) * 16 + (lane >> 2);  // and row + 8
    u32 uses0 = 0, uses1 = 0, segment = 0;
    float s[32], o[128];
    u32 p[4][4];
    for (int seq = part.first_seq; seq <= part.last_seq; ++seq) {
        int length = args.lengths[seq];
        int begin = seq == part.first_seq ? part.first_block : 0;
        int end = seq == part.last_seq ? part.end_block : (int)ceil_div((u32)length, 64);
        if (begin >= end) continue;
        // Query token i sees length - (queries - 1 - i) tokens.
        int visible[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
            visible[h] = length - (int)args.queries + 1 + (int)min_u32((row_tile * 64 + row + 8 * h) / args.heads, args.queries - 1);
        int masked_from = length - (int)args.queries + 1;  // blocks that end beyond this need the mask
        float max[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (u32 i = 0; i < 128; ++i) o[i] = 0.0f;
        int slot = args.pieces[seq], pieces = args.pieces[seq + 1] - slot;
        if (seq == part.first_seq) slot += part.split;
        mbar_wait(q_full, segment & 1);

        // Masks, then the largest score of each row over the quad's lanes, starting from `top`.
        auto largest = [&](int block, float (&top)[2]) {
            if ((block + 1) * 64 > masked_from) {
#pragma unroll
                for (u32 i = 0; i < 32; ++i) {
                    int token = block * 64 + (int)(8 * (i >> 2) + 2 * (lane & 3) + (i & 1));
                    if (token >= visible[i >> 1 & 1]) s[i] = -__int_as_float(0x7f800000);
                }
            }
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                float m = s[2 * h];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) m = fmaxf(m, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
                m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
                m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
                top[h] = fmaxf(top[h], m);
            }
        };
        auto exponentiate = [&](const float (&top)[2]) {
#pragma unroll
            for (u32 i = 0; i < 32; ++i) {
                u32 h = i >> 1 & 1;
                s[i] = exp2_approx(s[i] * args.scale - top[h] * args.scale);
                sum[h] += s[i];
            }
        };
        auto add_own = [&](u32 v) {
            pin(o);
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < 4; ++k) Bf16RegN<256>::mma(o, p[k], n_major(v + k * 2048, TILE), 1);
            wgmma_commit();
        };
        auto add_other = [&](u32 probabilities, u32 v) {
            pin(o);
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                Bf16N<256>::mma(o, k_major(probabilities) + 2 * k, n_major(v + k * 2048, TILE), 1);
            wgmma_commit();
        };
        auto release = [&](u32 bar) {
            if (lane == 0) mbar_arrive(bar);
        };

        for (int b = begin; b < end; b += 2) {
            bool odd = b + 1 < end;
            if (wg == 0) {
                start_scores(s, q, k0, full, uses0 & 1);
                wgmma_wait<0>();
                pin(s);
                float top[2] = {max[0], max[1]};
                largest(b, top);
                float by[2] = {exp2_approx((max[0] - top[0]) * args.scale), exp2_approx((max[1] - top[1]) * args.scale)};
                if ((lane & 3) == 0) max0[row] = top[0], max0[row + 8] = top[1];
                sum[0] *= by[0];
                sum[1] *= by[1];
                exponentiate(top);
                pack_probabilities(p, s);
                store_probabilities(k0 + 8 * TILE, p);
                fence_async();
                if (length < (b + 1) * 64) {
                    clear_tail(k0, length - b * 64);
                    named_sync(5, 128);
                }
                named_arrive(1, 256);  // the even block's maximum and probabilities
                rescale(o, by);
                add_own(k0);
                max[0] = top[0];
                max[1] = top[1];
                wgmma_wait<0>();
                pin(o);
                release(empty);
                if (odd) {
                    named_sync(2, 256);  // the odd block's
                    max[0] = max1[row];
                    max[1] = max1[row + 8];
                    by[0] = exp2_approx((top[0] - max[0]) * args.scale);
                    by[1] = exp2_approx((top[1] - max[1]) * args.scale);
                    sum[0] *= by[0];
                    sum[1] *= by[1];
                    rescale(o, by);
                    add_other(k1 + 8 * TILE, k1);
                    wgmma_wait<0>();
                    pin(o);
                    release(empty + 24);
                }
            } else {
                if (odd) {
                    start_scores(s, q, k1, full + 72, uses1 & 1);
                    wgmma_wait<0>();
                    pin(s);
                }
                named_sync(1, 256);
                float top[2] = {max0[row], max0[row + 8]};
                float by[2] = {exp2_approx((max[0] - top[0]) * args.scale), exp2_approx((max[1] - top[1]) * args.scale)};
                sum[0] *= by[0];
                sum[1] *= by[1];
                max[0] = top[0];
                max[1] = top[1];
                rescale(o, by);
                add_other(k0 + 8 * TILE, k0 + 4 * TILE);
                if (odd) {
                    largest(b + 1, top);
                    by[0] = exp2_approx((max[0] - top[0]) * args.scale);
                    by[1] = exp2_approx((max[1] - top[1]) * args.scale);
                    max[0] = top[0];
                    max[1] = top[1];
                    sum[0] *= by[0];
                    sum[1] *= by[1];
                    exponentiate(top);
                    pack_probabilities(p, s);
                    if ((lane & 3) == 0) max1[row] = top[0], max1[row + 8] = top[1];
                    store_probabilities(k1 + 8 * TILE, p);
                    fence_async();
                    if (length < (b + 2) * 64) {
                        clear_tail(k1, length - (b + 1) * 64);
                        named_sync(6, 128);
                    }
                    named_arrive(2, 256);
                    wgmma_wait<0>();
                    pin(o);
                    release(empty + 16);
                    rescale(o, by);
                    add_own(k1 + 4 * TILE);
                    wgmma_wait<0>();
                    pin(o);
                    release(empty + 8);
                } else {
                    wgmma_wait<0>();
                    pin(o);
                    release(empty + 16);
                }
            }
            ++uses0;
            uses1 += odd;
        }
        ++segment;

        // Both warpgroups' sums over their own blocks make the row's sum.
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1);
            sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 2);
            if ((lane & 3) == 0) (wg == 0 ? sum0 : sum1)[row + 8 * h] = sum[h];
        }
        named_sync(4, 256);  // the sums are there, and nobody reads Q any more
        // Not before: mla_combine's blocks would crowd on the first multiprocessors that have room.
        let_next_kernel_start();
        u32 pitch = row_tiles * 64;
        float by[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            // A query token ahead of this piece's first token sees none of it: weight 0, not 0 / 0.
            float total = sum0[row + 8 * h] + sum1[row + 8 * h];
            by[h] = total == 0.0f ? 0.0f : 1.0f / total;
            if (pieces == 1) continue;
            float largest = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 32; ++j)
                largest = max_nan(largest, max_nan(fabsf(o[4 * j + 2 * h]), fabsf(o[4 * j + 2 * h + 1])));
            largest = max_nan(largest, __shfl_xor_sync(0xffffffff, largest, 1));
            largest = max_nan(largest, __shfl_xor_sync(0xffffffff, largest, 2));
            float4* to = args.sums + (u64)slot * pitch + row_tile * 64 + row + 8 * h;
            if ((lane & 3) == 0) {
                if (wg == 0) to->x = max[h] * args.scale + log2f(total);
                (wg == 0 ? to->y : to->z) = largest * by[h];
            }
            by[h] = largest == 0.0f ? 0.0f : 1.0f / largest;
        }
        u32 staged = q + wg * 4 * TILE, r = (warp & 3) * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
        auto stage = [&](auto pack) {
#pragma unroll
            for (u32 i = 0; i < 16; ++i) {
                u32 column = 2 * i + (lane >> 4);  // of 8 values
                stmatrix_x4(staged + (column >> 3) * TILE + r * 128 + ((column & 7) ^ (r & 7)) * 16,
                            pack(o[8 * i] * by[0], o[8 * i + 1] * by[0]), pack(o[8 * i + 2] * by[1], o[8 * i + 3] * by[1]),
                            pack(o[8 * i + 4] * by[0], o[8 * i + 5] * by[0]), pack(o[8 * i + 6] * by[1], o[8 * i + 7] * by[1]));
            }
        };
        if (pieces == 1) stage([](float a, float b) { return pack_bf16(a, b); });
        else stage([](float a, float b) { return pack_f16(a, b); });
        named_sync(7 + wg, 128);
        u16* to = (pieces == 1 ? args.out + ((u64)seq * rows + row_tile * 64) * LATENT
                               : args.partial + ((u64)slot * pitch + row_tile * 64) * LATENT) + wg * 256;
        u32 words = min_u32(rows - row_tile * 64, 64) * 32;
#pragma unroll 8
        for (u32 i = threadIdx.x & 127; i < words; i += 128) {
            u32 at = i >> 5, column = i & 31;
            store_global_16(to + at * LATENT + column * 8,
                            load_shared_16(staged + (column >> 3) * TILE + at * 128 + ((column & 7) ^ (at & 7)) * 16));
        }
        if (seq == part.last_seq) break;
        fence_async();
        __syncwarp();
        if (lane == 0) mbar_arrive(q_empty);
    }
}
