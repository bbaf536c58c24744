// Products of a token of many rows, or of a short prompt, whose tokens are rows here: y = x W and what stands around it
// (step_linear.cuh), for compute capability 9.0, up to 128 rows, 16-bit weights.
//
// Bound by the weights and, for every block reads it again, by x. So the two blocks of a cluster share some columns and
// split their inputs: a block then reads all of its weights and half of x. Both come through a ring of stages in shared
// memory, by bulk copies of a thread each, the first weights before the kernel ahead has ended: a multiprocessor has room for
// much of them. A warpgroup multiplies 64 rows, whatever there are, straight from shared memory. In the end each block
// finishes half of the rows, whose sums the other writes into its shared memory.
#pragma once

#include "bulk_copy.cuh"
#include "step_tile.cuh"

namespace mamba {
namespace rows {

constexpr int kRows = 64, kInputs = 64;  // of a tile of wgmma; of a stage
constexpr int kBox = 2 * kInputs * 64;   // bytes, of x and of weights alike
constexpr int kThreads = 384;            // first warpgroups multiply, two warps bring weights and x; the rest, or all, finish
constexpr int kWarps = kThreads / 32;
constexpr int kSplit = 2;                // blocks of a cluster, which share columns and split inputs
constexpr int kBarBytes = 24;            // a slot's barriers: its weights are there; its x is; it is done with
constexpr int kShared = kHopperShared - 2048;  // bytes at most, so that a norm's block has room beside it

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// Of weights, boxes of 64 columns and one of the 16 or 32 that are left over.
template <int COLUMNS, int TILES>
struct Tile {
    static constexpr int kWhole = COLUMNS / 64, kRest = COLUMNS % 64, kWeights = 2 * kInputs * COLUMNS;
    static constexpr int kPitch = COLUMNS + 8;   // floats, of a row of sums
    static constexpr int kMultiply = 4 * TILES;  // warps that multiply
    // In shared memory: the barriers, those of the ring's slots first; then the ring, of stages of x and weights.
    static constexpr int kRing = 1024;
    static constexpr int kFew = (kShared - kRing) / (kWeights + TILES * kBox);  // slots for all rows of a tile
    static constexpr int kMany = (kShared - kRing) / (kWeights + (TILES == 1 ? kBox / 8 : TILES * kBox));  // for up to 8
    static constexpr int kMostSlots = kMany < 16 ? kMany : 16;
    static constexpr int kSumsBar = kBarBytes * kMostSlots, kEndedBar = kSumsBar + 8;
    // Threads that registers are shared out to: so few each, where that will do, that a block of a norm has some too.
    static constexpr int kSharing = COLUMNS > 160 ? kThreads : 480;
    static_assert(kEndedBar + 8 <= kRing, "or the first stage would lie in the barriers");
    static_assert(kFew > 3, "or a slot that is waited for would be another stage's: ahead()");
    static_assert(4 * kSplit * TILES * kRows / 2 * kPitch <= kFew * (kWeights + TILES * kBox), "sums lie in the ring's place");
    static_assert(kWeights >= kBox, "64 rows of x, of which a product reads all whatever there are, end within the stage");
    static_assert(kRest % 16 == 0 && kRest <= 32, "for which there are products");

