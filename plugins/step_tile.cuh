// Products of a decode step for more rows of the batch than two, in tiles as large products are: y = x W and what stands
// around it (step_linear.cuh); 16-bit weights, tensor cores.
//
// A block takes up to 64 rows and a tile of outputs; x and the weights of 64 inputs at a time (a stage) go through a ring in
// shared memory, the first weights before the kernel ahead has ended. Where tiles are fewer than multiprocessors, the blocks
// of a cluster share a tile and split its inputs, and each finishes its share of the rows, whose sums the others write into
// its shared memory. x has the rows of mma.m16n8k16.
#pragma once

#include "bulk_copy.cuh"
#include "step_linear.cuh"

namespace mamba {
namespace step {

constexpr int kTileThreads = 512, kTileInputs = 64;
constexpr int kMostTiles = 5;  // NT; 4 where outputs are not together

// ROW_TILES: of 16 rows. NT: of 8 outputs, of a warp. HEAD: weights [outputs, inputs] and nothing around the product, else
// [inputs, outputs].
template <int ROW_TILES, int NT, bool HEAD>
struct Tile {
    static constexpr int kTiles = NT;
    static constexpr int kAcross = 4;  // warps along the outputs; of the others kDown lie along the rows, kTurns take turns
    static constexpr int kOfWarp = ROW_TILES < 2 ? 1 : 2;  // row tiles
    static constexpr int kDown = ROW_TILES / kOfWarp, kTurns = kTileThreads / 32 / kAcross / kDown;
    static constexpr int kRows = 16 * ROW_TILES, kOutputs = 8 * NT * kAcross;
    // Bytes from a row of weights or of x to the next: 16 more than they are, so that rows fall on different banks.
    static constexpr int kRowPitch = 2 * kTileInputs + 16, kWeightPitch = HEAD ? kRowPitch : 2 * kOutputs + 16;
    static constexpr int kWeightRows = HEAD ? kOutputs : kTileInputs;
    static constexpr int kWeightBytes = kWeightRows * kWeightPitch, kStage = kWeightBytes + kRows * kRowPitch;
    static constexpr int kFit = (96 << 10) / kStage, kStages = kFit < 4 ? 4 : kFit > 8 ? 8 : kFit;
    static constexpr int kSumPitch = kOutputs + 8;  // floats
    static constexpr int kRing = kStages * kStage, kSums = 4 * kTurns * kRows * kSumPitch;
    static constexpr int kBytes = kRing > kSums ? kRing : kSums;
};

// Whether 4 neighbouring outputs are read and written together, as all published models allow.
inline __host__ __device__ bool is_together(const Linear& a) {
    if (a.conv_channels > 0 && (a.conv_width != 4 || a.conv_first % 4 != 0 || a.conv_channels % 4 != 0)) return false;
    const void* const all[] = {a.bias, a.residual, a.y, a.conv_weight, a.conv_bias, a.conv_state, a.conv_state_out};
    for (const void* p : all) {
        if (!is_aligned(p, 16)) return false;
    }
    return true;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// What the blocks of a cluster send each other in the end, and the barrier of each that counts its bytes, instead of one of
// the cluster: that would wait for all that its threads have on its way to memory. Of one block nothing is sent.
struct Sums {
    uint32_t bar;

    // One thread, with the bytes that come.
    __device__ __forceinline__ void expect(int bytes) const {
#if __CUDA_ARCH__ >= 900
        bar_init(bar, 1);
        bars_are_there();
        bar_expect(bar, bytes);
#endif
    }
    // pair(i) of COUNT to the place of to + 8 i in a block's shared memory.
    template <int COUNT, typename Pair>
    __device__ __forceinline__ void put(float* to, int block, int own, Pair&& pair) const {
#if __CUDA_ARCH__ >= 900
        if (block != own) {
            const uint32_t there = address_in(block, shared_address(to)), bar_there = address_in(block, bar);
#pragma unroll
            for (int i = 0; i < COUNT; i++) send_pair(there + 32 * i, bar_there, pair(i).x, pair(i).y);
            return;
        }
#endif
#pragma unroll
        for (int i = 0; i < COUNT; i++) *reinterpret_cast<float2*>(to + 8 * i) = pair(i);
    }
    // Until all of this block and, if there are others, theirs are there.
    __device__ __forceinline__ void wait(bool from_others) const {
        __syncthreads();
#if __CUDA_ARCH__ >= 900
        if (from_others) bar_wait_of_cluster(bar, 0);
#endif
    }
};

// Copies of ROWS rows of UNITS times 16 bytes, PITCH bytes apart, one stage after the other: this thread's share. Inputs are
// the rows (BY_ROWS) or lie along them; zeros stand behind the last.
template <typename T, int ROWS, int UNITS, int PITCH, bool BY_ROWS>
struct Copies {
    static constexpr int kCount = (ROWS * UNITS + kTileThreads - 1) / kTileThreads;

    const T* from;
    int offsets[kCount];  // -1: zeros

    // `from` has rows of `stride` values, of which `rows` and of each `width` are there.
    __device__ __forceinline__ Copies(const T* from, int64_t stride, int rows, int width) : from(from) {
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            const bool there = row(i) < rows && 8 * unit(i) < width;
            offsets[i] = there ? static_cast<int>(row(i) * stride) + 8 * unit(i) : -1;
        }
    }
    static __device__ __forceinline__ int row(int i) { return (threadIdx.x + i * kTileThreads) / UNITS; }
    static __device__ __forceinline__ int unit(int i) { return (threadIdx.x + i * kTileThreads) % UNITS; }

    // To a stage in shared memory, of which `left` inputs are there; the next call's is the next, `far` values on.
    __device__ __forceinline__ void next(uint32_t to, int left, int64_t far) {
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            if (ROWS * UNITS % kTileThreads != 0 && i == kCount - 1 && row(i) >= ROWS) break;
            const bool there = offsets[i] >= 0 && (left >= kTileInputs || (BY_ROWS ? row(i) : 8 * unit(i)) < left);
            copy_async(to + row(i) * PITCH + 16 * unit(i), from + (there ? offsets[i] : 0), there ? 16 : 0);
        }
        from += far;
    }
};

// As Column, of 4 neighbouring outputs.
template <typename T>
struct FourColumns {
    int m, channel;
    bool together, convolved;
    Pack<T, 4> filter[4];
    uint2 conv_bias;  // as it lies in memory: taken apart where it is chosen from zeros, it would be waited for there

