// One row's token through all layers in one kernel: MambaModel without its head, for compute capability 9.0.
//
// A block, alone on its multiprocessor, has some channels of every layer. Their columns of in_proj, their rows of out_proj
// and their states meet no other block, so a layer has two sums over blocks, of which one passes behind in_proj:
//     x, normed by every block -> own columns of in_proj for x, convolution
//     own rows of x_proj       -> sums -> dt's input, B and C, for all, while every block has own columns for z
//     (Mamba-2: own rows of in_proj's columns for B, C and dt, before the own columns)
//     scan of own channels, own rows of out_proj -> sums -> the residual stream, for all
// There is no barrier of the grid: who needs a word waits for its number (token_words.cuh). In small models (SUMS) blocks add
// to integers in the L2 cache, of which each layer has its own, and every block does what follows a sum. Adding costs that
// cache more than storing. So in larger ones blocks write their shares for the block that has this part of the sums, which
// does what follows and writes the result for all; no word is written again before what follows from it has been read. All
// sums have a fixed order, or need none. Where blocks are clusters of two (cluster_of()), each has half of the inputs of
// both's x and z, and sends the other's sums to its shared memory.
//
// One more warp brings weights to a ring in shared memory, up to a third of a layer ahead, and never pauses for an
// exchange: that is what this kernel gains over one kernel for each part. samples/results/step.txt, 42 to 51 and 69 to 78, has
// what was measured on the way.
#pragma once

#include "selective_update.cuh"
#include "token_exchange.cuh"
#include "token_load.cuh"

namespace mamba {
namespace token {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// The half that computes. Its methods run in this order for each layer, those of Exchange between them.
template <typename T, bool MAMBA2, int UNITS, bool SUMS>
struct Layers : Exchange<T, MAMBA2, UNITS, SUMS> {
    using Base = Exchange<T, MAMBA2, UNITS, SUMS>;
    using Base::kOwn, Base::kStates, Base::a, Base::own, Base::x_in, Base::low, Base::layers, Base::used, Base::l,
        Base::ring, Base::shared, Base::x_own, Base::held_slot, Base::held;
    using Base::here, Base::meet, Base::fetch_norm, Base::get_x, Base::put_low, Base::sum_low, Base::get_low, Base::put_out,
        Base::put_squares, Base::sum_out, Base::finish;
    using Held = Channels<kOwn, MAMBA2>;
    static constexpr int kTiles = (UNITS + 1) / 2;  // of 16 own columns
    static constexpr int kCluster = cluster_of(UNITS), kRows = kInRows / kCluster, kRowWarps = kWarps / kCluster;
    static constexpr int kAtOnce = SUMS ? 3 : 2, kOutAtOnce = SUMS ? 3 : 1;  // stages of in_proj, of out_proj

    using Base::Base;

    __device__ __forceinline__ int first_channel() const { return blockIdx.x * kOwn; }
    static __device__ __forceinline__ int rank() { return blockIdx.x % kCluster; }  // in the cluster
    __device__ __forceinline__ const char* generic(uint32_t address) const {
        return shared + (address - shared_address(shared));
    }
    template <typename V>
    __device__ __forceinline__ V of_held(int begin, int i) const { return reinterpret_cast<const V*>(held + begin)[i]; }

    // --- shares of low

    // Mamba-2's columns of in_proj, of the block's part of x.
    __device__ __forceinline__ void low_of_x() {
        const int thread = here(), lane = thread % 32, warp = thread / 32, of_box = (a.own_width + 7) / 8 * 8 * 2 * kBoxColumns;
        const T* const x = x_in + blockIdx.x * a.own_width;
#pragma unroll 1
        for (int c = 0; c < a.low; c += kColumns) {
            const uint32_t at = ring.wait() + warp / 4 * of_box + place_of<8>(lane % 8, warp % 4 * 2 + lane / 8 % 2);
            float sum[4] = {};
            if (c + 16 * warp < a.low) {
#pragma unroll 1
                for (int k = 0; k < a.own_width; k += 8) {
                    uint32_t w[4];
                    load_matrices_transposed(w, at + k * 2 * kBoxColumns);
                    const int i = k + lane % 4 * 2;
                    multiply_add_8<T>(sum, w[0], w[1], i < a.own_width ? two_at(x + i) : 0);
                }
            }
            ring.leave();
            put_low(c + 16 * warp + column_of(lane), value_of(sum, lane));
        }
    }

