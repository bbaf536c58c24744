// A row of logits as one block has it, or as the blocks of a cluster share it: its highest, the lowest that top-k or top-p
// keeps, and where a random number falls.
//
// A weight, exp((logit - highest) / temperature), is a 64-bit integer in units of 2^-43. Sums of integers are exact, so
// no answer depends on the order of the threads, and every GPU draws the same tokens. The exponential is float32, which
// moves a boundary of the draw by 1e-8 or so; double is 32 to 64 times as slow on most GPUs. Top-k and top-p find the
// lowest logit that is kept by its bits, 11, 11 and 10 at a time, from histograms of how much has which.
//
// BLOCKS blocks share a row. What is found of the whole row, each finds from the sums of all, so that all find the same.
#pragma once

#include "bulk_copy.cuh"
#include "step_common.cuh"

namespace mamba {
namespace sample {

using Sum = unsigned long long;

constexpr int kMaxVocab = 1 << 20;
constexpr int kUnit = 43;  // kMaxVocab weights of at most 2^kUnit add up to 2^63
constexpr float kOne = static_cast<float>(1ll << kUnit);
constexpr int kBins = 2048, kGroups = kBins / 32;
constexpr int kAhead = 4;  // loads of a thread in flight
constexpr int kNear = 8;   // neighbours whose masses a lane finds, where one of a warp's is drawn
constexpr unsigned kAll = 0xffffffffu;
constexpr Sum kNone = ~Sum{0};  // a row that is not finite

constexpr int threads_of(int blocks) { return blocks == 1 ? 1024 : 512; }

template <int BLOCKS>
struct Shared {
    static constexpr int kThreads = threads_of(BLOCKS), kWarps = kThreads / 32;
    Sum highest[BLOCKS * kWarps], sums[BLOCKS * kWarps];  // of each warp of all blocks
    Sum left, equal;                                      // of select
    Sum uniform;
    int bin, id;
};

// How much has which of kBins digits; and of each block, the sums of 32 neighbouring ones, highest first.
template <int BLOCKS>
struct Histogram {
    unsigned low[kBins], high[kBins];
    Sum groups[BLOCKS][kGroups];

    __device__ __forceinline__ void add(unsigned bin, unsigned count) { atomicAdd(&low[bin], count); }
    // GPUs add 32 bits at once in shared memory, and 64 bits in a loop.
    __device__ __forceinline__ void add(unsigned bin, Sum weight) {
        if (weight == 0) return;
        const unsigned part = static_cast<unsigned>(weight);
        const unsigned carry = atomicAdd(&low[bin], part) + part < part;
        const unsigned rest = static_cast<unsigned>(weight >> 32) + carry;
        if (rest != 0) atomicAdd(&high[bin], rest);
    }
    __device__ __forceinline__ Sum operator[](int bin) const { return Sum{high[bin]} << 32 | low[bin]; }
};

// --- a row of logits -----------------------------------------------------------------------------------------------

// Greater where the logit is; equal for -0.0 and 0.0.
__device__ __forceinline__ unsigned key_of(float logit) {
    const unsigned bits = __float_as_uint(logit + 0.0f);
    return bits ^ (bits >> 31 != 0 ? kAll : 0x80000000u);
}

__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : kAll));
}

// The ids of one warp of `count` that share a row, in loads of 16 bytes: where the row is not aligned to them the first
// begins before it.
struct Row {
    const float* logits;
    int begin, end;

    __device__ Row(const float* given, int vocab, int warp, int count) : logits(given) {
        const int before = static_cast<int>(reinterpret_cast<uintptr_t>(given) / sizeof(float) % 4);
        const int length = (vocab + before - 1) / (128 * count) * 128 + 128;
        begin = warp * length - before;
        end = min(begin + length, vocab);
    }

    __device__ __forceinline__ bool has(int id) const { return id >= 0 && id < end; }

    // Four, 0 for those that are not the warp's.
    __device__ __forceinline__ float4 load(int id) const {
        if (id >= 0 && id + 4 <= end) return __ldg(reinterpret_cast<const float4*>(logits + id));
        const auto one = [&](int j) { return has(id + j) ? __ldg(logits + id + j) : 0.0f; };
        return make_float4(one(0), one(1), one(2), one(3));
    }

    // Calls use(logit, id), for a thread in ascending order of the ids.
    template <typename Use>
    __device__ __forceinline__ void each(Use&& use) const {
        int id = begin + static_cast<int>(threadIdx.x % 32) * 4;
        for (; id >= 0 && id + 128 * (kAhead - 1) + 4 <= end; id += 128 * kAhead) {  // has() all of them
            float4 four[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; i++) four[i] = __ldg(reinterpret_cast<const float4*>(logits + id + 128 * i));
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int at = id + 128 * i;
                use(four[i].x, at), use(four[i].y, at + 1), use(four[i].z, at + 2), use(four[i].w, at + 3);
            }
        }
        for (; id < end; id += 128) {
            const float4 four = load(id);
            if (has(id)) use(four.x, id);
            if (has(id + 1)) use(four.y, id + 1);
            if (has(id + 2)) use(four.z, id + 2);
            if (has(id + 3)) use(four.w, id + 3);
        }
    }
};

