// A block's part of a matrix product of few rows: y = x W for 8, 4 or 2 outputs a lane, which tensor cores multiply.
//
// Bound by the weights, so made around how they are read. W is [inputs, outputs], the order of the ONNX file. A warp takes
// 16 inputs at once: lane (g, t) = (lane / 4, lane % 4) reads, of inputs 4 t to 4 t + 3, BYTES of outputs that follow those
// of lane (g - 1, t): whole sectors, straight into registers. Two inputs of two outputs that lie in two registers become
// the operand of mma.m16n8k16 by two byte permutations, for in what order inputs are summed, and which output is which row
// of the tile, is ours to choose. The other operand is x, 8 rows of the batch in its columns, so 1 row costs what 8 do.
// The warps of a block share its outputs and take turns along the inputs; their sums meet in shared memory.
//
// What a thread has in flight waits in registers, or in shared memory: a thread copies there what it alone reads, so no
// barrier is needed. H200, 4096 to 2048 values, 8 bytes a lane: 7.3 us instead of 10.0; but 2048 to 8192 values, 16 bytes a
// lane: 22.7 instead of 13.8. Asking the L2 cache for what comes later cost more than it gained (17.3 us became 20.8).
//
// Float32 weights, and compute capability below 8.0, go the same ways with multiply-adds.
#pragma once

#include "step_common.cuh"
#include "tensor_core.cuh"

namespace mamba {
namespace step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <typename T>
constexpr bool kTensorCores = sizeof(T) == 2;
#else
template <typename T>
constexpr bool kTensorCores = false;
#endif

constexpr int kColumns = 8;  // rows of the batch that a tensor core takes at once

// How many of WARPS warps a row has to itself, as a power of two.
template <int WARPS>
__device__ __forceinline__ int log_warps_of_row(int rows) {
    return (2 * rows <= WARPS) + (4 * rows <= WARPS) + (8 * rows <= WARPS) + (16 * rows <= WARPS);
}

// Elements from one row of x to the next in shared memory: rows fall on different banks.
inline __host__ __device__ int shared_stride(int inputs) { return (inputs + 63) / 64 * 64 + 16; }

template <int BYTES>
__device__ __forceinline__ typename Word<BYTES>::type load_weights(const void* from);
template <>
__device__ __forceinline__ uint4 load_weights<16>(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
template <>
__device__ __forceinline__ uint2 load_weights<8>(const void* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
template <>
__device__ __forceinline__ uint32_t load_weights<4>(const void* from) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

// x in shared memory, [rows, stride], zeros behind the inputs.
template <typename T>
struct SharedX {
    const T* values;
    int stride, rows;

    // Four inputs of row g.
    __device__ __forceinline__ uint2 four(int k) const {
        const int row = threadIdx.x % 32 / 4;
        return row < rows ? *reinterpret_cast<const uint2*>(values + row * stride + k) : make_uint2(0, 0);
    }
    __device__ __forceinline__ float one(int row, int k) const { return to_float(values[row * stride + k]); }
};

// WARPS warps along the inputs. RING: what is in flight waits in shared memory. DEPTH: steps, of 16 inputs, that a warp has
// in flight, where inputs are so few that it hardly has more; or 0: as many as were fastest.
template <typename T, int BYTES, int WARPS, bool RING = false, int DEPTH = 0>
struct Product {
    static constexpr int kVec = BYTES / sizeof(T), kOutputs = 8 * kVec;
    static constexpr int kFastest = BYTES == 16 ? (kOnHopper ? 3 : 2) : BYTES == 4 || RING ? 8 : 6;
    static constexpr int kDepth = DEPTH > 0 ? DEPTH : kFastest;
    static constexpr int kRound = kDepth * WARPS;  // steps of all warps until a warp is where it was
    static constexpr int kThreads = 32 * WARPS;
    static constexpr int kRingBytes = RING ? kDepth * 4 * BYTES * kThreads : 0;
    using Bits = typename Word<BYTES>::type;
    static constexpr bool kTensor = kTensorCores<T>, kFew = DEPTH > 0;
    static_assert(!kFew || !RING, "with few inputs all are in registers");

    const T *column, *next;  // of this lane: the first input, and what is to be read next
    int64_t stride, far;     // from an input to the next, from a warp's step to its next
    int inputs, steps, warp;  // whole steps
    char* ring;               // of this thread
    Bits held[RING ? 1 : kDepth][4];
    float sums[kTensor ? kVec / 2 : kColumns][kTensor ? 4 : kVec];

    // Of kOutputs outputs from `first` on; those past the end are read as others, in vain.
    __device__ __forceinline__ Product(const T* weights, int inputs, int outputs, int first, int warp, char* ring)
        : stride(outputs), far(int64_t{16 * WARPS} * outputs), inputs(inputs), steps(inputs / 16), warp(warp),
          ring(ring + BYTES * threadIdx.x) {
        const int lane = threadIdx.x % 32;
        column = weights + min(first + lane / 4 * kVec, outputs - kVec);
        next = column + int64_t{16 * warp + lane % 4 * 4} * stride;
#pragma unroll
        for (auto& row : sums) {
#pragma unroll
            for (float& v : row) v = 0.0f;
        }
    }

    // Begins to read.
    __device__ __forceinline__ void begin() { begin(warp); }
    __device__ __forceinline__ void begin(int step) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            if (step + d * WARPS < steps) load(d);
            commit();
        }
    }

    // This thread's next weights, to place d.
    __device__ __forceinline__ void load(int d) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (!RING) {
                held[d][j] = load_weights<BYTES>(next + j * stride);
            } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
                copy_async_whole<BYTES>(shared_address(ring + (4 * d + j) * BYTES * kThreads), next + j * stride);
#endif
            }
        }
        next += far;
    }
    __device__ __forceinline__ void commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        if constexpr (RING) copy_async_commit();
