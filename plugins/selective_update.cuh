// A decode step of MambaSelectiveScan from what the projections give, dt's own projection in it: delta = softplus(low W +
// bias); h = exp(delta A) h + delta x B; y = (C . h + D x) silu(z).
//
// A block takes 64 channels (32 in float32) of up to 4 rows of the batch. First the product, whose weights it reads before
// the kernel ahead has ended; then four lanes share a channel. With 16 states, which all published models have, a lane has
// four neighbouring ones, and those of all its rows are on their way before the product begins.
#pragma once

#include "selective_scan_common.cuh"
#include "step_product.cuh"

namespace mamba {
namespace scan {

constexpr int kUpdateLanes = 4;  // of a channel

template <typename T>
constexpr int kUpdateWarps = 16 / sizeof(T);
template <typename T>
constexpr int kUpdateChannels = 32 * kUpdateWarps<T> / kUpdateLanes;

struct UpdateLayout {
    int states, sums, bytes;  // where B and C and the sums of the warps begin; before them dt's input

    __host__ __device__ UpdateLayout(const MambaSelectiveUpdate& a, int rows, int item, int warp_outputs) {
        states = (rows * step::shared_stride(a.rank) * item + 15) / 16 * 16;
        sums = states + 4 * ((rows * 2 * a.state_size + 3) / 4 * 4);
        bytes = sums + 4 * rows * warp_outputs;
    }
};

// Four neighbouring states, as they lie in memory.
struct FourStates {
    uint4 bits;