    // x_proj, of the block's channels.
    __device__ __forceinline__ void low_of_channels() {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
#pragma unroll
        for (int k = 0; k < UNITS; k++) x_own[k] = two_at(own.x_in + 8 * k + lane % 4 * 2);
#pragma unroll 1
        for (int c = 0; c < a.low; c += kColumns) {
            Rows w;
            take_rows(w);
            if (c + 16 * warp < a.low) put_low(c + 16 * warp + column_of(lane), times_own(w));
        }
    }

    // --- own channels

    // A warp's share of the sums of own columns of x or z, by stages `from` to `end`: it has 16 rows of each. In a cluster the
    // first warps have the first block's columns. Some stages at once, so that one waits where another computes.
    __device__ __forceinline__ void add_stages(float (&sums)[kTiles][4], int from, int end) {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const int row = 16 * (warp % kRowWarps), first_unit = warp / kRowWarps * UNITS;
        const T* x = x_in + rank() * (a.width / kCluster) + from * kRows + row + lane % 4 * 2;
        int place[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            const int unit = first_unit + min(2 * t + lane / 8 % 2, UNITS - 1);
            place[t] = place_of<kCluster * UNITS>(row + lane / 16 * 8 + lane % 8, unit);
        }
#pragma unroll 1
        for (; from + kAtOnce <= end; from += kAtOnce, x += kAtOnce * kRows) add_at_once<kAtOnce>(sums, place, x);
#pragma unroll 1
        for (; from < end; from++, x += kRows) add_at_once<1>(sums, place, x);
    }

    template <int COUNT>
    __device__ __forceinline__ void add_at_once(float (&sums)[kTiles][4], const int (&place)[kTiles], const T* x) {
        uint32_t w[COUNT][kTiles][4], values[COUNT][2];
#pragma unroll
        for (int s = 0; s < COUNT; s++) {
            const uint32_t slot = ring.wait();
            values[s][0] = two_at(x + s * kRows), values[s][1] = two_at(x + s * kRows + 8);
#pragma unroll
            for (int t = 0; t < kTiles; t++) load_matrices_transposed(w[s][t], slot + place[t]);
            ring.leave();
        }
#pragma unroll
        for (int s = 0; s < COUNT; s++) {
#pragma unroll
            for (int t = 0; t < kTiles; t++) multiply_add<T>(sums[t], w[s][t], values[s][0], values[s][1]);
        }
    }

    // Of x (0) or z (1).
    __device__ __forceinline__ void put_partial(int of, const float (&sums)[kTiles][4]) const {
        const int thread = here(), lane = thread % 32;
        if (!has_column(lane)) return;
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            const int c = 16 * t + column_of(lane);
            if (c < kOwn) own.partial[of][thread / 32][c] = value_of(sums[t], lane);
        }
    }
    // Of column c of a block of the cluster, over the inputs of this one.
    __device__ __forceinline__ float sum_of_partial(int of, int block, int c) const {
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < kRowWarps; w++) v += own.partial[of][block * kRowWarps + w][c];
        return v;
    }

