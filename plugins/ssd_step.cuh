// MambaSsdScan for one token: h = exp(delta A) h + delta x B^T; y = h C + D x.
//
// Bound by the state, which goes in and out once. LANES lanes share a row p, each with 16 bytes of it, and a warp takes SETS
// sets of 32 / LANES rows, all loaded before the first is used. Nothing a load needs comes from another load: a row of
// length 0 reads its x, B, C and dt like any other and drops them. There is no barrier and no shared memory: the warps of a
// block read the same B and C, which the L1 cache serves.
//
// H200, cold L2, fp32 state, P 64, N 128: 94 and 95 % of the speed of a copy of as many bytes at B H 4096 and 8192 (four
// sets in blocks of two warps; two sets took 1.5 % longer, one 8 %), 91 % at 512 (two sets in blocks of eight warps; four
// sets 4 % longer); B 1, H 24 takes 2.6 us, of which an empty kernel takes 0.8.
#pragma once

#include "ssd_common.cuh"
#include "step_common.cuh"

namespace mamba {
namespace ssd {

constexpr int kStepWarps = 8;  // of a block, at most

// n / divisor for n < 2^31 by a multiplication.
struct Divisor {
    uint32_t divisor, factor, shift;

    __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, factor) + n) >> shift; }
};

struct StepDivisors {
    Divisor warps;  // of a head, where its rows fill whole warps
    Divisor rows;   // of a head: P
    Divisor heads;  // of a row of the batch: H
    Divisor group;  // heads of a group
    int small;      // all numerators are below 2^31
};

// Where a token's values lie: of x and z at [b * row + h * P + p], of B and C at [b * row + g * N + n], of dt at [b * row + h].
template <typename T>
struct StepPlaces {
    const T *x, *B, *C, *dt, *z;  // z, a gate of y, may be null
    int64_t x_row, group_row, dt_row, z_row;
};

// What the rows of one head have in common, of B and C a lane's share.
template <typename T, int VEC, int ITERS>
struct StepHead {
    Neighbours<T, VEC> B[ITERS], C[ITERS];
    float delta, decay;
    bool used;

    __device__ __forceinline__ void load(
        const MambaSsdScan& a, const StepPlaces<T>& at, const StepDivisors& by, int64_t b, int h, int n0, int stride) {
        const int64_t group = b * at.group_row + by.group.divide(h) * a.state_size;
        const T *b_row = at.B + group, *c_row = at.C + group;
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            const int n = n0 + i * stride;
            if (n < a.state_size) {
                B[i].load_written(b_row + n);
                C[i].load_written(c_row + n);
            }
        }
        const float dt = to_float(at.dt[b * at.dt_row + h]);
        const float A = __ldg(a.A + h), bias = a.dt_bias == nullptr ? 0.0f : __ldg(a.dt_bias + h);
        used = a.seq_lens[b] > 0;
        delta = step_size(a, dt, bias);
        decay = expf(delta * A);
    }
};

