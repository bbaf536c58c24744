// MambaSsdScan for prompts of fewer heads than there are multiprocessors, on sm_90 and newer: those that have none help.
//
// A row's chunks are one long line (ssd_prompt.cuh), however many multiprocessors are idle. Here one or two heads share a
// helper. A head's own block walks over the first tokens of a row, the helper meanwhile over the other tokens of each of the
// heads, from a state of zero, and leaves the state and, in float32, y. Both are linear in the state h after the first
// tokens, so that the own block, which has it, can finish them:
//     y[t] += left[t] * (C[t] h^T),  state += left[end] * h,  left[t] = exp(sum of A delta over those tokens up to t)
// That is one product of matrices, with no line to wait in. h is rounded to 16 bits for it, once, as in ssd_prompt.cuh, and y
// after the sum.
//
// What helpers leave passes through the L2 cache, and a flag says that it is there. A helper waits for nobody and has a lower
// index than the blocks that wait for it, so it has started before they do, whatever else the GPU runs. (As clusters, which
// need no flags, 39 of three blocks fit on an H200 where 80 heads want 40.)
#pragma once

#include "ssd_prompt.cuh"

namespace mamba {
namespace ssd {

constexpr int kHelpedChannels = 64;  // of a block
constexpr int kHelpedThreads = 32 * ChunkWarps<128, true>::kChannels + 2 * kHelpedChannels;

struct Help {
    int32_t heads;   // blocks of heads that share a helper: 1 or 2
    int32_t blocks;  // of all heads
    int32_t length;  // tokens of a row that a head's own block walks over, a multiple of 64
    int32_t chunks;  // the others
    float* left;     // [blocks, left_floats()]
    uint32_t* done;  // [blocks]: 1 when what is left is there

