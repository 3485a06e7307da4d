// MLA prefill, expanded form: ordinary causal attention with 192-wide keys (128 of the head's own, 64 of the rope key that all
// heads share) and 128-wide values, BF16 with float32 softmax, over new tokens and a cached prefix alike.
//
// A CTA takes 128 queries of one head; two warpgroups hold 64 rows each, one thread of a third feeds a ring of two K and two V
// tiles of 128 tokens. K is never put together in memory: its first 128 columns and V come from the up-projection's output
// [token][head][128 key | 128 value], its last 64 from the rope keys. A warpgroup starts the next tile's scores, then the
// current tile's output, and exponentiates the scores while the output is still being added. The two take turns at starting
// products, so that one's softmax meets the other's products instead of its softmax.
#include "wgmma.cuh"

constexpr u32 Q_ROWS = 128, KV_ROWS = 128, BOX = 128 * 128;  // a TMA box: 128 rows x 64 BF16
static_assert(2 * 240 + 24 <= 3 * (65536 / 384 / 8 * 8), "setmaxnreg would wait for registers for ever");
constexpr u32 Q_BYTES = 3 * BOX, K_BYTES = 3 * BOX, V_BYTES = 2 * BOX;

struct PrefillArgs {
    const int* query_start;    // [sequences + 1] rows of q and out
    const int* context_start;  // [sequences + 1] rows of kv and rope
    u16* out;                  // [rows][heads][128]
    float* lse;                // [rows][heads], natural logarithm, or null
    u32 heads;
    float scale;               // softmax scale times log2(e)
};

