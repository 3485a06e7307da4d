// What both FP8 GEMM kernels (fp8_gemm.cu, fp8_prefill.cu) take.
#pragma once
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

struct Tile {
    u32 group, row, first, tokens;  // weight row inside the group, first token inside the group, valid tokens
};

// First token row of a group.
template <bool GROUPED>
DEVICE u32 group_start(const GemmArgs& args, u32 group) {
    return !GROUPED ? 0 : args.starts ? (u32)args.starts[group] : group * args.group_stride;
}

// Where tile `index` lies. Token tiles of one weight tile are neighbours, in windows of 8, so that weights come from HBM once.
// A group's tokens are shared evenly, in steps of STEP, by as few tiles of at most T as they need; which of them comes first rotates
// from weight tile to weight tile, so that every CTA gets large and small ones.
template <u32 T, u32 STEP, u32 ROWS>
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
                u32 per = token_tiles < 8 ? ceil_div(ceil_div(count, token_tiles), STEP) * STEP : T;
                tile.group = group;
                tile.row = local / width * ROWS;
                tile.first = (8 * window + (local + local / width) % width) * per;
                tile.tokens = min_u32(per, count - tile.first);
                return true;
            }
            base += tiles;
        }
        return false;
    }
};

// Starts the product of 64 rows at `a` with N at `b` over one block of 128 of K, from zero.
template <int N>
DEVICE void start_block(float (&part)[N / 2], u32 a, u32 b) {
    pin(part);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < 4; ++k) Fp8<N>::mma(part, k_major(a) + 2 * k, k_major(b) + 2 * k, k);
    wgmma_commit();
}
