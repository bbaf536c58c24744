// MambaSsdScan for prompts on the tensor cores: 16-bit activations, P and N multiples of 8, sm_80 and newer.
//
// The chunked state-space dual form of Dao and Gu 2024, section 6, in one kernel that walks over the chunks of a segment:
// the state never leaves the registers, so device memory sees x, B, C and dt once and y once. A block has a head, or some
// of its channels p. Per chunk of 64 tokens, h being the state before it, products of 16-bit matrices:
//     y = from_start * (C h^T) + S x,  S[t, s] = (C B^T)[t, s] * exp(sum of A delta over s+1..t) * delta[s] for s <= t
//     h = from_start[end] * h + (weight * x)^T B,  weight[s] = exp(sum of A delta over the tokens after s) * delta[s]
// The warps of a block work in a line, each turn on one chunk: loading and the steps, then S, then the channels. A warp of
// the channels has 16 of them and all n, so its fragments of h are a right operand as they stand, with no exchange.
//
// Rounded to 16 bits: S, h where C meets it, weight * x. The state itself stays in float32 and is never rounded on its
// way. Error of y: at most 2 roundings of 2^-9 (bf16) or 2^-12 (fp16) of the sum over absolute values, one of each term.
// fp16 has too few exponents for the three, so each is scaled by a power of two: a row of S by its maximum, h by that of
// the warp's, the weights by that of the chunk. Logarithms of decays are clamped at 2^-150, which is 0 in float32, so that
// a step that forgets everything leaves few digits of their running sum: the decay between two tokens after k such steps
// of a chunk is off by k 2^-18 at most.
//
// H200, H 128, P 64, N 128, B 1: bf16 71 us at L 2048, 500 us at L 16384; fp16 84 us at L 2048. A chunk is 7,100
// instructions of warps, which is what it takes: shared memory and the matrix units are busy half and a quarter of the time.
// samples/results/step.txt, 28 to 30, has what else was tried.
#pragma once

#include "ssd_common.cuh"
#include "tensor_core.cuh"

namespace mamba {
namespace ssd {

constexpr int kChunk = 64;
enum { kBarrierAll = 0, kBarrierMakers = 1 };

struct ChunkSteps {
    float sums[kChunk];        // of log2 of the decays up to and with a token
    float delta[kChunk];
    float weight[kChunk];      // over unit
    float from_start[kChunk];  // 2^sums
    float total;               // from_start of the last token
    float unit;                // 1, or the fp16 scale of the weights
    float padding[2];
};

// S of a chunk: its tiles of 16 by 16 on and below the diagonal, by rows, each as the lanes' fragments of a left matrix.
struct ChunkScores {
    uint4 tiles[10][32];
    float unit[kChunk];  // the fp16 scale of a row
};

// How a block is laid out: its channels, 16 a warp, and how many chunks are in shared memory, 2 to 4.
struct Layout {
    uint32_t tiles;  // of a head
    int32_t channels, stages;
};

// Warps of a block by what they do, in this order: S, the steps, loading, and then 16 channels each. Up to 12 warps there
// are 168 registers a thread.
template <int NT, bool OUTPUT>
struct ChunkWarps {
    static constexpr int kSteps = OUTPUT ? 4 : 0, kLoad = kSteps + 1, kLoaders = NT > 128 ? 1 : 2;
    static constexpr int kChannels = kLoad + kLoaders;
    static constexpr int kMaxChannels = NT > 128 ? 32 : 80;
    static constexpr int kMax = kChannels + kMaxChannels / 16;
};

// Rows of B and C in shared memory. Units of 16 bytes change places within a row, so that neither ldmatrix nor the copies
// meet bank conflicts.
template <int NT>
struct GroupRows {
    static constexpr int kSize = kChunk * NT;
    static __device__ __forceinline__ int at(int row, int col) { return row * NT + (col ^ row % 8 * 8); }
    // The shared address `units` of 16 bytes to the right of a column that is not among their bits.
    static __device__ __forceinline__ uint32_t right_of(uint32_t address, int units) { return address ^ units * 16; }
    static __device__ __forceinline__ uint32_t below(uint32_t address, int rows) { return address + rows * NT * 2; }
};

template <int NT, bool OUTPUT>
struct ChunkShared {
    static constexpr int kGroup = GroupRows<NT>::kSize;
    static __host__ __device__ constexpr int row_x(int channels) { return channels + 8; }
    static __host__ __device__ constexpr int stage(int channels) {
        return (OUTPUT ? 2 : 1) * kGroup + kChunk * row_x(channels);
    }
    static __host__ __device__ constexpr size_t bytes(int channels, int stages) {
        return stages * (sizeof(ChunkSteps) + 2 * stage(channels)) + (OUTPUT ? 2 * sizeof(ChunkScores) : 0);
    }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

template <typename T>
struct IsHalf { static constexpr bool value = false; };
template <>
struct IsHalf<__half> { static constexpr bool value = true; };

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// 1 / v of a power of two.
__device__ __forceinline__ float inverse_power(float v) { return __int_as_float((254 << 23) - __float_as_int(v)); }

// floor(log2 v) within limits.
__device__ __forceinline__ int exponent_of(float v, int low, int high) {
    return min(max((__float_as_int(v) >> 23 & 0xff) - 127, low), high);
}

// --- loading

// 64 rows of `width` values, zero where rows or columns end; LANES threads read a row together. at(row, col) is a place in
// the tile.
template <int THREADS, int LANES, typename T, typename At>
__device__ __forceinline__ void load_tile(
    T* to, At&& at, const T* from, int row, int rows, int cols, int width, int thread) {
    thread = not_ahead(thread);
    for (int c = thread % LANES * 8; c < width; c += LANES * 8) {
        const T* source = from + static_cast<int64_t>(thread / LANES) * row + c;
#pragma unroll 4
        for (int i = 0; i < kChunk * LANES / THREADS; i++) {
            const int r = thread / LANES + i * (THREADS / LANES);
            const int count = r < rows ? cols - c : 0;
            copy_async(shared_address(to + at(r, c)), source, count > 0 ? 16 : 0);
            source += static_cast<int64_t>(THREADS / LANES) * row;
        }
    }
}

// Two tokens of a lane, or some others past the end.
template <typename T>
struct StepInputs {
    T first, second;

