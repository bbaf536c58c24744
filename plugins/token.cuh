// One row's token through all layers in one kernel: MambaModel without its head, for compute capability 9.0.
//
// A block, alone on its multiprocessor, has some channels of every layer. Their columns of in_proj, their rows of out_proj
// and their states meet no other block, so a layer has four exchanges between blocks, of which two pass behind in_proj:
//     x, normed by every block -> own columns of in_proj for x, convolution
//     own rows of x_proj       -> sums over blocks -> dt's input, B and C, for all, while every block has own columns for z
//     (Mamba-2: own rows of in_proj's columns for B, C and dt, before the own columns)
//     scan of own channels, own rows of out_proj -> sums over blocks -> x of the next layer, for all
// What is exchanged passes through the L2 cache in words of a float and the number of its layer. Who needs a word waits for
// its number, so there is no barrier of the grid, and no word is written again before what follows from it has been read.
// All sums have a fixed order. Where blocks are clusters of two (cluster_of()), each has half of the inputs of both's x and z,
// and sends the other's sums to its shared memory.
//
// One more warp brings weights to a ring in shared memory, up to a third of a layer ahead, and never pauses for an
// exchange: that is what this kernel gains over one kernel for each part. samples/results/step.txt, 42 to 46, has what was
// measured on the way.
#pragma once

#include "selective_update.cuh"
#include "ssd_common.cuh"
#include "token_load.cuh"

namespace mamba {
namespace token {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// A product's left operand are 16 columns of weights, and all eight columns of the right one are the same vector: a lane has
// any of eight equal values of a column's sum. Lanes with lane % 4 below 2 have all 16 between them.
__device__ __forceinline__ bool has_column(int lane) { return lane % 4 < 2; }
__device__ __forceinline__ int column_of(int lane) { return lane / 4 + lane % 4 * 8; }
__device__ __forceinline__ float value_of(const float (&d)[4], int lane) { return lane % 4 == 0 ? d[0] : d[2]; }

template <typename T>
__device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

__device__ __forceinline__ uint32_t two_at(const void* values) { return *static_cast<const uint32_t*>(values); }

// A channel's convolution of width 4, whose new state goes to `to`.
template <typename T>
__device__ __forceinline__ float convolve(const T* filter, const T* before, float bias, T now, T* to, bool used) {
    const T first = before[0], second = before[1], third = before[2];
    const Pack<T, 4> taps = load<T, 4>(filter);
    float sum = fmaf(to_float(taps.v[0]), to_float(first), bias);
    sum = fmaf(to_float(taps.v[1]), to_float(second), sum);
    sum = fmaf(to_float(taps.v[2]), to_float(third), sum);
    sum = fmaf(to_float(taps.v[3]), to_float(now), sum);
    to[0] = used ? second : first;
    to[1] = used ? third : second;
    to[2] = used ? now : third;
    return rounded<T>(silu(sum));
}

// The half that computes. Its methods run in this order for each layer; every one finds its thread anew, for what the
// compiler would keep of that from one to another costs registers.
template <typename T, bool MAMBA2, int UNITS>
struct Layers {
    static constexpr int kOwn = 8 * UNITS, kTiles = (UNITS + 1) / 2;  // kTiles: of 16 own columns
    static constexpr int kCluster = cluster_of(UNITS), kRows = kInRows / kCluster, kRowWarps = kWarps / kCluster;
    static constexpr int kPairs = kMostWidth / 2 / kThreads;  // of x, of a thread
    static constexpr int kStates = MAMBA2 ? 128 : 16;         // of a channel
    using Held = Channels<kOwn, MAMBA2>;

    const Token& a;
    Own<T, kOwn>& own;
    Ring ring;
    char* const shared;
    T* const x_in;        // [width], x of the layer
    float* const low;     // [low]
    const MambaLayer* const layers;
    const bool used;
    const T* const embedded;  // [width]
    float residual;           // where thread < own_width: of the stream, the block's
    float2 norm[kPairs];      // weights of the next layer's norm
    uint32_t x_own[UNITS];    // of own channels, as a right operand
    int l = 0, held_slot = 0;
    const char* held = nullptr;  // the stage of Channels

