// The last step of MLA decode: sequences that were cut into several pieces become whole.
#include "mla.cuh"

// Adds the pieces of every row that has several: of few, 64 threads hold a row's 512 columns; of many, a warp holds half a row's 256
// and takes every sixteenth piece.
constexpr u32 MAX_PIECES = 160, AT_ONCE = 8;  // pieces that a thread loads at once
extern "C" __global__ void __launch_bounds__(64 * GROUPS, 2) mla_combine(const MlaArgs args) {
    constexpr u32 WARPS = 2 * GROUPS;
    static_assert(GROUPS * FEW <= MAX_PIECES);
    __shared__ float4 known[MAX_PIECES];  // log-sum-exp and magnitudes of the pieces (of up to FEW for each row)
    __shared__ float partial_sums[WARPS][32][9];
    __shared__ uint4 first_entry;
    // The plan is older than the kernel before this one: what it says is fetched while that one ends.
    u32 units = (u32)args.rows[0];
    if (threadIdx.x == 0 && blockIdx.x < units) first_entry = ((const uint4*)args.rows)[1 + blockIdx.x];
    __syncthreads();
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 rows = args.queries * args.heads, pitch = ceil_div(rows, 64) * 64;
    u32 group = threadIdx.x >> 6, t = threadIdx.x & 63, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        uint4 entry = unit == blockIdx.x ? first_entry : ((const uint4*)args.rows)[1 + unit];
        u32 seq = entry.x, first = entry.z, count = entry.w;
        bool alone = count <= FEW, valid = !alone || entry.y + group < rows;
        u32 row = alone ? entry.y + (valid ? group : 0) : entry.y >> 1, begin = alone ? 0 : warp, step = alone ? 1 : WARPS;
        u32 column = alone ? t * 8 : (entry.y & 1) * 256 + lane * 8;
        u64 stride = (u64)step * pitch * LATENT;
        const u16* from = args.partial + ((u64)(first + begin) * pitch + row) * LATENT + column;
        u32 own = alone ? t : threadIdx.x;  // the piece whose sums this thread fetches
        float4 sums = own < count ? args.sums[(u64)(first + own) * pitch + row] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        uint4 v[AT_ONCE];
        auto load = [&](u32 piece) {
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k, piece += step, from += stride)
                if (piece < count) v[k] = __ldcs((const uint4*)from);
        };
        load(begin);
        float4* pieces = known + (alone ? group * FEW : 0);
        if (own < count) pieces[own] = sums;
        __syncthreads();
        float top = -1e30f, total = 0.0f;
        for (u32 i = lane; i < count; i += 32) top = fmaxf(top, pieces[i].x);
#pragma unroll
        for (u32 shift = 16; shift > 0; shift /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, shift));
        for (u32 i = lane; i < count; i += 32) total += exp2_approx(pieces[i].x - top);
#pragma unroll
        for (u32 shift = 16; shift > 0; shift /= 2) total += __shfl_xor_sync(0xffffffff, total, shift);
        float sum[8] = {}, inverse = reciprocal(total);
        for (u32 piece = begin; piece < count;) {
            if (piece > begin) load(piece);
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k, piece += step) {
                if (piece >= count) break;
                float w = exp2_approx(pieces[piece].x - top) * (column < 256 ? pieces[piece].y : pieces[piece].z);
                u32 pairs[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float2 both = unpack_f16(pairs[i]);
                    sum[2 * i] += w * both.x;
                    sum[2 * i + 1] += w * both.y;
                }
            }
        }
        u16* to = args.out + ((u64)seq * rows + row) * LATENT;
        if (alone && valid)
            store_global_16(to + column, uint4{pack_bf16(sum[0] * inverse, sum[1] * inverse), pack_bf16(sum[2] * inverse, sum[3] * inverse),
                                              pack_bf16(sum[4] * inverse, sum[5] * inverse), pack_bf16(sum[6] * inverse, sum[7] * inverse)});
        if (!alone) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) partial_sums[warp][lane][i] = sum[i];
            __syncthreads();
            if (threadIdx.x < 256) {
                float all = 0.0f;
#pragma unroll
                for (u32 w = 0; w < WARPS; ++w) all += partial_sums[w][threadIdx.x >> 3][threadIdx.x & 7];
                to[(entry.y & 1) * 256 + threadIdx.x] = to_bf16(all * inverse);
            }
        }
        __syncthreads();
    }
}