// VEC: values of the state a lane loads at once, 16 bytes or one. LANES * VEC * ITERS >= N. UNIFORM: a warp's rows are
// of one head, which saves all but one load of B and C; only then may tokens be apart and have gates.
template <typename T, typename S, int VEC, int LANES, int ITERS, int SETS, bool UNIFORM>
__global__ void __launch_bounds__(32 * kStepWarps, resident_blocks(0, 1)) step_kernel(
    const MambaSsdScan a, const StepPlaces<T> at, const StepDivisors by) {
    constexpr int kRows = 32 / LANES;  // of a set
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    const int row = static_cast<int>(threadIdx.x) % 32 / LANES;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t rows = static_cast<int64_t>(a.batch) * a.heads * a.head_dim;
    const int64_t first = warp * (SETS * kRows) + row;
    if (warp * (SETS * kRows) >= rows) return;
    const int N = a.state_size;
    const S* states = static_cast<const S*>(a.ssm_state) + first * N + lane * VEC;
    S* states_out = static_cast<S*>(a.ssm_state_out) + first * N + lane * VEC;
    const int set_stride = kRows * N;
    if (UNIFORM && at.z != nullptr) {  // in a decode step: what is waited for takes longer than this
#pragma unroll
        for (int s = 0; s < SETS; s++) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
                if (lane % 8 == 0 && (lane + i * LANES) * VEC < N) prefetch(states + s * set_stride + i * LANES * VEC);
            }
        }
    }
    let_next_start();
    wait_for_previous();

    Neighbours<S, VEC> state[SETS][ITERS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            if ((UNIFORM || first + s * kRows < rows) && (lane + i * LANES) * VEC < N) {
                state[s][i].load_streaming(states + s * set_stride + i * LANES * VEC);
            }
        }
    }

    StepHead<T, VEC, ITERS> head;
    int64_t b = 0;
    int h = 0, p = 0;
    const auto find = [&](int64_t at) {
        if (by.small) {
            const uint32_t of_head = by.rows.divide(static_cast<uint32_t>(at)), of_row = by.heads.divide(of_head);
            p = static_cast<int>(static_cast<uint32_t>(at) - of_head * a.head_dim);
            h = static_cast<int>(of_head - of_row * a.heads);
            b = of_row;
        } else {
            const int64_t of_head = at / a.head_dim;
            p = static_cast<int>(at - of_head * a.head_dim);
            b = of_head / a.heads;
            h = static_cast<int>(of_head - b * a.heads);
        }
    };
    if (UNIFORM) {
        const uint32_t of_head = by.warps.divide(static_cast<uint32_t>(warp));
        p = (static_cast<uint32_t>(warp) - of_head * by.warps.divisor) * (SETS * kRows) + row;
        const uint32_t of_row = by.heads.divide(of_head);
        h = of_head - of_row * a.heads;
        b = of_row;
        head.load(a, at, by, b, h, lane * VEC, LANES * VEC);
    }
    const int64_t of_head = int64_t{h} * a.head_dim + p;
    const T* const xs = UNIFORM ? at.x + b * at.x_row + of_head : at.x + first;
    float x[SETS], y[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        x[s] = UNIFORM || first + s * kRows < rows ? to_float(xs[s * kRows]) : 0.0f;
    }
    float skip = 0.0f;  // of the row this lane writes
    float gate = 1.0f;
    if (UNIFORM && lane < SETS) {
        skip = skip_of(a, h, p + lane * kRows);
        if (at.z != nullptr) gate = silu(to_float(at.z[b * at.z_row + of_head + lane * kRows]));
    }

    float out = 0.0f;
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        if (!UNIFORM) {
            find(min(first + s * kRows, rows - 1));
            head.load(a, at, by, b, h, lane * VEC, LANES * VEC);
            if (lane == s) skip = skip_of(a, h, p);
        }
        y[s] = 0.0f;
        const float drive = head.delta * x[s];
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            if ((UNIFORM || first + s * kRows < rows) && (lane + i * LANES) * VEC < N) {
                float B[VEC], C[VEC], v[VEC];
                head.B[i].get(B);
                head.C[i].get(C);
                state[s][i].get(v);
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    v[j] = fmaf(drive, B[j], head.decay * v[j]);
                    y[s] = fmaf(v[j], C[j], y[s]);
                }
                if (head.used) state[s][i].set(v);
                state[s][i].store_streaming(states_out + s * set_stride + i * LANES * VEC);
            }
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) y[s] += __shfl_xor_sync(~0u, y[s], offset);
        if (lane == s) out = head.used ? fmaf(skip, x[s], y[s]) : 0.0f;
    }
    T* ys = static_cast<T*>(a.y) + first;
    if (lane < SETS && first + lane * kRows < rows) ys[lane * kRows] = from_float<T>(out * gate);
}

}  // namespace ssd
}  // namespace mamba
