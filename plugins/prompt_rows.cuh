// What the whole model needs between its products and scans: rows that are looked up, normed, gated, or given a bias. Bound
// by memory; a row is read once and stays in registers.
#pragma once

#include "pending.cuh"

namespace mamba {
namespace model {

constexpr int kHeldValues = 32;      // of a row that a thread of norm_kernel has at most
constexpr int kFewValues = 8;        // or, up to so many of all rows, which then is faster
constexpr int kManyValues = 4 << 20;
constexpr int kSums = 4;             // in which a product of few rows may come
constexpr int kMostNormWarps = 32;   // of a row
constexpr int kRowThreads = 128, kPartWarps = 4;

// hidden[row] = embedding[ids[row]]; an id out of range names the nearest that is not. With marks (pending.cuh), of a single
// token a row, each becomes that of this step.
template <typename T, int VEC>
__global__ void __launch_bounds__(kRowThreads) embed_rows_kernel(
    const int32_t* ids, const T* embedding, float* hidden, int vocab, int width, uint32_t* marks, const int32_t* seq_lens,
    int mark_row) {
    const int64_t row = blockIdx.x;
    if (marks != nullptr && threadIdx.x == 0) {
        uint32_t& mark = marks[row * mark_row];
        mark = pending::next_mark(mark, seq_lens[row] > 0, static_cast<int>(row));
    }
    const int64_t id = min(max(ids[row], 0), vocab - 1);
    for (int c = threadIdx.x * VEC; c < width; c += kRowThreads * VEC) {
        float values[VEC];
        Neighbours<T, VEC> in;
        in.load(embedding + id * width + c);
        in.get(values);
        constexpr int kPack = VEC < 4 ? VEC : 4;
#pragma unroll
        for (int i = 0; i < VEC; i += kPack) {
            Pack<float, kPack> out;
            memcpy(&out, values + i, sizeof(out));
            store(hidden + row * width + c + i, out);
        }
    }
}

#ifndef MAMBA_KERNELS_ONLY

// The rows that a call's tokens name, [B, L, d]; and the marks of a step that may leave them pending.
template <typename T>
cudaError_t embed(const MambaModel& m, float* hidden, bool defers, cudaStream_t stream) {
    constexpr int kVec = 16 / sizeof(T);
    const bool vectors = m.width % kVec == 0 && is_aligned(m.embedding, 16);
    const auto kernel = vectors ? embed_rows_kernel<T, kVec> : embed_rows_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(int64_t{m.batch} * m.length), kRowThreads, 0, stream>>>(
        m.input_ids, static_cast<const T*>(m.embedding), hidden, m.vocab, m.width,
        defers ? reinterpret_cast<uint32_t*>(m.pending_out) : nullptr, m.seq_lens, m.pending_row);
    return cudaGetLastError();
}

#endif

// y = norm(x silu(z)) weight of each of `groups` parts of a row; where there are sums, x is first what it and they make.
struct Norm {
    const void* x;            // [rows, groups, width] X, x_row apart
    const void* z;            // [rows, groups, width] T, z_row apart; null: no gate
    const float* weight;      // [groups, width]
    void* y;                  // [rows, groups, width] T; may be x
    const float* sums;        // [kSums, sum_rows, width] or null
    float* total;             // [rows, width]: x and them, may be x; only where there are sums, and one group
    const int32_t* seq_lens;  // null; or x is [rows, length, width], and of each its last token that is used, or zeros
    int64_t rows, sum_rows;
    int32_t x_row, z_row, length, groups, width;
    float eps;                // negative: no norm, and no weight
};

// A row's threads along x, rows along y. VEC: values of an access; all rows begin at multiples of as many. VALUES: of a row
// that a thread has; where they are few it reads their weights before the kernel ahead has ended.
template <typename T, typename X, int VEC, int VALUES>
__global__ void __launch_bounds__(32 * kMostNormWarps) norm_kernel(const Norm a) {
    constexpr int kHeld = VALUES / VEC;
    constexpr bool kEarly = VALUES == kFewValues;
    __shared__ float partial[kMostNormWarps];
    const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, row = item / a.groups;
    const int group = static_cast<int>(item % a.groups), first = group * a.width;
    const int step = static_cast<int>(blockDim.x) * VEC, begin = static_cast<int>(threadIdx.x) * VEC;
    const bool exists = row < a.rows;
    Neighbours<float, VEC> weights[kEarly ? kHeld : 1];
    if (kEarly && a.eps >= 0.0f) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            if (begin + i * step < a.width) weights[kEarly ? i : 0].load(a.weight + first + begin + i * step);
        }
    }
    let_next_start();
    wait_for_previous();
    int64_t from = row;
    bool used = exists;
    if (a.seq_lens != nullptr && exists) {
        const int last = min(a.seq_lens[row], a.length) - 1;
        used = last >= 0;
        from = row * a.length + last;
    }
    const X* const x = static_cast<const X*>(a.x) + from * a.x_row + first;
    const T* const z = static_cast<const T*>(a.z) + from * a.z_row + first;
    float values[kHeld][VEC] = {};
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int c = begin + i * step;
        if (used && c < a.width) {
            Neighbours<X, VEC> in;
            in.load_written(x + c);
            in.get(values[i]);
        }
    }
    if constexpr (sizeof(X) == 4) {
        if (a.sums != nullptr && used) {
            const auto column = [&](int i) { return begin + i * step; };
            const auto read = [&](int i, Neighbours<float, VEC>(&in)[kSums]) {
#pragma unroll
                for (int s = 0; s < kSums; s++) in[s].load_written(a.sums + (s * a.sum_rows + from) * a.width + column(i));
            };
            const auto add = [&](int i, const Neighbours<float, VEC>(&in)[kSums]) {
                Pack<float, VEC> out;
#pragma unroll
                for (int s = 0; s < kSums; s++) {
                    float part[VEC];
                    in[s].get(part);
#pragma unroll
                    for (int v = 0; v < VEC; v++) out.v[v] = values[i][v] += part[v];
                }
                store(a.total + from * a.width + column(i), out);
            };
            if constexpr (kEarly && VEC > 1) {
                Neighbours<float, VEC> in[kHeld][kSums];  // all on their way at once, where they are few
#pragma unroll
                for (int i = 0; i < kHeld; i++) {
                    if (column(i) >= a.width) continue;
                    read(i, in[i]);
                }
#pragma unroll
                for (int i = 0; i < kHeld; i++) {
                    if (column(i) >= a.width) continue;
                    add(i, in[i]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < kHeld; i++) {
                    if (column(i) >= a.width) continue;
                    Neighbours<float, VEC> in[kSums];
                    read(i, in);
                    add(i, in);
                }
            }
        }
    }
    if (a.z != nullptr) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int c = begin + i * step;
            if (used && c < a.width) {
                float gate[VEC];
                Neighbours<T, VEC> in;
                in.load_written(z + c);
                in.get(gate);
#pragma unroll
                for (int v = 0; v < VEC; v++) values[i][v] *= silu(gate[v]);
            }
        }
    }
    float scale = 1.0f;
    if (a.eps >= 0.0f) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