    // To the other block its sums. It has read those of the layer before: x of this layer follows from them.
    __device__ __forceinline__ void send_sums(int of) const {
        const int c = here() - kThreads / 2;
        if (kCluster == 1 || c < 0 || c >= kOwn) return;
        const int other = rank() ^ 1;
        send(shared_address(&own.sent[of][c]), shared_address(&own.sent_bars[of]), other, sum_of_partial(of, other, c));
    }
    // Of own column c over all inputs, by a thread each. The first lets the barrier count the next layer's bytes.
    __device__ __forceinline__ float sum_of_own(int of, int c) const {
        const float v = sum_of_partial(of, rank(), c);
        if (kCluster == 1) return v;
        const uint32_t bar = shared_address(&own.sent_bars[of]);
        bar_wait_of_cluster(bar, l % 2);
        if (c == 0) bar_expect(bar, sizeof(own.sent[of]));
        return v + own.sent[of][c];
    }

    // The convolution of x, from the stage of Filters; and the gate of z. By the last threads: the first go on to get_low().
    __device__ __forceinline__ void finish_x(const char* filters) const {
        using At = Filters<kOwn>;
        send_sums(0);
        const int c = here() - (kThreads - 2 * kOwn);
        if (c < 0 || c >= kOwn) return;
        const MambaLayer& of = layers[l];
        const auto of_filters = [&](int begin) { return reinterpret_cast<const T*>(filters + begin); };
        const float in_bias = of.in_proj_bias != nullptr ? to_float(of_filters(At::in_bias)[c]) : 0.0f;
        const float bias = of.conv_bias != nullptr ? to_float(of_filters(At::conv_bias)[c]) : 0.0f;
        const T now = from_float<T>(in_bias + sum_of_own(0, c));
        T* const state = static_cast<T*>(of.conv_state_out) + 3 * (first_channel() + c);
        const float v = convolve(of_filters(At::filter) + 4 * c, of_filters(At::before) + 3 * c, bias, now, state, used);
        own.x[c] = v;
        own.x_in[c] = from_float<T>(v);
    }
    __device__ __forceinline__ void finish_z() const {
        send_sums(1);
        const int c = here() - (kThreads - kOwn);
        if (c < 0) return;
        const float bias = layers[l].in_proj_bias != nullptr ? to_float(of_held<T>(Held::in_bias, c)) : 0.0f;
        own.gate[c] = silu(rounded<T>(bias + sum_of_own(1, c)));
    }
    __device__ __forceinline__ void hold_channels() {
        held = generic(ring.wait());
        held_slot = ring.slot;
        ring.go_on();
    }

    // Sums of own columns of x or z; if not SUMS, those of low amid, when all blocks have put their shares.
    __device__ __forceinline__ void multiply_own(int of) {
        const int stages = a.width / kInRows, before = SUMS ? 0 : MAMBA2 ? 2 * stages / 3 : stages / 3;
        float sums[kTiles][4] = {};
        if (!SUMS && of == !MAMBA2) {
            add_stages(sums, 0, before);
            sum_low();
            add_stages(sums, before, stages);
        } else {
            add_stages(sums, 0, stages);
        }
        put_partial(of, sums);
    }
    __device__ __forceinline__ void in_proj_x() {
        multiply_own(0);
        const char* const filters = generic(ring.wait());
        meet();
        finish_x(filters);
        ring.leave();
        meet();
    }
    __device__ __forceinline__ void in_proj_z() {
        multiply_own(1);
        hold_channels();
        meet();
        finish_z();
    }
    // Both, where nothing happens between them.
    __device__ __forceinline__ void in_proj() {
        multiply_own(0);
        const char* const filters = generic(ring.wait());
        const int slot = ring.slot;
        ring.go_on();
        multiply_own(1);
        hold_channels();
        meet();
        finish_x(filters);
        finish_z();
        ring.give_back(slot);
    }