    __device__ Layers(const Token& a, Own<T, kOwn>& own, const Ring& ring, char* shared, const Places& at)
        : a(a), own(own), ring(ring), shared(shared), x_in(reinterpret_cast<T*>(shared)),
          low(reinterpret_cast<float*>(shared + at.low)), layers(reinterpret_cast<const MambaLayer*>(shared + at.layers)),
          used(a.seq_lens[0] > 0),
          embedded(static_cast<const T*>(a.embedding) + int64_t{min(max(a.input_ids[0], 0), a.vocab - 1)} * a.width) {
        const int thread = threadIdx.x;
        residual = thread < a.own_width ? to_float(embedded[blockIdx.x * a.own_width + thread]) : 0.0f;
        fetch_norm(0);
    }

    static __device__ __forceinline__ int here() { return not_ahead(threadIdx.x); }
    static __device__ __forceinline__ void meet() { barrier_wait(1, kThreads); }
    __device__ __forceinline__ uint32_t layer() const { return l + 1; }
    __device__ __forceinline__ int first_channel() const { return blockIdx.x * kOwn; }
    static __device__ __forceinline__ int rank() { return blockIdx.x % kCluster; }  // in the cluster
    __device__ __forceinline__ const char* generic(uint32_t address) const {
        return shared + (address - shared_address(shared));
    }
    template <typename V>
    __device__ __forceinline__ V of_held(int begin, int i) const { return reinterpret_cast<const V*>(held + begin)[i]; }

    __device__ __forceinline__ void fetch_norm(int layer) {
        const int thread = here();
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            const int k = 2 * (thread + i * kThreads);
            if (k >= a.width) continue;
            const Pack<float, 2> w = load_constant<float, 2>(layers[layer].norm_weight + k);
            norm[i] = make_float2(w.v[0], w.v[1]);
        }
    }