    // Rows of a box of x: of one tile as few as there are, of those that are swizzled together.
    static __host__ __device__ int box_rows(int batch) { return TILES == 1 ? (batch + 7) / 8 * 8 : kRows; }
    static __host__ __device__ int x_bytes(int batch) { return TILES * 2 * kInputs * box_rows(batch); }
    static __host__ __device__ int stage(int batch) { return x_bytes(batch) + kWeights; }
    // Stages of weights on their way until the kernel ahead has ended: more would queue, and other reads behind them.
    static __device__ int ahead(int batch) { return COLUMNS > 128 || batch > kRows / 2 ? 2 : 3; }
};

// Of the product after this one: the parts that its inputs are split into, weights of a part, and of these the first bytes that
// a warp asks the L2 cache for.
struct Next {
    const char* weights;
    int64_t part;  // bytes
    int32_t parts, asked;
};

struct Product {
    TensorMap x, weight, rest;  // in boxes; rest: of the columns left over
    step::Linear a;
    int32_t stages, slots;  // of a block; of the ring
    Next next;
    float* sums;  // [parts, rows, outputs] of as many inputs each, gridDim.y parts; or null: y, and what stands around it
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- wgmma: the left operand [64, 16] has its rows in shared memory, the right one [16, columns] its columns

// An operand of lines of SWIZZLE bytes, one after the other, as a bulk copy leaves them, of 64 columns the next kBox bytes on:
// the upper half of what describes it, and the lower, to which a sixteenth of a distance is added. The latter is from an
// address that all threads of a warp are known to share: else each costs four moves.
template <int SWIZZLE>
constexpr uint32_t kUpper = (SWIZZLE == 128 ? 1u : SWIZZLE == 64 ? 2u : 3u) << 30 | 8 * SWIZZLE / 16;
__device__ __forceinline__ uint32_t lower(uint32_t address) { return kBox / 16 << 16 | address >> 4; }
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

#define MAMBA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MAMBA_NAMES_16 MAMBA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MAMBA_NAMES_32                                                                                                     \
    MAMBA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MAMBA_NAMES_64                                                                                                     \
    MAMBA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MAMBA_NAMES_96                                                                                                     \
    MAMBA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                    \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MAMBA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MAMBA_8(i) MAMBA_4(i), MAMBA_4(i + 4)
#define MAMBA_16(i) MAMBA_8(i), MAMBA_8(i + 8)
#define MAMBA_32(i) MAMBA_16(i), MAMBA_16(i + 16)
#define MAMBA_64(i) MAMBA_32(i), MAMBA_32(i + 32)
#define MAMBA_96(i) MAMBA_64(i), MAMBA_32(i + 64)
// X, W, XU, WU: the numbers of the operands behind the sums.
#define MAMBA_PRODUCT(TYPE, COLUMNS, SUMS, X, W, XU, WU)                                                                   \
    asm volatile("{\n .reg .b64 x, w;\n mov.b64 x, {%" #X ", %" #XU "};\n mov.b64 w, {%" #W ", %" #WU "};\n"               \
                 " wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" MAMBA_NAMES_##SUMS            \
                 "}, x, w, 1, 1, 1, 0, 1;\n}\n"                                                                            \
                 : MAMBA_##SUMS(0) : "r"(x), "r"(w), "n"(kUpper<128>), "n"(kUpper<SWIZZLE>))
#define MAMBA_MULTIPLY(TYPE)                                                                                               \
    if constexpr (COUNT == 96) {                                                                                           \
        MAMBA_PRODUCT(TYPE, 192, 96, 96, 97, 98, 99);                                                                      \
    } else if constexpr (COUNT == 64) {                                                                                    \
        MAMBA_PRODUCT(TYPE, 128, 64, 64, 65, 66, 67);                                                                      \
    } else if constexpr (COUNT == 32) {                                                                                    \
        MAMBA_PRODUCT(TYPE, 64, 32, 32, 33, 34, 35);                                                                       \
    } else if constexpr (COUNT == 16) {                                                                                    \
        MAMBA_PRODUCT(TYPE, 32, 16, 16, 17, 18, 19);                                                                       \
    } else {                                                                                                               \
        MAMBA_PRODUCT(TYPE, 16, 8, 8, 9, 10, 11);                                                                          \
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
#undef MAMBA_PRODUCT
#undef MAMBA_96
#undef MAMBA_64
#undef MAMBA_32
#undef MAMBA_16
#undef MAMBA_8
#undef MAMBA_4
#undef MAMBA_NAMES_96
#undef MAMBA_NAMES_64
#undef MAMBA_NAMES_32
#undef MAMBA_NAMES_16
#undef MAMBA_NAMES_8

// Stages behind the first of each slot, when that is done with.
template <typename Bring>
__device__ __forceinline__ void bring_again(const Product& p, uint32_t bars, Bring&& bring) {
    int slot = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int s = p.slots; s < p.stages; s++) {
        bar_wait(bars + kBarBytes * slot + 16, parity);
        bring(slot, s);
        if (++slot == p.slots) slot = 0, parity ^= 1;
    }
}

// One thread, all slots' barriers of a kind. A thread each takes longer: of a warp they do it one after the other, in 25 ns.
template <int COLUMNS, int TILES>
__device__ __forceinline__ void set_up(uint32_t bars, int count) {
#pragma unroll
    for (int i = 0; i < Tile<COLUMNS, TILES>::kMostSlots; i++) bar_init(bars + kBarBytes * i, count);
    bars_are_there();
}

// The lane that brings weights. Until the kernel ahead has ended few are on their way.
template <int COLUMNS, int TILES>
struct Weights {
    using Own = Tile<COLUMNS, TILES>;
    const Product& p;
    uint32_t ring, bars;
    int column, input;

    __device__ __forceinline__ void bring(int slot, int s) const {
        const uint32_t to = ring + slot * Own::stage(p.a.batch) + Own::x_bytes(p.a.batch), bar = bars + kBarBytes * slot;
        const uint64_t policy = evict_first();
        const int k = input + s * kInputs;
        bar_expect(bar, Own::kWeights);
#pragma unroll
        for (int i = 0; i < Own::kWhole; i++) copy_box(to + i * kBox, p.weight, column + 64 * i, k, bar, policy);
        if (Own::kRest > 0) copy_box(to + Own::kWhole * kBox, p.rest, column + 64 * Own::kWhole, k, bar, policy);
    }
    // The first, as many as it says.
    __device__ __forceinline__ int begin() const {
        const int count = min(p.stages, Own::ahead(p.a.batch));
#pragma unroll 1
        for (int s = 0; s < count; s++) bring(s, s);
        return count;
    }
    // Those from `first` on.
    __device__ __forceinline__ void run(int first, uint32_t ended) const {
        const int ahead = Own::ahead(p.a.batch);
#pragma unroll 1
        for (int s = first; s < min(p.stages, p.slots); s++) {
            while (s >= ahead && !bar_is_over(bars + kBarBytes * (s - ahead), 0) && !bar_is_over(ended, 0)) {}
            bring(s, s);
        }
        bring_again(p, bars, [&](int slot, int s) { bring(slot, s); });
    }
};

// The lane that brings x.
template <int COLUMNS, int TILES>
__device__ __forceinline__ void bring_x(
    const Product& p, uint32_t ring, uint32_t bars, uint32_t ended, int input) {
    using Own = Tile<COLUMNS, TILES>;
    const int stage = Own::stage(p.a.batch), bytes = Own::x_bytes(p.a.batch);
    const auto bring = [&](int slot, int s) {
        const uint32_t to = ring + slot * stage, bar = bars + kBarBytes * slot + 8;
        bar_expect(bar, bytes);
#pragma unroll
        for (int i = 0; i < TILES; i++) copy_box(to + i * kBox, p.x, input + s * kInputs, kRows * i, bar);
    };
    wait_for_previous();
    bar_arrive(ended);
    for (int s = 0; s < min(p.stages, p.slots); s++) bring(s, s);
    bring_again(p, bars, bring);
}

// A warpgroup's 64 rows: their sums to the blocks that finish them.
template <typename T, int COLUMNS, int TILES>
__device__ __forceinline__ void multiply_rows(
    const Product& p, uint32_t ring, uint32_t bars, int tile, float (&sums)[COLUMNS / 2]) {
    using Own = Tile<COLUMNS, TILES>;
    float whole[32 * Own::kWhole] = {}, rest[Own::kRest > 0 ? Own::kRest / 2 : 8] = {};
    // Without the bits that say which block of the cluster it is: they would fall into the distances.
    const uint32_t first = lower(shared_by_warp(ring & 0x3FFFF)), stage = Own::stage(p.a.batch) / 16;
    const uint32_t weights = Own::x_bytes(p.a.batch) / 16;
    int slot = 0;
    uint32_t parity = 0;
    const auto give_back = [&](int of) {
        if (threadIdx.x % 32 == 0) bar_arrive(bars + kBarBytes * of + 16);
    };
#pragma unroll 1
    for (int s = 0; s < p.stages; s++) {
        bar_wait(bars + kBarBytes * slot, parity);
        bar_wait(bars + kBarBytes * slot + 8, parity);
        products_begin();
        const uint32_t x = first + slot * stage + tile * (kBox / 16), at = first + slot * stage + weights;
#pragma unroll
        for (int k = 0; k < kInputs / 16; k++) {
            const uint32_t left = x + 32 * k / 16;
            multiply<T, 128>(whole, left, at + 2048 * k / 16);
            if constexpr (Own::kRest > 0) {
                constexpr int kLine = 2 * Own::kRest;
                multiply<T, kLine>(rest, left, at + (Own::kWhole * kBox + 16 * kLine * k) / 16);
            }
        }
        products_commit();
        products_wait<1>();
        if (s > 0) give_back(slot > 0 ? slot - 1 : p.slots - 1);
        if (++slot == p.slots) slot = 0, parity ^= 1;
    }
    products_wait<0>();
    are_there(whole);
    are_there(rest);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = i < 32 * Own::kWhole ? whole[i] : rest[i % 32];
}

// A lane's sums of a row, pairs of columns 8 apart, to a block: two pairs together, for what counts is how many are sent.
template <int COLUMNS>
__device__ __forceinline__ void put_row(const step::Sums& sums, float* to, int block, int own, const float* pairs) {
    const uint32_t there = address_in(block, shared_address(to)), bar_there = address_in(block, sums.bar);
    const auto each = [&](auto&& put) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++) {
            const float* const v = pairs + 8 * i;
            put(i, {v[0], v[1], v[4], v[5]});
        }
    };
    if (block != own) {  // once: a branch for each takes longer than what it chooses
        each([&](int i, const float (&v)[4]) { send_four(there + 64 * i, bar_there, v); });
    } else {
        each([&](int i, const float (&v)[4]) { store(to + 16 * i, Pack<float, 4>{v[0], v[1], v[2], v[3]}); });
    }
}
// Four neighbouring columns of what that has left.
__device__ __forceinline__ Pack<float, 4> get_quad(const float* row, int quad) {
    const float* const from = row + quad / 4 * 16 + quad % 2 * 8 + quad % 4 / 2 * 2;
    const Pack<float, 2> first = load<float, 2>(from), second = load<float, 2>(from + 4);
    return {first.v[0], first.v[1], second.v[0], second.v[1]};
}

// A lane's share of what is asked for of the next product's weights. Found before the products, for asking when they end is
// then one instruction: memory has nothing to do from then on until what follows reads (samples/results/step.txt, 130).
struct Ask {
    const char* from;
    int bytes;