#pragma unroll
            for (int v = 0; v < VEC; v++) squares = fmaf(values[i][v], values[i][v], squares);
        }
        squares = sum_of_warp(squares);
        const int warps = blockDim.x / 32;
        if (warps > 1) {
            float* const own = partial + threadIdx.y * warps;
            if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = squares;
            __syncthreads();
            squares = 0.0f;
            for (int w = 0; w < warps; w++) squares += own[w];
        }
        scale = rsqrtf(squares / static_cast<float>(a.width) + a.eps);
    }
    if (!exists) return;
    T* const y = static_cast<T*>(a.y) + item * a.width;
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
        const int c = begin + i * step;
        if (c >= a.width) continue;
        if (a.eps >= 0.0f) {
            float weight[VEC];
            if (!kEarly) weights[0].load(a.weight + first + c);
            weights[kEarly ? i : 0].get(weight);
#pragma unroll
            for (int v = 0; v < VEC; v++) values[i][v] *= scale * weight[v];
        }
        Pack<T, VEC> out;
#pragma unroll
        for (int v = 0; v < VEC; v++) out.v[v] = from_float<T>(values[i][v]);
        store(y + c, out);
    }
}

// Falcon-Mamba: norms of the parts of a row of `low`, R, N and N values, each by itself and where it stands. A warp a row.
template <typename T>
__global__ void __launch_bounds__(32 * kPartWarps) part_norms_kernel(T* low, int64_t rows, int rank, int states, float eps) {
    const int64_t row = int64_t{blockIdx.x} * kPartWarps + threadIdx.x / 32;
    if (row >= rows) return;
    const int lane = threadIdx.x % 32;
    T* part = low + row * (rank + 2 * states);
    for (int i = 0; i < 3; i++) {
        const int width = i == 0 ? rank : states;
        float squares = 0.0f;
        for (int c = lane; c < width; c += 32) {
            const float v = to_float(part[c]);
            squares = fmaf(v, v, squares);
        }
        const float scale = rsqrtf(sum_of_warp(squares) / static_cast<float>(width) + eps);
        for (int c = lane; c < width; c += 32) part[c] = from_float<T>(to_float(part[c]) * scale);
        part += width;
    }
}

// y[row] = bias, or that added.
template <typename T, typename Y, bool ADD>
__global__ void __launch_bounds__(kRowThreads) bias_kernel(const T* bias, Y* y, int width) {
    Y* const row = y + int64_t{blockIdx.x} * width;
    for (int c = threadIdx.x; c < width; c += kRowThreads) {
        const float v = to_float(load_constant(bias + c));
        row[c] = from_float<Y>(ADD ? to_float(row[c]) + v : v);
    }
}

}  // namespace model
}  // namespace mamba