    // dt's own projection: a warp has 16 channels and a share of the rows. Then four lanes a channel.
    __device__ __forceinline__ void scan_mamba() {
        constexpr int kShares = kWarps / kTiles;
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const uint32_t slot = ring.wait();
        if (warp < kTiles * kShares) {
            const int tile = warp % kTiles, unit = min(2 * tile + lane / 8 % 2, UNITS - 1), c = 16 * tile + column_of(lane);
            float sum[4] = {};
#pragma unroll 1
            for (int k = 16 * (warp / kTiles); k < a.rank; k += 16 * kShares) {
                uint32_t w[4];
                load_matrices_transposed(w, slot + place_of<UNITS>(k + lane / 16 * 8 + lane % 8, unit));
                const T* const values = own.dt_in + k + lane % 4 * 2;
                multiply_add<T>(sum, w, two_at(values), two_at(values + 8));
            }
            if (has_column(lane) && c < kOwn) own.partial[0][warp / kTiles][c] = value_of(sum, lane);
        }
        ring.leave();
        meet();
        if (thread < 4 * kOwn) {
            const int c = thread / 4, n = thread % 4 * 4;
            float dt = 0.0f, y = 0.0f, h[4];
#pragma unroll
            for (int s = 0; s < kShares; s++) dt += own.partial[0][s][c];
            const float bias = layers[l].dt_bias != nullptr ? of_held<float>(Held::dt_bias, c) : 0.0f;
            const float delta = softplus(rounded<T>(dt) + bias), x = own.x[c], drive = delta * x;
            const Pack<float, 4> A = load<float, 4>(reinterpret_cast<const float*>(held + Held::A) + kStates * c + n);
            const Pack<float, 4> B = load<float, 4>(low + a.rank + n), C = load<float, 4>(low + a.rank + kStates + n);
            scan::FourStates state;
            state.load_shared(held + Held::states, kStates * c + n, a.state_dtype);
            state.get(h, a.state_dtype);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h[i] = fmaf(exp2_approx(delta * (kLog2E * A.v[i])), h[i], drive * B.v[i]);
                y = fmaf(h[i], C.v[i], y);
            }
            if (used) state.set(h, a.state_dtype);
            state.store(layers[l].ssm_state_out, int64_t{first_channel() + c} * kStates + n, a.state_dtype);
            y += __shfl_xor_sync(~0u, y, 2);
            y += __shfl_xor_sync(~0u, y, 1);
            const float skip = layers[l].D != nullptr ? of_held<float>(Held::skip, c) : 0.0f;
            if (n == 0) own.y[c] = used ? fmaf(skip, x, y) * own.gate[c] : 0.0f;
        }
        ring.give_back(held_slot);
        meet();
    }

    // A warp has a channel after the other, a lane four states of each. Lane i has what the i-th needs besides.
    __device__ __forceinline__ void scan_mamba2() {
        constexpr int kTurns = (kOwn + kWarps - 1) / kWarps;
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const MambaLayer& at = layers[l];
        const int mine = min(warp + lane % kTurns * kWarps, kOwn - 1), head = (first_channel() + mine) / a.head_dim;
        const int of_head = head - first_channel() / a.head_dim / 4 * 4;
        float delta = low[a.low - a.heads + head];
        if (at.dt_bias != nullptr) delta += of_held<float>(Held::dt_bias, of_head);
        delta = ssd::within(softplus(delta), a.dt_min, a.dt_max);
        const float decay = expf(delta * of_held<float>(Held::A, of_head)), x = own.x[mine], drive = delta * x;
        const Pack<float, 4> B = load<float, 4>(low + 4 * lane), C = load<float, 4>(low + kStates + 4 * lane);
        const char* const states = generic(ring.wait());
        float y[kTurns];
#pragma unroll
        for (int i = 0; i < kTurns; i++) {
            const int c = min(warp + i * kWarps, kOwn - 1);
            const float by = __shfl_sync(~0u, decay, i), driven = __shfl_sync(~0u, drive, i);
            scan::FourStates state;
            float h[4];
            state.load_shared(states, kStates * c + 4 * lane, a.state_dtype);
            state.get(h, a.state_dtype);
            y[i] = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                h[n] = fmaf(driven, B.v[n], by * h[n]);
                y[i] = fmaf(h[n], C.v[n], y[i]);
            }
            if (used) state.set(h, a.state_dtype);
            if (warp + i * kWarps < kOwn) {
                state.store(at.ssm_state_out, int64_t{first_channel() + c} * kStates + 4 * lane, a.state_dtype);
            }
        }
        ring.leave();
        float y_mine = 0.0f;
