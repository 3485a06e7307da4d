// Where tokens go: the gate's choice of experts, the order of token copies by expert slot, moving quantised rows into that
// order, and the weighted sum back. Every result is the same bits whatever runs beside it: ties go to the lowest index, copies
// keep their order inside a slot, sums run in the gate's order.
#include "ptx.cuh"

struct GateArgs {
    const float* logits;  // [tokens][experts]
    const float* bias;    // [experts]; for the selection only
    int* experts_out;     // [tokens][top_k] best first
    float* weights;       // [tokens][top_k]
    int* counts;          // [experts] += choices
    u32 tokens, experts, groups, top_groups, top_k;
    float scale;
    u32 normalise;
};

constexpr u32 MAX_PER_LANE = 8;  // the tree of maxima below is written for it

// A number that orders as the floats do, with NaN above everything: a broken score is chosen and its weight shows it.
DEVICE u32 ordered(float x) {
    if (x != x) return 0xffffffffu;
    u32 bits = __float_as_uint(x + 0.0f);  // -0 ties with 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One warp a token. Lane l holds experts l * per .. of its group's run, so that a group is a run of lanes.
extern "C" __global__ void __launch_bounds__(128) gate(const GateArgs args) {
    u32 lane = threadIdx.x & 31, token = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    u32 per = args.experts / 32, lanes = 32 / args.groups, first = lane * per;
    float bias[MAX_PER_LANE];
#pragma unroll
    for (u32 i = 0; i < MAX_PER_LANE; ++i) bias[i] = i < per ? __ldg(args.bias + first + i) : 0.0f;
    let_next_kernel_start();  // few and small blocks: they may wait in numbers
    wait_for_previous_kernel();
    if (token >= args.tokens) return;

    float score[MAX_PER_LANE];
    u32 key[MAX_PER_LANE];
    float infinity = __int_as_float(0x7f800000), best = -infinity, second = -infinity;
#pragma unroll
    for (u32 i = 0; i < MAX_PER_LANE; ++i) {
        key[i] = 0;
        if (i < per) {
            score[i] = reciprocal(1.0f + expf(-args.logits[(u64)token * args.experts + first + i]));
            float choice = score[i] + bias[i];
            key[i] = ordered(choice);
            second = max_nan(second, fminf(best, choice));
            best = max_nan(best, choice);
        }
    }
    // A group's score: the sum of its two best choices.
    for (u32 step = 1; step < lanes; step *= 2) {
        float other = __shfl_xor_sync(0xffffffff, best, step), other_second = __shfl_xor_sync(0xffffffff, second, step);
        second = max_nan(fminf(best, other), max_nan(second, other_second));
        best = max_nan(best, other);
    }
    u32 group_key = ordered(best + second);
    bool kept = args.top_groups >= args.groups;
    for (u32 i = 0; !(args.top_groups >= args.groups) && i < args.top_groups; ++i) {
        u32 top = __reduce_max_sync(0xffffffff, kept ? 0 : group_key);
        u32 winner = __ffs(__ballot_sync(0xffffffff, !kept && group_key == top)) - 1;
        if (lane / lanes == winner / lanes) kept = true;
    }
#pragma unroll
    for (u32 i = 0; i < MAX_PER_LANE; ++i)
        if (!kept || i >= per) key[i] = 0;  // below -infinity

    float mine = 0.0f, total = 0.0f;
    int chosen = 0;
    for (u32 k = 0; k < args.top_k; ++k) {
        u32 top = max_u32(max_u32(max_u32(key[0], key[1]), max_u32(key[2], key[3])),
                          max_u32(max_u32(key[4], key[5]), max_u32(key[6], key[7])));
        u32 highest = __reduce_max_sync(0xffffffff, top), at = 0;
        u32 winner = __ffs(__ballot_sync(0xffffffff, top == highest)) - 1;
        float value = 0.0f;
#pragma unroll
        for (u32 i = MAX_PER_LANE; i-- > 0;)
            if (key[i] == highest) at = i, value = score[i];
#pragma unroll
        for (u32 i = 0; i < MAX_PER_LANE; ++i)
            if (lane == winner && i == at) key[i] = 0;
        value = __shfl_sync(0xffffffff, value, winner);
        int expert = __shfl_sync(0xffffffff, (int)(first + at), winner);
        total += value;
        if (lane == k) mine = value, chosen = expert;
    }
    if (lane < args.top_k) {
        args.experts_out[token * args.top_k + lane] = chosen;
        args.weights[token * args.top_k + lane] = args.scale * (args.normalise ? mine / total : mine);
        atomicAdd(args.counts + chosen, 1);
    }
}

struct DispatchArgs {
    const int* experts;          // [tokens][top_k]
    const int* slot_of_expert;   // [experts][1 + replicas]: how many slots, then which
    int* offsets;                // [slots + 1]
    int* copy_of_row;            // [tokens * top_k]
    int* row_of_copy;            // [tokens * top_k]
    u32 copies, top_k, table_width, slots;
};

DEVICE u32 slot_of(const DispatchArgs& args, u32 copy) {
    const int* entry = args.slot_of_expert + (u64)args.experts[copy] * args.table_width;
    return (u32)entry[1 + copy / args.top_k % (u32)entry[0]];
}

// One block of threads a slot: counts the copies of lower slots (its first row), then numbers its own in order.
extern "C" __global__ void __launch_bounds__(256) dispatch(const DispatchArgs args) {
    __shared__ u32 lower_of[8], own_of[8];
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 slot = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 lower = 0, own = 0;
    for (u32 c = threadIdx.x; c < args.copies; c += 256) {
        u32 s = slot_of(args, c);
        lower += s < slot;
        own += s == slot;
    }
    lower = __reduce_add_sync(0xffffffff, lower);
    own = __reduce_add_sync(0xffffffff, own);
    if (lane == 0) lower_of[warp] = lower, own_of[warp] = own;
    __syncthreads();
    u32 row = 0, count = 0;
    for (u32 w = 0; w < 8; ++w) row += lower_of[w], count += own_of[w];
    if (threadIdx.x == 0) {
        args.offsets[slot] = (int)row;
        if (slot + 1 == args.slots) args.offsets[args.slots] = (int)(row + count);
    }
    for (u32 base = 0; base < args.copies; base += 256) {
        u32 c = base + threadIdx.x;
        bool match = c < args.copies && slot_of(args, c) == slot;
        u32 mask = __ballot_sync(0xffffffff, match);
        __syncthreads();
        if (lane == 0) own_of[warp] = __popc(mask);
        __syncthreads();
        u32 at = row + __popc(mask & ((1u << lane) - 1));
        for (u32 w = 0; w < 8; ++w) {
            if (w < warp) at += own_of[w];
            row += own_of[w];
        }
        if (match) {
            args.copy_of_row[at] = (int)c;
            args.row_of_copy[c] = (int)at;
        }
    }
}

struct PermuteArgs {
    const u8* from;          // [tokens][cols] E4M3
    const float* scales;     // [cols / 128][ld_from]
    const int* copy_of_row;  // [rows]
    u8* to;                  // [rows][cols]
    float* scales_to;        // [cols / 128][ld_to]
    u32 cols, ld_from, ld_to, top_k;
};

// Row r of the grouped product's input: token copy_of_row[r] / top_k. One block of threads a row.
extern "C" __global__ void __launch_bounds__(256) permute(const PermuteArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 row = blockIdx.x, token = (u32)args.copy_of_row[row] / args.top_k;
    const uint4* from = (const uint4*)(args.from + (u64)token * args.cols);
    uint4* to = (uint4*)(args.to + (u64)row * args.cols);
    for (u32 i = threadIdx.x; i < args.cols / 16; i += blockDim.x) to[i] = from[i];
    for (u32 i = threadIdx.x; i < args.cols / 128; i += blockDim.x)
        args.scales_to[(u64)i * args.ld_to + row] = args.scales[(u64)i * args.ld_from + token];
}

struct CombineArgs {
    const u16* y;            // [rows][cols] BF16, the experts' outputs
    const float* weights;    // [tokens][top_k]
    const int* row_of_copy;  // [tokens][top_k]
    const u16* shared;       // [tokens][cols] BF16 to add last, or null
    u16* out;                // [tokens][cols] BF16
    u32 cols, top_k;
};

// out[t] = sum over k in order of weights[t][k] * y[row_of_copy[t][k]], + shared[t]. Eight columns a thread.
extern "C" __global__ void __launch_bounds__(256) combine(const CombineArgs args) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 token = blockIdx.y, col = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (col >= args.cols) return;
    float sum[8] = {};
    auto add = [&](const u16* from, float weight) {
        uint4 raw = *(const uint4*)from;
        u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum[2 * i] += weight * bf16_low(pairs[i]);
            sum[2 * i + 1] += weight * bf16_high(pairs[i]);
        }
    };
#pragma unroll 8
    for (u32 k = 0; k < args.top_k; ++k)
        add(args.y + (u64)args.row_of_copy[token * args.top_k + k] * args.cols + col, args.weights[token * args.top_k + k]);
    if (args.shared) add(args.shared + (u64)token * args.cols + col, 1.0f);
    *(uint4*)(args.out + (u64)token * args.cols + col) = uint4{pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                               pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
}