    __device__ __forceinline__ FourColumns(const Linear& a, int m) : m(m), channel(m - a.conv_first) {
        together = is_together(a);
        convolved = together && m < a.outputs && channel >= 0 && channel < a.conv_channels;
        if (!convolved) return;
        const T* const weights = static_cast<const T*>(a.conv_weight) + 4 * int64_t{channel};
#pragma unroll
        for (int i = 0; i < 4; i++) filter[i] = load_constant<T, 4>(weights + 4 * i);
        conv_bias = four(a.conv_bias, channel);
    }
    // Of a bias; zeros where there is none.
    static __device__ __forceinline__ uint2 four(const void* bias, int i) {
        return bias != nullptr ? __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(bias) + i)) : make_uint2(0, 0);
    }
    static __device__ __forceinline__ Pack<T, 4> pack(const uint2& bits) {
        Pack<T, 4> values;
        memcpy(&values, &bits, sizeof(bits));
        return values;
    }
    __device__ __forceinline__ int64_t state(const Linear& a, int b) const {
        return (int64_t{b} * a.conv_channels + channel) * 3;
    }
};

// As Around, of 4 neighbouring outputs.
template <typename T>
struct FourAround {
    Pack<T, 4> before[3];  // 3 of each channel
    Pack<float, 4> residual;
    bool used;

    __device__ __forceinline__ void read(const Linear& a, const FourColumns<T>& of, int b) {
        if (a.residual != nullptr) residual = load<float, 4>(a.residual + int64_t{b} * a.outputs + of.m);
        if (!of.convolved) return;
        used = a.seq_lens[b] > 0;
        const T* const from = static_cast<const T*>(a.conv_state) + of.state(a, b);
#pragma unroll
        for (int i = 0; i < 3; i++) before[i] = load_streaming<T, 4>(from + 4 * i);
    }
    // v, of the product and the bias, becomes the convolution's, `before` the state that it leaves.
    __device__ __forceinline__ void convolve(const FourColumns<T>& of, Pack<float, 4>& v) {
        T moved[12];
        const Pack<T, 4> bias = of.pack(of.conv_bias);
        const auto old = [&](int i) { return before[i / 4].v[i % 4]; };
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum = to_float(bias.v[i]);
            const T window[4] = {old(3 * i), old(3 * i + 1), old(3 * i + 2), from_float<T>(v.v[i])};
#pragma unroll
            for (int t = 0; t < 4; t++) sum = fmaf(to_float(of.filter[i].v[t]), to_float(window[t]), sum);
#pragma unroll
            for (int t = 0; t < 3; t++) moved[3 * i + t] = window[t + 1];
            v.v[i] = silu(sum);
        }
        if (used) memcpy(before, moved, sizeof(before));
    }
    __device__ __forceinline__ void write_state(T* to) const {
#pragma unroll
        for (int i = 0; i < 3; i++) store_streaming(to + 4 * i, before[i]);
    }
    static __device__ __forceinline__ void write(T* to, const Pack<float, 4>& v) {
        Pack<T, 4> y;
#pragma unroll
        for (int i = 0; i < 4; i++) y.v[i] = from_float<T>(v.v[i]);
        store_whole(to, y);
    }
    __device__ __forceinline__ void finish(const Linear& a, const FourColumns<T>& of, int b, Pack<float, 4> v) {
        if (a.bias != nullptr) {
            const Pack<T, 4> bias = load_constant<T, 4>(static_cast<const T*>(a.bias) + of.m);
#pragma unroll
            for (int i = 0; i < 4; i++) v.v[i] += to_float(bias.v[i]);
        }
        const int64_t at = int64_t{b} * a.outputs + of.m;
        if (a.residual != nullptr) {
#pragma unroll
            for (int i = 0; i < 4; i++) v.v[i] = residual.v[i] + to_float(from_float<T>(v.v[i]));
            store(static_cast<float*>(a.y) + at, v);
            return;
        }
        if (of.convolved) {
            convolve(of, v);
            write_state(static_cast<T*>(a.conv_state_out) + of.state(a, b));
        }
        write(static_cast<T*>(a.y) + at, v);
    }
};