    __device__ __forceinline__ void load(const T* dt, int row, int rows, int lane) {
        first = __ldg(dt + static_cast<int64_t>(min(2 * lane, rows - 1)) * row);
        second = __ldg(dt + static_cast<int64_t>(min(2 * lane + 1, rows - 1)) * row);
    }
};

// By a warp. Running sums from the left and from the right: no sum is a difference of longer ones.
template <typename T>
__device__ __forceinline__ void prepare_steps(
    const MambaSsdScan& a, const StepInputs<T>& in, float A, float bias, int rows, int lane, ChunkSteps& to) {
    const float d0 = 2 * lane < rows ? step_size(a, to_float(in.first), bias) : 0.0f;
    const float d1 = 2 * lane + 1 < rows ? step_size(a, to_float(in.second), bias) : 0.0f;
    const float l0 = fmaxf(d0 * A * kLog2E, -150.0f), l1 = fmaxf(d1 * A * kLog2E, -150.0f);
    float sum = l0 + l1, rest = sum;  // of lanes up to this one, and from this one on
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const float left = __shfl_up_sync(~0u, sum, offset), right = __shfl_down_sync(~0u, rest, offset);
        if (lane >= offset) sum += left;
        if (lane + offset < 32) rest += right;
    }
    const float left = __shfl_up_sync(~0u, sum, 1), right = __shfl_down_sync(~0u, rest, 1);
    const float s0 = (lane == 0 ? 0.0f : left) + l0, after = lane == 31 ? 0.0f : right;
    float w0 = d0 * exp2_approx(after + l1), w1 = d1 * exp2_approx(after);
    float unit = 1.0f;
    if (IsHalf<T>::value) {  // weights below 1: times x they stay in range
        float largest = fmaxf(w0, w1);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        }
        const int exponent = exponent_of(largest, -24, 100) + 1;
        unit = power_of_two(exponent);
        w0 *= power_of_two(-exponent);
        w1 *= power_of_two(-exponent);
    }
    *reinterpret_cast<float2*>(to.sums + 2 * lane) = make_float2(s0, sum);
    *reinterpret_cast<float2*>(to.delta + 2 * lane) = make_float2(d0, d1);
    *reinterpret_cast<float2*>(to.from_start + 2 * lane) = make_float2(exp2_approx(s0), exp2_approx(sum));
    *reinterpret_cast<float2*>(to.weight + 2 * lane) = make_float2(w0, w1);
    if (lane == 31) {
        to.total = exp2_approx(sum);
        to.unit = unit;
    }
}

// --- S: a warp has 16 rows

template <typename T, int NT>
__device__ __forceinline__ void make_scores(
    const T* C, const T* B, const ChunkSteps& steps, ChunkScores& to, int tile, int lane) {
    using Rows = GroupRows<NT>;
    const uint32_t c_row = shared_address(C + Rows::at(tile * 16 + lane % 16, lane / 16 * 8));
    const uint32_t b_row = shared_address(B + Rows::at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
    const int t = tile * 16 + lane / 4;
    const float sum0 = steps.sums[t], sum1 = steps.sums[t + 8];
    float S[4][2][4] = {};
    uint32_t left[NT / 16][4];
#pragma unroll
    for (int k = 0; k < NT / 16; k++) load_matrices(left[k], Rows::right_of(c_row, 2 * k));
#pragma unroll
    for (int q = 0; q < 4; q++) {
        if (q > tile) break;
#pragma unroll
        for (int k = 0; k < NT / 16; k++) {
            uint32_t right[4];
            load_matrices(right, Rows::below(Rows::right_of(b_row, 2 * k), 16 * q));
            multiply_add<T>(S[q][0], left[k], right[0], right[1]);
            multiply_add<T>(S[q][1], left[k], right[2], right[3]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int s = q * 16 + j * 8 + lane % 4 * 2;
            const float2 sum = *reinterpret_cast<const float2*>(steps.sums + s);
            const float2 delta = *reinterpret_cast<const float2*>(steps.delta + s);
            float* v = S[q][j];
            v[0] = s > t ? 0.0f : v[0] * exp2_approx(sum0 - sum.x) * delta.x;
            v[1] = s + 1 > t ? 0.0f : v[1] * exp2_approx(sum0 - sum.y) * delta.y;
            v[2] = s > t + 8 ? 0.0f : v[2] * exp2_approx(sum1 - sum.x) * delta.x;
            v[3] = s + 1 > t + 8 ? 0.0f : v[3] * exp2_approx(sum1 - sum.y) * delta.y;
        }
    }
    float scale[2] = {1.0f, 1.0f};  // of the two rows
    if (IsHalf<T>::value) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            float largest = 0.0f;
#pragma unroll
            for (int q = 0; q < 4; q++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    largest = fmaxf(largest, fmaxf(fabsf(S[q][j][2 * u]), fabsf(S[q][j][2 * u + 1])));
                }
            }
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const int exponent = exponent_of(largest, -40, 100) - 14;
            scale[u] = power_of_two(-exponent);
            if (lane % 4 == 0) to.unit[t + 8 * u] = power_of_two(exponent);
        }
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
        if (q > tile) break;
        const float(*v)[4] = S[q];
        uint4 fragment;
        fragment.x = pack<T>(v[0][0] * scale[0], v[0][1] * scale[0]);
        fragment.y = pack<T>(v[0][2] * scale[1], v[0][3] * scale[1]);
        fragment.z = pack<T>(v[1][0] * scale[0], v[1][1] * scale[0]);
        fragment.w = pack<T>(v[1][2] * scale[1], v[1][3] * scale[1]);
        to.tiles[tile * (tile + 1) / 2 + q][lane] = fragment;
    }
}