    __device__ __forceinline__ void load(const void* from, int64_t at, int32_t dtype) {
        if (dtype == MAMBA_FLOAT32) {
            bits = __ldcs(reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at));
        } else {
            const uint2 half = __ldcs(reinterpret_cast<const uint2*>(static_cast<const __half*>(from) + at));
            bits.x = half.x, bits.y = half.y;
        }
    }
    __device__ __forceinline__ void store(void* to, int64_t at, int32_t dtype) const {
        if (dtype == MAMBA_FLOAT32) {
            __stcs(reinterpret_cast<uint4*>(static_cast<float*>(to) + at), bits);
        } else {
            __stcs(reinterpret_cast<uint2*>(static_cast<__half*>(to) + at), make_uint2(bits.x, bits.y));
        }
    }
    __device__ __forceinline__ void get(float (&h)[4], int32_t dtype) const {
        if (dtype == MAMBA_FLOAT32) {
            memcpy(h, &bits, sizeof(h));
        } else if (dtype == MAMBA_FLOAT16) {
            const float2 a = unpack<__half>(bits.x), b = unpack<__half>(bits.y);
            h[0] = a.x, h[1] = a.y, h[2] = b.x, h[3] = b.y;
        } else {
            const float2 a = unpack<__nv_bfloat16>(bits.x), b = unpack<__nv_bfloat16>(bits.y);
            h[0] = a.x, h[1] = a.y, h[2] = b.x, h[3] = b.y;
        }
    }
    template <typename S>
    __device__ __forceinline__ void round(const float (&h)[4]) {
        S values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = from_float<S>(h[i]);
        memcpy(&bits, values, sizeof(values));
    }
    __device__ __forceinline__ void set(const float (&h)[4], int32_t dtype) {
        if (dtype == MAMBA_FLOAT32) {
            round<float>(h);
        } else if (dtype == MAMBA_FLOAT16) {
            round<__half>(h);
        } else {
            round<__nv_bfloat16>(h);
        }
    }
};

template <typename T, int ROWS>
__global__ void __launch_bounds__(32 * kUpdateWarps<T>, resident_blocks(0, 1)) update_kernel(const MambaSelectiveUpdate a) {
    constexpr int kWarps = kUpdateWarps<T>, kChannels = kUpdateChannels<T>;
    using Own = step::Product<T, 16, kWarps, 1>;
    static_assert(Own::kOutputs == kChannels, "a block's channels are what it has products of");
    extern __shared__ float4 memory[];
    const int R = a.rank, N = a.state_size, D = a.channels, stride = step::shared_stride(R);
    const UpdateLayout layout(a, min(ROWS, a.batch), sizeof(T), kWarps * kChannels);
    T* const low = reinterpret_cast<T*>(memory);                                                          // [rows, stride]
    float* const states = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + layout.states);      // [rows, 2 N]
    float* const sums = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + layout.sums);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int b0 = blockIdx.y * ROWS, rows = min(ROWS, a.batch - b0), first = blockIdx.x * kChannels;

    Own product(static_cast<const T*>(a.dt_weight), R, D, first, warp, nullptr);
    product.begin();
    const int of_block = threadIdx.x / kUpdateLanes, share = threadIdx.x % kUpdateLanes;
    const bool exists = first + of_block < D, whole = N == 16;
    const int c = min(first + of_block, D - 1);
    const float bias = a.dt_bias != nullptr ? __ldg(a.dt_bias + c) : 0.0f, skip = a.D != nullptr ? __ldg(a.D + c) : 0.0f;
    const float* const A = a.A + int64_t{c} * N;
    const auto state_of = [&](int r) { return (int64_t{b0 + r} * D + c) * N; };
    float rates[4];
    if (whole) {
        const Pack<float, 4> of_lane = load_constant<float, 4>(A + 4 * share);
#pragma unroll
        for (int i = 0; i < 4; i++) rates[i] = kLog2E * of_lane.v[i];
        for (int r = share; r < rows; r += kUpdateLanes) {
            prefetch(static_cast<const char*>(a.ssm_state) + state_of(r) * (a.state_dtype == MAMBA_FLOAT32 ? 4 : 2));
        }
    }
    let_next_start();
    wait_for_previous();

    FourStates held[ROWS];
    T x[ROWS], z[ROWS];
    bool used[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows) break;
        const T* const xz = static_cast<const T*>(a.xz) + 2 * int64_t{b0 + r} * D + c;
        x[r] = xz[0], z[r] = xz[D], used[r] = a.seq_lens[b0 + r] > 0;
        if (whole) held[r].load(a.ssm_state, state_of(r) + 4 * share, a.state_dtype);
    }
    const auto put = [&](int r, int i, T v) {  // place i of a row of low
        if (i < R) {
            low[r * stride + i] = v;
        } else {
            states[r * 2 * N + i - R] = to_float(v);
        }
    };
    if (a.norm_eps >= 0.0f) {  // each part by itself, without weights
        for (int pair = warp; pair < 3 * rows; pair += kWarps) {
            const int r = pair / 3, part = pair % 3, size = part == 0 ? R : N, from = part == 0 ? 0 : R + (part - 1) * N;
            const T* const given = static_cast<const T*>(a.low) + int64_t{b0 + r} * a.low_row + from;
            float sum = 0.0f;
            for (int i = lane; i < size; i += 32) sum = fmaf(to_float(given[i]), to_float(given[i]), sum);
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
            const float scale = 1.0f / sqrtf(sum / size + a.norm_eps);
            for (int i = lane; i < size; i += 32) put(r, from + i, from_float<T>(to_float(given[i]) * scale));
        }
    } else {
        const int log_share = step::log_warps_of_row<kWarps>(rows), own = threadIdx.x % (32 << log_share);
        for (int r = warp >> log_share; r < rows; r += kWarps >> log_share) {
            const T* const given = static_cast<const T*>(a.low) + int64_t{b0 + r} * a.low_row;
#pragma unroll 4
            for (int i = own; i < a.low_row; i += 32 << log_share) put(r, i, given[i]);
        }
    }
    for (int i = R + static_cast<int>(threadIdx.x); i < (R + 15) / 16 * 16; i += 32 * kWarps) {
        for (int r = 0; r < rows; r++) low[r * stride + i] = from_float<T>(0.0f);
    }
    __syncthreads();
    product.run(step::SharedX<T>{low, stride, rows});
    product.put(sums, rows);
    __syncthreads();

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows) break;
        const float dt = to_float(from_float<T>(Own::sum(sums, rows, r * kChannels + of_block)));
        const float delta = softplus(dt + bias), drive = delta * to_float(x[r]);
        const float *const B = states + r * 2 * N, *const C = B + N;
        float y = 0.0f;
        if (whole) {
            float h[4];
            held[r].get(h, a.state_dtype);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h[i] = fmaf(exp2_approx(delta * rates[i]), h[i], drive * B[4 * share + i]);
                y = fmaf(h[i], C[4 * share + i], y);
            }
            if (used[r]) held[r].set(h, a.state_dtype);
            if (exists) held[r].store(a.ssm_state_out, state_of(r) + 4 * share, a.state_dtype);
        } else {
            for (int n = share; n < N; n += kUpdateLanes) {
                const int64_t at = state_of(r) + n;
                const float before = load_state(a.ssm_state, at, a.state_dtype);
                const float h = fmaf(exp2_approx(kLog2E * delta * __ldg(A + n)), before, drive * B[n]);
                y = fmaf(h, C[n], y);
                if (exists) store_state(a.ssm_state_out, at, a.state_dtype, used[r] ? h : before);
            }
        }
#pragma unroll
        for (int offset = kUpdateLanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
        if (share == 0 && exists) {
            const float out = used[r] ? fmaf(skip, to_float(x[r]), y) * silu(to_float(z[r])) : 0.0f;
            static_cast<T*>(a.y)[int64_t{b0 + r} * D + c] = from_float<T>(out);
        }
    }
}

}  // namespace scan
}  // namespace mamba