#endif

// Blocks: clusters of `split`, one a tile, times parts of kRows rows of the batch.
template <typename T, int ROW_TILES, int NT, bool HEAD>
__global__ void __launch_bounds__(kTileThreads, 1) tile_kernel(const Linear a, const int split) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    using Own = Tile<ROW_TILES, NT, HEAD>;
    constexpr int kStages = Own::kStages, kTurns = Own::kTurns, kOfWarp = Own::kOfWarp;
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int across = warp % Own::kAcross, down = warp / Own::kAcross % Own::kDown, turn = warp / Own::kAcross / Own::kDown;
    const int rank = blockIdx.x % split, output = blockIdx.x / split * Own::kOutputs;
    const int first = blockIdx.y * Own::kRows, rows = min(Own::kRows, a.batch - first);
    const int all = (a.inputs + kTileInputs - 1) / kTileInputs, begin = rank * all / split, end = (rank + 1) * all / split;

    const int there = min(Own::kOutputs, a.outputs - output), input = begin * kTileInputs;
    const T* const weight = static_cast<const T*>(a.weight);
    const int64_t far = HEAD ? kTileInputs : int64_t{kTileInputs} * a.outputs;
    using Weights = Copies<T, Own::kWeightRows, (HEAD ? kTileInputs : Own::kOutputs) / 8, Own::kWeightPitch, !HEAD>;
    Weights weights = HEAD ? Weights(weight + int64_t{output} * a.inputs + input, a.inputs, there, kTileInputs)
                           : Weights(weight + int64_t{input} * a.outputs + output, a.outputs, kTileInputs, there);
    Copies<T, Own::kRows, kTileInputs / 8, Own::kRowPitch, false> inputs(
        static_cast<const T*>(a.x) + int64_t{first} * a.x_stride + input, a.x_stride, rows, kTileInputs);
    const uint32_t ring = shared_address(shared);
    const auto fetch_weights = [&](uint32_t place, int stage) { weights.next(place, a.inputs - stage * kTileInputs, far); };
    const auto fetch_inputs = [&](uint32_t place, int stage) {
        inputs.next(place + Own::kWeightBytes, a.inputs - stage * kTileInputs, kTileInputs);
    };
#pragma unroll 1
    for (int s = 0; s < kStages - 1; s++) {
        if (begin + s < end) fetch_weights(ring + s * Own::kStage, begin + s);
    }
    copy_async_commit();
    // A thread finishes 4 outputs of every kAtOnce-th row of this block's share.
    constexpr int kQuads = Own::kOutputs / 4, kAtOnce = kTileThreads / kQuads;
    const int share = (rows + split - 1) / split, until = min(share, rows - rank * share);
    const int quad = threadIdx.x % kQuads, own_row = threadIdx.x / kQuads, own_first = first + rank * share;
    __shared__ uint64_t sums_bar;
    const Sums others{shared_address(&sums_bar)};
    if (split > 1 && threadIdx.x == 0) others.expect(4 * (split - 1) * kTurns * max(until, 0) * Own::kOutputs);
    const FourColumns<T> columns(a, output + 4 * quad);
    const bool finishes = columns.m < a.outputs && own_row < kAtOnce;
    if (!HEAD && columns.convolved) {
        for (int row = own_row; row < until; row += kAtOnce) {
            prefetch(static_cast<const T*>(a.conv_state) + columns.state(a, own_first + row));
        }
    }
    let_next_start();
    wait_for_previous();