#pragma unroll
        for (int i = 0; i < kTurns; i++) {
            const float sum = sum_of_warp(y[i]);
            if (lane == i) y_mine = sum;
        }
        if (lane < kTurns && warp + lane * kWarps < kOwn) {  // gated; the root mean square of the norm is yet to come
            const float skip = at.D != nullptr ? of_held<float>(Held::skip, a.skip_per_channel ? mine : of_head) : 0.0f;
            const float v = used ? rounded<T>(fmaf(skip, x, y_mine) * own.gate[mine]) : 0.0f;
            own.y[mine] = at.gate_norm != nullptr ? v * of_held<float>(Held::gate_norm, mine) : v;
            own.y_squared[mine] = v * v;
        }
        ring.give_back(held_slot);
        meet();
    }

    // --- the residual stream

    // The warp's 16 of 256 columns of a stage of own rows; and those times x_own.
    using Rows = uint32_t[(UNITS + 1) / 2][4];
    __device__ __forceinline__ void take_rows(Rows& w) {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const uint32_t at =
            ring.wait() + warp / 4 * (kOwn * 2 * kBoxColumns) + place_of<8>(lane % 8, warp % 4 * 2 + lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < UNITS; k += 2) {
            load_matrices_transposed(w[k / 2], at + (8 * k + (k + 1 < UNITS ? lane / 16 * 8 : 0)) * 2 * kBoxColumns);
        }
        ring.leave();
    }
    __device__ __forceinline__ float times_own(const Rows& w) const {
        float sum[4] = {}, other[4] = {};
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            const int half = k % 2 * 2;
            multiply_add_8<T>(half == 0 ? sum : other, w[k / 2][half], w[k / 2][half + 1], x_own[k]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += other[i];
        return value_of(sum, threadIdx.x % 32);
    }

    // The block's share of every sum of out_proj. Where a norm is yet to be divided by, what goes in is scaled to at most 1,
    // by a power of two, for it may be out of float16's range; and its squares are put beside the sums.
    __device__ __forceinline__ void out_proj() {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        Pack<float, 2> y[UNITS];
        float unit = 1.0f, most = 0.0f, squares = 0.0f;
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            y[k] = load<float, 2>(own.y + 8 * k + lane % 4 * 2);
            if (!MAMBA2) continue;
            const Pack<float, 2> squared = load<float, 2>(own.y_squared + 8 * k + lane % 4 * 2);
            most = fmaxf(most, fmaxf(fabsf(y[k].v[0]), fabsf(y[k].v[1])));
            squares += squared.v[0] + squared.v[1];
        }
        if (MAMBA2) {
            const int exponent = static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(most)) >> 23) - 126;
            unit = __int_as_float((min(max(exponent, -100), 100) + 127) << 23);
            squares += __shfl_xor_sync(~0u, squares, 1);
            squares += __shfl_xor_sync(~0u, squares, 2);
            put_squares(squares);
        }
        const float per_unit = 1.0f / unit;
#pragma unroll
        for (int k = 0; k < UNITS; k++) x_own[k] = pack<T>(y[k].v[0] * per_unit, y[k].v[1] * per_unit);
        if (l + 1 < a.layers) fetch_norm(l + 1);
        int column = 16 * warp + column_of(lane);
        int left = a.width / kColumns;
#pragma unroll(SUMS ? 1 : 2)
        for (; left >= kOutAtOnce; left -= kOutAtOnce, column += kOutAtOnce * kColumns) put_at_once<kOutAtOnce>(column, unit);
