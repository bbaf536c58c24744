// The half of token_kernel that brings weights and states to shared memory: one thread, by bulk copies, in the order in
// which the other half takes them.
#pragma once

#include "token_common.cuh"

namespace mamba {
namespace token {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// Stages on their way at once. More would only queue, and every read between blocks behind them: step.txt, 45.
constexpr int kStagesAhead = 3;

template <bool MAMBA2, int UNITS>
struct Loader {
    static constexpr int kOwn = 8 * UNITS, kCluster = cluster_of(UNITS);
    Ring ring;
    int behind = 0, stages = 0;
    uint32_t behind_parity = 0;
    const uint64_t policy = evict_first();  // of weights: what blocks exchange is to stay in the L2 cache

    __device__ explicit Loader(const Ring& ring) : ring(ring) {}

    // Calls fill(place), whose copies bring so many bytes.
    template <typename Fill>
    __device__ __forceinline__ void stage(int bytes, Fill&& fill) {
        bar_wait(ring.done(ring.slot), ring.parity ^ 1);
        if (stages++ >= kStagesAhead) {
            bar_wait(ring.whole(behind), behind_parity);
            if (++behind == ring.count) behind = 0, behind_parity ^= 1;
        }
        bar_expect(ring.whole(ring.slot), bytes);
        fill(ring.here());
        ring.go_on();
    }
    __device__ __forceinline__ void box(uint32_t to, const TensorMap& map, int column, int row) const {
        copy_box(to, map, column, row, ring.whole(ring.slot), policy);
    }
    // Neighbouring bytes, a multiple of 16, or nothing.
    __device__ __forceinline__ void line(uint32_t to, const void* from, int64_t at, int bytes) const {
        if (from != nullptr) copy_line(to, static_cast<const char*>(from) + at, bytes, ring.whole(ring.slot));
    }
    // Before the first copy by a map that a kernel has written.
    static __device__ __forceinline__ void see(const TensorMap& map) {
        asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" : : "l"(&map) : "memory");
    }

    // `columns` columns from `first` on, 256 at a time, of `rows` rows from `row` on.
    __device__ __forceinline__ void some_rows(const TensorMap& map, int first, int columns, int row, int rows) {
        const int of_box = rows * 2 * kBoxColumns;
#pragma unroll 1
        for (int c = 0; c < columns; c += kColumns) {
            const int boxes = min((columns - c + kBoxColumns - 1) / kBoxColumns, kColumns / kBoxColumns);
            stage(boxes * of_box, [&](uint32_t to) {
                for (int i = 0; i < boxes; i++) box(to + i * of_box, map, first + c + i * kBoxColumns, row);
            });
        }
    }

    // Own columns of x, or of z; in a cluster all its columns, of the block's share of the inputs.
    __device__ __forceinline__ void columns(const Token& a, const TensorMap& map, bool of_z) {
        constexpr int kRows = kInRows / kCluster;
        const int first = blockIdx.x / kCluster * kCluster * kOwn + (of_z != MAMBA2 ? a.inner : 0);
        const int inputs = a.width / kCluster, begin = blockIdx.x % kCluster * inputs;
#pragma unroll 1
        for (int k = 0; k < inputs; k += kRows) {
            stage(2 * kInRows * kOwn, [&](uint32_t to) { box(to, map, first, begin + k); });
        }
    }

    static __device__ __forceinline__ int have(const void* p, int bytes) { return p != nullptr ? bytes : 0; }

    __device__ __forceinline__ void filters(const Token& a, const MambaLayer& l) {
        using At = Filters<kOwn>;
        const int64_t first = blockIdx.x * kOwn;
        stage(14 * kOwn + have(l.conv_bias, 2 * kOwn) + have(l.in_proj_bias, 2 * kOwn), [&](uint32_t to) {
            line(to + At::filter, l.conv_weight, 8 * first, 8 * kOwn);
            line(to + At::before, l.conv_state, 6 * first, 6 * kOwn);
            line(to + At::conv_bias, l.conv_bias, 2 * first, 2 * kOwn);
            line(to + At::in_bias, l.in_proj_bias, 2 * (first + (MAMBA2 ? a.inner : 0)), 2 * kOwn);
        });
    }

    __device__ __forceinline__ void channels(const Token& a, const MambaLayer& l) {
        using At = Channels<kOwn, MAMBA2>;
        const int64_t first = blockIdx.x * kOwn;
        const int item = a.state_dtype == MAMBA_FLOAT32 ? 4 : 2, states = (MAMBA2 ? 128 : 16) * item * kOwn;
        const int head = MAMBA2 ? static_cast<int>(first) / a.head_dim / 4 * 4 : 0;
        const int of_heads = 4 * min(At::kHeads, a.heads - head), of_skip = MAMBA2 && !a.skip_per_channel ? of_heads : 4 * kOwn;
        const int64_t skip_at = MAMBA2 && !a.skip_per_channel ? 4 * head : 4 * first;
        int bytes = have(l.in_proj_bias, 2 * kOwn) + have(l.D, of_skip);
        bytes += MAMBA2 ? of_heads + have(l.dt_bias, of_heads) + have(l.gate_norm, 4 * kOwn)
                        : 64 * kOwn + have(l.dt_bias, 4 * kOwn) + states;
        stage(bytes, [&](uint32_t to) {
            line(to + At::in_bias, l.in_proj_bias, 2 * (first + (MAMBA2 ? 0 : a.inner)), 2 * kOwn);
            line(to + At::skip, l.D, skip_at, of_skip);
            if (MAMBA2) {
                line(to + At::A, l.A, 4 * head, of_heads);
                line(to + At::dt_bias, l.dt_bias, 4 * head, of_heads);
                line(to + At::gate_norm, l.gate_norm, 4 * first, 4 * kOwn);
            } else {
                line(to + At::A, l.A, 64 * first, 64 * kOwn);
                line(to + At::dt_bias, l.dt_bias, 4 * first, 4 * kOwn);
                line(to + At::states, l.ssm_state, 16 * item * first, states);
            }
        });
        if (MAMBA2) stage(states, [&](uint32_t to) { line(to, l.ssm_state, 128 * item * first, states); });
    }

    __device__ void run(const Token& a, const LayerTable& table, const MambaLayer* layers) {
        const int own = blockIdx.x * kOwn;
#pragma unroll 1
        for (int l = 0; l < a.layers; l++) {
            const TokenLayer& maps = layer_of(a, table, l);
            if (l >= kTableLayers) see(maps.in), see(maps.low), see(maps.dt), see(maps.out);
            if (MAMBA2) some_rows(maps.low, 2 * a.inner, a.low, blockIdx.x * a.own_width, (a.own_width + 7) / 8 * 8);
            columns(a, maps.in, false);
            filters(a, layers[l]);
            if (!MAMBA2) some_rows(maps.low, 0, a.low, own, kOwn);
            columns(a, maps.in, true);
            channels(a, layers[l]);
            if (!MAMBA2) {
                stage(2 * a.rank * kOwn, [&](uint32_t to) { box(to, maps.dt, own, 0); });
            }
            some_rows(maps.out, 0, a.width, own, kOwn);
        }
    }
};

#endif

}  // namespace token
}  // namespace mamba