#endif
    }
    __device__ __forceinline__ void take(Bits (&now)[4], int d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        if constexpr (RING) copy_async_wait<kDepth - 1>();
#endif
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (!RING) {
                now[j] = held[d][j];
            } else {
                now[j] = *reinterpret_cast<const Bits*>(ring + (4 * d + j) * BYTES * kThreads);
            }
        }
    }

    // All of x.
    __device__ __forceinline__ void run(const SharedX<T>& x) {
        int step = warp;
#pragma unroll 1
        for (; !kFew && step + (2 * kDepth - 1) * WARPS < steps; step += kRound) {
#pragma unroll
            for (int d = 0; d < kDepth; d++) {
                Bits now[4];
                take(now, d);
                multiply(now, x, 16 * (step + d * WARPS));
                load(d);
                commit();
            }
        }
#pragma unroll 1
        for (; step < steps; step += kRound) {
            uint2 given[kDepth];  // of x, before anything is waited for
            if constexpr (kTensor) {
#pragma unroll
                for (int d = 0; d < kDepth; d++) given[d] = x.four(16 * min(step + d * WARPS, steps - 1) + lane_k());
            }
#pragma unroll
            for (int d = 0; d < kDepth; d++) {
                if (step + d * WARPS < steps) {
                    Bits now[4];
                    take(now, d);
                    if constexpr (kTensor) {
                        multiply_given(now, given[d]);
                    } else {
                        multiply(now, x, 16 * (step + d * WARPS));
                    }
                    if (!kFew && step + d * WARPS + kRound < steps) load(d);
                    commit();
                }
            }
            if (kFew && step + kRound < steps) begin(step + kRound);
        }
        finish(x);
    }

    static __device__ __forceinline__ int lane_k() { return threadIdx.x % 4 * 4; }

    // Inputs that are no whole step, where x has zeros behind them.
    __device__ __forceinline__ void finish(const SharedX<T>& x) {
        if (inputs % 16 == 0 || steps % WARPS != warp) return;
        Bits last[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int k = min(16 * steps + lane_k() + j, inputs - 1);
            last[j] = load_weights<BYTES>(column + k * stride);
        }
        multiply(last, x, 16 * steps);
    }

    __device__ __forceinline__ void multiply_given(const Bits (&now)[4], uint2 given) {
        uint32_t w[4][BYTES / 4];
        memcpy(w, now, sizeof(w));
#pragma unroll
        for (int p = 0; p < BYTES / 4; p++) {
            const uint32_t a[4] = {__byte_perm(w[0][p], w[1][p], 0x5410), __byte_perm(w[0][p], w[1][p], 0x7632),
                                   __byte_perm(w[2][p], w[3][p], 0x5410), __byte_perm(w[2][p], w[3][p], 0x7632)};
            multiply_add<T>(sums[p], a, given.x, given.y);
        }
    }

    __device__ __forceinline__ void multiply(const Bits (&now)[4], const SharedX<T>& x, int k) {
        k += lane_k();
        if constexpr (kTensor) {
            multiply_given(now, x.four(k));
        } else {
            T w[4][kVec];
            memcpy(w, now, sizeof(w));
#pragma unroll
            for (int r = 0; r < kColumns; r++) {
                if (r >= x.rows) break;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float v = x.one(r, k + j);
#pragma unroll
                    for (int i = 0; i < kVec; i++) sums[r][i] = fmaf(v, to_float(w[j][i]), sums[r][i]);
                }
            }
        }
    }

    // To [WARPS, rows, kOutputs] in shared memory.
    __device__ __forceinline__ void put(float* to, int rows) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        to += warp * rows * kOutputs + g * kVec;
        if constexpr (kTensor) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int row = 2 * t + c;
                if (row >= rows) continue;
