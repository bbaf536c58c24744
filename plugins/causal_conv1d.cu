// MambaCausalConv1d: y[t] = activation(bias + sum over k of weight[k] x[t - K + 1 + k]), x before the call being the state.
//
// Bound by memory: x in, y out. Prompts: a thread takes kVec channels and a run of tokens, carries the last K - 1 inputs in
// registers and has four loads of kVec in flight while it computes on the four before; four runs that follow one another
// share a block, so that the K - 1 tokens each reads of its predecessor's come from the L1 cache. The thread of a row's
// first run alone reads the old state, and it alone writes the new one.
// One token: the state's rows of K - 1 elements go through shared memory, for accesses of 16 bytes side by side.
// H200, cold L2, C 5376: prompts of 2048 at B 1 and 8 reach 77 and 86 % of the speed of a copy of as many bytes (tiles in
// shared memory 61 and 73 %), one token at B 64 and 1024 80 and 93 %; one row of one token takes 2.0 us.
// Tuned for K = 4, the only width ever published, with channels in vectors; any other call goes an element at a time.
#ifndef MAMBA_KERNELS_ONLY
#include <algorithm>
#include <climits>

#include "strided.h"
#endif

#include "step_common.cuh"

namespace mamba {
namespace conv {

constexpr int kMaxWidth = 8;
constexpr int kLanes = 32;      // threads along channels
constexpr int kRuns = 4;        // runs of tokens in a block
template <typename T> constexpr int kBlocks = sizeof(T) == 2 ? 6 : 5;  // a multiprocessor holds at once
constexpr int kStepThreads = 64;

// An array in accesses of kPack elements.
template <int kPack, typename T, int kCount>
__device__ __forceinline__ void load_all(T (&to)[kCount], const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPack) {
        const auto pack = load<T, kPack>(from + i);
#pragma unroll
        for (int j = 0; j < kPack; j++) to[i + j] = pack.v[j];
    }
}

template <int kPack, typename T, int kCount>
__device__ __forceinline__ void store_all(T* to, const T (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPack) {
        Pack<T, kPack> pack;
#pragma unroll
        for (int j = 0; j < kPack; j++) pack.v[j] = from[i + j];
        store(to + i, pack);
    }
}

// A thread's weights, bias and window, in float32. kWidth is K, or 0: a.width says, and kVec is 1.
template <typename T, int kWidth, int kVec>
struct Filter {
    static constexpr int kTaps = kWidth > 0 ? kWidth : kMaxWidth;
    float weight[kVec][kTaps];  // with fewer taps than kTaps the last a.width count
    float bias[kVec];
    float window[kTaps - 1][kVec];
    int taps;
    bool silu;

    __device__ __forceinline__ Filter(const MambaCausalConv1d& a, int c) {
        taps = kWidth > 0 ? kWidth : a.width;
        silu = a.activation == MAMBA_ACTIVATION_SILU;
        const T* weights = static_cast<const T*>(a.weight) + int64_t{c} * taps;
        const T* biases = static_cast<const T*>(a.bias);
        if constexpr (kWidth > 0) {
            T values[kVec * kTaps];
            load_all<16 / sizeof(T)>(values, weights);
#pragma unroll
            for (int i = 0; i < kVec * kTaps; i++) weight[i / kTaps][i % kTaps] = to_float(values[i]);
        } else {
#pragma unroll
            for (int k = 0; k < kTaps; k++) {
                weight[0][k] = 0.0f;
                if (k >= kTaps - taps) weight[0][k] = to_float(weights[k - (kTaps - taps)]);
            }
        }
        if (biases != nullptr) {
            const auto pack = load_constant<T, kVec>(biases + c);
#pragma unroll
            for (int v = 0; v < kVec; v++) bias[v] = to_float(pack.v[v]);
        } else {
#pragma unroll
            for (int v = 0; v < kVec; v++) bias[v] = 0.0f;
        }
    }

    __device__ __forceinline__ bool has_tap(int k) const { return kWidth > 0 || k >= kTaps - taps; }