// --- 16 channels, by a warp

template <typename T, int NT>
struct Channels {
    using Rows = GroupRows<NT>;
    float h[NT / 8][4];  // fragments [16 channels, 8 of n]
    uint32_t x[4][4];    // of a chunk: channels 0-7 and 8-15 of tokens 0-7, then of tokens 8-15, of each 16
    int lane;

    template <typename Run>
    __device__ __forceinline__ void each(Run&& run) {  // run(value, n, p)
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) run(h[j][i], j * 8 + lane % 4 * 2 + i % 2, lane / 4 + i / 2 * 8);
        }
    }

    // Rows of 16 channels of states [rows, N], from `row` on; `cols` of the channels are there.
    __device__ __forceinline__ void read(const void* states, int32_t dtype, int64_t row, int N, int cols) {
        with_states(const_cast<void*>(states), dtype, [&](auto* from) {
            from += row * N;
            each([&](float& v, int n, int p) {
                if (n < N && p < cols) v = to_float(from[static_cast<int64_t>(p) * N + n]);
            });
        });
    }
    __device__ __forceinline__ void write(void* states, int32_t dtype, int64_t row, int N, int cols, float unit) {
        with_states(states, dtype, [&](auto* to) {
            to += row * N;
            each([&](float& v, int n, int p) {
                if (n < N && p < cols) store_as(to + static_cast<int64_t>(p) * N + n, v * unit);
            });
        });
    }

    // Of |h|, in all lanes. Four at a time, for one after the other is a long wait; positive floats have the order of their
    // bits.
    __device__ __forceinline__ float largest() const {
        float most[4] = {};
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) most[i] = fmaxf(most[i], fabsf(h[j][i]));
        }
        const float own = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
        return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(own)));
    }

    __device__ __forceinline__ void load(const T* from, int stride) {
        const int lane = not_ahead(this->lane);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int row = k * 16 + lane % 8 + lane / 16 * 8;
            load_matrices_transposed(x[k], shared_address(from + row * stride + lane / 8 % 2 * 8));
        }
    }

    // h = carry * h + x^T (weight * B)
    __device__ __forceinline__ void update(const T* B, const ChunkSteps& steps, float carry) {
        const int lane = not_ahead(this->lane);
        const uint32_t b_row = shared_address(B + Rows::at(lane % 16, lane / 16 * 8));
        each([&](float& v, int, int) { v *= carry; });
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t left[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 w = *reinterpret_cast<const float2*>(steps.weight + k * 16 + i * 8 + lane % 4 * 2);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float2 v = unpack<T>(x[k][2 * i + j]);
                    left[2 * i + j] = pack<T>(v.x * w.x, v.y * w.y);
                }
            }
