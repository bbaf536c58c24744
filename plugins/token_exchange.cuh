// What the blocks of token_kernel find out together: sums over blocks, and what follows them. token.cuh says when.
#pragma once

#include "ssd_common.cuh"
#include "token_words.cuh"

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

// What follows the sum of a column of low: in Mamba-2 a bias and the convolution. Their values are read before the sum is
// there.
template <typename T, bool MAMBA2>
struct AfterLow {
    Pack<T, 4> filter;
    T before[3];
    float bias = 0.0f, conv_bias = 0.0f;
    bool convolved = false;

    __device__ __forceinline__ AfterLow(const Token& a, const MambaLayer& of, int column) {
        const int channel = a.inner + column;
        if (!MAMBA2) return;
        if (of.in_proj_bias != nullptr) bias = to_float(static_cast<const T*>(of.in_proj_bias)[a.inner + channel]);
        convolved = column < a.low - a.heads;
        if (!convolved) return;
        filter = load_constant<T, 4>(static_cast<const T*>(of.conv_weight) + 4 * channel);
#pragma unroll
        for (int i = 0; i < 3; i++) before[i] = static_cast<const T*>(of.conv_state)[3 * channel + i];
        if (of.conv_bias != nullptr) conv_bias = to_float(static_cast<const T*>(of.conv_bias)[channel]);
    }

    // The new state goes to `to`.
    __device__ __forceinline__ float operator()(float sum, T* to, bool used) const {
        const float v = rounded<T>(sum + bias);
        return convolved ? convolve(filter.v, before, conv_bias, from_float<T>(v), to, used) : v;
    }
};

// What a block's half that computes knows, and what it does with other blocks; Layers is the rest of it.
template <typename T, bool MAMBA2, int UNITS, bool SUMS>
struct Exchange {
    static constexpr int kOwn = 8 * UNITS, kStates = MAMBA2 ? 128 : 16;             // kStates: of a channel
    static constexpr int kPairs = (SUMS ? kPartsFrom : kMostWidth) / 2 / kThreads;  // of x, of a thread

    const Token& a;
    Own<T, kOwn>& own;
    Ring ring;
    char* const shared;
    T* const x_in;        // [width], x of the layer
    float* const low;     // [low]
    float* const stream;  // [width], the residual stream, if SUMS; each value is one thread's, as those of
    T* const conv;        // [3 (low - heads)], new states of low's convolution, if SUMS and Mamba-2
    const MambaLayer* const layers;
    const bool used;
    const T* const embedded;  // [width]
    float residual = 0.0f;    // of the stream, the block's value of a thread; if not SUMS
    float2 norm[kPairs];      // weights of the next layer's norm
    uint32_t x_own[UNITS];    // of own channels, as a right operand
    int l = 0, held_slot = 0;
    const char* held = nullptr;  // the stage of Channels

    __device__ Exchange(const Token& a, Own<T, kOwn>& own, const Ring& ring, char* shared, const Places& at)
        : a(a), own(own), ring(ring), shared(shared), x_in(reinterpret_cast<T*>(shared)),
          low(reinterpret_cast<float*>(shared + at.low)), stream(reinterpret_cast<float*>(shared + at.stream)),
          conv(reinterpret_cast<T*>(shared + at.conv)), layers(reinterpret_cast<const MambaLayer*>(shared + at.layers)),
          used(a.seq_lens[0] > 0),
          embedded(static_cast<const T*>(a.embedding) + int64_t{min(max(a.input_ids[0], 0), a.vocab - 1)} * a.width) {
        const int thread = threadIdx.x;
        if (!SUMS && thread < a.own_width) residual = to_float(embedded[blockIdx.x * a.own_width + thread]);
        fetch_norm(0);
    }

    // If not SUMS, found anew in each method: there registers are few, and the compiler would keep what it knows of a thread.
    static __device__ __forceinline__ int here() { return SUMS ? static_cast<int>(threadIdx.x) : not_ahead(threadIdx.x); }
    static __device__ __forceinline__ void meet() { barrier_wait(1, kThreads); }
    __device__ __forceinline__ uint32_t layer() const { return l + 1; }

