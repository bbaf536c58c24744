// Products of a token of many rows, y = x W and what stands around it (step_linear.cuh), for compute capability 9.0: up to
// 128 rows, 16-bit weights.
//
// Bound by the weights and, for every block reads it again, by x. So the two blocks of a cluster share some columns and
// split their inputs: a block then reads all of its weights and half of x. Both come through a ring of stages in shared
// memory, by bulk copies of one thread, the first weights before the kernel ahead has ended: a multiprocessor has room for
// much of them. A warpgroup multiplies 64 rows, whatever there are, straight from shared memory. In the end each block
// finishes half of the rows, whose sums the other writes into its shared memory.
#pragma once

#include "bulk_copy.cuh"
#include "step_tile.cuh"

namespace mamba {
namespace rows {

constexpr int kRows = 64, kInputs = 64;  // of a tile of wgmma; of a stage
constexpr int kThreads = 384;            // one warp brings stages, the first warpgroups multiply, all finish
constexpr int kSplit = 2;                // blocks of a cluster, which share columns and split inputs
constexpr int kMostStages = 10;
constexpr int kBarBytes = 24;            // a stage's barriers: its weights are there; its x is; it is done with
constexpr int kAheadFrom = 16;           // rows, from which on not all slots' weights are asked for at once

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// Of weights, boxes of 64 columns and one of the 16 or 32 that are left over.
template <int COLUMNS, int TILES>
struct Tile {
    static constexpr int kWhole = COLUMNS / 64, kRest = COLUMNS % 64;
    static constexpr int kBox = 2 * kInputs * 64;  // bytes, of x and of weights alike
    static constexpr int kWeights = 2 * kInputs * COLUMNS, kStage = kWeights + TILES * kBox;
    static constexpr int kFit = (kHopperShared - 1024) / kStage, kStages = kFit < kMostStages ? kFit : kMostStages;
    static constexpr int kAhead = COLUMNS > 64 ? 2 : 3;  // stages of weights then: more would queue, and other reads behind
    static constexpr int kPitch = COLUMNS + 8;  // floats, of a row of sums
    static constexpr int kBars = kStages * kStage, kSumsBar = kBars + kBarBytes * kStages, kBytes = kSumsBar + 8;
    // Threads that registers are shared out to: so few each, where that will do, that a block of a norm has some too.
    static constexpr int kSharing = COLUMNS > 160 ? kThreads : 480;
    static_assert(4 * kSplit * TILES * kRows / 2 * kPitch <= kStages * kStage, "sums lie in the ring's place");
    static_assert(kAhead < kStages, "or the slot that is waited for would be another stage's");
    static_assert(kRest % 16 == 0 && kRest <= 32, "for which there are products");
};

struct Product {
    TensorMap x, weight, rest;  // in boxes; rest: of the columns left over
    step::Linear a;
    float* sums;  // [parts, rows, outputs] of as many inputs each, gridDim.y parts; or null: y, and what stands around it
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- wgmma: the left operand [64, 16] has its rows in shared memory, the right one [16, columns] its columns

// An operand of lines of SWIZZLE bytes, one after the other, as a bulk copy leaves them: the upper half of what describes it,
// and the lower. The latter is from an address that all threads of a warp are known to share: else each costs four moves.
template <int SWIZZLE>
constexpr uint32_t kUpper = (SWIZZLE == 128 ? 1u : SWIZZLE == 64 ? 2u : 3u) << 30 | 8 * SWIZZLE / 16;
template <int SWIZZLE>
__device__ __forceinline__ uint32_t lower(uint32_t address) {
    return 8 * SWIZZLE / 16 << 16 | address >> 4;
}
__device__ __forceinline__ uint32_t shared_by_warp(uint32_t v) { return __shfl_sync(~0u, v, 0); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LEFT) : "memory");
}

// Sums of products that have been waited for: not to be read before.
template <int COUNT>
__device__ __forceinline__ void are_there(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]));
}