#pragma unroll
            for (int j = 0; j < NT / 8; j += 2) {
                uint32_t right[4];
                load_matrices_transposed(right, Rows::below(Rows::right_of(b_row, j), k * 16));
                multiply_add<T>(h[j], left, right[0], right[1]);
                multiply_add<T>(h[j + 1], left, right[2], right[3]);
            }
        }
    }

    // y = from_start * (C h^T) + S x + skip * x of a chunk. h_unit: what h is in units of.
    template <typename Results>
    __device__ __forceinline__ void output(const T* C, const ChunkScores& scores, const ChunkSteps& steps, const T* x_tile,
                                           int stride, const float2 (&skip)[2], float h_unit, const Results& results,
                                           int rows) {
        constexpr bool kScaled = IsHalf<T>::value;
        const int lane = not_ahead(this->lane);
        float h_scale = 1.0f;
        if (kScaled) {
            const int exponent = exponent_of(largest(), -60, 120) - 14;
            h_scale = power_of_two(-exponent);
            h_unit *= power_of_two(exponent);
        }
        const uint32_t c_row = shared_address(C + Rows::at(lane % 16, lane / 16 * 8));
        float out[4][2][4] = {};  // tiles of 16 tokens, of 8 channels
#pragma unroll
        for (int k = 0; k < NT / 16; k++) {
            uint32_t right[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* v = h[2 * k + i % 2] + i / 2 * 2;
                right[i] = pack<T>(v[0] * h_scale, v[1] * h_scale);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t left[4];
                load_matrices(left, Rows::below(Rows::right_of(c_row, 2 * k), i * 16));
                multiply_add<T>(out[i][0], left, right[0], right[1]);
                multiply_add<T>(out[i][1], left, right[2], right[3]);
            }
        }
        float unit[4][2];  // of the rows of S
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int t = i * 16 + lane / 4 + 8 * u;
                unit[i][u] = kScaled ? scores.unit[t] : 1.0f;
                const float from = steps.from_start[t] * (kScaled ? h_unit * inverse_power(unit[i][u]) : 1.0f);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    out[i][j][2 * u] *= from;
                    out[i][j][2 * u + 1] *= from;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int i = k; i < 4; i++) {
                const uint4 tile = scores.tiles[i * (i + 1) / 2 + k][lane];
                const uint32_t left[4] = {tile.x, tile.y, tile.z, tile.w};
                multiply_add<T>(out[i][0], left, x[k][0], x[k][2]);
                multiply_add<T>(out[i][1], left, x[k][1], x[k][3]);
            }
        }
        const int c = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int token = i * 16 + lane / 4 + 8 * u;
                float2 v[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    v[j] = unpack<T>(*reinterpret_cast<const uint32_t*>(x_tile + token * stride + j * 8 + c));
                    v[j].x = fmaf(skip[j].x, v[j].x, out[i][j][2 * u] * unit[i][u]);
                    v[j].y = fmaf(skip[j].y, v[j].y, out[i][j][2 * u + 1] * unit[i][u]);
                }
                results.put(i * 2 + u, v, rows, lane);
            }
        }
    }
};