    __host__ __device__ int helpers() const { return (blocks + heads - 1) / heads; }
};

// What a helper leaves of a block's channels.
constexpr int kLeftChunk = kChunk * (kHelpedChannels + 1);  // floats
inline __host__ __device__ constexpr int64_t left_floats(int NT, int64_t chunks) {
    return kHelpedChannels * NT + chunks * kLeftChunk;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// y of a chunk is [8 eights of tokens, 4 warps, 32 lanes] of two values of channels 0 to 7 and two of 8 to 15.
constexpr int kLeftEight = kHelpedChannels / 16 * 32;

template <int NT>
struct Left {
    float4* state;  // [4 warps, NT / 8, 32]: fragments
    float4* y;      // [chunks] of y, then the decays from the first token to each of the 64

    __device__ __forceinline__ Left(const Help& help, int block) {
        state = reinterpret_cast<float4*>(help.left + block * left_floats(NT, help.chunks));
        y = state + kHelpedChannels * NT / 4;
    }
    __device__ __forceinline__ const float4* y_of(int eight) const {
        return y + eight / 8 * (kLeftChunk / 4) + eight % 8 * kLeftEight;
    }
    __device__ __forceinline__ float decay(int token) const {
        return reinterpret_cast<const float*>(y_of(token / 64 * 8) + 8 * kLeftEight)[token % 64];
    }
};

// As ChunkResults.
template <int NT>
struct HelperResults {
    static constexpr bool kOutput = true;
    float4* y;    // of the chunk and the warp
    float decay;  // of the chunks before

    __device__ __forceinline__ void put(int i, const float2 (&v)[2], int, int lane) const {
        y[i * kLeftEight + lane] = make_float4(v[0].x, v[0].y, v[1].x, v[1].y);
    }
    __device__ __forceinline__ void next(const ChunkSteps& steps, int lane) {
        if (own_channels<NT, true>() == 0) {
            const float2 v = *reinterpret_cast<const float2*>(steps.from_start + 2 * lane);
            reinterpret_cast<float2*>(y + 8 * kLeftEight)[lane] = make_float2(decay * v.x, decay * v.y);
        }
        decay *= steps.total;
        y += kLeftChunk / 4;
    }
};

// h in shared memory, in 16 bits.
template <typename T, int NT>
struct SharedState {
    static constexpr int kRow = NT + 32;  // rows of neighbouring channels, read together, are on different banks
    T values[kHelpedChannels][kRow];
    float unit[kHelpedChannels / 16];

    // By a warp of the channels.
    __device__ __forceinline__ void put(const Channels<T, NT>& state, int own, float h_unit) {
        const int lane = state.lane;
        float scale = 1.0f;
        if (IsHalf<T>::value) {
            const int exponent = exponent_of(state.largest(), -60, 120) - 14;
            scale = power_of_two(-exponent);
            h_unit *= power_of_two(exponent);
        }
        if (lane == 0) unit[own / 16] = h_unit;
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* v = state.h[j] + 2 * i;
                T* const to = values[own + lane / 4 + 8 * i] + j * 8 + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(to) = pack<T>(v[0] * scale, v[1] * scale);
            }
        }
    }
};

// y of the tokens [begin, length): what the helper left and what h adds. By all warps of a block, 16 tokens each at a time.
template <typename T, int NT>
__device__ __forceinline__ void finish_outputs(const MambaSsdScan& a, const Rows& from, const Place& at, int begin,
                                               int length, const Left<NT>& left, const SharedState<T, NT>& h) {
    constexpr int kGroups = kHelpedChannels / 16;  // of channels
    const int lane = static_cast<int>(threadIdx.x) % 32, N = a.state_size, n = lane % 4 * 8;
    const int tokens = length - begin, row = a.heads * a.head_dim, p0 = at.tile * kHelpedChannels;
    const int64_t token0 = static_cast<int64_t>(at.b) * a.length + begin;
    const int64_t group_offset = token0 * from.group + static_cast<int64_t>(at.h / (a.heads / a.groups)) * N;
    const T* const C = static_cast<const T*>(a.C) + group_offset + n;
    T* const y = static_cast<T*>(a.y) + token0 * row + static_cast<int64_t>(at.h) * a.head_dim + p0;
    for (int tile = static_cast<int>(threadIdx.x) / 32; tile * 16 < tokens; tile += kHelpedThreads / 32) {
        // Products of 16 n each take four of a lane's eight neighbouring n: which, is all the same if C and h agree.
        uint4 c[NT / 32][2];
        float4 v[kGroups][2];
        float decay[2];
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int token = tile * 16 + lane / 4 + 8 * u;
            const T* const of_token = C + static_cast<int64_t>(min(token, tokens - 1)) * from.group;
#pragma unroll
            for (int j = 0; j < NT / 32; j++) {
                const bool there = j * 32 + n < N;
                c[j][u] = there ? __ldg(reinterpret_cast<const uint4*>(of_token + j * 32)) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int g = 0; g < kGroups; g++) v[g][u] = left.y_of(2 * tile + u)[g * 32 + lane];
            decay[u] = left.decay(token);
        }
        float sums[kGroups][2][4] = {};
#pragma unroll
        for (int j = 0; j < NT / 32; j++) {
            const uint4 &low = c[j][0], &high = c[j][1];
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int g = 0; g < kGroups; g++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 right = *reinterpret_cast<const uint4*>(h.values[g * 16 + i * 8 + lane / 4] + j * 32 + n);
                    multiply_add<T>(sums[g][i], first, right.x, right.y);
                    multiply_add<T>(sums[g][i], second, right.z, right.w);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int token = tile * 16 + lane / 4 + 8 * u;
#pragma unroll
            for (int g = 0; g < kGroups; g++) {
                const float by = decay[u] * h.unit[g];
                const float4 was = v[g][u];
                const float(&sum)[2][4] = sums[g];
                const float2 out[2] = {
                    make_float2(fmaf(by, sum[0][2 * u], was.x), fmaf(by, sum[0][2 * u + 1], was.y)),
                    make_float2(fmaf(by, sum[1][2 * u], was.z), fmaf(by, sum[1][2 * u + 1], was.w))};
                const int cols = token < tokens ? a.head_dim - p0 - g * 16 : 0;
                store_outputs(y + static_cast<int64_t>(token) * row + g * 16, cols, out, lane);
            }
        }
    }
}

// By all threads of a helper, what it has written before.
__device__ __forceinline__ void say_done(const Help& help, int block) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(help.done + block), "r"(1) : "memory");
    }
}

// By whole warps.
__device__ __forceinline__ void wait_until_done(const Help& help, int block) {
    uint32_t done = 0;
    while (done == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(help.done + block) : "memory");
    __syncwarp();
}