#pragma unroll 1
    for (int s = 0; s < kStages - 1; s++) {
        if (begin + s < end) fetch_inputs(ring + s * Own::kStage, begin + s);
        copy_async_commit();
    }

    float sums[kOfWarp][NT][4] = {};
    // Where this lane's rows of the matrices are, in a stage; rows of x that are not there are zeros.
    const uint32_t x_row = Own::kWeightBytes + (16 * down * kOfWarp + lane % 16) * Own::kRowPitch + lane / 16 * 16;
    const uint32_t w_row = HEAD ? (8 * (across * NT + lane / 16) + lane % 8) * Own::kWeightPitch + lane / 8 % 2 * 16
                                : lane % 16 * Own::kWeightPitch + 16 * (across * NT + lane / 16);
    const uint32_t last = ring + (kStages - 1) * Own::kStage;
    uint32_t at = ring, ahead = last;
#pragma unroll 1
    for (int s = begin; s < end; s++) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        if (s + kStages - 1 < end) {
            fetch_weights(ahead, s + kStages - 1);
            fetch_inputs(ahead, s + kStages - 1);
        }
        copy_async_commit();
#pragma unroll
        for (int step = 0; step < kTileInputs / 16 / kTurns; step++) {
            const int k = step * kTurns + turn;
            uint32_t x[kOfWarp][4];
#pragma unroll
            for (int i = 0; i < kOfWarp; i++) load_matrices(x[i], at + x_row + 16 * i * Own::kRowPitch + 32 * k);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t w[4];
                if (HEAD) {
                    load_matrices(w, at + w_row + 32 * k + 8 * n * Own::kWeightPitch);
                } else {
                    load_matrices_transposed(w, at + w_row + 16 * k * Own::kWeightPitch + 16 * n);
                }
#pragma unroll
                for (int i = 0; i < kOfWarp; i++) {
                    multiply_add<T>(sums[i][n], x[i], w[0], w[1]);
                    if (n + 1 < NT) multiply_add<T>(sums[i][n + 1], x[i], w[2], w[3]);
                }
            }
        }
        ahead = at;  // which all have read by the next round
        at = at == last ? ring : at + Own::kStage;
    }

    // [split, kTurns, share, kSumPitch] of the block that finishes them, in the ring's place.
    float* const results = reinterpret_cast<float*>(shared);
    copy_async_wait<0>();
    cluster_meet();
#pragma unroll
    for (int i = 0; i < kOfWarp; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * (down * kOfWarp + i) + lane / 4 + 8 * half, block = row / share;
            if (row >= rows) continue;
            float* const to = results + ((rank * kTurns + turn) * share + row - block * share) * Own::kSumPitch;
            others.put<NT>(to + 8 * across * NT + lane % 4 * 2, block, rank, [&](int n) {
                return make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
            });
        }
    }
    const auto sum = [&](int row, int of_block, auto& out) {
        for (int s = 0; s < split * kTurns; s++) {
            const auto part = load<float, sizeof(out) / 4>(results + (s * share + row) * Own::kSumPitch + of_block);
#pragma unroll
            for (int i = 0; i < sizeof(out) / 4; i++) out.v[i] += part.v[i];
        }
    };
    if (!HEAD && NT < kMostTiles && !columns.together) {
        others.wait(split > 1);
#pragma unroll 1
        for (int i = threadIdx.x; i < until * Own::kOutputs; i += kTileThreads) {
            const int row = i / Own::kOutputs, m = output + i % Own::kOutputs;
            const Column<T> column(a, m, m < a.outputs);
            Around<T> around;
            around.read(a, column, own_first + row, true);
            Pack<float, 1> v{};
            sum(row, i % Own::kOutputs, v);
            around.finish(a, column, own_first + row, v.v[0]);
        }
        return;
    }
    constexpr int kAhead = 2;  // rows that a thread reads before it needs the first
    FourAround<T> around[kAhead];
    const auto read = [&](int row) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            if (!HEAD && finishes && row + i * kAtOnce < until) around[i].read(a, columns, own_first + row + i * kAtOnce);
        }
    };
    read(own_row);
    others.wait(split > 1);
    if (!finishes) return;
#pragma unroll 1
    for (int row = own_row; row < until; row += kAhead * kAtOnce) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int r = row + i * kAtOnce;
            if (r >= until) break;
            Pack<float, 4> v{};
            sum(r, 4 * quad, v);
            if (HEAD) {
                float* const y = static_cast<float*>(a.y) + int64_t{own_first + r} * a.outputs + columns.m;
                if (columns.together && a.outputs % 4 == 0) {
                    store(y, v);
                } else {
                    for (int j = 0; j < min(4, a.outputs - columns.m); j++) y[j] = v.v[j];
                }
            } else {
                around[i].finish(a, columns, own_first + r, v);
            }
        }
        read(row + kAhead * kAtOnce);
    }
#endif
}

}  // namespace step
}  // namespace mamba