// --- what a block gives

// Of a token and 16 channels of y the values of a quad of lanes: two of channels 0 to 7, two of 8 to 15.
template <typename T>
__device__ __forceinline__ void store_outputs(T* to, int cols, const float2 (&v)[2], int lane) {
    const uint32_t pair[2] = {pack<T>(v[0].x, v[0].y), pack<T>(v[1].x, v[1].y)};
    // Neighbouring lanes swap, so that each has four values of one tile.
    const int odd = lane % 2, p = odd * 8 + lane % 4 / 2 * 4;
    const uint32_t got = __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 1);
    const uint2 four = odd ? make_uint2(got, pair[1]) : make_uint2(pair[0], got);
    if (p < cols) *reinterpret_cast<uint2*>(to + p) = four;
}

// Of 16 channels, chunk by chunk: y in its dtype, or what is left of a state.
template <typename T, bool OUTPUT>
struct ChunkResults {
    static constexpr bool kOutput = OUTPUT;
    T* y;  // of the chunk
    int row, cols;
    float decay;

    // row: of values, below 2^31 or the launcher refuses.
    __device__ __forceinline__ void start(const MambaSsdScan& a, int64_t token, int64_t channel, int there) {
        row = a.heads * a.head_dim;
        cols = there;
        y = static_cast<T*>(a.y) + token * row + channel;
        decay = 1.0f;
    }
    // The i-th 8 tokens of a chunk of `rows`.
    __device__ __forceinline__ void put(int i, const float2 (&v)[2], int rows, int lane) const {
        const int token = i * 8 + lane / 4;
        store_outputs(y + static_cast<int64_t>(token) * row, token < rows ? cols : 0, v, lane);
    }
    __device__ __forceinline__ void next(const ChunkSteps& steps, int) {
        if (OUTPUT) {
            y += static_cast<int64_t>(kChunk) * row;
        } else {
            decay *= steps.total;
        }
    }
};

// The first of the channels of this warp, among those of the block.
template <int NT, bool OUTPUT>
__device__ __forceinline__ int own_channels() {
    return (static_cast<int>(threadIdx.x) / 32 - ChunkWarps<NT, OUTPUT>::kChannels) * 16;
}

extern __shared__ __align__(1024) unsigned char chunk_bytes[];  // GroupRows::right_of needs the alignment

// The part of a row that a block walks over.
struct Span {
    Place at;
    int begin, end;  // tokens
};

