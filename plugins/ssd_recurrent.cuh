// MambaSsdScan for prompts by the plain recurrence in float32: any dtype, any P, any N. And the passing of states between
// segments, which the tensor core kernels of ssd_prompt.cuh use too.
//
// On the FMA units the recurrence costs 3 P N operations a token and head, the chunked form about as many and with them
// its segment sums; here every decay is applied by itself, so nothing can cancel. Four rows p and eight n of a state stay
// in the registers of a thread; B, C and x pass through shared memory, 16 tokens at a time.
// 96 of about 120 instructions a token and warp are the FMAs (predicted for N 128, H 128, L 2048: 250 us on an H200).
#pragma once

#include "ssd_common.cuh"

namespace mamba {
namespace ssd {

// LANES lanes share a row p: N <= 8 * LANES.
template <int LANES>
struct Recurrent {
    static constexpr int kTokens = 16;                        // at once in shared memory
    static constexpr int kWidth = 8 * LANES;                  // N, padded
    static constexpr int kWarps = LANES == 4 ? 2 : 4;         // of a block
    static constexpr int kWarpRows = 4 * 32 / LANES;          // four a lane
    static constexpr int kRows = kWarps * kWarpRows;          // of a block
    static constexpr int kXWords = (kRows + 31) / 32;         // rows a lane loads
    static constexpr int kTokensPerWarp = kTokens / kWarps;
    static constexpr int kSharedBytes = 4 * (kTokens * (2 * kWidth + 2 * kRows + 2));
};

// OUTPUT: y and the state of the last token; else what a segment adds to a state of zero, into segments.states.
template <typename T, int LANES, bool OUTPUT>
__global__ void __launch_bounds__(32 * Recurrent<LANES>::kWarps)
    recurrent_kernel(const MambaSsdScan a, const Rows from, const Segments segments, uint32_t tiles) {
    using Sizes = Recurrent<LANES>;
    constexpr int kTokens = Sizes::kTokens, kWidth = Sizes::kWidth, kRows = Sizes::kRows, kWarps = Sizes::kWarps;
    extern __shared__ __align__(16) unsigned char shared[];
    float* const Bs = reinterpret_cast<float*>(shared);  // [kTokens, kWidth]
    float* const Cs = Bs + kTokens * kWidth;             // [kTokens, kWidth]
    float* const xs = Cs + kTokens * kWidth;             // [kTokens, kRows]
    float* const ys = xs + kTokens * kRows;              // [kTokens, kRows]
    float2* const steps = reinterpret_cast<float2*>(ys + kTokens * kRows);  // [kTokens]: delta, decay

    const Place at = place(a, blockIdx.x, tiles);
    const int segment = static_cast<int>(blockIdx.y);
    const int N = a.state_size, P = a.head_dim;
    const int p0 = at.tile * kRows, p1 = min(P, p0 + kRows);
    const int64_t rows_total = static_cast<int64_t>(a.batch) * a.heads * P;
    const int64_t row0 = at.head * P + p0;  // of [B, H, P]
    const int length = row_length(a, at.b);
    const int begin = segment * segments.length;
    const int limit = static_cast<int>(min(static_cast<int64_t>(begin) + segments.length, static_cast<int64_t>(a.length)));
    const int end = min(limit, length);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;

    if (OUTPUT) {
        clear_outputs<T>(a, at, max(begin, length), limit, p0, p1);
        if (length == 0) {
            if (segments.count == 1) copy_states(a, row0 * N + thread, (row0 + p1 - p0) * N, blockDim.x);
            return;
        }
    }

    // Rows p0 + own_row + i; n = own_n + j and own_n + 4 * LANES + j, which LDS.128 reads without conflicts.
    const int own_row = warp * Sizes::kWarpRows + lane / LANES * 4, own_n = lane % LANES * 4;
    float h[4][8] = {};
    const auto each = [&](auto&& run) {  // run(value, its place in a [B, H, P, N])
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int n = own_n + j % 4 + j / 4 * 4 * LANES;
                if (p0 + own_row + i < P && n < N) run(h[i][j], (row0 + own_row + i) * N + n);
            }
        }
    };
    const bool whole = segments.count == 1;
    float* const segment_states = whole ? nullptr : segments.states + segment * rows_total * N;
    if (OUTPUT) {
        void* const given = whole ? const_cast<void*>(a.ssm_state) : segment_states;
        with_states(given, whole ? a.state_dtype : MAMBA_FLOAT32,
                    [&](auto* states) { each([&](float& v, int64_t e) { v = to_float(states[e]); }); });
    }

    const int64_t group_row = from.group, x_row = from.x, y_row = static_cast<int64_t>(a.heads) * P;
    const int64_t token0 = static_cast<int64_t>(at.b) * a.length;
    const int64_t group = at.h / (a.heads / a.groups);
    const T* const B = static_cast<const T*>(a.B) + token0 * group_row + group * N;
    const T* const C = static_cast<const T*>(a.C) + token0 * group_row + group * N;
    const T* const x = static_cast<const T*>(a.x) + token0 * x_row + static_cast<int64_t>(at.h) * P + p0;
    const T* const dt = static_cast<const T*>(a.dt) + token0 * from.dt + at.h;
    T* const y = static_cast<T*>(a.y) + token0 * y_row + static_cast<int64_t>(at.h) * P + p0;
    const float A = a.A[at.h], bias = a.dt_bias == nullptr ? 0.0f : a.dt_bias[at.h];
    float product = 1.0f;