#pragma unroll 1
        for (; kOutAtOnce > 1 && left > 0; left--, column += kColumns) put_at_once<1>(column, unit);
    }

    template <int COUNT>
    __device__ __forceinline__ void put_at_once(int column, float unit) {
        Rows w[COUNT];
#pragma unroll
        for (int s = 0; s < COUNT; s++) take_rows(w[s]);
#pragma unroll
        for (int s = 0; s < COUNT; s++) put_out(column + s * kColumns, times_own(w[s]) * unit);
    }

    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (; l < a.layers; l++) {
            get_x();
            if (MAMBA2) low_of_x();
            if constexpr (SUMS) {
                if (!MAMBA2) in_proj_x(), low_of_channels();
                const AfterLow<T, MAMBA2> after(a, layers[l], min(here(), a.low - 1));
                MAMBA2 ? in_proj() : in_proj_z();
                get_low(after);
            } else {
                in_proj_x();
                if (!MAMBA2) low_of_channels();
                in_proj_z();
                get_low();
            }
            if (MAMBA2) {
                scan_mamba2();
            } else {
                scan_mamba();
            }
            out_proj();
            if (!SUMS) sum_out();
        }
        if (SUMS && blockIdx.x == 0) finish();
    }
};

template <typename T, bool MAMBA2, int UNITS, bool SUMS>
__global__ void __launch_bounds__(kThreads + 32, 1)
    token_kernel(const Token a, const __grid_constant__ LayerTable table) {
    extern __shared__ float4 memory[];
    __shared__ Own<T, 8 * UNITS> own;
    char* const shared = reinterpret_cast<char*>(memory);
    const Places at(a);
    constexpr bool kAlone = Layers<T, MAMBA2, UNITS, SUMS>::kCluster == 1;
    const int thread = threadIdx.x;
    const Ring ring(own.bars, shared + at.ring, a.slots, a.slot_bytes);
    if (thread < a.slots) {
        bar_init(ring.whole(thread), 1);
        bar_init(ring.done(thread), kWarps);
        bars_are_there();
    }
    if (!kAlone && thread < 2) {
        const uint32_t bar = shared_address(&own.sent_bars[thread]);
        bar_init(bar, 1);
        bars_are_there();
        bar_expect(bar, sizeof(own.sent[0]));
    }
    uint64_t* const layers = reinterpret_cast<uint64_t*>(shared + at.layers);
    const auto meet = [] {
        __syncwarp();
        kAlone ? __syncthreads() : cluster_barrier();
    };
    meet();
    // Pointers are put here, not ahead of the branch: the compiler then finds code of fewer registers, which takes 1 to 4 % less
    // (samples/results/step.txt, 150).
    if (thread < kThreads) {
        constexpr int kPointers = sizeof(MambaLayer) / 8;
        for (int i = thread; i < a.layers * kPointers; i += kThreads) {
            layers[i] = reinterpret_cast<const uint64_t*>(&layer_of(a, table, i / kPointers).at)[i % kPointers];
        }
        barrier_wait(2, kThreads + 32);
        Layers<T, MAMBA2, UNITS, SUMS>(a, own, ring, shared, at).run();
    } else {
        barrier_wait(2, kThreads + 32);
        if (thread == kThreads) Loader<MAMBA2, UNITS>(ring).run(a, table, reinterpret_cast<const MambaLayer*>(layers));
    }
    if (!kAlone) meet();  // a block is there as long as the other may send to it
}

#else

template <typename T, bool MAMBA2, int UNITS, bool SUMS>
__global__ void token_kernel(const Token, const LayerTable) {}

#endif

// Puts the layers that are no argument where the kernel finds them, and zeros to what the kernel adds to.
__global__ void __launch_bounds__(256) token_table_kernel(
    const __grid_constant__ LayerTable others, int count, TokenLayer* to, uint4* zeros, int64_t zero_count) {
    constexpr int kOfLayer = sizeof(TokenLayer) / sizeof(uint4);
    const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, all = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = first; i < count * kOfLayer; i += all) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(others.each)[i];
    }
    for (int64_t i = first; i < zero_count; i += all) zeros[i] = make_uint4(0, 0, 0, 0);
}

}  // namespace token
}  // namespace mamba