// Over the chunks of a span, by all warps of a block. The warps of the channels, 16 each, call start(state) before the first
// and finish(state, what it is in units of) after the last, when the block's shared memory is free.
template <typename T, int NT, typename Results, typename Start, typename Finish>
__device__ __forceinline__ void walk(const MambaSsdScan& a, const Rows& from, const Layout& layout, const Span& span,
                                     Results& results, Start&& start, Finish&& finish) {
    constexpr bool OUTPUT = Results::kOutput;
    using Warps = ChunkWarps<NT, OUTPUT>;
    using Shared = ChunkShared<NT, OUTPUT>;
    using Rows = GroupRows<NT>;
    constexpr bool kScaled = IsHalf<T>::value;
    const int PT = layout.channels, row_x = Shared::row_x(PT), stages = layout.stages;
    const int threads = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    T* const values = reinterpret_cast<T*>(chunk_bytes);
    ChunkScores* const scores = reinterpret_cast<ChunkScores*>(values + stages * Shared::stage(PT));  // [2]
    ChunkSteps* const steps = reinterpret_cast<ChunkSteps*>(scores + (OUTPUT ? 2 : 0));               // [stages]
    const auto B_of = [&](int stage) { return values + stage * Shared::stage(PT); };
    const auto C_of = [&](int stage) { return B_of(stage) + Shared::kGroup; };
    const auto x_of = [&](int stage) { return B_of(stage) + (OUTPUT ? 2 : 1) * Shared::kGroup; };

    const Place& at = span.at;
    const int begin = span.begin, end = span.end;
    const int N = a.state_size, P = a.head_dim, p0 = at.tile * PT;
    const int chunks = end > begin ? (end - begin + kChunk - 1) / kChunk : 0;
    const int64_t token0 = static_cast<int64_t>(at.b) * a.length + begin;
    const int64_t channel = static_cast<int64_t>(at.h) * P + p0;
    const auto rows_of = [&](int chunk) { return min(kChunk, end - begin - chunk * kChunk); };

    // A line of work: in turn i chunk i is loaded, S is made of chunk i - ahead, and the channels are at chunk i - last.
    const int last = stages - 1, ahead = OUTPUT ? stages - 2 : stages - 1, turns = chunks > 0 ? chunks + last : 0;
    const auto next = [&](int& stage) {
        if (++stage == stages) stage = 0;
    };
    const auto makers_meet = [&] {  // no turn between loading and S
        if (OUTPUT && ahead == 0) barrier_wait(kBarrierMakers, 32 * Warps::kChannels);
    };

    if (warp < Warps::kSteps) {
        for (int i = 0, stage = 0; i < turns; i++) {
            makers_meet();
            const int chunk = i - ahead;
            if (chunk >= 0 && chunk < chunks) {
                const T *const C = C_of(stage), *const B = B_of(stage);
                ChunkScores& to = scores[chunk % 2];
                make_scores<T, NT>(C, B, steps[stage], to, warp, not_ahead(lane));
                next(stage);
            }
            barrier_wait(kBarrierAll, threads);
        }
        return;
    }
    if (warp < Warps::kLoad) {
        const T* const dt = static_cast<const T*>(a.dt) + token0 * from.dt + at.h;
        const float A = a.A[at.h], bias = a.dt_bias == nullptr ? 0.0f : a.dt_bias[at.h];
        StepInputs<T> inputs;
        const auto load = [&](int chunk) {
            if (chunk < chunks) {
                inputs.load(dt + static_cast<int64_t>(chunk) * kChunk * from.dt, from.dt, rows_of(chunk), lane);
            }
        };
        load(0);
        for (int i = 0, stage = 0; i < turns; i++) {
            if (i < chunks) {
                const StepInputs<T> now = inputs;
                load(i + 1);
                prepare_steps(a, now, A, bias, rows_of(i), lane, steps[stage]);
                next(stage);
            }
            makers_meet();
            barrier_wait(kBarrierAll, threads);
        }
        return;
    }
    if (warp < Warps::kChannels) {
        constexpr int kThreads = 32 * Warps::kLoaders;
        const int64_t group_offset = token0 * from.group + static_cast<int64_t>(at.h / (a.heads / a.groups)) * N;
        const int thread = static_cast<int>(threadIdx.x) - 32 * Warps::kLoad;
        const T* const x = static_cast<const T*>(a.x) + token0 * from.x + channel;
        const T* const B = static_cast<const T*>(a.B) + group_offset;
        const T* const C = static_cast<const T*>(a.C) + group_offset;
        const auto load_group = [&](T* to, const T* group, int chunk) {
            load_tile<kThreads, NT / 8 < 32 ? NT / 8 : 32>(
                to, [](int row, int col) { return Rows::at(row, col); },
                group + static_cast<int64_t>(chunk) * kChunk * from.group, from.group, rows_of(chunk), N, NT, thread);
        };
        const auto load = [&](int chunk, int stage) {
            load_group(B_of(stage), B, chunk);
            if (OUTPUT) load_group(C_of(stage), C, chunk);
            load_tile<kThreads, 8>(
                x_of(stage), [&](int row, int col) { return row * row_x + col; },
                x + static_cast<int64_t>(chunk) * kChunk * from.x, from.x, rows_of(chunk), P - p0, PT, thread);
        };
        for (int i = 0, to = 0; i < turns; i++) {
            if (i < chunks) {
                load(i, to);
                next(to);
            }
            copy_async_commit();
            if (ahead < 2) {
                copy_async_wait<0>();
            } else if (ahead == 2) {
                copy_async_wait<1>();
            } else {
                copy_async_wait<2>();
            }
            makers_meet();
            barrier_wait(kBarrierAll, threads);
        }
        return;
    }

    const int own = own_channels<NT, OUTPUT>(), cols = P - p0 - own;
    Channels<T, NT> state;
    state.lane = lane;
    state.each([&](float& v, int, int) { v = 0.0f; });
    float2 skip[2];
    const auto read_skip = [&](int lane) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int p = j * 8 + lane % 4 * 2;
            skip[j].x = p < cols ? skip_of(a, at.h, p0 + own + p) : 0.0f;
            skip[j].y = p + 1 < cols ? skip_of(a, at.h, p0 + own + p + 1) : 0.0f;
        }
    };
    start(state);
    if (OUTPUT && kOnHopper) read_skip(lane);
    float unit = 1.0f;  // h is in units of this
    for (int i = 0, stage = 0; i < turns; i++) {
        const int chunk = i - last;
        if (chunk >= 0) {
            const T* const x = x_of(stage) + own;
            state.load(x, row_x);
            if constexpr (OUTPUT) {
                if (!kOnHopper) read_skip(not_ahead(lane));  // or there are too few registers on some
                state.output(
                    C_of(stage), scores[chunk % 2], steps[stage], x, row_x, skip, unit, results, rows_of(chunk));
            }
            results.next(steps[stage], lane);
            float carry = steps[stage].total;
            if (kScaled) {
                carry *= unit * inverse_power(steps[stage].unit);
                unit = steps[stage].unit;
            }
            state.update(B_of(stage), steps[stage], carry);
            next(stage);
        }
        barrier_wait(kBarrierAll, threads);
    }
    finish(state, unit);
}