struct Weights {
    float highest, slope, rest;  // slope + rest: log2(e) / temperature

    __device__ Weights(float highest_logit, float temperature) : highest(highest_logit) {
        const float divisor = fmaxf(temperature, 1e-38f);  // so that slope is finite
        slope = kLog2E / divisor;
        rest = (fmaf(-slope, divisor, kLog2E) + 1.925963e-8f) / divisor;  // kLog2E is so much too low
    }

    __device__ __forceinline__ Sum operator()(float logit) const { return of(logit - highest, slope, rest); }

    // Called, for it would be there some sixty times: less code is read (samples/results/step.txt, 136).
    static __device__ __noinline__ Sum of(float below, float slope, float rest) {
        const float power = __fmul_rn(below, slope);  // as it is rounded: what is lost is added next
        if (!(power > -kUnit - 1.0f)) return 0;
        const float whole = rintf(power);
        const float f = (power - whole) + fmaf(below, rest, fmaf(below, slope, -power));
        float p = 1.5461912e-4f;  // (2^f - 1) / f, fitted on [-0.5, 0.5]: times f within 7e-9
        p = fmaf(p, f, 1.3391328e-3f);
        p = fmaf(p, f, 9.618055e-3f);
        p = fmaf(p, f, 5.5503562e-2f);
        p = fmaf(p, f, 2.402265e-1f);
        p = fmaf(p, f, 6.931472e-1f);
        const int near_one = (1 << 30) + static_cast<int>(__fmul_rn(p, f) * 0x1p30f);  // 2^f in units of 2^-30
        return static_cast<Sum>(near_one) << (kUnit - 30) >> static_cast<int>(-whole);
    }
};

// --- of a warp -----------------------------------------------------------------------------------------------------

// The sum over the lanes up to this one.
__device__ __forceinline__ Sum scan_warp(Sum value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Sum before = __shfl_up_sync(kAll, value, step);
        if (threadIdx.x % 32 >= step) value += before;
    }
    return value;
}

__device__ __forceinline__ Sum sum_warp(Sum value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
    return value;
}

__device__ __forceinline__ Sum max_warp(Sum value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAll, value, step));
    return value;
}

// The first of a warp's values, COUNT a lane, with which their sum exceeds `left`, from which those before it are taken;
// -1 where it does not, and all are taken.
template <int COUNT>
__device__ int find(const Sum (&values)[COUNT], Sum& left) {
    Sum sum = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += values[i];
    const Sum upto = scan_warp(sum);
    const unsigned past = __ballot_sync(kAll, upto > left);
    const int lane = past == 0 ? 31 : __ffs(static_cast<int>(past)) - 1;
    Sum before = past == 0 ? upto : upto - sum;
    int at = 0;
#pragma unroll
    for (int i = 0; i < COUNT - 1; i++) {
        if (past != 0 && at == i && before + values[i] <= left) before += values[i], at++;
    }
    left -= __shfl_sync(kAll, before, lane);
    at = __shfl_sync(kAll, at, lane);
    return past == 0 ? -1 : lane * COUNT + at;
}

// --- of the blocks that share a row --------------------------------------------------------------------------------

// Two halves of a barrier, for no block may write into another that has not begun.
template <int BLOCKS>
__device__ __forceinline__ void has_begun() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) cluster_arrive();
#endif
}
template <int BLOCKS>
__device__ __forceinline__ void all_have_begun() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) cluster_wait();
#endif
}

// __syncthreads() for all of them.
template <int BLOCKS>
__device__ __forceinline__ void meet() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) return cluster_barrier();
#endif
    __syncthreads();
}

// Where another of them has what is at `own` here.
template <int BLOCKS, typename V>
__device__ __forceinline__ V* in_block(int block, V* own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) return address_in(block, own);
#endif
    return own;
}

template <int BLOCKS>
__device__ __forceinline__ int own_warp() {
    return static_cast<int>(blockIdx.x % BLOCKS * Shared<BLOCKS>::kWarps + threadIdx.x / 32);
}

// A warp's value, to that place of all blocks; meet() must follow.
template <int BLOCKS, typename V>
__device__ __forceinline__ void tell(V* own, V value) {
    const int lane = threadIdx.x % 32;
    if (lane < BLOCKS) *in_block<BLOCKS>(lane, own) = value;
}

