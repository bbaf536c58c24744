// Matrix products of a decode step whose weights go through shared memory: y = x W for many rows of the batch, or for few
// outputs of many inputs, and what stands around it (step_linear.cuh); 16-bit weights, tensor cores.
//
// The outputs are dealt out over groups of blocks in tiles of 16, so evenly that every multiprocessor has as much to read.
// The blocks of a cluster share a group's outputs and split the inputs, so each holds its part of x whole; each finishes
// its share of the outputs, whose sums the others write into its shared memory. The same holds for the warps of a block:
// some lie side by side along the outputs, the others take turns along the inputs, 16 at a time (a step).
//
// A warp copies what it alone multiplies into a ring in shared memory, so nothing in the loop waits for other warps. The
// ring fills before the kernel ahead has ended; x follows when it has, in as few parts as there is room for. In the product
// x has the columns of mma.m16n8k16, 8 rows each.
#pragma once

#include "step_linear.cuh"

namespace mamba {
namespace step {

constexpr int kStreamWarps = 8, kStreamThreads = 32 * kStreamWarps;

// Steps a warp has in its ring.
constexpr int stream_depth(int tiles, int columns) { return columns == 8 ? 3 : columns == 4 ? 4 : tiles == 1 ? 12 : 8; }
// Bytes of an input's weights of a warp: 16 more than they are, so that inputs fall on different banks.
constexpr int stream_pitch(int tiles) { return 32 * tiles + 16; }
constexpr int stream_ring(int tiles, int columns) {
    return kStreamWarps * stream_depth(tiles, columns) * 16 * stream_pitch(tiles);
}

// How a product is cut.
struct Cut {
    int32_t split, along;  // blocks of a cluster, warps along the outputs
    int32_t share;         // outputs a block finishes
    int32_t part;          // steps of x in shared memory at once
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}
// To the place of `to` in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_pair(float* to, int block, float first, float second) {
    asm volatile(
        "{.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\nst.shared::cluster.v2.f32 [at], {%2, %3};}"
        :
        : "r"(shared_address(to)), "r"(block), "f"(first), "f"(second)
        : "memory");
}
#else  // a block is a cluster
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ void store_pair(float* to, int, float first, float second) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
#endif

// What one warp multiplies: TILES tiles of outputs, of which there are `units` halves, by 8 COLUMNS rows.
template <typename T, int TILES, int COLUMNS>
struct Stream {
    static constexpr int kDepth = stream_depth(TILES, COLUMNS), kPitch = stream_pitch(TILES), kPlace = 16 * kPitch;
    static constexpr int kUnits = 2 * TILES, kInputs = 32 / kUnits;  // of 8 outputs; inputs a warp copies at once
    static constexpr int kPairs = (COLUMNS + 1) / 2;

    const T* next;        // this lane's first weights of the step that is copied next
    int64_t far, rows;    // from there to those of the step after, and to kInputs inputs on
    int inputs, input;    // of the step, which is this lane's first
    int step, end, turn;  // the step that is copied next, the one behind the last, and how far the next one is
    bool exists;          // this lane's outputs
    uint32_t to, matrix;  // where this lane copies to, and where its row of the matrices is, in the first place
    int place = 0;        // bytes into the ring
    float sums[TILES][COLUMNS][4];

    __device__ __forceinline__ Stream(
        const Linear& a, int output, int units, int step, int end, int turn, uint32_t ring)
        : far(int64_t{16 * turn} * a.outputs), rows(int64_t{kInputs} * a.outputs), inputs(a.inputs), step(step),
          end(units > 0 ? end : 0), turn(turn) {
        const int lane = threadIdx.x % 32, unit = lane % kUnits;
        input = lane / kUnits;
        exists = unit < units;
        next = static_cast<const T*>(a.weight) + int64_t{16 * step + input} * a.outputs + output + 8 * unit;
        to = ring + input * kPitch + 16 * unit;
        matrix = ring + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (auto& tile : sums) {
#pragma unroll
            for (auto& values : tile) values[0] = values[1] = values[2] = values[3] = 0.0f;
        }
    }

    __device__ __forceinline__ void copy_next(int at) {
        if (step < end && exists) {
            const int left = inputs - 16 * step;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const uint32_t place = to + at + i * kInputs * kPitch;
                if (left >= 16) {
                    copy_async_whole<16>(place, next + i * rows);
                } else {  // zeros behind the last input
                    const bool there = input + i * kInputs < left;
                    copy_async(place, there ? next + i * rows : next - input * (rows / kInputs), there ? 16 : 0);
                }
            }
        }
        copy_async_commit();
        step += turn;
        next += far;
    }

    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int d = 0; d < kDepth; d++) copy_next(d * kPlace);
    }

    // The next step; x[j] is where this lane's row of matrices of inputs begins, in shared memory. Lanes whose rows there
    // are not have others, in vain.
    __device__ __forceinline__ void multiply(const uint32_t (&x)[kPairs], int offset) {
        copy_async_wait<kDepth - 1>();
        __syncwarp();
        uint32_t given[kPairs][4];
#pragma unroll
        for (int j = 0; j < kPairs; j++) load_matrices(given[j], x[j] + offset);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            uint32_t w[4];
            load_matrices_transposed(w, matrix + place + 32 * m);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                multiply_add<T>(sums[m][j], w, given[j / 2][j % 2 * 2], given[j / 2][j % 2 * 2 + 1]);
            }
        }
        __syncwarp();
        copy_next(place);
        place = place == (kDepth - 1) * kPlace ? 0 : place + kPlace;
    }
};

