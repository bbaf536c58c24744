// x_proj of some rows, of the batch or of a short prompt, for compute capability 9.0: y = x W, few outputs of many inputs, 16
// bits.
//
// It is short, and what it takes is the way: a block's inputs are all on their way at once, those of a warp to where no other
// reads, so that each begins when its own are there; and sums meet twice, those of a block's warps in its shared memory, and
// those of the blocks of a cluster, which share outputs and split inputs, in that of the block that finishes a row.
#pragma once

#include "bulk_copy.cuh"
#include "step_linear.cuh"

namespace mamba {
namespace step {

constexpr int kLowWarps = 8, kLowSplit = 8, kLowOutputs = 32;  // of a block; blocks and outputs of a cluster
constexpr int kLowThreads = 32 * kLowWarps;
constexpr int kLowShared = 192 << 10, kLowSpare = 1024;  // bytes of shared memory that are asked for; that never are

// Of up to 16 ROW_TILES rows.
template <int ROW_TILES>
struct LowTile {
    static constexpr int kRows = 16 * ROW_TILES, kShare = kRows / kLowSplit;  // of a cluster; that a block finishes
    static constexpr int kQuads = kLowOutputs / 4;
    static constexpr int kWeightPitch = 2 * kLowOutputs + 16;   // bytes
    static constexpr int kSumPitch = kLowOutputs + 8;           // floats: rows fall on different banks
    static constexpr int kReceived = 4 * kLowSplit * kShare * kLowOutputs;

