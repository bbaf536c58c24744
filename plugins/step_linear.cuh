// Matrix products of a decode step with what stands around them in a layer: y = f(x) W, where f is a norm (root mean square,
// in groups) or nothing; then bias; then a causal convolution of some columns, for a column is all it needs besides its
// state; or the residual stream, to which the product is added.
//
// Of a row or two of the batch every block finds the norm itself, which costs less than one more kernel; of more, the norm
// is a kernel of its own. What a norm makes is rounded to T, as it is between operators. Here up to 8 rows of x lie in shared
// memory whole. A row or two of many inputs, and the head of one row, are in step_row.cuh; many rows, and few of many
// inputs, in step_tile.cuh.
#pragma once

#include "step_product.cuh"

namespace mamba {
namespace step {

// Null where it is not.
struct Linear {
    int32_t batch, inputs, outputs, x_stride, groups, conv_first, conv_channels, conv_width;
    int32_t rows, group_size, by_16;  // of a block; inputs of a norm's group; whether x can be read 16 bytes at once
    float eps;
    const void *x, *weight, *bias;
    const float *norm_weight, *residual;
    const void *conv_weight, *conv_bias, *conv_state;
    const int32_t* seq_lens;
    void *y, *conv_state_out;
};

#ifndef MAMBA_KERNELS_ONLY

inline Linear linear_of(const MambaInProj& c) {
    Linear a{};
    a.batch = c.batch, a.inputs = c.width, a.outputs = c.outputs, a.x_stride = c.width, a.groups = 1, a.eps = c.eps;
    a.x = c.hidden, a.weight = c.weight, a.bias = c.bias, a.norm_weight = c.norm_weight, a.y = c.y;
    a.conv_first = c.conv_first, a.conv_channels = c.channels, a.conv_width = c.conv_width;
    a.conv_weight = c.conv_weight, a.conv_bias = c.conv_bias, a.conv_state = c.conv_state, a.seq_lens = c.seq_lens;
    a.conv_state_out = c.conv_state_out;
    return a;
}

#endif

// Rows of x to shared memory, this thread's share.
template <typename X, int WARPS>
__device__ __forceinline__ void fetch(const Linear& a, int first, int rows, X* to, int stride) {
    constexpr int kVec = 16 / sizeof(X);
    const int log_share = log_warps_of_row<WARPS>(rows), warp = threadIdx.x / 32, row = warp >> log_share;
    if (row >= rows) return;
    const int lane = ((warp - (row << log_share)) << 5) + threadIdx.x % 32, lanes = 32 << log_share;
    const X* const from = static_cast<const X*>(a.x) + int64_t{first + row} * a.x_stride;
    X* const out = to + row * stride;
    if (a.by_16) {
#pragma unroll 4
        for (int k = kVec * lane; k < a.inputs; k += kVec * lanes) store(out + k, load<X, kVec>(from + k));
    } else {
        for (int k = lane; k < a.inputs; k += lanes) out[k] = from[k];
    }
}

// Zeros behind the inputs, to a multiple of 32.
template <typename X>
__device__ __forceinline__ void fill_behind(const Linear& a, int rows, X* to, int stride) {
    const int k = a.inputs + threadIdx.x;
    if (k >= (a.inputs + 31) / 32 * 32) return;
    for (int r = 0; r < rows; r++) to[r * stride + k] = from_float<X>(0.0f);
}

// The norm of `rows` rows at `from`, in shared memory, to `to`, which may be the same; `sums` has room for 16 values of a
// group of a row.
template <typename T, typename X, int WARPS>
__device__ __forceinline__ void normalize(
    const Linear& a, int rows, const X* from, int from_stride, const float* norm, float* sums, T* to, int to_stride) {
    const int log_share = log_warps_of_row<WARPS>(rows);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp >> log_share;
    const int own = warp - (row << log_share), size = a.group_size, group_step = 1 << log_share;
    const bool quads = a.by_16 && size % 4 == 0;
    const int begin = (own * 32 + lane) * (quads ? 4 : 1), step = (32 << log_share) * (quads ? 4 : 1);
    const X* const x = from + row * from_stride;
    T* const y = to + row * to_stride;
    float* const of_row = sums + ((row * a.groups) << log_share);
    if (row < rows) {
        for (int g = 0; g < a.groups; g++) {
            float sum = 0.0f;
            if (quads) {
#pragma unroll 4
                for (int k = begin; k < size; k += step) {
                    const Pack<X, 4> v = load<X, 4>(x + g * size + k);
#pragma unroll
                    for (int i = 0; i < 4; i++) sum = fmaf(to_float(v.v[i]), to_float(v.v[i]), sum);
                }
            } else {
                for (int k = begin; k < size; k += step) {
                    sum = fmaf(to_float(x[g * size + k]), to_float(x[g * size + k]), sum);
                }
            }
            sum = sum_of_warp(sum);
            if (lane == 0) of_row[g * group_step + own] = sum;
        }
    }
    __syncthreads();
    if (row < rows) {
        for (int g = 0; g < a.groups; g++) {
            float sum = 0.0f;
            for (int i = 0; i < group_step; i++) sum += of_row[g * group_step + i];
            const float scale = rsqrtf(sum / size + a.eps);
            if (quads) {
#pragma unroll 4
                for (int k = g * size + begin; k < (g + 1) * size; k += step) {
                    const Pack<X, 4> v = load<X, 4>(x + k);
                    const Pack<float, 4> w = load<float, 4>(norm + k);
                    Pack<T, 4> made;
#pragma unroll
                    for (int i = 0; i < 4; i++) made.v[i] = from_float<T>(to_float(v.v[i]) * scale * w.v[i]);
                    store(y + k, made);
                }
            } else {
                for (int k = g * size + begin; k < (g + 1) * size; k += step) {
                    y[k] = from_float<T>(to_float(x[k]) * scale * norm[k]);
                }
            }
        }
    }
}

// The norm's weights to shared memory, this thread's share; null where there is no norm.
__device__ __forceinline__ const float* fetch_norm(const Linear& a, float* to) {
    if (a.norm_weight == nullptr) return nullptr;
#pragma unroll 4
    for (int k = threadIdx.x; k < a.inputs; k += blockDim.x) to[k] = __ldg(a.norm_weight + k);
    return to;
}

// How shared memory is laid out, up to 8 rows. The sums of the warps may take the place of the ring.
struct Layout {
    int scales, raw, x, ring, sums, bytes;  // where they begin; the norm's weights are first