// The greatest logit in the high half, and in the low half ~id of the first that has it; kNone where one is not finite.
template <int BLOCKS>
__device__ Sum find_highest(const Row& row, Shared<BLOCKS>& shared) {
    float highest = __int_as_float(0xff800000);  // of the thread; -inf
    unsigned largest = 0;  // bits of the greatest magnitude
    int id = 0;
    row.each([&](float logit, int at) {
        largest = max(largest, __float_as_uint(logit) & 0x7fffffffu);
        if (logit > highest) highest = logit, id = at;
    });
    const bool finite = largest < 0x7f800000u;
    Sum best = max_warp(finite ? Sum{key_of(highest)} << 32 | ~static_cast<unsigned>(id) : kNone);
    all_have_begun<BLOCKS>();
    tell<BLOCKS>(&shared.highest[own_warp<BLOCKS>()], best);
    meet<BLOCKS>();
    for (int i = threadIdx.x % 32; i < BLOCKS * Shared<BLOCKS>::kWarps; i += 32) best = max(best, shared.highest[i]);
    return max_warp(best);
}

struct Cut {
    unsigned key;     // of the lowest logit that is kept
    Sum left, equal;  // how much of the mass of those equal to it is wanted, and how much they have
};

// Where the mass of the highest logits reaches wanted(all mass), which is at least 1. mass(logit) depends on key_of it.
// The histograms take turns, `turn` is the first: others read one while the next is made.
template <int BLOCKS, typename Mass, typename Wanted>
__device__ Cut select(
    const Row& row, Shared<BLOCKS>& shared, Histogram<BLOCKS>* histograms, int turn, Mass&& mass, Wanted&& wanted) {
    constexpr int kThreads = Shared<BLOCKS>::kThreads, kWarps = Shared<BLOCKS>::kWarps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % BLOCKS;
    Cut cut{};
    unsigned known = 0;  // the bits of cut.key that are found
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10, turn ^= 1) {
        const unsigned digit = shift == 0 ? 0x3ffu : 0x7ffu;
        Histogram<BLOCKS>& bins = histograms[turn];
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins.low[i] = bins.high[i] = 0;
        __syncthreads();
        row.each([&](float logit, int) {
            const unsigned key = key_of(logit);
            if (((key ^ cut.key) & known) == 0) bins.add(key >> shift & digit, mass(logit));
        });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kGroups / kWarps; i++) {
            const int group = warp * (kGroups / kWarps) + i;
            tell<BLOCKS>(&bins.groups[rank][group], sum_warp(bins[kBins - 1 - 32 * group - lane]));
        }
        meet<BLOCKS>();
        if (warp == 0) {
            Sum two[2]{}, own[1]{};
            for (int block = 0; block < BLOCKS; block++) {
                two[0] += bins.groups[block][2 * lane], two[1] += bins.groups[block][2 * lane + 1];
            }
            Sum left = (known == 0 ? wanted(sum_warp(two[0] + two[1])) : cut.left) - 1;  // to exceed is to reach
            const int bin = kBins - 1 - 32 * find(two, left);
            for (int block = 0; block < BLOCKS; block++) own[0] += (*in_block<BLOCKS>(block, &bins))[bin - lane];
            const int at = find(own, left);
            if (lane == at) shared.bin = bin - at, shared.left = left + 1, shared.equal = own[0];
        }
        __syncthreads();
        cut = {cut.key | static_cast<unsigned>(shared.bin) << shift, shared.left, shared.equal};
        known |= digit << shift;
    }
    return cut;
}

// The first id with which the sum of mass(logit, id) over ascending ids exceeds bound(all mass), which is less than all.
template <int BLOCKS, typename Mass, typename Bound>
__device__ int locate(const Row& row, Shared<BLOCKS>& shared, Mass&& mass, Bound&& bound) {
    constexpr int kEach = BLOCKS * Shared<BLOCKS>::kWarps / 32;
    const int lane = threadIdx.x % 32, own = own_warp<BLOCKS>();
    Sum sum = 0;
    row.each([&](float logit, int id) { sum += mass(logit, id); });
    tell<BLOCKS>(&shared.sums[own], sum_warp(sum));
    meet<BLOCKS>();
    Sum sums[kEach], all = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) all += sums[i] = shared.sums[lane * kEach + i];
    Sum left = bound(sum_warp(all));
    if (find(sums, left) == own) {
        int at = -1, first = row.begin;
        for (; at < 0; first += 32 * kNear) {
            Sum near[kNear];
#pragma unroll
            for (int i = 0; i < kNear; i += 4) {
                const int id = first + lane * kNear + i;
                const float4 four = row.load(id);
                near[i] = row.has(id) ? mass(four.x, id) : 0;
                near[i + 1] = row.has(id + 1) ? mass(four.y, id + 1) : 0;
                near[i + 2] = row.has(id + 2) ? mass(four.z, id + 2) : 0;
                near[i + 3] = row.has(id + 3) ? mass(four.w, id + 3) : 0;
            }
            at = find(near, left);
        }
        tell<BLOCKS>(&shared.id, first - 32 * kNear + at);
    }
    meet<BLOCKS>();
    return shared.id;
}

// floor(share * all / 2^64)
__device__ __forceinline__ Sum part_of(Sum all, Sum share) { return __umul64hi(all, share); }

}  // namespace sample
}  // namespace mamba
