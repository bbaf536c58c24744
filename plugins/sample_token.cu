// MambaSampleToken: picks each row's next token as runtime/sampling.py does on the CPU.
#include "sample_row.cuh"

namespace mamba {
namespace sample {

// The id that thread 0's uniform draws.
template <int BLOCKS>
__device__ int draw(const MambaSampleToken& a, const Row& row, float highest, double uniform, Shared<BLOCKS>& shared,
                    Histogram<BLOCKS>* histograms) {
    const Weights weight(highest, a.temperature);
    unsigned lowest = 0;  // the key of the lowest logit that is kept
    int last = a.vocab;   // the last id that is kept of those with this key
    if (a.top_k > 0 && a.top_k < a.vocab) {
        const auto one = [](float) { return 1u; };
        lowest = select(row, shared, histograms, 0, one, [&](Sum) { return static_cast<Sum>(a.top_k); }).key;
    }
    if (a.top_p < 1.0f) {
        const auto mass = [&](float logit) { return key_of(logit) >= lowest ? weight(logit) : 0; };
        const Sum share = static_cast<Sum>(a.top_p * 0x1p64f);
        const Cut cut = select(row, shared, histograms, 1, mass, [&](Sum all) {
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
    if (threadIdx.x == 0) shared.uniform = static_cast<Sum>(uniform * 0x1p64);  // before a barrier that all wait for
    const auto mass = [&](float logit, int id) -> Sum {
        const unsigned key = key_of(logit);
        if (key < lowest || (key == lowest && id > last)) return 0;
        const Sum own = weight(logit);
        return own >= least ? own : 0;
    };
    return locate(row, shared, mass, [&](Sum all) { return part_of(all, shared.uniform); });
}

// BLOCKS blocks for each row.
template <int BLOCKS, bool GREEDY>
__global__ void __launch_bounds__(threads_of(BLOCKS)) sample_token_kernel(MambaSampleToken a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (BLOCKS > 1) __trap();  // not launched there
#endif
    constexpr int kThreads = Shared<BLOCKS>::kThreads;
    __shared__ Shared<BLOCKS> shared;
    const int b = static_cast<int>(blockIdx.x / BLOCKS), thread = static_cast<int>(threadIdx.x);
    const bool may_end = a.seq_lens != nullptr;
    wait_for_previous();
    has_begun<BLOCKS>();
    // Needed at the end, and on their way from now on.
    const int length = may_end ? a.seq_lens[b] : 1;
    const int ending = may_end && thread < a.endings ? a.eos_ids[thread] : -1;
    const Row row(a.logits + int64_t{b} * a.vocab, a.vocab, own_warp<BLOCKS>(), BLOCKS * Shared<BLOCKS>::kWarps);
    int64_t at = 0;
    uint32_t step = 0;
    double uniform = 0;
    if (thread == 0) {
        step = static_cast<uint32_t>(a.steps[b]);
        at = step % static_cast<uint32_t>(a.capacity) * int64_t{a.batch} + b;
        if (!GREEDY) uniform = a.uniform[at];  // now: it may come from the host
    }
    const Sum best = find_highest(row, shared);
    int id = static_cast<int>(~static_cast<unsigned>(best));
    if constexpr (!GREEDY) {
        __shared__ Histogram<BLOCKS> histograms[2];
        if (best != kNone) id = draw(a, row, logit_of(static_cast<unsigned>(best >> 32)), uniform, shared, histograms);
    }
    if (length == 0 || blockIdx.x % BLOCKS != 0) return;
    if (thread == 0) {  // what the others have read by now
        a.steps[b] = static_cast<int32_t>(step + 1);
        a.tokens[b] = best != kNone ? id : 0;
        if (a.log != nullptr) a.log[at] = best != kNone ? id : -1;
    }
    if (!may_end || best == kNone) return;
    bool ends = ending == id;
    for (int i = thread + kThreads; i < a.endings; i += kThreads) ends = ends || a.eos_ids[i] == id;
    if (ends) a.seq_lens[b] = 0;
}

#ifndef MAMBA_KERNELS_ONLY
namespace {

constexpr float kMaxFloat = 3.4028235e38f;

template <int BLOCKS>
cudaError_t start(const MambaSampleToken& a, bool early, cudaStream_t stream) {
    const auto kernel = a.temperature == 0 ? sample_token_kernel<BLOCKS, true> : sample_token_kernel<BLOCKS, false>;
    const dim3 grid(static_cast<unsigned>(a.batch) * BLOCKS);
    return launch_early(kernel, grid, dim3(threads_of(BLOCKS)), 0, BLOCKS, early, stream, MambaSampleToken(a));
}

cudaError_t run(const MambaSampleToken& a, cudaStream_t stream) {
    const bool sizes = a.batch > 0 && a.vocab > 0 && a.vocab <= kMaxVocab && a.capacity > 0 && a.top_k >= 0;
    const bool filters = a.temperature >= 0 && a.temperature <= kMaxFloat && a.top_p > 0 && a.top_p <= 1 &&
                         a.min_p >= 0 && a.min_p <= 1;
    if (!sizes || !filters || (a.temperature > 0 && a.uniform == nullptr)) return cudaErrorInvalidValue;
    Device device;
    const cudaError_t error = device.read(sample_token_kernel<1, true>);
    if (error != cudaSuccess) return error;
    const bool clusters = device.major >= 9;
    const int room = clusters ? device.multiprocessors / a.batch : 1;  // blocks of a row, each with a multiprocessor
    if (room >= 8) return start<8>(a, clusters, stream);
    if (room >= 4) return start<4>(a, clusters, stream);
    return room >= 2 ? start<2>(a, clusters, stream) : start<1>(a, clusters, stream);
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