#pragma unroll
                for (int p = 0; p < kVec / 2; p++) {
                    *reinterpret_cast<float2*>(to + row * kOutputs + 2 * p) = make_float2(sums[p][c], sums[p][c + 2]);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < kColumns; r++) {
                if (r >= rows) break;
#pragma unroll
                for (int i = 0; i < kVec; i++) {
                    float v = sums[r][i];
                    v += __shfl_xor_sync(~0u, v, 1);
                    v += __shfl_xor_sync(~0u, v, 2);
                    if (t == 0) to[r * kOutputs + i] = v;
                }
            }
        }
    }

    // What the warps put there of place i of [rows, kOutputs].
    static __device__ __forceinline__ float sum(const float* from, int rows, int i) {
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += from[w * rows * kOutputs + i];
        return v;
    }

    // From tensor cores and of 8 bytes, to [rows, WARPS, OUTPUTS] in shared memory, `to` being where this product's outputs
    // begin: pairs change places within 32 values, so that rows fall on different banks. sum_of_pair() finds them.
    template <int OUTPUTS>
    __device__ __forceinline__ void put_spread(float* to, int rows) {
        static_assert(kTensor && kVec == 4, "half a warp's lanes, which write at once, fill the banks");
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        to += warp * OUTPUTS;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int row = 2 * t + c;
            if (row >= rows) break;
#pragma unroll
            for (int p = 0; p < kVec / 2; p++) {
                const float(&sum)[4] = sums[p];
                const int place = row * WARPS * OUTPUTS + ((kVec * g + 2 * p) ^ spread(2 * t));
                *reinterpret_cast<float2*>(to + place) = make_float2(sum[c], sum[c + 2]);
            }
        }
    }

    // The two bits of t in what the two of g, and p, leave free.
    static __device__ __forceinline__ int spread(int row) { return (row & 2) | (row & 4) << 2; }

    // What the warps put there of outputs i and i + 1 of a row, which begins at `from`; i is even.
    template <int OUTPUTS>
    static __device__ __forceinline__ float2 sum_of_pair(const float* from, int row, int i) {
        from += i ^ spread(row);
        float2 v = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 part = *reinterpret_cast<const float2*>(from + w * OUTPUTS);
            v.x += part.x;
            v.y += part.y;
        }
        return v;
    }
};

}  // namespace step
}  // namespace mamba
