// The products of step_linear.cuh for a row or two of the batch and many inputs: multiply-adds, which keep up with the
// memory there, in blocks that are as many as multiprocessors, equal, and alone on theirs.
//
// A thread reads 16 bytes of weights at a time, straight into registers. Of weights [inputs, outputs] `lanes` threads side
// by side read those of an input for the block's outputs, the others those of the next inputs; their sums meet in shared
// memory. A norm over all inputs is not waited for: x times the norm's weights is multiplied, and the sum divided by the
// root mean square. How they are read decides; samples/results/step.txt, 12 to 16, has what was measured.
#pragma once

#include "step_linear.cuh"

namespace mamba {
namespace step {

constexpr int kRowWarps = 32, kMostLanes = 32;  // of a block

template <typename T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // weights that are read at once

template <typename T>
__device__ __forceinline__ void unpack_piece(const uint4& bits, float (&w)[kPiece<T>]) {
    if constexpr (sizeof(T) == 4) {
        memcpy(w, &bits, 16);
    } else {
        uint32_t pairs[4];
        memcpy(pairs, &bits, 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 v = unpack<T>(pairs[i]);
            w[2 * i] = v.x;
            w[2 * i + 1] = v.y;
        }
    }
}

template <int COUNT>
struct AtOnce {
    static constexpr int kCount = COUNT;
};

// x of ROWS rows, the whole batch, in shared memory, in float32, [ROWS, stride]; times the norm's weights, if there are any.
template <typename X, int ROWS>
struct RowInputs {
    static constexpr int kThreads = 32 * kRowWarps;
    float* const values;
    float* const squares;  // [ROWS, kRowWarps] sums
    const int stride;

    // Calls run(k, AtOnce) for this thread's inputs, so many of them at once.
    template <typename Run>
    __device__ __forceinline__ void own(const Linear& a, Run&& run) const {
        if (a.by_16) {
#pragma unroll 2
            for (int k = 4 * threadIdx.x; k < a.inputs; k += 4 * kThreads) run(k, AtOnce<4>{});
        } else {
            for (int k = threadIdx.x; k < a.inputs; k += kThreads) run(k, AtOnce<1>{});
        }
    }
    __device__ __forceinline__ bool in_one(const Linear& a) const { return a.norm_weight != nullptr && a.groups == 1; }

    // Before what kernels ahead made is there.
    __device__ __forceinline__ void begin(const Linear& a) const {
        if (!in_one(a)) return;
        own(a, [&](int k, auto at_once) {
            store(values + k, load_constant<float, decltype(at_once)::kCount>(a.norm_weight + k));
        });
    }
    __device__ __forceinline__ void fetch(const Linear& a) const {
        const bool one = in_one(a);
        float sums[ROWS] = {};
        own(a, [&](int k, auto at_once) {
            constexpr int kCount = decltype(at_once)::kCount;
            Pack<float, kCount> scale;
            if (one) scale = load<float, kCount>(values + k);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Pack<X, kCount> v = load<X, kCount>(static_cast<const X*>(a.x) + int64_t{r} * a.x_stride + k);
                Pack<float, kCount> to;
#pragma unroll
                for (int i = 0; i < kCount; i++) {
                    const float x = to_float(v.v[i]);
                    sums[r] = fmaf(x, x, sums[r]);
                    to.v[i] = one ? x * scale.v[i] : x;
                }
                store(values + r * stride + k, to);
            }
        });
        if (one) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                sums[r] = sum_of_warp(sums[r]);
                if (threadIdx.x % 32 == 0) squares[r * kRowWarps + threadIdx.x / 32] = sums[r];
            }
        }
        __syncthreads();
        if (a.norm_weight != nullptr && !one) {
            in_groups(a);
            __syncthreads();
        }
    }
    // Norms of groups, a warp each.
    __device__ __forceinline__ void in_groups(const Linear& a) const {
        const int lane = threadIdx.x % 32, size = a.group_size;
        for (int i = threadIdx.x / 32; i < a.groups * ROWS; i += kRowWarps) {
            const int g = i % a.groups;
            float* const x = values + i / a.groups * stride + g * size;
            float sum = 0.0f;
            for (int k = lane; k < size; k += 32) sum = fmaf(x[k], x[k], sum);
            const float scale = rsqrtf(sum_of_warp(sum) / size + a.eps);
            for (int k = lane; k < size; k += 32) x[k] *= scale * __ldg(a.norm_weight + g * size + k);
        }
    }
    // What the sums of products with row r are yet to be multiplied by.
    __device__ __forceinline__ float scale(const Linear& a, int r) const {
        if (!in_one(a)) return 1.0f;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kRowWarps; w++) sum += squares[r * kRowWarps + w];
        return rsqrtf(sum / a.inputs + a.eps);
    }
};