extern "C" __global__ void __launch_bounds__(384, 1)
    mla_prefill(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
                const __grid_constant__ TensorMap rope_map, const PrefillArgs args) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 q = shared_address(shared), k = q + Q_BYTES, v = k + 2 * K_BYTES;
    u32 q_full = v + 2 * V_BYTES, k_full = q_full + 8, v_full = k_full + 16, k_empty = v_full + 16, v_empty = k_empty + 16;
    // The first token whose value is not finite and has been taken away, for those who see it.
    int& broken = *(int*)(shared + (v_empty + 16 - q));
    if (threadIdx.x == 0) {
        broken = 0x7fffffff;
        mbar_init(q_full, 1);
        for (u32 i = 0; i < 2; ++i) {
            mbar_init(k_full + 8 * i, 1);
            mbar_init(v_full + 8 * i, 1);
            mbar_init(k_empty + 8 * i, 8);
            mbar_init(v_empty + 8 * i, 8);
        }
        mbar_init_done();
        prefetch_map(&q_map);
        prefetch_map(&kv_map);
        prefetch_map(&rope_map);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    __syncthreads();

    u32 seq = blockIdx.z;
    int first_query = args.query_start[seq], queries = args.query_start[seq + 1] - first_query;
    int first_token = args.context_start[seq], tokens = args.context_start[seq + 1] - first_token;
    // As many heads side by side as have their keys and values (512 bytes a token) in 32 MB of L2, their longest tiles first.
    u32 at_once = min_u32(max_u32((32u << 20) / 512 / (u32)max(tokens, 1), 1), 16);
    u32 index = blockIdx.y * gridDim.x + blockIdx.x, group = index / (at_once * gridDim.x) * at_once;
    u32 width = min_u32(at_once, gridDim.y - group), within = index - group * gridDim.x, head = group + within % width;
    int tile = (int)(gridDim.x - 1 - within / width) * (int)Q_ROWS;
    if (tile >= queries) return;
    // Query i sees tokens up to tokens - queries + i.
    int seen = tokens - queries + min(queries, tile + (int)Q_ROWS);
    int tiles = (seen + (int)KV_ROWS - 1) / (int)KV_ROWS;
    u32 warp = __shfl_sync(0xffffffff, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wg = warp >> 2;

    if (wg == 2) {
        registers_down<24>();
        if (warp != 8 || !elect_one()) return;  // not threadIdx.x == 256: the compiler would loop over differing registers
        mbar_expect(q_full, Q_BYTES);
        for (u32 i = 0; i < 3; ++i)
            tma_2d(q + i * BOX, &q_map, q_full, head * 192 + i * 64, first_query + tile, EVICT_FIRST);
        for (int n = 0; n < tiles; ++n) {
            u32 s = n & 1, parity = (n >> 1 & 1) ^ 1;
            int row = first_token + (tiles - 1 - n) * (int)KV_ROWS;
            if (n >= 2) mbar_wait(k_empty + 8 * s, parity);
            mbar_expect(k_full + 8 * s, K_BYTES);
            tma_2d(k + s * K_BYTES, &kv_map, k_full + 8 * s, head * 256, row, EVICT_LAST);
            tma_2d(k + s * K_BYTES + BOX, &kv_map, k_full + 8 * s, head * 256 + 64, row, EVICT_LAST);
            tma_2d(k + s * K_BYTES + 2 * BOX, &rope_map, k_full + 8 * s, 0, row, EVICT_LAST);
            if (n >= 2) mbar_wait(v_empty + 8 * s, parity);
            mbar_expect(v_full + 8 * s, V_BYTES);
            tma_2d(v + s * V_BYTES, &kv_map, v_full + 8 * s, head * 256 + 128, row, EVICT_LAST);
            tma_2d(v + s * V_BYTES + BOX, &kv_map, v_full + 8 * s, head * 256 + 192, row, EVICT_LAST);
        }
        return;
    }

    registers_up<240>();
    u32 row = wg * 64 + (warp & 3) * 16 + (lane >> 2);  // of the tile, and row + 8
    float s[64], o[64], max[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, by[2];
    u32 p[8][4];
#pragma unroll
    for (u32 i = 0; i < 64; ++i) o[i] = 0.0f;

    auto start_scores = [&](int n) {
        u32 stage = n & 1;
        mbar_wait(k_full + 8 * stage, n >> 1 & 1);
        pin(s);
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < 12; ++i)
            Bf16<128>::mma(s, k_major(q + (i >> 2) * BOX + wg * 64 * 128) + 2 * (i & 3),
                           k_major(k + stage * K_BYTES + (i >> 2) * BOX) + 2 * (i & 3), i);
        wgmma_commit();
    };
    auto start_output = [&](int n) {
        u32 stage = n & 1;
        mbar_wait(v_full + 8 * stage, n >> 1 & 1);
        pin(o);
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < 8; ++i) Bf16RegN<128>::mma(o, p[i], n_major(v + stage * V_BYTES + i * 2048, BOX), 1);
        wgmma_commit();
    };
    // Masks and exponentiates the scores of tile n; `by` takes earlier sums to the new maximum.
    auto softmax = [&](int n) {
        int base = (tiles - 1 - n) * (int)KV_ROWS, limit = tokens - queries + tile + (int)row;
        if (base + (int)KV_ROWS - 1 > tokens - queries + tile + (int)(wg * 64)) {
#pragma unroll
            for (u32 i = 0; i < 64; ++i) {
                int token = base + (int)(8 * (i >> 2) + 2 * (lane & 3) + (i & 1));
                if (token > limit + (int)(i >> 1 & 1) * 8 || token >= tokens) s[i] = -__int_as_float(0x7f800000);
            }
        }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            float m = max[h];
#pragma unroll
            for (u32 i = 0; i < 16; ++i) m = fmaxf(m, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
            by[h] = exp2_approx((max[h] - m) * args.scale);
            max[h] = m;
            sum[h] *= by[h];
        }
#pragma unroll
        for (u32 i = 0; i < 64; ++i) {
            u32 h = i >> 1 & 1;
            s[i] = exp2_approx(s[i] * args.scale - max[h] * args.scale);
            sum[h] += s[i];
        }
    };
    auto pack = [&]() {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
#pragma unroll
            for (u32 j = 0; j < 4; ++j) p[i][j] = pack_bf16(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    };
    // Values that some query of this warpgroup must not see meet probability 0 there, and 0 * NaN is NaN: what is not finite
    // among them becomes 0. Who does see them learns it from `broken`, which is written first.
    auto hide_unseen = [&](int n) {
        int base = (tiles - 1 - n) * (int)KV_ROWS, from = tokens - queries + tile + (int)(wg * 64) + 1 - base;
        if (from >= (int)KV_ROWS) return;
        mbar_wait(v_full + 8 * (n & 1), n >> 1 & 1);
        u32 first = from > 0 ? (u32)from * 8 : 0, sums[4] = {};
#pragma unroll 1
        for (u32 i = first / 512 * 512; i < KV_ROWS * 8; i += 512) {  // 64 rows at once: there is nothing to hide this behind
            u32 at = v + (n & 1) * V_BYTES + (i + (threadIdx.x & 127)) * 16;
            uint4 values[8];
#pragma unroll
            for (u32 k = 0; k < 8; ++k) values[k] = load_shared_16(at + (k & 1) * BOX + (k >> 1) * 2048);
#pragma unroll
            for (u32 k = 0; k < 8; ++k) add_not_finite_bf16(sums, values[k]);
        }
        if (!named_any(2 + wg, 128, ((sums[0] | sums[1] | sums[2] | sums[3]) & 0x7fff7fffu) != 0)) return;
#pragma unroll 1
        for (u32 i = first + (threadIdx.x & 127); i < KV_ROWS * 8; i += 128) {
#pragma unroll 1
            for (u32 half = 0; half < 2; ++half) {
                u32 at = v + (n & 1) * V_BYTES + half * BOX + i * 16, own[4] = {};
                add_not_finite_bf16(own, load_shared_16(at));
                if (((own[0] | own[1] | own[2] | own[3]) & 0x7fff7fffu) == 0) continue;
                atomicMin(&broken, base + (int)(i >> 3));
                store_shared_16(at, 0, 0, 0, 0);
            }
        }
        fence_async();
        named_sync(2 + wg, 128);
    };
    auto release = [&](u32 bar, int n) {
        if (lane == 0) mbar_arrive(bar + 8 * (n & 1));
    };

    // Barrier 4 + w: warpgroup w may start products.
    auto take_turn = [&]() { named_sync(4 + wg, 256); };
    auto pass_turn = [&]() { named_arrive(4 + (wg ^ 1), 256); };

    mbar_wait(q_full, 0);
    if (wg == 1) pass_turn();
    take_turn();
    start_scores(0);
    pass_turn();
    wgmma_wait<0>();
    pin(s);
    release(k_empty, 0);
    softmax(0);
    pack();
#pragma unroll 1
    for (int n = 0; n < tiles && n < 2; ++n) hide_unseen(n);  // no other tile meets a mask; in the loop it would cost 5 %
    for (int n = 0; n + 1 < tiles; ++n) {
        take_turn();
        start_scores(n + 1);
        start_output(n);
        pass_turn();
        wgmma_wait<1>();
        pin(s);
        release(k_empty, n + 1);
        softmax(n + 1);
        wgmma_wait<0>();
        pin(o);
        release(v_empty, n);
#pragma unroll
        for (u32 i = 0; i < 64; ++i) o[i] *= by[i >> 1 & 1];
        pack();
    }
    take_turn();
    start_output(tiles - 1);
    if (wg == 0) pass_turn();
    wgmma_wait<0>();
    pin(o);

    // Through this warpgroup's own rows of Q, which nobody reads any more, to whole lines of the output.
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 2);
        int query = tile + (int)row + 8 * (int)h;
        if (args.lse && (lane & 3) == 0 && query < queries)
            args.lse[(u64)(first_query + query) * args.heads + head] =
                (max[h] * args.scale + log2f(sum[h])) * 0.69314718f;
        by[h] = sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
        if (tokens - queries + query >= broken) by[h] = __int_as_float(0x7fffffff);
    }
    u32 r = wg * 64 + (warp & 3) * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        u32 column = 2 * i + (lane >> 4);  // of 8 values
        stmatrix_x4(q + (column >> 3) * BOX + r * 128 + ((column & 7) ^ (r & 7)) * 16, pack_bf16(o[8 * i] * by[0], o[8 * i + 1] * by[0]),
                    pack_bf16(o[8 * i + 2] * by[1], o[8 * i + 3] * by[1]), pack_bf16(o[8 * i + 4] * by[0], o[8 * i + 5] * by[0]),
                    pack_bf16(o[8 * i + 6] * by[1], o[8 * i + 7] * by[1]));
    }
    named_sync(2 + wg, 128);
    for (u32 i = threadIdx.x & 127; i < 64 * 16; i += 128) {
        u32 at = wg * 64 + (i >> 4), column = i & 15;
        int query = tile + (int)at;
        if (query < queries)
            *(uint4*)(args.out + ((u64)(first_query + query) * args.heads + head) * 128 + column * 8) =
                load_shared_16(q + (column >> 3) * BOX + at * 128 + ((column & 7) ^ (at & 7)) * 16);
    }
}