    // Takes in the next token and gives its output.
    __device__ __forceinline__ Pack<T, kVec> next(const Pack<T, kVec>& x) {
        Pack<T, kVec> y;
#pragma unroll
        for (int v = 0; v < kVec; v++) {
            const float newest = to_float(x.v[v]);
            float sum = bias[v];
#pragma unroll
            for (int k = 0; k < kTaps - 1; k++) {
                if (has_tap(k)) sum = fmaf(weight[v][k], window[k][v], sum);  // not 0 * NaN
            }
            sum = fmaf(weight[v][kTaps - 1], newest, sum);
            y.v[v] = from_float<T>(silu ? mamba::silu(sum) : sum);
#pragma unroll
            for (int k = 0; k < kTaps - 2; k++) window[k][v] = window[k + 1][v];
            window[kTaps - 2][v] = newest;
        }
        return y;
    }
};

template <typename T, int kWidth, int kVec>
__global__ void __launch_bounds__(kLanes * kRuns, kBlocks<T>)
prompt_kernel(MambaCausalConv1d a, int x_row, unsigned channel_blocks, int run_length) {
    using Vec = Pack<T, kVec>;
    using Kernel = Filter<T, kWidth, kVec>;
    constexpr int kKept = Kernel::kTaps - 1, kAhead = kWidth > 0 ? 4 : 8;  // tokens loaded at once
    const int c = static_cast<int>((blockIdx.x % channel_blocks) * kLanes + threadIdx.x) * kVec;
    const int64_t first = (int64_t{blockIdx.x / channel_blocks} * kRuns + threadIdx.y) * run_length;
    if (c >= a.channels || first >= a.length) return;
    const int start = static_cast<int>(first), end = static_cast<int>(min(first + run_length, int64_t{a.length}));
    const int C = a.channels;
    Kernel filter(a, c);
    const int kept = filter.taps - 1;
    let_next_start();
    wait_for_previous();

    for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
        const T* x = static_cast<const T*>(a.x) + b * a.length * x_row + c;
        const int used = min(max(a.seq_lens[b], 0), a.length), stop = min(end, used);
        const auto token = [&](int t) { return load<T, kVec>(x + int64_t{t} * x_row); };  // which the kernel ahead wrote

        const T* from = x + int64_t{start} * x_row;
        T* const y = static_cast<T*>(a.y) + b * a.length * C + c;
        Vec ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            ahead[i] = Vec{};
            if (start + i < stop) ahead[i] = load<T, kVec>(from);
            from += x_row;
        }
        if (start == 0) {
            const T* old = static_cast<const T*>(a.conv_state) + (b * C + c) * kept;
            T* fresh = static_cast<T*>(a.conv_state_out) + (b * C + c) * kept;
            T state[kVec * kKept], next[kVec * kKept];
            if constexpr (kWidth > 0) {
                load_all<kVec>(state, old);
            } else {
#pragma unroll
                for (int k = 0; k < kKept; k++) {
                    state[k] = from_float<T>(0.0f);
                    if (filter.has_tap(k)) state[k] = old[k - (kKept - kept)];
                }
            }
#pragma unroll
            for (int k = 0; k < kKept; k++) {
                const int t = used - kKept + k;  // the token that belongs there, if it is one of this call
                Vec newest{};
                if (t >= 0 && filter.has_tap(k)) newest = token(t);
#pragma unroll
                for (int v = 0; v < kVec; v++) {
                    next[v * kKept + k] = newest.v[v];
                    if (t < 0 && filter.has_tap(k)) next[v * kKept + k] = old[v * kept + used + k - (kKept - kept)];
                    filter.window[k][v] = to_float(state[v * kKept + k]);
                }
            }
            if constexpr (kWidth > 0) {
                store_all<kVec>(fresh, next);
            } else {
#pragma unroll
                for (int k = 0; k < kKept; k++) {
                    if (filter.has_tap(k)) fresh[k - (kKept - kept)] = next[k];
                }
            }
        } else {  // a run is no shorter than kMaxWidth
#pragma unroll
            for (int k = 0; k < kKept; k++) {
                Vec before{};
                if (start < stop && filter.has_tap(k)) before = token(start - kKept + k);
#pragma unroll
                for (int v = 0; v < kVec; v++) filter.window[k][v] = to_float(before.v[v]);
            }
        }