    __host__ __device__ Layout(const Linear& a, int item, int x_item, int ring_bytes, int warp_outputs) {
        const bool normed = a.norm_weight != nullptr;
        scales = normed ? 4 * ((a.inputs + 3) / 4 * 4) : 0;
        raw = scales + (normed ? 4 * 16 * a.rows * a.groups : 0);
        x = raw + (x_item != item ? (a.rows * a.inputs * x_item + 15) / 16 * 16 : 0);
        ring = sums = x + (a.rows * shared_stride(a.inputs) * item + 15) / 16 * 16;
        const int last = 4 * a.rows * warp_outputs;
        bytes = ring + (ring_bytes > last ? ring_bytes : last);
    }
};

// f(x) of the rows from `first` on, in shared memory.
template <typename T, typename X, int WARPS>
__device__ __forceinline__ SharedX<T> prepare(
    const Linear& a, const Layout& layout, char* shared, const float* norm, int first, int rows) {
    T* const x = reinterpret_cast<T*>(shared + layout.x);
    const int stride = shared_stride(a.inputs);
    if constexpr (sizeof(X) == sizeof(T)) {
        fetch<X, WARPS>(a, first, rows, reinterpret_cast<X*>(x), stride);
    } else {
        fetch<X, WARPS>(a, first, rows, reinterpret_cast<X*>(shared + layout.raw), a.inputs);
    }
    fill_behind(a, rows, x, stride);
    __syncthreads();
    if (norm != nullptr) {
        float* const sums = reinterpret_cast<float*>(shared + layout.scales);
        if constexpr (sizeof(X) == sizeof(T)) {
            normalize<T, X, WARPS>(a, rows, reinterpret_cast<X*>(x), stride, norm, sums, x, stride);
        } else {
            normalize<T, X, WARPS>(a, rows, reinterpret_cast<X*>(shared + layout.raw), a.inputs, norm, sums, x, stride);
        }
        __syncthreads();
    }
    return {x, stride, rows};
}

// What is done with the values of an output, in what is the same for all rows.
template <typename T>
struct Column {
    static constexpr int kTaps = 4;  // of the convolution; further ones are read when they are due

    int m, channel;
    bool exists, convolved;
    T filter[kTaps];
    float bias, conv_bias;

    Column() = default;
    __device__ __forceinline__ Column(const Linear& a, int m, bool exists) : m(m), channel(m - a.conv_first), exists(exists) {
        convolved = exists && channel >= 0 && channel < a.conv_channels;
        bias = exists && a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[m]) : 0.0f;
        conv_bias = 0.0f;
        if (!convolved) return;
        if (a.conv_bias != nullptr) conv_bias = to_float(static_cast<const T*>(a.conv_bias)[channel]);
#pragma unroll
        for (int t = 0; t < kTaps; t++) {
            if (t < a.conv_width) filter[t] = weights(a)[t];
        }
    }
    __device__ __forceinline__ const T* weights(const Linear& a) const {
        return static_cast<const T*>(a.conv_weight) + int64_t{channel} * a.conv_width;
    }
};

// And in what is a row's: read ahead, after what kernels before write is there.
template <typename T>
struct Around {
    static constexpr int kTaps = Column<T>::kTaps;