    // --- the residual stream, and x

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

    static __device__ __forceinline__ int pair_of(int i) { return 2 * (here() + i * kThreads); }
    __device__ __forceinline__ bool exists(int i) const { return pair_of(i) < a.width; }

    // The residual stream with what the layer before adds to it, when all blocks have added.
    __device__ __forceinline__ void get_stream(float2 (&x)[kPairs]) {
        const int last = max((a.width - 2 - pair_of(0)) / (2 * kThreads), 0);  // of the thread's pairs, if it has any
        if constexpr (SUMS) {
            const MambaLayer& before = layers[l - 1];
            const uint64_t* const from = out_sums(l - 1);
            TwoWords words[kPairs + MAMBA2];  // with Mamba-2's squares
            if (exists(0)) wait_for(from + out_place(pair_of(last)), gridDim.x);
            const auto place = [&](int i) { return i < kPairs ? out_place(pair_of(i)) : squares_place(pair_of(0)); };
            gather(words, gridDim.x, [&](int i) { return from + place(i); }, [&](int i) { return exists(i % kPairs); });
            const T* const bias = static_cast<const T*>(before.out_proj_bias);
            const float scale = MAMBA2 ? scale_of(before, squares_of(words[kPairs - 1 + MAMBA2])) : 1.0f;
#pragma unroll
            for (int i = 0; i < kPairs; i++) {
                if (!exists(i)) continue;
                const float2 sum = words[i].sums(kUnit);
                const float* const old = stream + pair_of(i);
                x[i].x = old[0] + after_out(sum.x, scale, bias, pair_of(i));
                x[i].y = old[1] + after_out(sum.y, scale, bias, pair_of(i) + 1);
            }
        } else {
            TwoWords words[kPairs];
            if (exists(0)) wait_for(a.stream + pair_of(last), l);
            gather(words, l, [&](int i) { return a.stream + pair_of(i); }, [&](int i) { return exists(i); });
#pragma unroll
            for (int i = 0; i < kPairs; i++) x[i] = words[i].floats();
        }
    }

    // What a layer adds to a value of the stream, of a sum that, of Mamba-2, is yet to be divided by the norm before out_proj.
    static __device__ __forceinline__ float after_out(float sum, float scale, const T* bias, int column) {
        return rounded<T>(sum * scale + (bias != nullptr ? to_float(bias[column]) : 0.0f));
    }
    __device__ __forceinline__ float scale_of(const MambaLayer& of, float squares) const {
        return of.gate_norm != nullptr ? rsqrtf(squares / a.inner + a.eps) : 1.0f;
    }

    // x of the layer, normed.
    __device__ __forceinline__ void get_x() {
        const int thread = here();
        float2 x[kPairs];
        if (l > 0) {
            get_stream(x);
        } else {
#pragma unroll
            for (int i = 0; i < kPairs; i++) {
                if (!exists(i)) continue;
                const Pack<T, 2> v = load_constant<T, 2>(embedded + pair_of(i));
                x[i] = make_float2(to_float(v.v[0]), to_float(v.v[1]));
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            if (!exists(i)) continue;
            if (SUMS) *reinterpret_cast<float2*>(stream + pair_of(i)) = x[i];
            squares = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, squares));
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
        if (SUMS && MAMBA2 && l > 0) put_conv();
    }