// Floats of shared memory from a row to the next: its x, in whose place sums of parts of the block meet.
inline __host__ __device__ int row_stride(int inputs, int threads) {
    return inputs > threads ? (inputs + 3) / 4 * 4 : threads;
}

// What is read ahead for the end, in shared memory, for registers are full of weights.
template <typename T>
struct RowEnd {
    Column<T> of;
    Around<T> around;
};

// Bytes of shared memory.
template <typename T>
__host__ __device__ int row_bytes(int inputs, int rows, int lanes) {
    constexpr int kThreads = 32 * kRowWarps;
    const int end = lanes * kPiece<T> * static_cast<int>(sizeof(RowEnd<T>));
    return rows * (4 * (row_stride(inputs, kThreads) + kThreads * kPiece<T>) + end);
}

// Weights [inputs, outputs], `lanes` pieces of an input's for a block.
template <typename T, typename X, int ROWS>
__global__ void __launch_bounds__(32 * kRowWarps) row_kernel(const Linear a, const int lanes) {
    constexpr int kVec = kPiece<T>, kThreads = 32 * kRowWarps;
    constexpr int kDepth = kOnHopper || ROWS == 1 ? 4 : 2;  // loads a thread has on their way
    extern __shared__ float4 memory[];
    __shared__ float squares[ROWS * kRowWarps];
    const int thread = threadIdx.x, stride = row_stride(a.inputs, kThreads);
    const RowInputs<X, ROWS> x{reinterpret_cast<float*>(memory), squares, stride};
    float* const partial = x.values + ROWS * stride;  // [ROWS, kThreads, kVec]
    RowEnd<T>* const ends = reinterpret_cast<RowEnd<T>*>(partial + ROWS * kThreads * kVec);  // [ROWS, tile]
    const int turns = kThreads / lanes, turn = thread / lanes, tile = lanes * kVec, column = blockIdx.x * tile;

    // Outputs past the end are read as others, in vain.
    const int64_t far = int64_t{turns} * a.outputs;
    const T* next = static_cast<const T*>(a.weight) + int64_t{turn} * a.outputs +
                    min(column + (thread - turn * lanes) * kVec, a.outputs - kVec);
    const int count = turn < turns ? (a.inputs - turn + turns - 1) / turns : 0;
    uint4 held[kDepth];
    const auto load = [&](uint4& to) {
        to = load_weights<16>(next);
        next += far;
    };
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
        if (d < count) load(held[d]);
    }
    x.begin(a);
    // A thread finishes an output of a row.
    const int row = thread / tile, of_block = thread - row * tile, m = column + of_block;
    if (row < ROWS) ends[thread].of = Column<T>(a, m, m < a.outputs);
    let_next_start();
    wait_for_previous();
    if (row < ROWS) ends[thread].around.read(a, ends[thread].of, row, true);
    x.fetch(a);

    float sums[ROWS][kVec] = {};
    const auto multiply = [&](const uint4& bits, int i) {
        float w[kVec];
        unpack_piece<T>(bits, w);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float v = x.values[r * stride + turn + i * turns];
#pragma unroll
            for (int j = 0; j < kVec; j++) sums[r][j] = fmaf(v, w[j], sums[r][j]);
        }
    };
    int i = 0;
#pragma unroll 1
    for (; i + 2 * kDepth - 1 < count; i += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            multiply(held[d], i + d);
            load(held[d]);
        }
    }