    T before[kTaps - 1];
    float residual;
    bool exists, used;

    __device__ __forceinline__ void read(const Linear& a, const Column<T>& of, int b, bool row_exists) {
        exists = row_exists && of.exists;
        if (!exists) return;
        if (a.residual != nullptr) residual = a.residual[int64_t{b} * a.outputs + of.m];
        if (!of.convolved) return;
        used = a.seq_lens[b] > 0;
        const T* const from = static_cast<const T*>(a.conv_state) + state(a, of, b);
#pragma unroll
        for (int t = 0; t < kTaps - 1; t++) {
            if (t < a.conv_width - 1) before[t] = from[t];
        }
    }
    static __device__ __forceinline__ int64_t state(const Linear& a, const Column<T>& of, int b) {
        return (int64_t{b} * a.conv_channels + of.channel) * (a.conv_width - 1);
    }

    __device__ __forceinline__ void finish(const Linear& a, const Column<T>& of, int b, float v) const {
        if (!exists) return;
        v += of.bias;
        const int64_t at = int64_t{b} * a.outputs + of.m;
        if (a.residual != nullptr) {
            static_cast<float*>(a.y)[at] = residual + to_float(from_float<T>(v));
            return;
        }
        if (of.convolved) v = convolve(a, of, b, from_float<T>(v));
        static_cast<T*>(a.y)[at] = from_float<T>(v);
    }

    __device__ __forceinline__ float convolve(const Linear& a, const Column<T>& of, int b, T now) const {
        const int taps = a.conv_width;
        const T* const from = static_cast<const T*>(a.conv_state) + state(a, of, b);
        T* const to = static_cast<T*>(a.conv_state_out) + state(a, of, b);
        float sum = fmaf(to_float(of.filter[0]), to_float(before[0]), of.conv_bias);
        T last = before[0];
#pragma unroll
        for (int t = 1; t < 8; t++) {
            if (t >= taps) break;
            const T next = t == taps - 1 ? now : t < kTaps - 1 ? before[t < kTaps - 1 ? t : 0] : from[t];
            const T weight = t < kTaps ? of.filter[t < kTaps ? t : 0] : of.weights(a)[t];
            sum = fmaf(to_float(weight), to_float(next), sum);
            to[t - 1] = used ? next : last;
            last = next;
        }
        return silu(sum);
    }
};

// Weights [inputs, outputs], of up to 8 rows at once; WARPS warps along the inputs.
template <typename T, typename X, int BYTES, int WARPS, bool RING>
__global__ void __launch_bounds__(32 * WARPS, resident_blocks(16 / WARPS, 1)) linear_kernel(const Linear a) {
    using Own = Product<T, BYTES, WARPS, RING>;
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const int first = blockIdx.y * a.rows, rows = min(a.rows, a.batch - first), column = blockIdx.x * Own::kOutputs;
    const Layout layout(a, sizeof(T), sizeof(X), Own::kRingBytes, WARPS * Own::kOutputs);

    Own product(static_cast<const T*>(a.weight), a.inputs, a.outputs, column, threadIdx.x / 32, shared + layout.ring);
    product.begin();
    const int of_block = threadIdx.x % Own::kOutputs, m = column + of_block;
    const Column<T> of(a, m, m < a.outputs);
    const float* const norm = fetch_norm(a, reinterpret_cast<float*>(shared));
    let_next_start();
    wait_for_previous();
    constexpr int kRows = Own::kThreads / Own::kOutputs;  // finished at once
    int row = threadIdx.x / Own::kOutputs;
    Around<T> around;
    around.read(a, of, first + row, row < rows);

    float* const sums = reinterpret_cast<float*>(shared + layout.sums);
    product.run(prepare<T, X, WARPS>(a, layout, shared, norm, first, rows));
    if (RING) __syncthreads();
    product.put(sums, rows);
    __syncthreads();
    for (; row < rows; row += kRows) {
        around.finish(a, of, first + row, Own::sum(sums, rows, row * Own::kOutputs + of_block));
        around.read(a, of, first + row + kRows, row + kRows < rows);
    }
}

// f(x) of many rows, where it is a norm: y is [batch, stride] T.
template <typename T, typename X>
__global__ void __launch_bounds__(256) norm_kernel(const Linear a, T* y, int stride) {
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const Layout layout(a, sizeof(T), sizeof(X), 0, 0);
    const float* const norm = fetch_norm(a, reinterpret_cast<float*>(shared));
    let_next_start();
    wait_for_previous();
    const int b = blockIdx.x;
    T* const own = y + int64_t{b} * stride;
    X* const x = reinterpret_cast<X*>(shared + (sizeof(X) == sizeof(T) ? layout.x : layout.raw));
    fetch<X, 8>(a, b, 1, x, a.inputs);
    fill_behind(a, 1, own, stride);
    __syncthreads();
    normalize<T, X, 8>(a, 1, x, a.inputs, norm, reinterpret_cast<float*>(shared + layout.scales), own, stride);
}

constexpr int kHeadWarps = 8;
constexpr int kHeadOutputs = 16;  // of a warp

// Weights [outputs, inputs], which is a tied embedding; x normed already, y float32. A warp takes 16 outputs, and of each
// 64 bytes at once.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadWarps, sizeof(T) == 4 ? 2 : 3) head_kernel(const Linear a) {
    extern __shared__ float4 memory[];
    constexpr int kVec = 16 / sizeof(T), kStep = 4 * kVec, kDepth = 3;
    constexpr bool kTensor = kTensorCores<T>;
    char* const shared = reinterpret_cast<char*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * a.rows, rows = min(a.rows, a.batch - first);
    const int output = (blockIdx.x * kHeadWarps + warp) * kHeadOutputs, whole = a.inputs / kStep;
    const auto weights = [&](int i) {  // outputs past the end are read as others, in vain
        return static_cast<const T*>(a.weight) + int64_t{min(output + g + i, a.outputs - 1)} * a.inputs + t * kVec;
    };

