// MambaLastToken: row b's token seq_lens[b] - 1, zeros where a row has none. A copy, so dtypes do not matter, only bytes.
#ifndef MAMBA_KERNELS_ONLY
#include <algorithm>
#endif

#include "common.cuh"

namespace mamba {
namespace last {

constexpr int kThreads = 128;

// A token is `words` words long.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
last_token_kernel(const Word* x, const int32_t* seq_lens, Word* y, int batch, int length, int words) {
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i >= words) return;
    for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
        const int used = min(seq_lens[b], length);
        Word word{};
        if (used > 0) word = x[(b * length + used - 1) * words + i];
        y[b * words + i] = word;
    }
}

#ifndef MAMBA_KERNELS_ONLY
namespace {

template <typename Word>
cudaError_t launch(const MambaLastToken& a, int words, cudaStream_t stream) {
    const dim3 grid((words - 1) / kThreads + 1, std::min(a.batch, 65535));
    last_token_kernel<<<grid, kThreads, 0, stream>>>(
        static_cast<const Word*>(a.x), a.seq_lens, static_cast<Word*>(a.y), a.batch, a.length, words);
    return cudaGetLastError();
}

cudaError_t run(const MambaLastToken& a, cudaStream_t stream) {
    const bool sizes = a.batch > 0 && a.length > 0 && a.length <= 1 << 20 && a.width > 0;
    if (!sizes || a.dtype < MAMBA_FLOAT32 || a.dtype > MAMBA_BFLOAT16) return cudaErrorInvalidValue;
    const int64_t bytes = int64_t{a.width} * item_bytes(a.dtype);
    if (bytes % 16 == 0 && is_aligned(a.x, 16) && is_aligned(a.y, 16)) {
        return launch<uint4>(a, static_cast<int>(bytes / 16), stream);
    }
    return a.dtype == MAMBA_FLOAT32 ? launch<uint32_t>(a, a.width, stream) : launch<uint16_t>(a, a.width, stream);
}

}  // namespace
#endif
}  // namespace last
}  // namespace mamba

#ifndef MAMBA_KERNELS_ONLY

extern "C" size_t mamba_last_token_workspace(const MambaLastToken*) { return 0; }

extern "C" int mamba_last_token(const MambaLastToken* call, void*, void* stream) {
    return mamba::last::run(*call, static_cast<cudaStream_t>(stream));
}
#endif