        int t = start;
#pragma unroll 1
        for (; t + 2 * kAhead <= stop; t += kAhead) {  // and the next kAhead are there
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const Vec current = ahead[i];
                ahead[i] = load<T, kVec>(from);
                from += x_row;
                store(y + int64_t{t + i} * C, filter.next(current));
            }
        }
#pragma unroll 1
        for (; t < stop; t += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const Vec current = ahead[i];
                ahead[i] = Vec{};
                if (t + kAhead + i < stop) ahead[i] = load<T, kVec>(from);
                from += x_row;
                if (t + i < end) store(y + int64_t{t + i} * C, t + i < stop ? filter.next(current) : Vec{});
            }
        }
        for (; t < end; t++) store(y + int64_t{t} * C, Vec{});
    }
}

template <typename T, int kWidth, int kVec>
__global__ void __launch_bounds__(kStepThreads) step_kernel(MambaCausalConv1d a, int32_t row) {
    using Kernel = Filter<T, kWidth, kVec>;
    constexpr int kTaps = Kernel::kTaps, kKept = kTaps - 1;
    constexpr int kPack = 16 / sizeof(T);  // of the state, as of x where kWidth is not 0
    __shared__ alignas(16) T rows[kStepThreads * kVec * kKept];
    const int64_t b = blockIdx.x;
    const int first = static_cast<int>(blockIdx.y) * kStepThreads * kVec, c = first + static_cast<int>(threadIdx.x) * kVec;
    const int C = a.channels, width = kWidth > 0 ? kWidth : a.width;
    const T* old = static_cast<const T*>(a.conv_state) + (b * C + first) * (width - 1);
    T* fresh = static_cast<T*>(a.conv_state_out) + (b * C + first) * (width - 1);
    const int elements = min(kStepThreads * kVec, C - first) * (width - 1);

    let_next_start();
    Kernel filter(a, min(c, C - kVec));
    wait_for_previous();
    Pack<T, kVec> x{};
    if (c < C) x = load<T, kVec>(static_cast<const T*>(a.x) + b * row + c);  // which y may overwrite
    const bool used = a.seq_lens[b] > 0;
    // All loads before the first shared store waits for one.
    constexpr int kMoved = kWidth > 0 ? kPack : 1, kMoves = kVec * kKept / kMoved;
    Pack<T, kMoved> moved[kMoves];
#pragma unroll
    for (int k = 0; k < kMoves; k++) {
        const int i = (k * kStepThreads + threadIdx.x) * kMoved;
        if (i < elements) moved[k] = load<T, kMoved>(old + i);
    }
#pragma unroll
    for (int k = 0; k < kMoves; k++) {
        const int i = (k * kStepThreads + threadIdx.x) * kMoved;
        if (i < elements) store(rows + i, moved[k]);
    }
    __syncthreads();

    T* mine = rows + threadIdx.x * kVec * (width - 1);
    Pack<T, kVec> y{};
    if (used && c < C) {
        T state[kVec * kKept];
        if constexpr (kWidth > 0) {
            load_all<kVec>(state, mine);
        } else {
#pragma unroll
            for (int k = 0; k < kKept; k++) {
                state[k] = from_float<T>(0.0f);
                if (filter.has_tap(k)) state[k] = mine[k - (kTaps - width)];
            }
        }
#pragma unroll
        for (int i = 0; i < kVec * kKept; i++) filter.window[i % kKept][i / kKept] = to_float(state[i]);
        y = filter.next(x);
#pragma unroll
        for (int v = 0; v < kVec; v++) {
#pragma unroll
            for (int k = 0; k < kKept - 1; k++) state[v * kKept + k] = state[v * kKept + k + 1];
            state[v * kKept + kKept - 1] = x.v[v];
        }
        if constexpr (kWidth > 0) {
            store_all<kVec>(mine, state);
        } else {
#pragma unroll
            for (int k = 0; k < kKept; k++) {
                if (filter.has_tap(k)) mine[k - (kTaps - width)] = state[k];
            }
        }
    }
    if (c < C) store(static_cast<T*>(a.y) + b * row + c, y);
    __syncthreads();
    if (!used && old == fresh) return;
#pragma unroll
    for (int k = 0; k < kMoves; k++) {
        const int i = (k * kStepThreads + threadIdx.x) * kMoved;
        if (i < elements) store(fresh + i, load<T, kMoved>(rows + i));
    }
}

