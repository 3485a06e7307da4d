// The next token of each row of logits: the largest, or one drawn from the nucleus (top-p) at a temperature.
//
// Nothing is sorted, and a row is read three times (twice more where many logits lie close together). Probabilities become
// integers (2^32 for the largest), whose sums do not depend on the order of adding:
//   - the first reading finds the largest logit;
//   - the second sorts the others into 2048 buckets by their distance from it, 64 to a factor of two in probability, which
//     spreads them well over the addresses; the bucket in which the sum from the top reaches what is wanted holds the smallest
//     logit of the nucleus;
//   - the third sums what lies above that bucket, for each warp's segment of the row, and lists what lies in it. The list says
//     where the nucleus ends, equal logits being all in or all out. A list too long is cut by a histogram over its keys first.
// The random point then falls into one segment, which the whole block looks through. Every other reading goes backwards and so
// starts with what is still in L2.
#include "ptx.cuh"

struct SampleArgs {
    const float* logits;       // [rows][ld]
    const float* temperature;  // [rows]; 0: the largest logit, lowest index first
    const float* top_p;        // [rows] in (0, 1]
    const float* uniform;      // [rows] in [0, 1): the random point
    int* out;                  // [rows] tokens; -1 where a logit is NaN
    u32 vocab, ld;
};

constexpr u32 THREADS = 1024, WARPS = THREADS / 32, BUCKETS = 2048, LISTED = 512, AT_ONCE = 4;
constexpr u32 LOWEST = 0x007fffffu;      // the key of minus infinity
constexpr float STEP = BUCKETS / 32.0f;  // buckets for a factor of two

// Keys of numbers are ordered as the numbers are.
DEVICE u32 to_key(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float from_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// A row in words of four logits, whatever its alignment: positions count from the word that holds its first logit.
struct Row {
    const float4* words;
    u32 first, last;  // positions of the row's first logit and behind its last

    DEVICE u32 count() const { return ceil_div(last, 4); }
    // Minus infinity where a position is not the row's.
    DEVICE float at(u32 position) const {
        return position >= first && position < last ? ((const float*)words)[position] : -__int_as_float(0x7f800000);
    }
};

// Calls f(logit, position) for all of the row's words from `begin` to `end`, by the lanes of a warp, a few loads in flight each.
template <class F>
DEVICE void scan(const Row& row, u32 begin, u32 end, bool backwards, F f) {
    u32 rounds = ceil_div(end - begin, 32 * AT_ONCE), words = row.count();
    for (u32 round = 0; round < rounds; ++round) {
        u32 base = begin + (backwards ? rounds - 1 - round : round) * 32 * AT_ONCE, at = base + (threadIdx.x & 31);
        if (base > 0 && base + 32 * AT_ONCE <= min_u32(end, words - 1)) {
            float4 x[AT_ONCE];
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) x[k] = row.words[at + 32 * k];
#pragma unroll
            for (u32 k = 0; k < AT_ONCE; ++k) {
                u32 position = 4 * (at + 32 * k);
                f(x[k].x, position), f(x[k].y, position + 1), f(x[k].z, position + 2), f(x[k].w, position + 3);
            }
        } else {
            for (u32 word = at; word < min_u32(base + 32 * AT_ONCE, end); word += 32) {
#pragma unroll 1
                for (u32 i = 0; i < 4; ++i) f(row.at(4 * word + i), 4 * word + i);
            }
        }
    }
}