    __device__ __forceinline__ void get_x() {
        const int thread = here();
        const auto exists = [&](int i) { return 2 * (thread + i * kThreads) < a.width; };
        float2 x[kPairs];
        if (l == 0) {
#pragma unroll
            for (int i = 0; i < kPairs; i++) {
                if (!exists(i)) continue;
                const Pack<T, 2> v = load_constant<T, 2>(embedded + 2 * (thread + i * kThreads));
                x[i] = make_float2(to_float(v.v[0]), to_float(v.v[1]));
            }
        } else {
            gather(x, l, [&](int i) { return a.stream + 2 * (thread + i * kThreads); }, exists);
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            if (exists(i)) squares = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, squares));
        }
        squares = sum_of_warp(squares);
        if (thread % 32 == 0) own.squares[thread / 32] = squares;
        meet();
        squares = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w += 4) {
            const Pack<float, 4> four = load<float, 4>(own.squares + w);
            squares += (four.v[0] + four.v[1]) + (four.v[2] + four.v[3]);
        }
        const float scale = rsqrtf(squares / a.width + a.eps);
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            if (!exists(i)) continue;
            reinterpret_cast<uint32_t*>(x_in)[thread + i * kThreads] =
                pack<T>(x[i].x * scale * norm[i].x, x[i].y * scale * norm[i].y);
        }
        meet();
    }

    // --- low: a block's share of every sum; the sums, by some blocks; all of them, by all

    __device__ __forceinline__ void put_low(int column, float v) const {
        if (column >= a.low || !has_column(threadIdx.x % 32)) return;
        const int to = __umulhi(column, a.low_factor);
        write_word(a.low_parts + (to * gridDim.x + blockIdx.x) * a.own_low + (column - to * a.own_low), v, layer());
    }

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
            const uint32_t slot = ring.wait();
            if (c + 16 * warp < a.low) put_low(c + 16 * warp + column_of(lane), times_rows(slot, warp, lane));
            ring.leave();
        }
    }

    // A warp has two columns; of Mamba-2 the convolution follows.
    __device__ __forceinline__ void sum_low() const {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const int column = blockIdx.x * a.own_low + 2 * warp + lane, channel = a.inner + column;  // where lane < 2
        if (2 * warp >= a.own_low || column - lane >= a.low) return;
        const MambaLayer& at = layers[l];
        const bool exists = lane < 2 && column < a.low, convolved = MAMBA2 && exists && column < a.low - a.heads;
        Pack<T, 4> filter;
        T before[3];
        float bias = 0.0f, conv_bias = 0.0f;
        if (convolved) {  // read before the wait
            filter = load_constant<T, 4>(static_cast<const T*>(at.conv_weight) + 4 * channel);
#pragma unroll
            for (int i = 0; i < 3; i++) before[i] = static_cast<const T*>(at.conv_state)[3 * channel + i];
            if (at.conv_bias != nullptr) conv_bias = to_float(static_cast<const T*>(at.conv_bias)[channel]);
        }
        if (MAMBA2 && exists && at.in_proj_bias != nullptr) {
            bias = to_float(static_cast<const T*>(at.in_proj_bias)[2 * a.inner + column]);
        }
        float2 parts[kMostBlocks / 32];
        const int blocks = gridDim.x;
        const uint64_t* const from = a.low_parts + blockIdx.x * blocks * a.own_low + 2 * warp;
        const auto is_block = [&](int i) { return lane + 32 * i < blocks; };
        gather(parts, layer(), [&](int i) { return from + (lane + 32 * i) * a.own_low; }, is_block);
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kMostBlocks / 32; i++) {
            if (is_block(i)) sum.x += parts[i].x, sum.y += parts[i].y;
        }
        sum = make_float2(sum_of_warp(sum.x), sum_of_warp(sum.y));
        if (!exists) return;
        float v = rounded<T>((lane == 0 ? sum.x : sum.y) + bias);
        if (convolved) {
            v = convolve(filter.v, before, conv_bias, from_float<T>(v), static_cast<T*>(at.conv_state_out) + 3 * channel, used);
        }
        write_word(a.lows + column, v, layer());
    }

    __device__ __forceinline__ void get_low() const {
#pragma unroll 1
        for (int i = here(); 2 * i < a.low; i += kThreads) {
            float2 pair[1];
            gather(pair, layer(), [&](int) { return a.lows + 2 * i; }, [](int) { return true; });
            *reinterpret_cast<float2*>(low + 2 * i) = pair[0];
            if (!MAMBA2 && 2 * i < a.rank) reinterpret_cast<uint32_t*>(own.dt_in)[i] = pack<T>(pair[0].x, pair[0].y);
        }
        meet();
        if (!MAMBA2 && a.norm_eps >= 0.0f) norm_low();
    }

    // Falcon-Mamba's norms of dt's input, B and C, without weights: a warp each.
    __device__ __forceinline__ void norm_low() const {
        const int thread = here(), lane = thread % 32, part = thread / 32;
        if (part < 3) {
            const int size = part == 0 ? a.rank : kStates, from = part == 0 ? 0 : a.rank + (part - 1) * kStates;
            float squares = 0.0f;
            for (int i = lane; i < size; i += 32) squares = fmaf(low[from + i], low[from + i], squares);
            const float scale = 1.0f / sqrtf(sum_of_warp(squares) / size + a.norm_eps);
            for (int i = lane; i < size; i += 32) {
                const T v = from_float<T>(low[from + i] * scale);
                low[from + i] = to_float(v);
                if (part == 0) own.dt_in[i] = v;
            }
        }
        meet();
    }

    // --- own channels

    // A warp's share of the sums of own columns of x or z, by stages `from` to `end`: it has 16 rows of each. In a cluster the
    // first warps have the first block's columns. Two stages at once, so that one waits where the other computes.
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
        for (; from + 2 <= end; from += 2, x += 2 * kRows) add_at_once<2>(sums, place, x);
        if (from < end) add_at_once<1>(sums, place, x);
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

    __device__ __forceinline__ void put_partial(const float (&sums)[kTiles][4]) const {
        const int thread = here(), lane = thread % 32;
        if (!has_column(lane)) return;
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            const int c = 16 * t + column_of(lane);
            if (c < kOwn) own.partial[thread / 32][c] = value_of(sums[t], lane);
        }
    }
    // Of column c of a block of the cluster, over the inputs of this one.
    __device__ __forceinline__ float sum_of_partial(int block, int c) const {
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < kRowWarps; w++) v += own.partial[block * kRowWarps + w][c];
        return v;
    }

    // To the other block its sums, of x (0) or z (1). It has read those of the layer before: x of this layer follows from them.
    __device__ __forceinline__ void send_sums(int of) const {
        const int c = here() - kThreads / 2;
        if (kCluster == 1 || c < 0 || c >= kOwn) return;
        const int other = rank() ^ 1;
        send(shared_address(&own.sent[of][c]), shared_address(&own.sent_bars[of]), other, sum_of_partial(other, c));
    }
    // Of own column c over all inputs, by a thread each. The first lets the barrier count the next layer's bytes.
    __device__ __forceinline__ float sum_of_own(int of, int c) const {
        const float v = sum_of_partial(rank(), c);
        if (kCluster == 1) return v;
        const uint32_t bar = shared_address(&own.sent_bars[of]);
        bar_wait_of_cluster(bar, l % 2);
        if (c == 0) bar_expect(bar, sizeof(own.sent[of]));
        return v + own.sent[of][c];
    }

    __device__ __forceinline__ void in_proj_x() {
        using At = Filters<kOwn>;
        const int stages = a.width / kInRows, before = MAMBA2 ? 2 * stages / 3 : 0;
        float sums[kTiles][4] = {};
        if (MAMBA2) {  // by then all blocks have put their shares
            add_stages(sums, 0, before);
            sum_low();
        }
        add_stages(sums, before, stages);
        put_partial(sums);
        const char* const at = generic(ring.wait());
        meet();
        send_sums(0);
        const int c = here();
        if (c < kOwn) {
            const MambaLayer& of = layers[l];
            const float in_bias = of.in_proj_bias != nullptr ? to_float(reinterpret_cast<const T*>(at + At::in_bias)[c]) : 0.0f;
            const float bias = of.conv_bias != nullptr ? to_float(reinterpret_cast<const T*>(at + At::conv_bias)[c]) : 0.0f;
            const float v = convolve(reinterpret_cast<const T*>(at + At::filter) + 4 * c,
                                     reinterpret_cast<const T*>(at + At::before) + 3 * c, bias,
                                     from_float<T>(in_bias + sum_of_own(0, c)),
                                     static_cast<T*>(of.conv_state_out) + 3 * (first_channel() + c), used);
            own.x[c] = v;
            own.x_in[c] = from_float<T>(v);
        }
        ring.leave();
        meet();
    }

    // The last threads finish it: the first go on to get_low().
    __device__ __forceinline__ void in_proj_z() {
        const int stages = a.width / kInRows, before = MAMBA2 ? 0 : stages / 3;
        float sums[kTiles][4] = {};
        if (!MAMBA2) {
            add_stages(sums, 0, before);
            sum_low();
        }
        add_stages(sums, before, stages);
        put_partial(sums);
        held = generic(ring.wait());
        held_slot = ring.slot;
        ring.go_on();
        meet();
        send_sums(1);
        const int c = here() - (kThreads - kOwn);
        if (c >= 0) {
            const float bias = layers[l].in_proj_bias != nullptr ? to_float(of_held<T>(Held::in_bias, c)) : 0.0f;
            own.gate[c] = silu(rounded<T>(bias + sum_of_own(1, c)));
        }
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
            if (has_column(lane) && c < kOwn) own.partial[warp / kTiles][c] = value_of(sum, lane);
        }
        ring.leave();
        meet();
        if (thread < 4 * kOwn) {
            const int c = thread / 4, n = thread % 4 * 4;
            float dt = 0.0f, y = 0.0f, h[4];
#pragma unroll
            for (int s = 0; s < kShares; s++) dt += own.partial[s][c];
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

    // The warp's 16 of 256 columns of a stage of own rows, times x_own.
    __device__ __forceinline__ float times_rows(uint32_t slot, int warp, int lane) const {
        float sum[4] = {}, other[4] = {};
        const uint32_t at = slot + warp / 4 * (kOwn * 2 * kBoxColumns) + place_of<8>(lane % 8, warp % 4 * 2 + lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < UNITS; k += 2) {
            const bool both = k + 1 < UNITS;
            uint32_t w[4];
            load_matrices_transposed(w, at + (8 * k + (both ? lane / 16 * 8 : 0)) * 2 * kBoxColumns);
            multiply_add_8<T>(sum, w[0], w[1], x_own[k]);
            if (both) multiply_add_8<T>(other, w[2], w[3], x_own[k + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += other[i];
        return value_of(sum, lane);
    }

    // The block's share of every sum of out_proj. Where a norm is yet to be divided by, what goes in is scaled to at most 1,
    // by a power of two, for it may be out of float16's range; and its squares are put beside the sums.
    __device__ __forceinline__ void out_proj() {
        const int thread = here(), lane = thread % 32, warp = thread / 32, blocks = gridDim.x;
        float unit = 1.0f;
        if (MAMBA2) {
            const auto both = [&](const float* v, int i) { return i < kOwn ? v[i] : 0.0f; };
            const float most = fmaxf(fabsf(both(own.y, lane)), fabsf(both(own.y, lane + 32)));
            const int exponent = static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(most)) >> 23) - 126;
            unit = __int_as_float((min(max(exponent, -100), 100) + 127) << 23);
            if (warp == 0) {
                const float squares = sum_of_warp(both(own.y_squared, lane) + both(own.y_squared, lane + 32));
                for (int to = lane; to < blocks; to += 32) {
                    uint64_t* const at = a.parts + (to * blocks + blockIdx.x) * a.part + a.own_width;
                    write_word(at, squares, layer());
                    write_word(at + 1, 0.0f, layer());
                }
            }
        }
        const float per_unit = 1.0f / unit;
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            const Pack<float, 2> v = load<float, 2>(own.y + 8 * k + lane % 4 * 2);
            x_own[k] = pack<T>(v.v[0] * per_unit, v.v[1] * per_unit);
        }
        if (l + 1 < a.layers) fetch_norm(l + 1);
        int column = 16 * warp + column_of(lane);
#pragma unroll 2
        for (int left = a.width / kColumns; left > 0; left--, column += kColumns) {
            const float v = times_rows(ring.wait(), warp, lane);
            ring.leave();
            const int to = __umulhi(column, a.width_factor);
            if (has_column(lane)) {
                write_word(a.parts + (to * blocks + blockIdx.x) * a.part + (column - to * a.own_width), v * unit, layer());
            }
        }
    }

    // The sums of the block's part of the stream: a warp has those of some blocks, with lanes side by side on one's words.
    __device__ __forceinline__ void sum_parts() {
        const int thread = here(), lane = thread % 32, warp = thread / 32, blocks = gridDim.x;
        const int pairs = a.part / 2, log_lanes = 32 - __clz(pairs - 1), at_once = 32 >> log_lanes;
        const int pair = lane & ((1 << log_lanes) - 1), row = lane >> log_lanes, rows = blocks / kWarps;
        const uint64_t* const from = a.parts + (blockIdx.x * blocks + warp * rows) * a.part + 2 * pair;
        float2 parts[kMostBlocks / kWarps / 2];
        const auto exists = [&](int i) { return pair < pairs && row + i * at_once < rows; };
        gather(parts, layer(), [&](int i) { return from + (row + i * at_once) * a.part; }, exists);
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kMostBlocks / kWarps / 2; i++) {
            if (exists(i)) sum.x += parts[i].x, sum.y += parts[i].y;
        }
        for (int offset = 1 << log_lanes; offset < 32; offset *= 2) {
            sum.x += __shfl_xor_sync(~0u, sum.x, offset);
            sum.y += __shfl_xor_sync(~0u, sum.y, offset);
        }
        if (lane < pairs) *reinterpret_cast<float2*>(own.sums[warp] + 2 * lane) = sum;
        meet();
        if (thread >= a.own_width) return;
        const int i = blockIdx.x * a.own_width + thread;
        const MambaLayer& at = layers[l];
        const float bias = at.out_proj_bias != nullptr ? to_float(static_cast<const T*>(at.out_proj_bias)[i]) : 0.0f;
        float v = 0.0f, squares = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            v += own.sums[w][thread];
            if (MAMBA2) squares += own.sums[w][a.own_width];
        }
        if (MAMBA2 && at.gate_norm != nullptr) v *= rsqrtf(squares / a.inner + a.eps);
        residual += rounded<T>(v + bias);
        if (l + 1 < a.layers) {
            write_word(a.stream + i, residual, layer());
        } else {
            a.hidden[i] = residual;
        }
    }

    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (; l < a.layers; l++) {
            get_x();
            if (MAMBA2) low_of_x();
            in_proj_x();
            if (!MAMBA2) low_of_channels();
            in_proj_z();
            get_low();
            if (MAMBA2) {
                scan_mamba2();
            } else {
                scan_mamba();
            }
            out_proj();
            sum_parts();
        }
    }
};