// The helper's part of a row, for a head's block.
template <typename T, int NT>
__device__ __forceinline__ void help_block(
    const MambaSsdScan& a, const Rows& from, const Help& help, const Layout& layout, int block) {
    const Place at = place(a, block, layout.tiles);
    const int begin = help.length, length = row_length(a, at.b), p0 = at.tile * kHelpedChannels;
    clear_outputs<T>(a, at, max(begin, length), a.length, p0, min(a.head_dim, p0 + kHelpedChannels));
    if (length <= begin) return;
    const int own = own_channels<NT, true>();
    HelperResults<NT> results;
    const auto start = [&](Channels<T, NT>&) {
        results.y = Left<NT>(help, block).y + own / 16 * 32;
        results.decay = 1.0f;
    };
    const auto finish = [&](Channels<T, NT>& state, float unit) {
        float4* const to = Left<NT>(help, block).state + own / 16 * (NT / 8) * 32 + state.lane;
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
            const float* v = state.h[j];
            to[j * 32] = make_float4(v[0] * unit, v[1] * unit, v[2] * unit, v[3] * unit);
        }
    };
    walk<T, NT>(a, from, layout, {at, begin, length}, results, start, finish);
}

// What h adds to what the helper has of a state: h is that then.
template <typename T, int NT>
__device__ __forceinline__ void add_to_state(Channels<T, NT>& h, const Left<NT>& left, int own, float decay) {
    const float4* const from = left.state + own / 16 * (NT / 8) * 32 + h.lane;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        const float4 v = from[j * 32];
        const float added[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) h.h[j][i] = fmaf(decay, h.h[j][i], added[i]);
    }
}

// A head's own block.
template <typename T, int NT>
__device__ __forceinline__ void own_block(
    const MambaSsdScan& a, const Rows& from, const Help& help, const Layout& layout) {
    const auto block = [&] { return not_ahead(static_cast<int>(blockIdx.x)) - help.helpers(); };
    const auto here = [&] { return place(a, block(), layout.tiles); };  // not kept: walk() leaves few registers
    const Place at = here();
    const int N = a.state_size, P = a.head_dim, p0 = at.tile * kHelpedChannels, length = row_length(a, at.b);
    const int own = own_channels<NT, true>();
    const bool is_helped = length > help.length;
    SharedState<T, NT>& h = *reinterpret_cast<SharedState<T, NT>*>(chunk_bytes);
    clear_outputs<T>(a, at, length, help.length, p0, min(P, p0 + kHelpedChannels));
    if (length == 0) {
        const int64_t first = (at.head * P + p0) * N;
        copy_states(a, first + threadIdx.x, first + min(kHelpedChannels, P - p0) * N, kHelpedThreads);
    } else {
        ChunkResults<T, true> results;
        const auto start = [&](Channels<T, NT>& state) {
            state.read(a.ssm_state, a.state_dtype, at.head * P + p0 + own, N, P - p0 - own);
            const int64_t channel = static_cast<int64_t>(at.h) * P + p0 + own;
            results.start(a, static_cast<int64_t>(at.b) * a.length, channel, P - p0 - own);
        };
        const auto finish = [&](Channels<T, NT>& state, float unit) {
            if (is_helped) {
                h.put(state, own, unit);
                wait_until_done(help, block());
                const Left<NT> left(help, block());
                add_to_state(state, left, own, left.decay(length - help.length - 1) * unit);
                unit = 1.0f;
            }
            const Place at = here();
            const int first = at.tile * kHelpedChannels + own;
            state.write(a.ssm_state_out, a.state_dtype, at.head * P + first, N, P - first, unit);
        };
        walk<T, NT>(a, from, layout, {at, 0, min(length, help.length)}, results, start, finish);
    }
    if (!is_helped) return;
    wait_until_done(help, block());
    __syncthreads();  // h is there
    finish_outputs(a, from, here(), help.length, length, Left<NT>(help, block()), h);
}

#endif

// Blocks of helpers, then of heads.
template <typename T, int NT>
__global__ void __launch_bounds__(kHelpedThreads, 1)
    helped_kernel(const MambaSsdScan a, const Rows from, const Help help, const Layout layout) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (static_cast<int>(blockIdx.x) >= help.helpers()) {
        own_block<T, NT>(a, from, help, layout);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < help.heads; i++) {
        const int block = not_ahead(static_cast<int>(blockIdx.x)) * help.heads + i;
        if (block >= help.blocks) return;
        help_block<T, NT>(a, from, help, layout, block);
        say_done(help, block);
    }
#endif
}

// Before helped_kernel: the workspace may hold anything.
__global__ void clear_done_kernel(const Help help) {
    for (int i = threadIdx.x; i < help.blocks; i += blockDim.x) help.done[i] = 0;
}

}  // namespace ssd
}  // namespace mamba