    for (int t0 = begin; t0 < end; t0 += kTokens) {
        const int count = min(kTokens, end - t0);
        if (thread < kTokens) {  // past the end a token that changes nothing
            float2 step = make_float2(0.0f, 1.0f);
            if (thread < count) {
                step.x = step_size(a, to_float(load_constant(dt + static_cast<int64_t>(t0 + thread) * from.dt)), bias);
                step.y = expf(step.x * A);
            }
            steps[thread] = step;
        }
#pragma unroll
        for (int i = 0; i < Sizes::kTokensPerWarp; i++) {
            const int t = warp + i * kWarps;
            const bool valid = t < count;
#pragma unroll
            for (int j = 0; j < kWidth / 32; j++) {
                const int n = lane + 32 * j;
                const bool inside = valid && n < N;
                Bs[t * kWidth + n] = inside ? to_float(load_constant(B + (t0 + t) * group_row + n)) : 0.0f;
                if (OUTPUT) Cs[t * kWidth + n] = inside ? to_float(load_constant(C + (t0 + t) * group_row + n)) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < Sizes::kXWords; j++) {
                const int r = lane + 32 * j;
                const bool inside = valid && p0 + r < P;
                if (r < kRows) xs[t * kRows + r] = inside ? to_float(load_constant(x + (t0 + t) * x_row + r)) : 0.0f;
            }
        }
        __syncthreads();

#pragma unroll 1
        for (int t4 = 0; t4 < count; t4 += 4) {
            float sums[16] = {};  // of four tokens and four rows
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int t = t4 + u;
                const float2 step = steps[t];
                const float4 row = *reinterpret_cast<const float4*>(xs + t * kRows + own_row);
                const float drive[4] = {step.x * row.x, step.x * row.y, step.x * row.z, step.x * row.w};
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int n = t * kWidth + own_n + k * 4 * LANES;
                    const float4 b4 = *reinterpret_cast<const float4*>(Bs + n);
                    const float4 c4 = OUTPUT ? *reinterpret_cast<const float4*>(Cs + n) : b4;
                    const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float& v = h[i][4 * k + j];
                            v = fmaf(drive[i], b[j], step.y * v);
                            if (OUTPUT) sums[4 * u + i] = fmaf(v, c[j], sums[4 * u + i]);
                        }
                    }
                }
                if (!OUTPUT) product *= step.y;
            }
            if (OUTPUT) {  // each lane gives half of its sums away, again and again, and ends with 16 / LANES of them
                const int own = lane % LANES;
#pragma unroll
                for (int half = 8, offset = LANES / 2; offset > 0; half /= 2, offset /= 2) {
                    const bool upper = own & offset;
                    if (half == 0) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        if (k >= half) continue;
                        const float given = upper ? sums[k] : sums[k + half];
                        sums[k] = (upper ? sums[k + half] : sums[k]) + __shfl_xor_sync(~0u, given, offset);
                    }
                }
                constexpr int kOwn = LANES < 16 ? 16 / LANES : 1;
#pragma unroll
                for (int k = 0; k < kOwn; k++) {
                    const int i = LANES < 16 ? own * kOwn + k : own * 16 / LANES;
                    if (LANES <= 16 || own % 2 == 0) ys[(t4 + i / 4) * kRows + own_row + i % 4] = sums[k];
                }
            }
        }
        __syncthreads();
        if (OUTPUT) {
#pragma unroll
            for (int j = 0; j < Sizes::kXWords; j++) {
                const int r = lane + 32 * j;
                if (r >= kRows || p0 + r >= P) continue;
                const float skip = skip_of(a, at.h, p0 + r);
                for (int t = warp; t < count; t += kWarps) {
                    y[(t0 + t) * y_row + r] = from_float<T>(fmaf(skip, xs[t * kRows + r], ys[t * kRows + r]));
                }
            }
            __syncthreads();
        }
    }

    if (OUTPUT && segment != segments.count - 1) return;
    with_states(OUTPUT ? a.ssm_state_out : segment_states, OUTPUT ? a.state_dtype : MAMBA_FLOAT32,
                [&](auto* states) { each([&](float& v, int64_t e) { store_as(states + e, v); }); });
    if (!OUTPUT && at.tile == 0 && thread == 0) {
        segments.decays[static_cast<int64_t>(segment) * a.batch * a.heads + at.head] = product;
    }
}

// The state each segment starts from, in place of what the segment before it adds to zero. A thread an element.
__global__ void __launch_bounds__(256) pass_states_kernel(const MambaSsdScan a, const Segments segments) {
    const int64_t heads = static_cast<int64_t>(a.batch) * a.heads, of_head = static_cast<int64_t>(a.head_dim) * a.state_size;
    const int64_t elements = heads * of_head, e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (e >= elements) return;
    const int64_t head = e / of_head;
    if (row_length(a, static_cast<int>(head / a.heads)) == 0) {
        copy_states(a, e, e + 1, 1);
        return;
    }
    float h = 0.0f;
    with_states(const_cast<void*>(a.ssm_state), a.state_dtype, [&](auto* from) { h = to_float(from[e]); });
    float* states = segments.states + e;
    constexpr int kAtOnce = 8;  // read before the first is written over: one after the other took a microsecond each
    for (int first = 0; first < segments.count - 1; first += kAtOnce) {
        float added[kAtOnce], decay[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (first + i >= segments.count - 1) break;
            added[i] = states[(first + i) * elements];
            decay[i] = segments.decays[(first + i) * heads + head];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (first + i >= segments.count - 1) break;
            states[(first + i) * elements] = h;
            h = fmaf(decay[i], h, added[i]);
        }
    }
    states[(segments.count - 1) * elements] = h;
}

}  // namespace ssd
}  // namespace mamba