template <typename T, bool MAMBA2, int UNITS>
__global__ void __launch_bounds__(kThreads + 32, 1) token_kernel(const Token a) {
    extern __shared__ float4 memory[];
    __shared__ Own<T, 8 * UNITS> own;
    char* const shared = reinterpret_cast<char*>(memory);
    const Places at(a);
    constexpr bool kAlone = Layers<T, MAMBA2, UNITS>::kCluster == 1;
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
    constexpr int kPointers = sizeof(MambaLayer) / 8;
    for (int i = thread; i < a.layers * kPointers; i += kThreads + 32) {
        layers[i] = reinterpret_cast<const uint64_t*>(&a.each[i / kPointers].at)[i % kPointers];
    }
    const auto meet = [] {
        __syncwarp();
        kAlone ? __syncthreads() : cluster_barrier();
    };
    meet();
    if (thread < kThreads) {
        Layers<T, MAMBA2, UNITS>(a, own, ring, shared, at).run();
    } else if (thread == kThreads) {
        Loader<MAMBA2, UNITS>(ring).run(a, reinterpret_cast<const MambaLayer*>(layers));
    }
    if (!kAlone) meet();  // a block is there as long as the other may send to it
}

#else

template <typename T, bool MAMBA2, int UNITS>
__global__ void token_kernel(const Token) {}

#endif

// Puts layers where the kernel finds them, and zeros to a part of the words, so that no number of an earlier token is met.
__global__ void __launch_bounds__(256) token_table_kernel(
    const __grid_constant__ LayerTable table, int count, TokenLayer* to, uint4* words, int64_t begin, int64_t end) {
    constexpr int kOfLayer = sizeof(TokenLayer) / sizeof(uint4);
    const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, all = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = first; i < count * kOfLayer; i += all) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(table.each)[i];
    }
    for (int64_t i = begin + first; i < end; i += all) words[i] = make_uint4(0, 0, 0, 0);
}

}  // namespace token
}  // namespace mamba