#pragma unroll 1
    for (; i < count; i += kDepth) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            if (i + d < count) multiply(held[d], i + d);
            if (i + d + kDepth < count) load(held[d]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int j = 0; j < kVec; j += 4) {
            *reinterpret_cast<float4*>(partial + (r * kThreads + thread) * kVec + j) =
                make_float4(sums[r][j], sums[r][j + 1], sums[r][j + 2], sums[r][j + 3]);
        }
    }
    __syncthreads();
    // In two steps: `parts` sums of an output, then theirs.
    const int parts = min(kThreads / tile, 16);
    if (row < parts) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float v = 0.0f;
#pragma unroll 4
            for (int t = row; t < turns; t += parts) v += partial[r * kThreads * kVec + t * tile + of_block];
            x.values[r * stride + thread] = v;
        }
    }
    __syncthreads();
    if (row < ROWS) {
        float v = 0.0f;
#pragma unroll 4
        for (int p = 0; p < parts; p++) v += x.values[row * stride + p * tile + of_block];
        ends[thread].around.finish(a, ends[thread].of, row, v * x.scale(a, row));
    }
}

constexpr int kRowHeadWarps = 16, kRowHeadOutputs = 8;  // of a block, at most; of each

// The head for one row: weights [outputs, inputs], of which a warp takes 32 pieces of each of the block's outputs at once.
template <typename T>
__global__ void __launch_bounds__(32 * kRowHeadWarps) row_head_kernel(const Linear a) {
    constexpr int kVec = kPiece<T>, kOutputs = kRowHeadOutputs;
    __shared__ float partial[kRowHeadWarps][kOutputs + 1];  // the last: squares
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, output = blockIdx.x * kOutputs;
    const float* const x = static_cast<const float*>(a.x);
    int k = (warp * 32 + lane) * kVec;
    uint4 held[kOutputs];
    float scale[kVec];
    const auto load = [&] {
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
            held[o] = make_uint4(0, 0, 0, 0);
            if (k < a.inputs) {
                const int64_t m = min(output + o, a.outputs - 1);  // past the end as another, in vain
                held[o] = load_weights<16>(static_cast<const T*>(a.weight) + m * a.inputs + k);
            }
        }
#pragma unroll
        for (int i = 0; i < kVec; i++) scale[i] = k < a.inputs ? __ldg(a.norm_weight + k + i) : 0.0f;
    };
    load();
    let_next_start();
    wait_for_previous();
    float sums[kOutputs] = {}, squares = 0.0f;
    while (true) {
        float scaled[kVec];
#pragma unroll
        for (int i = 0; i < kVec; i++) {
            const float v = k < a.inputs ? x[k + i] : 0.0f;
            squares = fmaf(v, v, squares);
            scaled[i] = v * scale[i];
        }
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
            float w[kVec];
            unpack_piece<T>(held[o], w);
#pragma unroll
            for (int i = 0; i < kVec; i++) sums[o] = fmaf(scaled[i], w[i], sums[o]);
        }
        k += warps * 32 * kVec;
        if (k - lane * kVec >= a.inputs) break;
        load();
    }
    // Halves of the outputs go to halves of the lanes, until each has one.
#pragma unroll
    for (int n = kOutputs / 2, offset = 16; n > 0; n /= 2, offset /= 2) {
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float given = upper ? sums[i] : sums[i + n];
            sums[i] = (upper ? sums[i + n] : sums[i]) + __shfl_xor_sync(~0u, given, offset);
        }
    }
    constexpr int kLanes = 32 / kOutputs;  // that have the same output
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
    squares = sum_of_warp(squares);
    if (lane % kLanes == 0) partial[warp][lane / kLanes] = sums[0];
    if (lane == 0) partial[warp][kOutputs] = squares;
    __syncthreads();
    const int m = output + threadIdx.x;
    if (threadIdx.x >= kOutputs || m >= a.outputs) return;
    float sum = 0.0f, square = 0.0f;
    for (int w = 0; w < warps; w++) {
        sum += partial[w][threadIdx.x];
        square += partial[w][kOutputs];
    }
    static_cast<float*>(a.y)[m] = sum * rsqrtf(square / a.inputs + a.eps);
}

}  // namespace step
}  // namespace mamba