    // Inputs of a warp: a multiple of 16.
    static __host__ __device__ int inputs(const Linear& a) {
        return (a.inputs + 16 * kLowWarps * kLowSplit - 1) / (16 * kLowWarps * kLowSplit) * 16;
    }
    static __host__ __device__ int x_pitch(int inputs) { return 2 * inputs + 16; }
    // Bytes of a warp: its weights and its x, and then its sums in their place.
    static __host__ __device__ int of_warp(int inputs) {
        const int ring = inputs * kWeightPitch + kRows * x_pitch(inputs), sums = 4 * kRows * kSumPitch;
        return ring > sums ? ring : sums;
    }
    static __host__ __device__ int bytes(int inputs) { return kReceived + kLowWarps * of_warp(inputs); }
};

// Blocks: clusters of kLowSplit, one for so many outputs; times parts of the rows.
template <typename T, int ROW_TILES>
__global__ void __launch_bounds__(kLowThreads, 1) x_proj_kernel(const Linear a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using Own = LowTile<ROW_TILES>;
    let_next_start();  // the scan, whose first blocks then read states while this reads x
    extern __shared__ float4 memory[];
    __shared__ uint64_t received_bar;
    char* const shared = reinterpret_cast<char*>(memory);
    float* const received = reinterpret_cast<float*>(shared);  // [kLowSplit, kShare, kLowOutputs]
    const uint32_t bar = shared_address(&received_bar);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % kLowSplit, output = blockIdx.x / kLowSplit * kLowOutputs;
    const int first = blockIdx.y * Own::kRows, rows = min(Own::kRows, a.batch - first);
    const int count = Own::inputs(a), input = (rank * kLowWarps + warp) * count, pitch = Own::x_pitch(count);
    char* const of_warp = shared + Own::kReceived + warp * Own::of_warp(count);
    const uint32_t weights = shared_address(of_warp), xs = weights + count * Own::kWeightPitch;

    // Lanes: 8 rows of 4 pieces of 16 bytes. What is not there is zeros.
    const int line = lane / 4, piece = lane % 4;
    const T* const weight = static_cast<const T*>(a.weight) + output + 8 * piece;
    const bool has_outputs = output + 8 * piece < a.outputs;
#pragma unroll 4
    for (int k = line; k < count; k += 8) {
        const bool there = has_outputs && input + k < a.inputs;
        copy_async(weights + k * Own::kWeightPitch + 16 * piece, there ? weight + int64_t{input + k} * a.outputs : weight,
                   there ? 16 : 0);
    }
    if (threadIdx.x == 0) {
        bar_init(bar, 1);
        bars_are_there();
        const int own = min(Own::kShare, rows - rank * Own::kShare);
        bar_expect(bar, 4 * (kLowSplit - 1) * max(own, 0) * kLowOutputs);
    }
    // Of eight rows those behind the last are copies of it, whose sums nobody reads; further rows are left as they are. Inputs
    // behind the last are copies of the last eight: their weights are zeros.
    const T* x_of[Own::kRows / 8];
#pragma unroll
    for (int i = 0; i < Own::kRows / 8; i++) {
        x_of[i] = static_cast<const T*>(a.x) + int64_t{first + min(8 * i + line, rows - 1)} * a.x_stride;
        asm volatile("" : "+l"(x_of[i]));  // now, not when the kernel ahead has ended
    }
    const uint32_t x_to = xs + line * pitch;
    cluster_arrive();
    wait_for_previous();
#pragma unroll 1
    for (int k = 8 * piece; k < count; k += 32) {
        const int at = min(input + k, (a.inputs - 1) / 8 * 8);
#pragma unroll
        for (int i = 0; i < Own::kRows / 8; i++) {
            if (8 * i < rows) copy_async_whole<16>(x_to + 8 * i * pitch + 2 * k, x_of[i] + at);
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();

    float sums[ROW_TILES][kLowOutputs / 8][4] = {};
    const uint32_t x_row = xs + lane % 16 * pitch + lane / 16 * 16;
    const uint32_t w_row = weights + lane % 16 * Own::kWeightPitch + lane / 16 * 16;
#pragma unroll 2
    for (int k = 0; k < count; k += 16) {
        uint32_t left[ROW_TILES][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) load_matrices(left[i], x_row + 16 * i * pitch + 2 * k);
#pragma unroll
        for (int n = 0; n < kLowOutputs / 8; n += 2) {
            uint32_t right[4];
            load_matrices_transposed(right, w_row + k * Own::kWeightPitch + 16 * n);
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                multiply_add<T>(sums[i][n], left[i], right[0], right[1]);
                multiply_add<T>(sums[i][n + 1], left[i], right[2], right[3]);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int n = 0; n < kLowOutputs / 8; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = 16 * i + lane / 4 + 8 * half;
                *reinterpret_cast<float2*>(reinterpret_cast<float*>(of_warp) + row * Own::kSumPitch + 8 * n + lane % 4 * 2) =
                    make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
            }
        }
    }
    cluster_wait();  // for its blocks' barriers; and for this block's sums
    __syncthreads();

    // A thread has four neighbouring outputs of a row.
    const int row = threadIdx.x / Own::kQuads, column = threadIdx.x % Own::kQuads * 4;
    if (row >= rows) return;
    Pack<float, 4> own{};
#pragma unroll
    for (int w = 0; w < kLowWarps; w++) {
        const float* const from = reinterpret_cast<const float*>(shared + Own::kReceived + w * Own::of_warp(count));
        const Pack<float, 4> part = load<float, 4>(from + row * Own::kSumPitch + column);
#pragma unroll
        for (int i = 0; i < 4; i++) own.v[i] += part.v[i];
    }
    const int block = row / Own::kShare;
    const auto place = [&](int from) { return received + (from * Own::kShare + row % Own::kShare) * kLowOutputs + column; };
    if (block != rank) {
        send_four(address_in(block, shared_address(place(rank))), address_in(block, bar), own.v);
        return;
    }
    store(place(rank), own);
    bar_wait_of_cluster(bar, 0);
    Pack<float, 4> all{};
#pragma unroll
    for (int s = 0; s < kLowSplit; s++) {
        const Pack<float, 4> part = load<float, 4>(place(s));
#pragma unroll
        for (int i = 0; i < 4; i++) all.v[i] += part.v[i];
    }
    if (output + column >= a.outputs) return;
    Pack<T, 4> y;
#pragma unroll
    for (int i = 0; i < 4; i++) y.v[i] = from_float<T>(all.v[i]);
    store(static_cast<T*>(a.y) + int64_t{first + row} * a.outputs + output + column, y);
#else
    __trap();  // step.cu launches it only where blocks have clusters
#endif
}

}  // namespace step
}  // namespace mamba