// x of the inputs of steps `from` to `end`, zeros behind the last, to [rows, stride]: this thread's copies begin.
template <typename T>
__device__ __forceinline__ void fetch_part(const Linear& a, int first, int rows, int from, int end, T* to, int stride) {
    const int units = 2 * (end - from), left = a.inputs - 16 * from;
    const int log_lanes = units <= 32 ? 5 : units <= 64 ? 6 : units <= 128 ? 7 : 8, own = threadIdx.x % (1 << log_lanes);
    for (int r = threadIdx.x >> log_lanes; r < rows; r += kStreamThreads >> log_lanes) {
        const T* const x = static_cast<const T*>(a.x) + int64_t{first + r} * a.x_stride + 16 * from;
#pragma unroll 2
        for (int u = own; u < units; u += 1 << log_lanes) {
            copy_async(shared_address(to + r * stride + 8 * u), 8 * u < left ? x + 8 * u : x, 8 * u < left ? 16 : 0);
        }
    }
}

#endif

// Blocks: clusters of cut.split one after the other, times parts of a.rows rows of the batch.
template <typename T, int TILES, int COLUMNS>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_kernel(const Linear a, const Cut cut) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    using Own = Stream<T, TILES, COLUMNS>;
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turns = kStreamWarps / cut.along;
    const int across = warp % cut.along, turn = warp / cut.along;  // this warp along the outputs and the inputs
    const int rank = blockIdx.x % cut.split, group = blockIdx.x / cut.split, groups = gridDim.x / cut.split;
    const int first = blockIdx.y * a.rows, rows = min(a.rows, a.batch - first), pairs = (rows + 1) / 2;
    const int all_tiles = (a.outputs + 15) / 16, steps = (a.inputs + 15) / 16;
    const int tile = group * all_tiles / groups, end_tile = (group + 1) * all_tiles / groups;
    const int begin = rank * steps / cut.split, end = (rank + 1) * steps / cut.split;
    const int behind = min(a.outputs, 16 * end_tile);  // the outputs of this group

    const int own_output = 16 * (tile + across * TILES), units = max(0, min(2 * TILES, (behind - own_output) / 8));
    Own own(a, own_output, units, begin + turn, end, turns, shared_address(shared + warp * Own::kDepth * Own::kPlace));
    own.begin();

    // The output this thread finishes, of two rows at once and then the pairs `at_once` on.
    const int m = 16 * tile + rank * cut.share + threadIdx.x % cut.share, at_once = kStreamThreads / cut.share;
    const int own_pair = threadIdx.x / cut.share;
    const Column<T> column(a, m, m < behind && own_pair < at_once);
    if (column.convolved && m % 4 == 0) {
        for (int p = own_pair; p < pairs; p += at_once) {
            const T* const state = static_cast<const T*>(a.conv_state);
            prefetch(state + Around<T>::state(a, column, first + 2 * p));
            prefetch(state + Around<T>::state(a, column, min(first + 2 * p + 1, a.batch - 1)));
        }
    }
    let_next_start();
    wait_for_previous();

    T* const x = reinterpret_cast<T*>(shared + kStreamWarps * Own::kDepth * Own::kPlace);
    const int stride = 16 * cut.part + 8;
    uint32_t of_lane[Own::kPairs];
#pragma unroll
    for (int j = 0; j < Own::kPairs; j++) {
        const int row = min(16 * j + lane / 16 * 8 + lane % 8, rows - 1);
        of_lane[j] = shared_address(x + row * stride + lane / 8 % 2 * 8);
    }
#pragma unroll 1
    for (int part = begin; part < end; part += cut.part) {
        const int until = min(part + cut.part, end);
        if (part > begin) __syncthreads();
        fetch_part<T>(a, first, rows, part, until, x, stride);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (units == 0) continue;
#pragma unroll 1
        for (int step = part + turn; step < until; step += turns) own.multiply(of_lane, 32 * (step - part));
    }

    // Sums: [blocks, turns, pairs, share, 2] of the block that finishes them, in the ring's place.
    float* const sums = reinterpret_cast<float*>(shared);
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        if (i >= units) break;
        const int output = 16 * across * TILES + 8 * i + lane / 4, block = output / cut.share;
        float* const to = sums + 2 * ((rank * turns + turn) * pairs * cut.share + output - block * cut.share);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int pair = 4 * j + lane % 4;
            const float* const pair_sums = own.sums[i / 2][j] + i % 2 * 2;
            if (pair < pairs) store_pair(to + 2 * pair * cut.share, block, pair_sums[0], pair_sums[1]);
        }
    }
    cluster_barrier();
    if (!column.exists) return;
    constexpr int kAtOnce = COLUMNS > 2 ? 4 : 1;  // pairs that a thread reads before it needs the first
    const float* const own_sums = sums + 2 * (threadIdx.x % cut.share);
#pragma unroll 1
    for (int pair = own_pair; pair < pairs; pair += kAtOnce * at_once) {
        Around<T> around[kAtOnce][2];
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; i++) {
            const int row = 2 * (pair + i / 2 * at_once) + i % 2;
            around[i / 2][i % 2].read(a, column, first + row, row < rows);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int p = pair + i * at_once;
            if (p >= pairs) break;
            const float* from = own_sums + 2 * p * cut.share;
            float2 v = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int s = 0; s < cut.split * turns; s++, from += 2 * pairs * cut.share) {
                const float2 of = *reinterpret_cast<const float2*>(from);
                v.x += of.x, v.y += of.y;
            }
            around[i][0].finish(a, column, first + 2 * p, v.x);
            around[i][1].finish(a, column, first + 2 * p + 1, v.y);
        }
    }
#endif
}

}  // namespace step
}  // namespace mamba