#ifndef MAMBA_KERNELS_ONLY
namespace {

template <typename T, int kWidth, int kVec>
cudaError_t step(const MambaCausalConv1d& a, int32_t row, cudaStream_t stream) {
    const int64_t channel_blocks = ceil_div(a.channels, kStepThreads * kVec);
    if (channel_blocks > 65535) return cudaErrorInvalidValue;
    const dim3 grid(a.batch, static_cast<unsigned>(channel_blocks));
    const auto kernel = step_kernel<T, kWidth, kVec>;
    Device device;
    const cudaError_t error = device.read(kernel);
    if (error != cudaSuccess) return error;
    return launch_early(kernel, grid, kStepThreads, 0, 1, device.major >= 9, stream, MambaCausalConv1d(a), int32_t{row});
}

template <typename T, int kWidth, int kVec>
cudaError_t prompt(const MambaCausalConv1d& a, int32_t x_row, bool early, cudaStream_t stream) {
    const int64_t channel_blocks = ceil_div(a.channels, kLanes * kVec), rows = std::min(a.batch, 65535);
    // Short runs fill the GPU, long ones read less twice: the shortest for which all blocks run at once.
    Device device;
    const cudaError_t error = device.read(prompt_kernel<T, kWidth, kVec>);
    if (error != cudaSuccess) return error;
    const int64_t runs = std::max<int64_t>(1, int64_t{device.multiprocessors} * kBlocks<T> / (channel_blocks * rows)) * kRuns;
    const int run_length = static_cast<int>(std::min<int64_t>(std::max<int64_t>(ceil_div(a.length, 4 * runs) * 4, 8), 64));
    const int64_t width = channel_blocks * ceil_div(a.length, int64_t{run_length} * kRuns);
    if (width > INT_MAX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(width), static_cast<unsigned>(rows));
    return launch_early(prompt_kernel<T, kWidth, kVec>, grid, dim3(kLanes, kRuns), 0, 1, early && device.major >= 9,
                        stream, MambaCausalConv1d(a), int32_t{x_row}, static_cast<unsigned>(channel_blocks), int{run_length});
}

}  // namespace

cudaError_t run(const MambaCausalConv1d& a, int32_t x_row, bool early, cudaStream_t stream) {
    const bool sizes = a.batch > 0 && a.length > 0 && a.length <= 1 << 20 && a.channels > 0 && a.width >= 2 &&
                       a.width <= kMaxWidth;
    if (!sizes || a.activation < MAMBA_ACTIVATION_NONE || a.activation > MAMBA_ACTIVATION_SILU) {
        return cudaErrorInvalidValue;
    }
    bool aligned = true;
    for (const void* p : {a.x, a.weight, a.bias, a.conv_state, const_cast<const void*>(a.y),
                          const_cast<const void*>(a.conv_state_out)}) {
        aligned = aligned && is_aligned(p, 16);
    }
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(a.dtype, [&](auto t) {
        using T = decltype(t);
        constexpr int kVec = 16 / sizeof(T);
        if (!aligned || a.width != 4 || a.channels % kVec != 0 || x_row % kVec != 0) {
            error = a.length == 1 ? step<T, 0, 1>(a, x_row, stream) : prompt<T, 0, 1>(a, x_row, early, stream);
        } else {
            error = a.length == 1 ? step<T, 4, kVec>(a, x_row, stream) : prompt<T, 4, 4>(a, x_row, early, stream);
        }
    });
    return error;
}

#endif
}  // namespace conv
}  // namespace mamba

#ifndef MAMBA_KERNELS_ONLY

extern "C" size_t mamba_causal_conv1d_workspace(const MambaCausalConv1d*) { return 0; }

extern "C" int mamba_causal_conv1d(const MambaCausalConv1d* call, void*, void* stream) {
    return mamba::conv::run(*call, call->channels, false, static_cast<cudaStream_t>(stream));
}
#endif