#define MAMBA_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MAMBA_LOWER "r"(x), "r"(w), "n"(kUpper<128>), "n"(kUpper<SWIZZLE>)
#define MAMBA_MULTIPLY(TYPE)                                                                                               \
    if constexpr (COUNT == 32) {                                                                                           \
        asm volatile("{\n .reg .b64 x, w;\n mov.b64 x, {%32, %34};\n mov.b64 w, {%33, %35};\n"                             \
                     " wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                          \
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "   \
                     "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, x, w, 1, 1, 1, 0, 1;\n}\n"                   \
                     : MAMBA_FOUR(d, 0), MAMBA_FOUR(d, 4), MAMBA_FOUR(d, 8), MAMBA_FOUR(d, 12), MAMBA_FOUR(d, 16),         \
                       MAMBA_FOUR(d, 20), MAMBA_FOUR(d, 24), MAMBA_FOUR(d, 28)                                             \
                     : MAMBA_LOWER);                                                                                       \
    } else if constexpr (COUNT == 16) {                                                                                    \
        asm volatile("{\n .reg .b64 x, w;\n mov.b64 x, {%16, %18};\n mov.b64 w, {%17, %19};\n"                             \
                     " wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                          \
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, x, w, 1, 1, 1, 0, 1;\n}\n"  \
                     : MAMBA_FOUR(d, 0), MAMBA_FOUR(d, 4), MAMBA_FOUR(d, 8), MAMBA_FOUR(d, 12) : MAMBA_LOWER);             \
    } else {                                                                                                               \
        asm volatile("{\n .reg .b64 x, w;\n mov.b64 x, {%8, %10};\n mov.b64 w, {%9, %11};\n"                               \
                     " wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                                          \
                     " {%0, %1, %2, %3, %4, %5, %6, %7}, x, w, 1, 1, 1, 0, 1;\n}\n"                                        \
                     : MAMBA_FOUR(d, 0), MAMBA_FOUR(d, 4) : MAMBA_LOWER);                                                  \
    }

template <typename T, int SWIZZLE, int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], uint32_t x, uint32_t w) {
    if constexpr (kIsHalf<T>) {
        MAMBA_MULTIPLY("f16")
    } else {
        MAMBA_MULTIPLY("bf16")
    }
}
#undef MAMBA_MULTIPLY
#undef MAMBA_LOWER
#undef MAMBA_FOUR

// The warp that brings stages: one lane.
template <int COLUMNS, int TILES>
__device__ __forceinline__ void bring(const Product& p, uint32_t ring, uint32_t bars, int column, int input, int stages) {
    using Own = Tile<COLUMNS, TILES>;
    const uint64_t policy = evict_first();
    const int ahead = p.a.batch < kAheadFrom ? Own::kStages - 1 : Own::kAhead;
    int behind = 0, count = 0;
    uint32_t behind_parity = 0;
    const auto weights = [&](int slot, int k) {
        if (count++ >= ahead) {
            bar_wait(bars + kBarBytes * behind, behind_parity);
            if (++behind == Own::kStages) behind = 0, behind_parity ^= 1;
        }
        const uint32_t to = ring + slot * Own::kStage, bar = bars + kBarBytes * slot;
        bar_expect(bar, Own::kWeights);
#pragma unroll
        for (int i = 0; i < Own::kWhole; i++) copy_box(to + i * Own::kBox, p.weight, column + 64 * i, k, bar, policy);
        if (Own::kRest > 0) copy_box(to + Own::kWhole * Own::kBox, p.rest, column + 64 * Own::kWhole, k, bar, policy);
    };
    const auto x = [&](int slot, int k) {
        const uint32_t to = ring + slot * Own::kStage + Own::kWeights, bar = bars + kBarBytes * slot + 8;
        bar_expect(bar, TILES * Own::kBox);
#pragma unroll
        for (int i = 0; i < TILES; i++) copy_box(to + i * Own::kBox, p.x, k, kRows * i, bar);
    };
    const int first = min(stages, Own::kStages);
    for (int s = 0; s < first; s++) weights(s, input + s * kInputs);
    wait_for_previous();
    for (int s = 0; s < first; s++) x(s, input + s * kInputs);
    int slot = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int s = first; s < stages; s++) {
        bar_wait(bars + kBarBytes * slot + 16, parity);
        weights(slot, input + s * kInputs);
        x(slot, input + s * kInputs);
        if (++slot == Own::kStages) slot = 0, parity ^= 1;
    }
}

// A warpgroup's 64 rows: their sums to the blocks that finish them.
template <typename T, int COLUMNS, int TILES>
__device__ __forceinline__ void multiply_rows(uint32_t ring, uint32_t bars, int tile, int stages, float (&sums)[COLUMNS / 2]) {
    using Own = Tile<COLUMNS, TILES>;
    float whole[Own::kWhole][32] = {}, rest[Own::kRest > 0 ? Own::kRest / 2 : 8] = {};
    int slot = 0;
    uint32_t parity = 0;
    const auto give_back = [&](int of) {
        if (threadIdx.x % 32 == 0) bar_arrive(bars + kBarBytes * of + 16);
    };
#pragma unroll 1
    for (int s = 0; s < stages; s++) {
        bar_wait(bars + kBarBytes * slot, parity);
        bar_wait(bars + kBarBytes * slot + 8, parity);
        products_begin();
        // Without the bits that say which block of the cluster it is: they would fall into the distances.
        const uint32_t at = shared_by_warp((ring + slot * Own::kStage) & 0x3FFFF), x = at + Own::kWeights + tile * Own::kBox;
#pragma unroll
        for (int k = 0; k < kInputs / 16; k++) {
            const uint32_t left = lower<128>(x + 32 * k);
#pragma unroll
            for (int i = 0; i < Own::kWhole; i++) multiply<T, 128>(whole[i], left, lower<128>(at + i * Own::kBox + 2048 * k));
            if constexpr (Own::kRest > 0) {
                constexpr int kLine = 2 * Own::kRest;
                multiply<T, kLine>(rest, left, lower<kLine>(at + Own::kWhole * Own::kBox + 16 * kLine * k));
            }
        }
        products_commit();
        products_wait<1>();
        if (s > 0) give_back(slot > 0 ? slot - 1 : Own::kStages - 1);
        if (++slot == Own::kStages) slot = 0, parity ^= 1;
    }
    products_wait<0>();
    for (auto& of_box : whole) are_there(of_box);
    are_there(rest);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = i / 32 < Own::kWhole ? whole[i / 32][i % 32] : rest[i % 32];
}