    // Of a warp's first lane, of so many warps of a block.
    __device__ __forceinline__ Ask(const Next& next, int warps) {
        const int block = blockIdx.y * gridDim.x + blockIdx.x, own = block * warps + static_cast<int>(threadIdx.x) / 32;
        from = next.weights + own % next.parts * next.part + own / next.parts * int64_t{next.asked};
        bytes = threadIdx.x % 32 == 0 ? next.asked : 0;
        asm volatile("" : "+l"(from), "+r"(bytes));  // now
    }
    __device__ __forceinline__ void ask() const {
        if (bytes > 0) ask_for_line(from, bytes);
        __syncwarp();
    }
};

// What a thread does with sums that have met: `results` of both blocks, of four columns.
template <typename T, int PITCH, int AT_ONCE>
struct Finish {
    const Product& p;
    const step::FourColumns<T>& columns;
    uint2 bias_bits;
    const float* results;  // [kSplit, share, PITCH]
    int quad, share, first, until;

    // COUNT rows from `row` on, AT_ONCE apart, each step of all of them at once and without a branch between: a thread then
    // waits once for what it would wait for COUNT times. Rows that are not there are the last, and not written.
    template <int COUNT, int HELD>
    __device__ __forceinline__ void rows(step::FourAround<T> (&around)[HELD], int row) const {
        const step::Linear& a = p.a;
        const Pack<T, 4> bias = columns.pack(bias_bits);
        Pack<float, 4> v[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const float* const of_row = results + min(row + i * AT_ONCE, until - 1) * PITCH;
            v[i] = get_quad(of_row, quad);
            const Pack<float, 4> other = get_quad(of_row + share * PITCH, quad);
#pragma unroll
            for (int j = 0; j < 4; j++) v[i].v[j] += other.v[j] + to_float(bias.v[j]);
        }
        const auto each = [&](auto* to, int size, auto&& write) {  // rows of `size` values, the batch's first at `to`
            to += int64_t{first + row} * size;
#pragma unroll
            for (int i = 0; i < COUNT; i++, to += AT_ONCE * size) {
                if (row + i * AT_ONCE < until) write(i, to);
            }
        };
        if (p.sums != nullptr) {
            float* const sums = p.sums + int64_t{blockIdx.y} * a.batch * a.outputs;
            each(sums + columns.m, a.outputs, [&](int i, float* to) { store_whole(to, v[i]); });
            return;
        }
        if (columns.convolved) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) around[i].convolve(columns, v[i]);
            each(static_cast<T*>(a.conv_state_out) + columns.state(a, 0), 3 * a.conv_channels,
                 [&](int i, T* to) { around[i].write_state(to); });
        }
        each(static_cast<T*>(a.y) + columns.m, a.outputs, [&](int i, T* to) { around[i].write(to, v[i]); });
    }
};