// The sum of `x` over the threads before this one; `total` over all of the block.
DEVICE u64 sum_before(u64 x, u64* scratch, u64& total) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    auto inclusive = [&](u64 run) {
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            u64 before = __shfl_up_sync(0xffffffff, run, step);
            if (lane >= step) run += before;
        }
        return run;
    };
    u64 run = inclusive(x);
    __syncthreads();
    if (lane == 31) scratch[warp] = run;
    __syncthreads();
    u64 warps = inclusive(scratch[lane]);
    total = __shfl_sync(0xffffffff, warps, 31);
    u64 before = __shfl_sync(0xffffffff, warps, warp > 0 ? warp - 1 : 0);
    return run - x + (warp > 0 ? before : 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const SampleArgs args) {
    __shared__ u32 low[BUCKETS], high[BUCKETS];  // of the sums of the buckets
    __shared__ u32 listed_key[LISTED], listed_mass[LISTED], listed_warp[LISTED], listed;
    __shared__ u64 scratch[WARPS], above_bucket, segment_start;
    __shared__ u32 top_key[WARPS], top_index[WARPS], bucket, bounds[2], threshold, segment;
    __shared__ int drawn;
    static_assert(WARPS == 32 && BUCKETS == 2 * THREADS, "scans take a warp's sum a lane and two buckets a thread");
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 index = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float* logits = args.logits + (u64)index * args.ld;
    u32 lead = (u32)((u64)logits >> 2 & 3);
    Row row = {(const float4*)(logits - lead), lead, lead + args.vocab};
    u32 width = ceil_div(row.count(), WARPS), begin = min_u32(warp * width, row.count()), end = min_u32(begin + width, row.count());

    // The largest logit, lowest index first.
    float largest = -__int_as_float(0x7f800000);
    u32 where = lead;
    bool broken = false;
    scan(row, begin, end, false, [&](float x, u32 position) {
        if (x > largest) largest = x, where = position;
        broken |= x != x;
    });
    u32 best = broken ? 0xffffffffu : to_key(largest), top = __reduce_max_sync(0xffffffff, best);
    where = __reduce_min_sync(0xffffffff, best == top ? where : 0xffffffffu);
    if (lane == 0) top_key[warp] = top, top_index[warp] = where;
    __syncthreads();
    best = top_key[lane];
    top = __reduce_max_sync(0xffffffff, best);
    where = __reduce_min_sync(0xffffffff, best == top ? top_index[lane] : 0xffffffffu) - lead;
    float temperature = args.temperature[index];
    if (top == 0xffffffffu || !(temperature > 0.0f)) {
        if (threadIdx.x == 0) args.out[index] = top == 0xffffffffu ? -1 : (int)where;
        return;
    }

    // Distance from the largest in buckets; logits as far as BUCKETS have no mass.
    float factor = 1.4426950408889634f * STEP / temperature;
    largest = from_key(top);
    auto distance = [&](float x) { return (largest - x) * factor; };
    auto mass = [&](float distance) {
        return (u32)fminf(exp2_approx(fmaf(distance, -1.0f / STEP, 32.0f)), 4294967040.0f);
    };
    auto clear = [&]() {
        __syncthreads();
        for (u32 i = threadIdx.x; i < BUCKETS; i += THREADS) low[i] = high[i] = 0;
        __syncthreads();
    };
    auto add = [&](u32 at, u32 m) {  // in two words: shared memory adds no wider ones
        u32 old = atomicAdd(&low[at], m);
        if (old + m < old) atomicAdd(&high[at], 1u);
    };
    // The bucket in which the sum from bucket 0 on reaches `wanted`, and the sum above it.
    auto load_bucket = [&](u32 i) { return (u64)high[i] << 32 | low[i]; };
    auto select = [&](u64 before, u64 wanted) {
        u64 even = load_bucket(2 * threadIdx.x), odd = load_bucket(2 * threadIdx.x + 1);
        if (before < wanted && wanted <= before + even) bucket = 2 * threadIdx.x, above_bucket = before;
        before += even;
        if (before < wanted && wanted <= before + odd) bucket = 2 * threadIdx.x + 1, above_bucket = before;
        __syncthreads();
    };
    auto buckets_before = [&](u64& total) {
        __syncthreads();
        return sum_before(load_bucket(2 * threadIdx.x) + load_bucket(2 * threadIdx.x + 1), scratch, total);
    };

    clear();
    scan(row, begin, end, true, [&](float x, u32) {
        float d = distance(x);
        if (d < (float)BUCKETS) add((u32)d, mass(d));
    });
    u64 total;
    u64 before = buckets_before(total);
    if (total == 0) {  // infinite logits, or a temperature next to 0
        if (threadIdx.x == 0) args.out[index] = (int)where;
        return;
    }
    u64 wanted = (u64)((double)total * (double)args.top_p[index]);
    if (wanted > total) wanted = total;
    if (wanted == 0) wanted = 1;
    select(before, wanted);

    // Its keys: from one above the largest key that is as far as the next bucket up to the largest as far as this one.
    if (warp == 0) {
        float far = (float)(bucket + (lane == 0));
        u32 key = LOWEST, last = top;
        while (key < last) {
            u32 middle = key + (last - key + 1) / 2;
            if (distance(from_key(middle)) >= far) key = middle;
            else last = middle - 1;
        }
        if (lane < 2) bounds[lane] = key + (lane == 0);
    }
    __syncthreads();
    u32 lowest = bounds[0], highest = bounds[1], count;  // keys
    u64 inside, candidates, above = above_bucket;  // masses above the keys looked at, and at them, of this thread's logits
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) listed = 0, bounds[0] = highest, bounds[1] = lowest;
        __syncthreads();
        u32 least = highest, most = lowest;
        inside = candidates = 0;
        float low_end = from_key(lowest);
        scan(row, begin, end, false, [&](float x, u32) {
            if (x < low_end) return;
            u32 key = to_key(x), m = mass(distance(x));
            if (key > highest) {
                inside += m;
                return;
            }
            candidates += m;
            least = min_u32(least, key);
            most = max_u32(most, key);
            if (*(volatile u32*)&listed > LISTED) return;  // thousands of adds to one address take long
            u32 at = atomicAdd(&listed, 1u);
            if (at < LISTED) listed_key[at] = key, listed_mass[at] = m, listed_warp[at] = warp;
        });
        least = __reduce_min_sync(0xffffffff, least);
        most = __reduce_max_sync(0xffffffff, most);
        if (lane == 0) atomicMin(&bounds[0], least), atomicMax(&bounds[1], most);
        __syncthreads();
        count = listed, lowest = bounds[0], highest = bounds[1];
        if (count <= LISTED || lowest == highest) break;
        u32 shift = 0;
        while ((highest - lowest) >> shift >= BUCKETS) ++shift;
        clear();
        scan(row, begin, end, true, [&](float x, u32) {
            u32 key = to_key(x);
            if (key >= lowest && key <= highest) add((highest - key) >> shift, mass(distance(x)));
        });
        before = above + buckets_before(total);
        select(before, wanted);
        above = above_bucket;
        highest -= bucket << shift;
        lowest = max_u32(lowest, highest - ((1u << shift) - 1));
    }
    if (lowest == highest) {
        inside += candidates;
    } else {
        if (threadIdx.x == 0) threshold = 0xffffffffu;
        __syncthreads();
        if (threadIdx.x < count) {
            u64 sum = above;
            u32 key = listed_key[threadIdx.x];
            for (u32 i = 0; i < count; ++i)
                if (listed_key[i] > key) sum += listed_mass[i];
            if (sum < wanted) atomicMin(&threshold, key);
        }
        __syncthreads();
        lowest = threshold;
        for (u32 i = lane; i < count; i += 32)
            if (listed_warp[i] == warp && listed_key[i] >= lowest) inside += listed_mass[i];
    }

    // Draw among the tokens at or above the key, in the order of their indices: the segment, then the token.
    u64 start = sum_before(inside, scratch, total);
    u64 point = (u64)((double)total * (double)args.uniform[index]);
    if (point >= total) point = total - 1;
    u64 segment_begin = __shfl_sync(0xffffffff, start, 0), segment_end = __shfl_sync(0xffffffff, start + inside, 31);
    if (lane == 0 && segment_begin <= point && point < segment_end) segment = warp, segment_start = segment_begin;
    __syncthreads();
    start = segment_start;
    begin = min_u32(segment * width, row.count());
    end = min_u32(begin + width, row.count());
    for (u32 base = begin; base < end; base += THREADS) {
        u32 word = base + threadIdx.x;
        u64 masses[4] = {}, own = 0;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float x = word < end ? row.at(4 * word + i) : -__int_as_float(0x7f800000);
            own += masses[i] = x >= from_key(lowest) ? mass(distance(x)) : 0;
        }
        u64 at = start + sum_before(own, scratch, total);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (at <= point && point < at + masses[i]) drawn = (int)(4 * word + i - row.first);
            at += masses[i];
        }
        start += total;
    }
    __syncthreads();
    if (threadIdx.x == 0) args.out[index] = drawn;
}