#endif

// Blocks: clusters of two, one for so many columns; times parts of the inputs.
template <typename T, int COLUMNS, int TILES>
__global__ void __launch_bounds__(Tile<COLUMNS, TILES>::kSharing, 1)
    rows_kernel(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Own = Tile<COLUMNS, TILES>;
    extern __shared__ __align__(1024) char shared[];
    const step::Linear& a = p.a;
    const uint32_t ring = shared_address(shared), first_bar = ring + Own::kBars;
    const step::Sums others{ring + Own::kSumsBar};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % kSplit;
    const int share = (a.batch + kSplit - 1) / kSplit, first = rank * share, until = min(share, a.batch - first);
    const int column = blockIdx.x / kSplit * COLUMNS, inputs = a.inputs / (kSplit * gridDim.y), stages = inputs / kInputs;
    constexpr int kMultiply = 4 * TILES;  // warps
    if (threadIdx.x < Own::kStages) {
        const uint32_t own = first_bar + kBarBytes * threadIdx.x;
        bar_init(own, 1);
        bar_init(own + 8, 1);
        bar_init(own + 16, kMultiply);
        bars_are_there();
    }
    if (threadIdx.x == 0) others.expect(4 * until * COLUMNS);
    __syncthreads();
    if (warp == kThreads / 32 - 1) {
        if (lane == 0) {
            bring<COLUMNS, TILES>(p, ring, first_bar, column, (blockIdx.y * kSplit + rank) * inputs, stages);
        }
        __syncwarp();
    }
    // A thread finishes 4 columns of every kAtOnce-th row of this block's share.
    constexpr int kQuads = COLUMNS / 4, kAtOnce = kThreads / kQuads;
    // Rows that a thread reads before it needs the first: all of 64.
    constexpr int kTurn = TILES == 1 ? (kRows / kSplit + kAtOnce - 1) / kAtOnce : 2;
    const int quad = threadIdx.x % kQuads, own_row = threadIdx.x / kQuads;
    const step::FourColumns<T> columns(a, column + 4 * quad);
    const bool finishes = columns.m < a.outputs && own_row < kAtOnce;
    if (columns.convolved) {
        for (int row = own_row; row < until; row += kAtOnce) {
            prefetch(static_cast<const T*>(a.conv_state) + columns.state(a, first + row));
        }
    }
    let_next_start();
    wait_for_previous();
    float* const results = reinterpret_cast<float*>(shared);  // [kSplit, share, kPitch], in the ring's place
    if (warp < kMultiply) {
        float sums[COLUMNS / 2];
        multiply_rows<T, COLUMNS, TILES>(ring, first_bar, TILES == 1 ? 0 : shared_by_warp(warp / 4), stages, sums);
        cluster_meet();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * warp + lane / 4 + 8 * half, block = row / share;
            if (row >= a.batch) continue;
            float* const to = results + (rank * share + row - block * share) * Own::kPitch + lane % 4 * 2;
            others.put<COLUMNS / 8>(to, block, rank, [&](int i) {
                return make_float2(sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
            });
        }
    } else {
        cluster_meet();
    }
    step::FourAround<T> around[kTurn];
    const auto read = [&](int row) {
#pragma unroll
        for (int i = 0; i < kTurn; i++) {
            if (p.sums == nullptr && finishes && row + i * kAtOnce < until) {
                around[i].read(a, columns, first + row + i * kAtOnce);
            }
        }
    };
    read(own_row);
    others.wait(true);
    if (!finishes) return;
#pragma unroll 1
    for (int row = own_row; row < until; row += kTurn * kAtOnce) {
#pragma unroll
        for (int i = 0; i < kTurn; i++) {
            const int r = row + i * kAtOnce;
            if (r >= until) break;
            Pack<float, 4> v = load<float, 4>(results + r * Own::kPitch + 4 * quad);
            const Pack<float, 4> other = load<float, 4>(results + (share + r) * Own::kPitch + 4 * quad);
#pragma unroll
            for (int j = 0; j < 4; j++) v.v[j] += other.v[j];
            if (p.sums == nullptr) {
                around[i].finish(a, columns, first + r, v);
            } else {
                store(p.sums + (int64_t{blockIdx.y} * a.batch + first + r) * a.outputs + columns.m, v);
            }
        }
        read(row + kTurn * kAtOnce);
    }
#else
    __trap();  // rows.cu launches it only where there is code with wgmma
#endif
}

}  // namespace rows
}  // namespace mamba
