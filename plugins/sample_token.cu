// MambaSampleToken: picks each row's next token as runtime/sampling.py does on the CPU. One block a row.
//
// A weight, exp((logit - highest) / temperature), is a 64-bit integer in units of 2^-43. Sums of integers are exact, so
// no answer depends on the order of the threads, and every GPU draws the same tokens. The exponential is float32, which
// moves a boundary of the draw by 1e-8 or so; double is 32 to 64 times as slow on most GPUs. Top-k and top-p find the
// lowest logit that is kept by its bits, 11, 11 and 10 at a time, from histograms of how much has which.
#ifndef MAMBA_KERNELS_ONLY
#include <algorithm>
#endif

#include "common.cuh"

namespace mamba {
namespace sample {

using Sum = unsigned long long;

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMaxVocab = 1 << 20;
constexpr int kUnit = 43;  // kMaxVocab weights of at most 2^kUnit add up to 2^63
constexpr float kOne = static_cast<float>(1ll << kUnit);
constexpr int kBins = 2 * kThreads;
constexpr int kAhead = 4;  // loads of a thread in flight
constexpr unsigned kAll = 0xffffffffu;

struct Shared {
    Sum sums[kWarps];
    Sum left, equal;  // of select
    Sum uniform;
    int bin, id;
};

struct Histogram {
    unsigned low[kBins], high[kBins];

    __device__ __forceinline__ void add(unsigned bin, unsigned count) { atomicAdd(&low[bin], count); }
    // GPUs add 32 bits at once in shared memory, and 64 bits in a loop.
    __device__ __forceinline__ void add(unsigned bin, Sum weight) {
        if (weight == 0) return;
        const unsigned part = static_cast<unsigned>(weight);
        const unsigned carry = atomicAdd(&low[bin], part) + part < part;
        const unsigned rest = static_cast<unsigned>(weight >> 32) + carry;
        if (rest != 0) atomicAdd(&high[bin], rest);
    }
    __device__ __forceinline__ Sum operator[](unsigned bin) const { return Sum{high[bin]} << 32 | low[bin]; }
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

// The ids of one warp, in loads of 16 bytes: where the row is not aligned to them the first begins before it.
struct Row {
    const float* logits;
    int begin, end;

    __device__ Row(const float* given, int vocab) : logits(given) {
        const int before = static_cast<int>(reinterpret_cast<uintptr_t>(given) / sizeof(float) % 4);
        const int length = (vocab + before - 1) / (128 * kWarps) * 128 + 128;
        begin = static_cast<int>(threadIdx.x / 32) * length - before;
        end = min(begin + length, vocab);
    }

    __device__ __forceinline__ bool has(int id) const { return id >= 0 && id < end; }

    __device__ __forceinline__ void load(int id, float (&out)[4]) const {
        if (id >= 0 && id + 4 <= end) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(logits + id));
            out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) out[j] = has(id + j) ? __ldg(logits + id + j) : 0.0f;
        }
    }

    // Calls use(logit, id), for a thread in ascending order of the ids.
    template <typename Use>
    __device__ __forceinline__ void each(Use&& use) const {
        int first = begin + static_cast<int>(threadIdx.x % 32) * 4;
        for (; first >= 0 && first + 128 * kAhead <= end; first += 128 * kAhead) {  // has() all of them
            float4 four[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; i++) four[i] = __ldg(reinterpret_cast<const float4*>(logits + first + 128 * i));
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int id = first + 128 * i;
                use(four[i].x, id), use(four[i].y, id + 1), use(four[i].z, id + 2), use(four[i].w, id + 3);
            }
        }
        for (; first < end; first += 128 * kAhead) {
            float four[kAhead][4];
#pragma unroll
            for (int i = 0; i < kAhead; i++) load(first + 128 * i, four[i]);
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int id = first + 128 * i + j;
                    if (has(id)) use(four[i][j], id);
                }
            }
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

    __device__ __forceinline__ Sum operator()(float logit) const {
        const float below = logit - highest;
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
        const long long more = static_cast<long long>(__fmul_rn(p, f) * kOne);
        return static_cast<Sum>((1ll << kUnit) + more) >> static_cast<int>(-whole);
    }
};

// --- of a whole block ----------------------------------------------------------------------------------------------

// The sum over the threads up to this one.
__device__ __forceinline__ Sum scan_warp(Sum value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Sum before = __shfl_up_sync(kAll, value, step);
        if (threadIdx.x % 32 >= step) value += before;
    }
    return value;
}

__device__ __forceinline__ Sum scan_block(Sum value, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = scan_warp(value);
    if (lane == 31) shared.sums[warp] = value;
    __syncthreads();
    if (warp == 0) shared.sums[lane] = scan_warp(shared.sums[lane]);
    __syncthreads();
    return warp == 0 ? value : value + shared.sums[warp - 1];
}