    // The stream after the last layer, by one block; if not SUMS, sum_out() does that.
    __device__ __forceinline__ void finish() {
        float2 x[kPairs];
        get_stream(x);
        if (MAMBA2) put_conv();
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            if (exists(i)) *reinterpret_cast<float2*>(a.hidden + pair_of(i)) = x[i];
        }
    }

    // --- low: a block's shares of the sums; if not SUMS, the sums by some blocks; all of them, by all

    __device__ __forceinline__ uint64_t* low_sums() const { return a.sums + l * a.layer_sums; }

    __device__ __forceinline__ void put_low(int column, float v) const {
        if (column >= a.low || !has_column(threadIdx.x % 32)) return;
        if (SUMS) {
            add_share(low_sums() + column, v * (1.0f / kUnit));
        } else {
            const int to = __umulhi(column, a.low_factor);
            put_float(a.low_parts + (to * gridDim.x + blockIdx.x) * a.own_low + (column - to * a.own_low), v, layer());
        }
    }

    // A warp has two columns. By blocks that have parts of low.
    __device__ __forceinline__ void sum_low() const {
        const int thread = here(), lane = thread % 32, warp = thread / 32;
        const int column = blockIdx.x * a.own_low + 2 * warp + lane;  // where lane < 2
        if (2 * warp >= a.own_low || column - lane >= a.low) return;
        const AfterLow<T, MAMBA2> after(a, layers[l], min(column, a.low - 1));
        TwoWords parts[kMostBlocks / 32];
        const int blocks = gridDim.x;
        const uint64_t* const from = a.low_parts + blockIdx.x * blocks * a.own_low + 2 * warp;
        const auto is_block = [&](int i) { return lane + 32 * i < blocks; };
        gather(parts, layer(), [&](int i) { return from + (lane + 32 * i) * a.own_low; }, is_block);
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kMostBlocks / 32; i++) {
            if (is_block(i)) sum.x += parts[i].floats().x, sum.y += parts[i].floats().y;
        }
        sum = make_float2(sum_of_warp(sum.x), sum_of_warp(sum.y));
        if (lane >= 2 || column >= a.low) return;
        T* const state = MAMBA2 ? static_cast<T*>(layers[l].conv_state_out) + 3 * (a.inner + column) : nullptr;
        put_float(a.lows + column, after(lane == 0 ? sum.x : sum.y, state, used), layer());
    }

    __device__ __forceinline__ void get_low() const {
#pragma unroll 1
        for (int i = 2 * here(); i < a.low; i += 2 * kThreads) {
            TwoWords words[1];
            gather(words, layer(), [&](int) { return a.lows + i; }, [](int) { return true; });
            const float2 pair = words[0].floats();
            *reinterpret_cast<float2*>(low + i) = pair;
            if (!MAMBA2 && i < a.rank) *reinterpret_cast<uint32_t*>(own.dt_in + i) = pack<T>(pair.x, pair.y);
        }
        low_is_there();
    }
    // If SUMS, where a thread has a column, which `after` is of.
    __device__ __forceinline__ void get_low(const AfterLow<T, MAMBA2>& after) const {
        const int i = here();
        if (i < a.low) {
            TwoWords words[1];
            gather(words, gridDim.x, [&](int) { return low_sums() + i / 2 * 2; }, [](int) { return true; });
            const float2 sums = words[0].sums(kUnit);
            const float v = after(i % 2 == 0 ? sums.x : sums.y, conv + 3 * i, used);
            low[i] = v;
            if (!MAMBA2 && i < a.rank) own.dt_in[i] = from_float<T>(v);
        }
        low_is_there();
    }
    __device__ __forceinline__ void low_is_there() const {
        meet();
        if (!MAMBA2 && a.norm_eps >= 0.0f) norm_low();
    }

    // Where every block finds all columns, one puts their new states, of the layer before: all have read the old ones then.
    __device__ __forceinline__ void put_conv() const {
        if (blockIdx.x > 0) return;
        T* const to = static_cast<T*>(layers[l - 1].conv_state_out) + 3 * a.inner;
        const int i = here();
#pragma unroll
        for (int k = 0; k < 3; k++) {
            if (i < a.low - a.heads) to[3 * i + k] = conv[3 * i + k];
        }
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

    // --- out_proj: a block's shares of the sums; if not SUMS, the sums by some blocks

    // Sums of a layer for the stream; of Mamba-2 there are squares behind every 64, lest all wait for the same word.
    __device__ __forceinline__ uint64_t* out_sums(int layer) const { return a.sums + layer * a.layer_sums + a.low; }
    static __device__ __forceinline__ int out_place(int column) { return MAMBA2 ? column + column / 64 * 2 : column; }
    static __device__ __forceinline__ int squares_place(int column) { return column / 64 * 66 + 64; }
    // Two sums of them, in units of kSquareUnit and of 1: where the first is out of range, the second counts.
    static constexpr float kSquareUnit = 0x1p-20f;
    static __device__ __forceinline__ float squares_of(const TwoWords& words) {
        const float2 sums = words.sums(1.0f);
        return isnan(sums.x) ? sums.y : sums.x * kSquareUnit;
    }

    __device__ __forceinline__ void put_out(int column, float v) const {
        if (!has_column(threadIdx.x % 32)) return;
        if (SUMS) {
            add_share(out_sums(l) + out_place(column), v * (1.0f / kUnit));
        } else {
            const int to = __umulhi(column, a.width_factor);
            put_float(a.parts + (to * gridDim.x + blockIdx.x) * a.part + (column - to * a.own_width), v, layer());
        }
    }
    __device__ __forceinline__ void put_squares(float squares) const {
        const int thread = here(), lane = thread % 32, warp = thread / 32, blocks = gridDim.x;
        if (SUMS) {
            for (int group = warp; group < a.width / 64; group += kWarps) {
                if (lane >= 2) continue;
                add_share(out_sums(l) + squares_place(64 * group) + lane, lane == 0 ? squares * (1.0f / kSquareUnit) : squares);
            }
        } else if (warp == 0) {
            for (int to = lane; to < blocks; to += 32) {
                uint64_t* const at = a.parts + (to * blocks + blockIdx.x) * a.part + a.own_width;
                put_float(at, squares, layer());
                put_float(at + 1, 0.0f, layer());
            }
        }
    }

    // The sums of the block's part of the stream: a warp has those of some blocks, with lanes side by side on one's words.
    __device__ __forceinline__ void sum_out() {
        const int thread = here(), lane = thread % 32, warp = thread / 32, blocks = gridDim.x;
        const int pairs = a.part / 2, log_lanes = 32 - __clz(pairs - 1), at_once = 32 >> log_lanes;
        const int pair = lane & ((1 << log_lanes) - 1), row = lane >> log_lanes, rows = blocks / kWarps;
        const uint64_t* const from = a.parts + (blockIdx.x * blocks + warp * rows) * a.part + 2 * pair;
        TwoWords parts[kMostBlocks / kWarps / 2];
        const auto exists = [&](int i) { return pair < pairs && row + i * at_once < rows; };
        gather(parts, layer(), [&](int i) { return from + (row + i * at_once) * a.part; }, exists);
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kMostBlocks / kWarps / 2; i++) {
            if (exists(i)) sum.x += parts[i].floats().x, sum.y += parts[i].floats().y;
        }
        for (int offset = 1 << log_lanes; offset < 32; offset *= 2) {
            sum.x += __shfl_xor_sync(~0u, sum.x, offset);
            sum.y += __shfl_xor_sync(~0u, sum.y, offset);
        }
        auto* const sums = reinterpret_cast<float(*)[64]>(own.partial);
        if (lane < pairs) *reinterpret_cast<float2*>(sums[warp] + 2 * lane) = sum;
        meet();
        if (thread >= a.own_width) return;
        const int i = blockIdx.x * a.own_width + thread;
        float v = 0.0f, squares = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            v += sums[w][thread];
            if (MAMBA2) squares += sums[w][a.own_width];
        }
        const MambaLayer& at = layers[l];
        const float scale = MAMBA2 ? scale_of(at, squares) : 1.0f;
        residual += after_out(v, scale, static_cast<const T*>(at.out_proj_bias), i);
        if (l + 1 < a.layers) {
            put_float(a.stream + i, residual, layer());
        } else {
            a.hidden[i] = residual;
        }
    }
};

#endif

}  // namespace token
}  // namespace mamba