#endif

// Blocks: clusters of two, one for so many columns; times parts of the inputs.
template <typename T, int COLUMNS, int TILES>
__global__ void __launch_bounds__(Tile<COLUMNS, TILES>::kSharing, 1)
    rows_kernel(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Own = Tile<COLUMNS, TILES>;
    extern __shared__ __align__(1024) char shared[];
    const step::Linear& a = p.a;
    const uint32_t first_bar = shared_address(shared), ended = first_bar + Own::kEndedBar, ring = first_bar + Own::kRing;
    const step::Sums others{first_bar + Own::kSumsBar};
    if (p.sums != nullptr) let_next_start();  // a norm, which has room beside it
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % kSplit;
    const int share = (a.batch + kSplit - 1) / kSplit, first = rank * share, until = min(share, a.batch - first);
    const int column = blockIdx.x / kSplit * COLUMNS, inputs = p.stages * kInputs;
    constexpr int kMultiply = Own::kMultiply;
    const int input = (blockIdx.y * kSplit + rank) * inputs;
    const Weights<COLUMNS, TILES> weights{p, ring, first_bar, column, input};
    // At once, but for an in_proj whose stages all have room: those are in time anyway, and in the way of what still runs.
    const bool at_once = p.sums != nullptr || p.stages > p.slots;
    int brought = 0;
    if (lane == 0) {
        if (warp == kWarps - 1) {
            set_up<COLUMNS, TILES>(first_bar, 1);
            if (at_once) brought = weights.begin();
        } else if (warp == kWarps - 2) {
            set_up<COLUMNS, TILES>(first_bar + 8, 1);
            bar_init(ended, 1);
        } else if (warp == 0) {
            set_up<COLUMNS, TILES>(first_bar + 16, kMultiply);
            others.expect(4 * until * COLUMNS);
        }
    }
    __syncthreads();
    if (warp >= kWarps - 2) {
        if (lane == 0 && warp == kWarps - 2) bring_x<COLUMNS, TILES>(p, ring, first_bar, ended, input);
        if (lane == 0 && warp == kWarps - 1) weights.run(brought, ended);
        __syncwarp();
    }
    // A thread finishes 4 columns of every kAtOnce-th row of this block's share; of up to 64 rows, one that does not multiply,
    // and has read what stands around them meanwhile.
    constexpr bool kApart = TILES == 1;
    constexpr int kFirst = kApart ? 32 * kMultiply : 0, kQuads = COLUMNS / 4, kAtOnce = (kThreads - kFirst) / kQuads;
    // Rows that a thread finishes at once, and reads before it needs the first: up to four, for more would not stay in
    // registers, and in turns of as many.
    constexpr int kNeeded = (kRows / kSplit + kAtOnce - 1) / kAtOnce, kTurns = (kNeeded + 3) / 4;
    constexpr int kTurn = kApart ? (kNeeded + kTurns - 1) / kTurns : 2;
    const int of_finish = static_cast<int>(threadIdx.x) - kFirst, quad = max(of_finish, 0) % kQuads, own_row = of_finish / kQuads;
    const step::FourColumns<T> columns(a, column + 4 * quad);
    const bool finishes = columns.m < a.outputs && of_finish >= 0 && own_row < kAtOnce;
    const uint2 bias = columns.four(finishes ? a.bias : nullptr, columns.m);
    if (finishes && columns.convolved) {
        for (int row = own_row; row < until; row += kAtOnce) {
            prefetch(static_cast<const T*>(a.conv_state) + columns.state(a, first + row));
        }
    }
    if (p.sums == nullptr) let_next_start();  // in_proj: samples/results/step.txt, 96
    wait_for_previous();
    step::FourAround<T> around[kTurn];
    const auto read = [&](int row) {
#pragma unroll
        for (int i = 0; i < kTurn; i++) {
            if (p.sums == nullptr && finishes && row + i * kAtOnce < until) {
                around[i].read(a, columns, first + row + i * kAtOnce);
            }
        }
    };
    float* const results = reinterpret_cast<float*>(shared + Own::kRing);  // [kSplit, share, kPitch], in the ring's place
    if (warp < kMultiply) {
        float sums[COLUMNS / 2];
        const Ask next(p.next, kMultiply);
        multiply_rows<T, COLUMNS, TILES>(p, ring, first_bar, TILES == 1 ? 0 : shared_by_warp(warp / 4), sums);
        cluster_arrive();
        next.ask();
        cluster_wait();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * warp + lane / 4 + 8 * half, block = row < share ? 0 : 1;
            if (row >= a.batch) continue;
            float* const to = results + (rank * share + row - block * share) * Own::kPitch + lane % 4 * 4;
            put_row<COLUMNS>(others, to, block, rank, sums + 2 * half);
        }
    } else {
        if (kApart) read(own_row);
        cluster_meet();
    }
    if (!kApart) read(own_row);
    others.wait(true);
    if (!finishes) return;
    const Finish<T, Own::kPitch, kAtOnce> finish{p, columns, bias, results, quad, share, first, until};
    if (until <= kAtOnce) {
        if (own_row < until) finish.template rows<1>(around, own_row);
        return;
    }
    constexpr bool kOneTurn = kTurn * kAtOnce >= TILES * kRows / kSplit;
    if (kOneTurn && p.sums == nullptr) {  // without a loop, ahead of which much would be computed for all its turns
        finish.template rows<kTurn>(around, own_row);
        return;
    }
#pragma unroll 1
    for (int row = own_row; row < until; row += kTurn * kAtOnce) {
        finish.template rows<kTurn>(around, row);
        read(row + kTurn * kAtOnce);
    }
#else
    __trap();  // rows.cu launches it only where there is code with wgmma
#endif
}

}  // namespace rows
}  // namespace mamba