// The greatest logit in the high half, and in the low half ~id of the first that has it; 0 where one is not finite.
__device__ Sum find_highest(const Row& row, Shared& shared) {
    float highest = __int_as_float(0xff800000);  // of the thread; -inf
    unsigned largest = 0;  // bits of the greatest magnitude
    int id = 0;
    row.each([&](float logit, int at) {
        largest = max(largest, __float_as_uint(logit) & 0x7fffffffu);
        if (logit > highest) highest = logit, id = at;
    });
    const bool finite = largest < 0x7f800000u;
    Sum best = Sum{key_of(highest)} << 32 | ~static_cast<unsigned>(id);
    const auto reduce = [&] {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const Sum other = __shfl_xor_sync(kAll, best, step);
            best = other > best ? other : best;
        }
    };
    reduce();
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = best;
    __syncthreads();
    best = shared.sums[threadIdx.x % 32];
    reduce();
    return __syncthreads_or(!finite) ? 0 : best;
}

struct Cut {
    unsigned key;     // of the lowest logit that is kept
    Sum left, equal;  // how much of the mass of those equal to it is wanted, and how much they have
};

// Where the mass of the highest logits reaches wanted(all mass), which is at least 1. mass(logit) depends on key_of it.
template <typename Mass, typename Wanted>
__device__ Cut select(const Row& row, Shared& shared, Histogram& bins, Mass&& mass, Wanted&& wanted) {
    Cut cut{};
    unsigned known = 0;  // the bits of cut.key that are found
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        const unsigned digit = shift == 0 ? 0x3ffu : 0x7ffu;
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins.low[i] = bins.high[i] = 0;
        __syncthreads();
        row.each([&](float logit, int) {
            const unsigned key = key_of(logit);
            if (((key ^ cut.key) & known) == 0) bins.add(key >> shift & digit, mass(logit));
        });
        __syncthreads();
        const int bin = kBins - 1 - 2 * static_cast<int>(threadIdx.x);  // this thread has it and the next lower one
        const Sum upper = bins[bin], lower = bins[bin - 1];
        const Sum upto = scan_block(upper + lower, shared), before = upto - upper - lower;
        if (known == 0) cut.left = wanted(shared.sums[kWarps - 1]);
        if (before < cut.left && cut.left <= upto) {
            const bool first = cut.left <= before + upper;
            shared.bin = first ? bin : bin - 1;
            shared.left = cut.left - before - (first ? 0 : upper);
            shared.equal = first ? upper : lower;
        }
        __syncthreads();
        cut = {cut.key | static_cast<unsigned>(shared.bin) << shift, shared.left, shared.equal};
        known |= digit << shift;
    }
    return cut;
}

// The first id with which the sum of mass(logit, id) over ascending ids exceeds bound(all mass), which is less than all.
template <typename Mass, typename Bound>
__device__ int locate(const Row& row, Shared& shared, Mass&& mass, Bound&& bound) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Sum sum = 0;
    row.each([&](float logit, int id) { sum += mass(logit, id); });
    sum = scan_warp(sum);
    if (lane == 31) shared.sums[warp] = sum;
    __syncthreads();
    Sum all = 0;
#pragma unroll
    for (int i = 0; i < kWarps; i++) all += shared.sums[i];
    Sum left = bound(all);
    int in = 0;
    while (left >= shared.sums[in]) left -= shared.sums[in++];
    if (warp == in) {
        for (int first = row.begin;; first += 128) {
            float four[4];
            row.load(first + 4 * lane, four);
            Sum upto[4], before = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int id = first + 4 * lane + j;
                upto[j] = before += row.has(id) ? mass(four[j], id) : 0;
            }
            before = scan_warp(upto[3]) - upto[3];
            const unsigned past = __ballot_sync(kAll, before + upto[3] > left);
            if (past != 0) {
                if (lane == __ffs(static_cast<int>(past)) - 1) {
                    int j = 0;
#pragma unroll
                    for (int i = 0; i < 3; i++) j += before + upto[i] <= left;
                    shared.id = first + 4 * lane + j;
                }
                break;
            }
            left -= __shfl_sync(kAll, before + upto[3], 31);
        }
    }
    __syncthreads();
    return shared.id;
}

// floor(share * all / 2^64)
__device__ __forceinline__ Sum part_of(Sum all, Sum share) { return __umul64hi(all, share); }

// --- the kernel ----------------------------------------------------------------------------------------------------

