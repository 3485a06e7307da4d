// The next token of each row of logits: the largest, or one drawn from the nucleus (top-p) at a temperature.
//
// Nothing is sorted. Probabilities become integers (2^32 for the largest), whose sums do not depend on the order of adding;
// three passes of a histogram over the logits' ordered bits (11, 11 and 10) find the smallest logit of the nucleus, equal
// logits being all in or all out; one more pass finds the token under the random point. Rows come from L2 after the first pass.
#include "ptx.cuh"

struct SampleArgs {
    const float* logits;       // [rows][ld]
    const float* temperature;  // [rows]; 0: the largest logit, lowest index first
    const float* top_p;        // [rows] in (0, 1]
    const float* uniform;      // [rows] in [0, 1): the random point
    int* out;                  // [rows] tokens; -1 where a logit is NaN
    u32 vocab, ld;
};

constexpr u32 THREADS = 1024, BUCKETS = 2048;

DEVICE u32 ordered(float x) {
    if (x != x) return 0xffffffffu;
    u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum over the block's threads, known to all.
DEVICE u64 block_sum(u64 x, u64* scratch) {
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    u64 sum = 0;
    for (u32 w = 0; w < THREADS / 32; ++w) sum += scratch[w];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const SampleArgs args) {
    __shared__ u64 histogram[BUCKETS], scratch[THREADS / 32];
    __shared__ u32 top_key[THREADS / 32], top_index[THREADS / 32], bucket;
    __shared__ u64 above_bucket;
    __shared__ int drawn;
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 row = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float* logits = args.logits + (u64)row * args.ld;

    // The largest logit, lowest index first.
    u32 key = 0, index = 0;
    for (u32 i = threadIdx.x; i < args.vocab; i += THREADS) {
        u32 k = ordered(logits[i]);
        if (k > key) key = k, index = i;
    }
    u32 best = __reduce_max_sync(0xffffffff, key);
    u32 where = __reduce_min_sync(0xffffffff, key == best ? index : 0xffffffffu);
    if (lane == 0) top_key[warp] = best, top_index[warp] = where;
    __syncthreads();
    best = __reduce_max_sync(0xffffffff, top_key[lane]);
    where = __reduce_min_sync(0xffffffff, top_key[lane] == best ? top_index[lane] : 0xffffffffu);
    float temperature = args.temperature[row];
    if (best == 0xffffffffu || !(temperature > 0.0f)) {
        if (threadIdx.x == 0) args.out[row] = best == 0xffffffffu ? -1 : (int)where;
        return;
    }

    float top = logits[where], factor = 1.4426950408889634f / temperature;
    auto mass = [&](u32 i) { return (u64)(exp2f((logits[i] - top) * factor) * 4294967296.0f); };
    // Find, ten or eleven bits at a time, the key of the smallest logit in the nucleus.
    u32 prefix = 0, known = 0;
    u64 above = 0, wanted = 0;  // mass of keys above the prefix's; mass the nucleus must reach
    for (u32 pass = 0; pass < 3; ++pass) {
        u32 bits = pass < 2 ? 11 : 10, shift = 32 - known - bits;
        __syncthreads();
        for (u32 i = threadIdx.x; i < BUCKETS; i += THREADS) histogram[i] = 0;
        __syncthreads();
        u64 own = 0;
        for (u32 i = threadIdx.x; i < args.vocab; i += THREADS) {
            u32 k = ordered(logits[i]);
            if (known != 0 && k >> (32 - known) != prefix) continue;
            u64 m = mass(i);
            own += m;
            if (m != 0) atomicAdd(&histogram[k >> shift & ((1u << bits) - 1)], m);
        }
        if (pass == 0) {
            u64 total = block_sum(own, scratch);
            wanted = (u64)((double)total * (double)args.top_p[row]);
            if (wanted > total) wanted = total;
            if (wanted == 0) wanted = 1;
        }
        __syncthreads();
        if (warp == 0) {
            // From the top: the bucket in which the sum reaches what is wanted.
            u64 sum = above;
            for (int base = (int)(1u << bits) - 32; base >= 0; base -= 32) {
                u64 here = histogram[base + 31 - (int)lane], run = here;
                for (u32 step = 1; step < 32; step *= 2) {
                    u64 before = __shfl_up_sync(0xffffffff, run, step);
                    if (lane >= step) run += before;
                }
                u32 reached = __ballot_sync(0xffffffff, sum + run >= wanted);
                if (reached != 0) {
                    u32 first = __ffs(reached) - 1;
                    u64 upto = __shfl_sync(0xffffffff, sum + run - here, first);
                    if (lane == 0) bucket = (u32)base + 31 - first, above_bucket = upto;
                    break;
                }
                sum += __shfl_sync(0xffffffff, run, 31);
            }
        }
        __syncthreads();
        prefix = prefix << bits | bucket;
        above = above_bucket;
        known += bits;
    }

    // Draw among the tokens at or above the key, in the order of their indices.
    u32 chunk = ceil_div(args.vocab, THREADS), begin = threadIdx.x * chunk, end = min_u32(begin + chunk, args.vocab);
    u64 own = 0;
    for (u32 i = begin; i < end; ++i)
        if (ordered(logits[i]) >= prefix) own += mass(i);
    u64 run = own;
    for (u32 step = 1; step < 32; step *= 2) {
        u64 before = __shfl_up_sync(0xffffffff, run, step);
        if (lane >= step) run += before;
    }
    u64 total = block_sum(own, scratch);
    if (threadIdx.x == 0) drawn = (int)where;
    u64 start = run - own;
    for (u32 w = 0; w < warp; ++w) start += scratch[w];
    __syncthreads();
    u64 point = (u64)((double)total * (double)args.uniform[row]);
    if (point >= total) point = total - 1;
    if (point >= start && point < start + own) {
        for (u32 i = begin; i < end; ++i) {
            if (ordered(logits[i]) < prefix) continue;
            u64 m = mass(i);
            if (point < start + m) {
                drawn = (int)i;
                break;
            }
            start += m;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) args.out[row] = drawn;
}