#endif

// OUTPUT: y and the state of the last token; else what a segment adds to a state of zero.
template <typename T, int NT, bool OUTPUT>
__global__ void __launch_bounds__(32 * ChunkWarps<NT, OUTPUT>::kMax, OUTPUT || NT > 128 ? 1 : resident_blocks(2, 1))
    chunk_kernel(const MambaSsdScan a, const Rows from, const Segments segments, const Layout layout) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const auto here = [&] { return place(a, not_ahead(static_cast<int>(blockIdx.x)), layout.tiles); };
    const Place at = here();
    const int segment = static_cast<int>(blockIdx.y);
    const int N = a.state_size, P = a.head_dim, PT = layout.channels, p0 = at.tile * PT;
    const int length = row_length(a, at.b);
    const int begin = segment * segments.length;
    const int limit = static_cast<int>(min(static_cast<int64_t>(begin) + segments.length, static_cast<int64_t>(a.length)));
    const int64_t row0 = at.head * P + p0;  // of [B, H, P]
    const bool whole = segments.count == 1;
    if (OUTPUT) {
        clear_outputs<T>(a, at, max(begin, length), limit, p0, min(P, p0 + PT));
        if (length == 0) {
            const int64_t last = (row0 + min(PT, P - p0)) * N;
            if (whole) copy_states(a, row0 * N + threadIdx.x, last, static_cast<int>(blockDim.x));
            return;
        }
    }

    const int own = own_channels<NT, OUTPUT>(), cols = P - p0 - own;
    const auto state_of = [&](int s) { return segments.states + static_cast<int64_t>(s) * a.batch * a.heads * P * N; };
    ChunkResults<T, OUTPUT> results;
    const auto start = [&](Channels<T, NT>& state) {
        if (OUTPUT) {
            const void* const given = whole ? a.ssm_state : state_of(segment);
            state.read(given, whole ? a.state_dtype : MAMBA_FLOAT32, row0 + own, N, cols);
        }
        const int64_t token0 = static_cast<int64_t>(at.b) * a.length + begin;
        results.start(a, token0, static_cast<int64_t>(at.h) * P + p0 + own, cols);
    };
    const auto finish = [&](Channels<T, NT>& state, float unit) {
        if (OUTPUT && segment != segments.count - 1) return;
        const Place at = here();  // not kept: walk() leaves few registers
        const int first = at.tile * PT + own;
        void* const to = OUTPUT ? a.ssm_state_out : state_of(segment);
        state.write(to, OUTPUT ? a.state_dtype : MAMBA_FLOAT32, at.head * P + first, N, P - first, unit);
        if (!OUTPUT && at.tile == 0 && own == 0 && state.lane == 0) {
            segments.decays[static_cast<int64_t>(segment) * a.batch * a.heads + at.head] = results.decay;
        }
    };
    walk<T, NT>(a, from, layout, {at, begin, min(limit, length)}, results, start, finish);
#endif
}

}  // namespace ssd
}  // namespace mamba