    uint4 held[kDepth][2];
    const T* const rows_of[2] = {weights(0), weights(8)};
    const auto load = [&](uint4 (&to)[2], int step) {
#pragma unroll
        for (int i = 0; i < 2; i++) to[i] = load_weights<16>(rows_of[i] + step * kStep);
    };
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
        held[d][0] = held[d][1] = make_uint4(0, 0, 0, 0);
        if (d < whole) load(held[d], d);
    }
    let_next_start();
    wait_for_previous();

    float sums[kTensor ? 1 : kColumns][kTensor ? 4 : 2] = {};
    const auto multiply = [&](const uint4 (&now)[2], const SharedX<T>& x, int k) {
        if constexpr (kTensor) {
            const uint32_t a0[4] = {now[0].x, now[1].x, now[0].y, now[1].y};
            const uint32_t a1[4] = {now[0].z, now[1].z, now[0].w, now[1].w};
            uint4 v = make_uint4(0, 0, 0, 0);
            if (g < rows) v = *reinterpret_cast<const uint4*>(x.values + g * x.stride + k);
            multiply_add<T>(sums[0], a0, v.x, v.y);
            multiply_add<T>(sums[0], a1, v.z, v.w);
        } else {
            T w[2][kVec];
            memcpy(w, now, sizeof(w));
#pragma unroll
            for (int r = 0; r < kColumns; r++) {
                if (r >= rows) break;
#pragma unroll
                for (int i = 0; i < kVec; i++) {
                    const float v = x.one(r, k + i);
                    sums[r][0] = fmaf(v, to_float(w[0][i]), sums[r][0]);
                    sums[r][1] = fmaf(v, to_float(w[1][i]), sums[r][1]);
                }
            }
        }
    };
    const Layout layout(a, sizeof(T), sizeof(T), 0, 0);
    const SharedX<T> x = prepare<T, T, kHeadWarps>(a, layout, shared, nullptr, first, rows);
    int from = 0;
#pragma unroll 1
    for (; from + 2 * kDepth - 1 < whole; from += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            multiply(held[d], x, (from + d) * kStep + t * kVec);
            load(held[d], from + d + kDepth);
        }
    }
#pragma unroll 1
    for (; from < whole; from += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            if (from + d < whole) multiply(held[d], x, (from + d) * kStep + t * kVec);
            if (from + d + kDepth < whole) load(held[d], from + d + kDepth);
        }
    }
    if (a.inputs % kStep != 0) {  // inputs that are no whole step
        uint4 last[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (whole * kStep + t * kVec < a.inputs) load(last, whole);
        multiply(last, x, whole * kStep + t * kVec);
    }
    const auto put = [&](int row, int i, float v) {
        const int m = output + g + 8 * i;
        if (row < rows && m < a.outputs) static_cast<float*>(a.y)[int64_t{first + row} * a.outputs + m] = v;
    };
    if constexpr (kTensor) {
#pragma unroll
        for (int i = 0; i < 4; i++) put(2 * t + i % 2, i / 2, sums[0][i]);
    } else {
#pragma unroll
        for (int r = 0; r < kColumns; r++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float v = sums[r][i];
                v += __shfl_xor_sync(~0u, v, 1);
                v += __shfl_xor_sync(~0u, v, 2);
                if (t == 0) put(r, i, v);
            }
        }
    }
}

}  // namespace step
}  // namespace mamba