// The id that thread 0's uniform draws; it is a fraction of 2^64.
__device__ int draw(
    const MambaSampleToken& a, const Row& row, float highest, Sum uniform, Shared& shared, Histogram& bins) {
    const Weights weight(highest, a.temperature);
    unsigned lowest = 0;  // the key of the lowest logit that is kept
    int last = a.vocab;   // the last id that is kept of those with this key
    if (a.top_k > 0 && a.top_k < a.vocab) {
        const auto one = [](float) { return 1u; };
        lowest = select(row, shared, bins, one, [&](Sum) { return static_cast<Sum>(a.top_k); }).key;
    }
    if (a.top_p < 1.0f) {
        const auto mass = [&](float logit) { return key_of(logit) >= lowest ? weight(logit) : 0; };
        const Sum share = static_cast<Sum>(a.top_p * 0x1p64f);
        const Cut cut = select(row, shared, bins, mass, [&](Sum all) {
            const Sum whole = part_of(all, share);  // rounded up, and at least 1
            return whole + (all * share != 0 || whole == 0);
        });
        lowest = cut.key;
        const Sum each = weight(logit_of(lowest)), count = (cut.left + each - 1) / each;
        if (count * each < cut.equal) {
            const auto equal = [&](float logit, int) { return Sum{key_of(logit) == lowest}; };
            last = locate(row, shared, equal, [&](Sum) { return count - 1; });
        }
    }
    const Sum least = static_cast<Sum>(ceilf(a.min_p * kOne));
    if (threadIdx.x == 0) shared.uniform = uniform;
    const auto mass = [&](float logit, int id) -> Sum {
        const unsigned key = key_of(logit);
        if (key < lowest || (key == lowest && id > last)) return 0;
        const Sum own = weight(logit);
        return own >= least ? own : 0;
    };
    return locate(row, shared, mass, [&](Sum all) { return part_of(all, shared.uniform); });
}

template <bool kGreedy>
__global__ void __launch_bounds__(kThreads) sample_token_kernel(MambaSampleToken a) {
    __shared__ Shared shared;
    for (int64_t b = blockIdx.x; b < a.batch; b += gridDim.x) {
        if (a.seq_lens != nullptr && a.seq_lens[b] == 0) continue;
        const Row row(a.logits + b * a.vocab, a.vocab);
        int64_t at = 0;
        Sum uniform = 0;
        if (threadIdx.x == 0) {
            const uint32_t step = static_cast<uint32_t>(a.steps[b]);
            at = step % static_cast<uint32_t>(a.capacity) * int64_t{a.batch} + b;
            a.steps[b] = static_cast<int32_t>(step + 1);
            if (!kGreedy) uniform = static_cast<Sum>(a.uniform[at] * 0x1p64);  // now: it may come from the host
        }
        const Sum best = find_highest(row, shared);
        int id = static_cast<int>(~static_cast<unsigned>(best));
        if constexpr (!kGreedy) {
            __shared__ Histogram bins;
            if (best != 0) id = draw(a, row, logit_of(static_cast<unsigned>(best >> 32)), uniform, shared, bins);
        }
        if (threadIdx.x == 0) {
            a.tokens[b] = best != 0 ? id : 0;
            if (a.log != nullptr) a.log[at] = best != 0 ? id : -1;
            for (int i = 0; a.seq_lens != nullptr && i < a.endings; ++i) {
                if (best != 0 && a.eos_ids[i] == id) a.seq_lens[b] = 0;
            }
        }
    }
}

#ifndef MAMBA_KERNELS_ONLY
namespace {

constexpr float kMaxFloat = 3.4028235e38f;

cudaError_t run(const MambaSampleToken& a, cudaStream_t stream) {
    const bool sizes = a.batch > 0 && a.vocab > 0 && a.vocab <= kMaxVocab && a.capacity > 0 && a.top_k >= 0;
    const bool filters = a.temperature >= 0 && a.temperature <= kMaxFloat && a.top_p > 0 && a.top_p <= 1 &&
                         a.min_p >= 0 && a.min_p <= 1;
    const bool greedy = a.temperature == 0;
    if (!sizes || !filters || (!greedy && a.uniform == nullptr)) return cudaErrorInvalidValue;
    const int blocks = std::min(a.batch, 65535);
    if (greedy) {
        sample_token_kernel<true><<<blocks, kThreads, 0, stream>>>(a);
    } else {
        sample_token_kernel<false><<<blocks, kThreads, 0, stream>>>(a);
    }
    return cudaGetLastError();
}

}  // namespace
#endif
}  // namespace sample
}  // namespace mamba

#ifndef MAMBA_KERNELS_ONLY

extern "C" size_t mamba_sample_token_workspace(const MambaSampleToken*) { return 0; }

extern "C" int mamba_sample_token(const MambaSampleToken* call, void*, void* stream) {
    return mamba::sample::run(*call, static_cast<cudaStream_t>(stream));
}
#endif
