// Cuts an MLA decode step into parts, once for all layers, and lists the rows that lie in several pieces for mla_combine.
#include "mla.cuh"

// One block of threads. Cuts the blocks of all sequences into at most `parts` runs: where there are fewer sequences than
// parts, every part gets a piece of one sequence, all of the smallest length that suffices; where there are more, every part gets
// whole sequences, if that does not make the longest part much longer; else runs of equal cost over all sequences. A piece costs
// OVERHEAD blocks more than its own, and cutting sequences (partial results, mla_combine) UNCUT blocks of everybody's time.
constexpr u32 OVERHEAD = 4, UNCUT = 6;
constexpr int MOST_QUERIES = 4;  // tokens that a step adds to a sequence

// Cuts, by one thread.
DEVICE void cut(const int* blocks, u32 batch, u32 parts, u32 total, u32 best, Part* out, int* pieces) {
    u32 greedy = ceil_div(total + batch * OVERHEAD, parts) + OVERHEAD;
    bool one = batch <= parts && best <= greedy, uncut = batch > parts && best <= greedy + UNCUT;
    u32 overhead = one ? 0 : OVERHEAD, limit = one || uncut ? best : greedy;
    u32 seq = 0, block = 0, slot = 0, split = 0;
    pieces[0] = 0;
    for (u32 p = 0; p < parts; ++p) {
        while (seq < batch && blocks[seq] == 0) pieces[++seq] = (int)slot;
        if (seq == batch) {
            out[p].first_seq = -1;
            continue;
        }
        Part part = {(int)seq, (int)block, (int)seq, (int)block, (int)split};
        u32 budget = limit;
        bool last = p + 1 == parts;
        while (seq < batch) {
            u32 left = (u32)blocks[seq] - block, cost = left + overhead;
            if (cost <= budget || last) {
                part.last_seq = (int)seq;
                part.end_block = blocks[seq];
                slot += 1;
                budget = cost <= budget ? budget - cost : 0;
                block = split = 0;
                pieces[++seq] = (int)slot;
                while (seq < batch && blocks[seq] == 0) pieces[++seq] = (int)slot;
                if (seq == batch || !last && (one || !uncut && budget <= 2 * OVERHEAD)) break;
            } else {
                if (uncut) break;
                part.last_seq = (int)seq;
                block += budget - overhead;
                part.end_block = (int)block;
                slot += 1;
                split += 1;
                break;
            }
        }
        out[p] = part;
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    mla_plan(const int* lengths, const int* block_table, u32 max_blocks, u32 batch, u32 parts, u32 rows, Part* out, int* pieces,
             int* combine) {
    extern __shared__ int blocks[];
    __shared__ u32 total, best, units;
    wait_for_previous_kernel();
    if (threadIdx.x == 0) total = units = 0, best = ~0u;
    __syncthreads();
    for (u32 i = threadIdx.x; i < batch; i += blockDim.x) {
        blocks[i] = (int)ceil_div((u32)lengths[i], 64);
        atomicAdd(&total, (u32)blocks[i]);
    }
    __syncthreads();
    if (batch <= parts) {
        u32 length = max_u32(ceil_div(total, parts), 1) + threadIdx.x, used = 0;
        for (u32 i = 0; i < batch; ++i) used += ceil_div((u32)blocks[i], length);
        if (used <= parts) atomicMin(&best, length);
    } else {
        u32 limit = ceil_div(total + batch * OVERHEAD, parts) + threadIdx.x, used = 1, sum = 0;
        for (u32 i = 0; i < batch; ++i) {
            u32 cost = blocks[i] == 0 ? 0 : (u32)blocks[i] + OVERHEAD;
            if (cost > limit) used = parts + 1;
            if (sum + cost > limit) used += 1, sum = 0;
            sum += cost;
        }
        if (used <= parts) atomicMin(&best, limit);
    }
    __syncthreads();
    if (threadIdx.x == 0) cut(blocks, batch, parts, total, best, out, pieces);
    __syncthreads();
    for (u32 p = threadIdx.x; p < parts; p += blockDim.x) {
        int seq = out[p].first_seq, block = out[p].first_block;
        for (u32 i = 0; seq >= 0 && i < 2; ++i)
            out[p].ids[i] = block + i < max_blocks ? block_table[(u64)seq * max_blocks + block + i] : 0;
        if (seq >= 0) out[p].settled = lengths[seq] > MOST_QUERIES ? (lengths[seq] - MOST_QUERIES) / 64 : 0;
    }
    for (u32 seq = threadIdx.x; seq < batch; seq += blockDim.x) {
        u32 count = (u32)(pieces[seq + 1] - pieces[seq]), step = count <= FEW ? GROUPS : 1, end = count <= FEW ? rows : 2 * rows;
        if (count < 2) continue;
        u32 at = atomicAdd(&units, ceil_div(end, step));
        for (u32 row = 0; row < end; row += step)
            ((uint4*)combine)[++at] = uint4{seq, row, (u32)pieces[seq], count};
    }
    __syncthreads();
    if (threadIdx.x == 0) combine[0] = (int)units;
}
