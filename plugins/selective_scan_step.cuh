// MambaSelectiveScan for one token: h = exp(delta A) h + delta x B; y = (C . h + D x) silu(z).
//
// Bound by the state, which goes in and out once. A warp takes up to 32 neighbouring channels of ROWS rows of the batch, a
// lane first as a channel: it turns that one's dt into delta and delta x. Then LANES lanes share a channel, each with VEC
// neighbouring states, and a pass covers 32 / LANES channels; what they need of the channel comes by shuffles, and so
// goes their sum back to the channel's lane, which adds the skip, gates and writes y. All loads of some passes are issued
// before the first is used, and none needs what another brings: a row of length 0 reads its inputs like any other and
// drops what comes of them. A part of A serves ROWS rows: from the L2 cache it would take as much as the state.
//
// H200, cold L2, D 5120, N 16: 83 % of the speed of a copy of as many bytes at B 64 (two rows a warp), 89 % at B 256 (four);
// with every lane turning dt into delta for itself it was 75 %. One row of D 1536 takes 2.3 us with a pass a warp, 3.0 with
// four. N 17 takes 1.5 times what N 16 does: its rows come an element a lane.
#pragma once

#include "selective_scan_common.cuh"

namespace mamba {
namespace scan {

constexpr int kStepWarps = 4;  // of a block, at most

// VEC: states a lane moves at once. LANES * VEC * ITERS >= N.
template <typename T, typename S, int VEC, int LANES, int ITERS, int PASSES, int ROWS>
__global__ void __launch_bounds__(32 * kStepWarps) step_kernel(const MambaSelectiveScan a, unsigned channel_blocks) {
    constexpr int kChannels = 32 / LANES, kWarpChannels = PASSES * kChannels;  // of a pass, of a warp
    constexpr int kBytes = sizeof(S) * VEC * ITERS;  // of a lane in a pass
    constexpr int kFitting = kBytes > 32 ? 1 : kBytes > 16 ? 2 : kBytes > 8 ? 4 : 8;
    constexpr int kDepth = kFitting < PASSES ? kFitting : PASSES;  // passes whose loads are in flight
    const int lane = static_cast<int>(threadIdx.x) % 32, share = lane % LANES, N = a.state_size;
    const int first = (blockIdx.x % channel_blocks * (blockDim.x / 32) + threadIdx.x / 32) * kWarpChannels;
    const int64_t b0 = int64_t{blockIdx.x / channel_blocks} * ROWS;
    if (first >= a.channels) return;

    // Whatever is beyond the end reads the last channel or row, and writes nothing.
    const auto row = [&](int r) { return min(b0 + r, int64_t{a.batch} - 1); };
    const auto exists = [&](int r, int channel) { return channel < a.channels && (ROWS == 1 || b0 + r < a.batch); };
    const auto n_of = [&](int i) { return (i * LANES + share) * VEC; };
    const auto channel_of = [&](int pass) { return first + pass * kChannels + lane / LANES; };

    Neighbours<S, VEC> state[ROWS][kDepth][ITERS];
    Neighbours<float, VEC> A[kDepth][ITERS];
    const auto load_passes = [&](int pass) {
#pragma unroll
        for (int k = 0; k < kDepth; k++) {
            const int channel = min(channel_of(pass + k), a.channels - 1);
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
                if (n_of(i) >= N) continue;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    state[r][k][i].load_streaming(
                        static_cast<const S*>(a.ssm_state) + (row(r) * a.channels + channel) * N + n_of(i));
                }
                A[k][i].load(a.A + int64_t{channel} * N + n_of(i));
            }
        }
    };
    load_passes(0);

    Neighbours<T, VEC> B[ROWS][ITERS], C[ROWS][ITERS];
    T x[ROWS], dt[ROWS], z[ROWS];
    bool used[ROWS];
    const int own = min(first + lane, a.channels - 1);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int64_t i = row(r) * a.channels + own;
        dt[r] = load_constant(static_cast<const T*>(a.dt) + i);
        x[r] = load_constant(static_cast<const T*>(a.x) + i);
        z[r] = a.z != nullptr ? load_constant(static_cast<const T*>(a.z) + i) : from_float<T>(0.0f);
        used[r] = __ldg(a.seq_lens + row(r)) > 0;
#pragma unroll
        for (int j = 0; j < ITERS; j++) {
            if (n_of(j) >= N) continue;
            B[r][j].load(static_cast<const T*>(a.B) + row(r) * N + n_of(j));
            C[r][j].load(static_cast<const T*>(a.C) + row(r) * N + n_of(j));
        }
    }
    const float bias = a.dt_bias != nullptr ? __ldg(a.dt_bias + own) : 0.0f;
    const float skip = a.D != nullptr ? __ldg(a.D + own) : 0.0f;

    float delta[ROWS], drive[ROWS], y[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float d = to_float(dt[r]) + bias;
        if (a.dt_softplus) d = softplus(d);
        drive[r] = d * to_float(x[r]);
        delta[r] = kLog2E * d;
        y[r] = 0.0f;
    }
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass += kDepth) {
        if (pass > 0) load_passes(pass);
#pragma unroll
        for (int k = 0; k < kDepth; k++) {
            const int of_warp = (pass + k) * kChannels + lane / LANES, channel = first + of_warp;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float d = __shfl_sync(~0u, delta[r], of_warp), u = __shfl_sync(~0u, drive[r], of_warp);
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < ITERS; i++) {
                    if (n_of(i) >= N) continue;
                    float h[VEC], decay[VEC], in[VEC], out[VEC];
                    state[r][k][i].get(h);
                    A[k][i].get(decay);
                    B[r][i].get(in);
                    C[r][i].get(out);
#pragma unroll
                    for (int j = 0; j < VEC; j++) {
                        h[j] = fmaf(exp2_approx(d * decay[j]), h[j], u * in[j]);
                        sum = fmaf(h[j], out[j], sum);
                    }
                    if (used[r]) state[r][k][i].set(h);
                    if (exists(r, channel)) {
                        state[r][k][i].store_streaming(
                            static_cast<S*>(a.ssm_state_out) + ((b0 + r) * a.channels + channel) * N + n_of(i));
                    }
                }
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
                sum = __shfl_sync(~0u, sum, lane % kChannels * LANES);
                if (lane / kChannels == pass + k) y[r] = sum;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (a.D != nullptr) y[r] = fmaf(skip, to_float(x[r]), y[r]);
        if (a.z != nullptr) y[r] *= silu(to_float(z[r]));
        if (lane < kWarpChannels && exists(r, first + lane)) {
            static_cast<T*>(a.y)[(b0 + r) * a.channels + first + lane] = from_float<T>(used[r] ? y[r] : 0.0f);
        }
    }
}

}  // namespace scan
}  // namespace mamba
