// What the kernels of MambaSsdScan share: where a block stands, step sizes, the state in its three dtypes.
#pragma once

#include "common.cuh"
#include "strided.h"

namespace mamba {
namespace ssd {

// A prompt is cut into segments of equal length that run side by side, for rows too few to fill the GPU. With one
// segment the output kernel reads and writes ssm_state itself, each thread its own elements. With more, a first kernel
// leaves what each segment but the last adds to a state of zero, and pass_states() turns that into the state each
// segment starts from; then only the last segment's blocks write ssm_state_out, and none reads ssm_state.
struct Segments {
    int32_t count;
    int32_t length;  // tokens, a multiple of 64
    float* states;   // [count, B, H, P, N], where count > 1
    float* decays;   // [count, B, H]: what is left of a state after the segment
};

// The head, its row and the tile of its channels a block works on.
struct Place {
    int64_t head;  // b * H + h
    int32_t b, h, tile;
};

__device__ __forceinline__ Place place(const MambaSsdScan& a, uint32_t index, uint32_t tiles) {
    const uint32_t head = index / tiles;
    Place at;
    at.head = head;
    at.b = static_cast<int32_t>(head / static_cast<uint32_t>(a.heads));
    at.h = static_cast<int32_t>(head % static_cast<uint32_t>(a.heads));
    at.tile = static_cast<int32_t>(index % tiles);
    return at;
}

__device__ __forceinline__ int row_length(const MambaSsdScan& a, int b) {
    return min(max(a.seq_lens[b], 0), a.length);
}

// Not fmaxf and fminf, which would swallow a NaN.
__device__ __forceinline__ float within(float v, float least, float most) {
    v = v < least ? least : v;
    return v > most ? most : v;
}

__device__ __forceinline__ float step_size(const MambaSsdScan& a, float dt, float bias) {
    const float v = dt + bias;
    return within(a.dt_softplus ? softplus(v) : v, a.dt_min, a.dt_max);
}

// run(states as their type): a copy of its code for each of the three.
template <typename Run>
__device__ __forceinline__ void with_states(void* states, int32_t dtype, Run&& run) {
    if (dtype == MAMBA_FLOAT32) {
        run(static_cast<float*>(states));
    } else if (dtype == MAMBA_FLOAT16) {
        run(static_cast<__half*>(states));
    } else {
        run(static_cast<__nv_bfloat16*>(states));
    }
}

template <typename S>
__device__ __forceinline__ void store_as(S* to, float v) { *to = from_float<S>(v); }

// Elements first, first + step, ... of the states as they are, for a row of length 0.
__device__ __forceinline__ void copy_states(const MambaSsdScan& a, int64_t first, int64_t end, int64_t step) {
    if (a.ssm_state == a.ssm_state_out) return;
    for (int64_t i = first; i < end; i += step) {
        if (a.state_dtype == MAMBA_FLOAT32) {
            static_cast<uint32_t*>(a.ssm_state_out)[i] = static_cast<const uint32_t*>(a.ssm_state)[i];
        } else {
            static_cast<uint16_t*>(a.ssm_state_out)[i] = static_cast<const uint16_t*>(a.ssm_state)[i];
        }
    }
}

// Tokens [from, to) of a block's channels [p0, p1).
template <typename T>
__device__ __forceinline__ void clear_outputs(const MambaSsdScan& a, const Place& at, int from, int to, int p0, int p1) {
    const int warps = blockDim.x / 32;
    for (int t = from + static_cast<int>(threadIdx.x) / 32; t < to; t += warps) {
        T* y = static_cast<T*>(a.y) + ((static_cast<int64_t>(at.b) * a.length + t) * a.heads + at.h) * a.head_dim;
        for (int p = p0 + static_cast<int>(threadIdx.x) % 32; p < p1; p += 32) y[p] = from_float<T>(0.0f);
    }
}

__device__ __forceinline__ float skip_of(const MambaSsdScan& a, int h, int p) {
    if (a.D == nullptr) return 0.0f;
    return __ldg(a.D + (a.skip_per_channel ? static_cast<int64_t>(h) * a.head_dim + p : h));
}

}  // namespace ssd
}  // namespace mamba
