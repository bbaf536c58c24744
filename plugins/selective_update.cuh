// A decode step of MambaSelectiveScan from what the projections give, dt's own projection in it: delta = softplus(low W +
// bias); h = exp(delta A) h + delta x B; y = (C . h + D x) silu(z).
//
// A block takes 64 channels (32 in float32) of up to 8 rows of the batch. First the product, whose weights it reads before
// the kernel ahead has ended; then four lanes share a channel. With 16 states, which all published models have, a lane has
// four neighbouring ones, and those of all its rows are on their way before the product begins: of up to two rows in
// registers, of more in shared memory, so that blocks are small and many share a multiprocessor. Then instructions bound it.
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
    int states, sums, held, bytes;  // where B and C, sums and old states begin; before them dt's input

    __host__ __device__ UpdateLayout(const MambaSelectiveUpdate& a, int rows, int item, int sums_of_row, int held_states) {
        states = (rows * step::shared_stride(a.rank) * item + 15) / 16 * 16;
        sums = states + 4 * ((rows * 2 * a.state_size + 3) / 4 * 4);
        held = sums + 4 * rows * sums_of_row;
        bytes = held + rows * held_states * (a.state_dtype == MAMBA_FLOAT32 ? 4 : 2);
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

// What a lane needs of a row besides the product.
template <typename T>
struct UpdateRow {
    FourStates states;
    T x, z;
    bool used;
};

// dt's input, and B and C, of a block's rows to shared memory, Falcon-Mamba's norms in it; this thread's share.
template <typename T, int WARPS>
__device__ __forceinline__ void fetch_low(
    const MambaSelectiveUpdate& a, int b0, int rows, T* low, int stride, float* states) {
    constexpr int kWide = 16 / sizeof(T);
    const int R = a.rank, N = a.state_size, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto put = [&](int r, int i, T v) {  // place i of a row of low
        if (i < R) {
            low[r * stride + i] = v;
        } else {
            states[r * 2 * N + i - R] = to_float(v);
        }
    };
    if (a.norm_eps >= 0.0f) {  // each part by itself, without weights
        for (int pair = warp; pair < 3 * rows; pair += WARPS) {
            const int r = pair / 3, part = pair % 3, size = part == 0 ? R : N, from = part == 0 ? 0 : R + (part - 1) * N;
            const T* const given = static_cast<const T*>(a.low) + int64_t{b0 + r} * a.low_row + from;
            float sum = 0.0f;
            for (int i = lane; i < size; i += 32) sum = fmaf(to_float(given[i]), to_float(given[i]), sum);
            const float scale = 1.0f / sqrtf(sum_of_warp(sum) / size + a.norm_eps);
            for (int i = lane; i < size; i += 32) put(r, from + i, from_float<T>(to_float(given[i]) * scale));
        }
    } else if (R % kWide == 0 && N % kWide == 0) {
        for (int r = warp; r < rows; r += WARPS) {
            const T* const given = static_cast<const T*>(a.low) + int64_t{b0 + r} * a.low_row;
            for (int i = kWide * lane; i < a.low_row; i += kWide * 32) {
                const auto values = load<T, kWide>(given + i);
                if (i < R) {
                    store(low + r * stride + i, values);
                    continue;
                }
#pragma unroll
                for (int v = 0; v < kWide; v++) states[r * 2 * N + i - R + v] = to_float(values.v[v]);
            }
        }
    } else {
        const int log_share = step::log_warps_of_row<WARPS>(rows), own = threadIdx.x % (32 << log_share);
        for (int r = warp >> log_share; r < rows; r += WARPS >> log_share) {
            const T* const given = static_cast<const T*>(a.low) + int64_t{b0 + r} * a.low_row;
#pragma unroll 8
            for (int i = own; i < a.low_row; i += 32 << log_share) put(r, i, given[i]);
        }
    }
    for (int i = R + static_cast<int>(threadIdx.x); i < (R + 15) / 16 * 16; i += 32 * WARPS) {
        for (int r = 0; r < rows; r++) low[r * stride + i] = from_float<T>(0.0f);
    }
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(32 * kUpdateWarps<T>, resident_blocks(ROWS > 2 ? 2 : 0, 1)) update_kernel(
    const MambaSelectiveUpdate a, const int rows_of_block) {
    constexpr int kWarps = kUpdateWarps<T>, kChannels = kUpdateChannels<T>, kAhead = ROWS < 4 ? ROWS : 4;
    using Own = step::Product<T, 16, kWarps>;
    static_assert(Own::kOutputs == kChannels, "a block's channels are what it has products of");
    extern __shared__ float4 memory[];
    const int R = a.rank, N = a.state_size, D = a.channels, stride = step::shared_stride(R);
    const UpdateLayout layout(a, rows_of_block, sizeof(T), kWarps * kChannels, 0);
    T* const low = reinterpret_cast<T*>(memory);                                                          // [rows, stride]
    float* const states = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + layout.states);      // [rows, 2 N]
    float* const sums = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + layout.sums);
    const int b0 = blockIdx.y * rows_of_block, rows = min(rows_of_block, a.batch - b0), first = blockIdx.x * kChannels;

    Own product(static_cast<const T*>(a.dt_weight), R, D, first, threadIdx.x / 32, nullptr);
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

    UpdateRow<T> ahead[kAhead];
    const auto fetch = [&](UpdateRow<T>& of, int r) {
        const T* const xz = static_cast<const T*>(a.xz) + 2 * int64_t{b0 + r} * D + c;
        of.x = xz[0], of.z = xz[D], of.used = a.seq_lens[b0 + r] > 0;
        if (whole) of.states.load(a.ssm_state, state_of(r) + 4 * share, a.state_dtype);
    };
#pragma unroll
    for (int r = 0; r < kAhead; r++) {
        if (r < rows) fetch(ahead[r], r);
    }
    fetch_low<T, kWarps>(a, b0, rows, low, stride, states);
    __syncthreads();
    product.run(step::SharedX<T>{low, stride, rows});
    product.put(sums, rows);
    __syncthreads();

    const auto update = [&](UpdateRow<T>& of, int r) {
        const float dt = to_float(from_float<T>(Own::sum(sums, rows, r * kChannels + of_block)));
        const float delta = softplus(dt + bias), x = to_float(of.x), drive = delta * x;
        const float *const B = states + r * 2 * N, *const C = B + N;
        float y = 0.0f;
        if (whole) {
            float h[4];
            of.states.get(h, a.state_dtype);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h[i] = fmaf(exp2_approx(delta * rates[i]), h[i], drive * B[4 * share + i]);
                y = fmaf(h[i], C[4 * share + i], y);
            }
            if (of.used) of.states.set(h, a.state_dtype);
            if (exists) of.states.store(a.ssm_state_out, state_of(r) + 4 * share, a.state_dtype);
        } else {
            for (int n = share; n < N; n += kUpdateLanes) {
                const int64_t at = state_of(r) + n;
                const float before = load_state(a.ssm_state, at, a.state_dtype);
                const float h = fmaf(exp2_approx(kLog2E * delta * __ldg(A + n)), before, drive * B[n]);
                y = fmaf(h, C[n], y);
                if (exists) store_state(a.ssm_state_out, at, a.state_dtype, of.used ? h : before);
            }
        }
#pragma unroll
        for (int offset = kUpdateLanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
        if (share == 0 && exists) {
            const float out = of.used ? fmaf(skip, x, y) * silu(to_float(of.z)) : 0.0f;
            static_cast<T*>(a.y)[int64_t{b0 + r} * D + c] = from_float<T>(out);
        }
    };
#pragma unroll 1
    for (int first_row = 0; first_row < rows; first_row += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int r = first_row + i;
            if (r >= rows) break;
            update(ahead[i], r);
            if (r + kAhead < rows) fetch(ahead[i], r + kAhead);
        }
    }
}

// Of 16 states of type S, 16-bit weights, on tensor cores. A warp finds what the lanes of all channels need of a row, and
// leaves it in shared memory, four values a channel.
template <typename T, typename S>
__global__ void __launch_bounds__(32 * kUpdateWarps<T>, resident_blocks(4, 1)) update_rows_kernel(
    const MambaSelectiveUpdate a, const int rows_of_block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    constexpr int kWarps = kUpdateWarps<T>, kChannels = kUpdateChannels<T>, kThreads = 32 * kWarps, N = 16;
    static_assert(kChannels == 64 && kWarps >= step::kColumns, "a lane has two channels of its warp's row");
    using Own = step::Product<T, 16, kWarps, false, 1>;
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const int R = a.rank, D = a.channels, stride = step::shared_stride(R);
    const UpdateLayout layout(a, rows_of_block, sizeof(T), kWarps * kChannels, 4 * kThreads);
    T* const low = reinterpret_cast<T*>(shared);                                // [rows, stride]
    float* const states = reinterpret_cast<float*>(shared + layout.states);     // [rows, 2 N]
    float* const sums = reinterpret_cast<float*>(shared + layout.sums);         // [warps, rows, channels], then
    float* const found = sums;                                                  // [rows, channels, 4]
    const S* const held = reinterpret_cast<S*>(shared + layout.held) + 4 * threadIdx.x;  // [rows, threads], four of each
    const int b0 = blockIdx.y * rows_of_block, rows = min(rows_of_block, a.batch - b0), first = blockIdx.x * kChannels;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    Own product(static_cast<const T*>(a.dt_weight), R, D, first, warp, nullptr);
    product.begin();
    const int of_block = threadIdx.x / kUpdateLanes, share = threadIdx.x % kUpdateLanes, c = min(first + of_block, D - 1);
    const int64_t of_row = int64_t{D} * N, own_state = (int64_t{b0} * D + c) * N + 4 * share;
    const S* before = static_cast<const S*>(a.ssm_state) + own_state;
#pragma unroll
    for (int r = 0; r < step::kColumns; r += kUpdateLanes) {
        if (r + share < rows) prefetch(before + (r + share) * of_row);
    }
    let_next_start();
    wait_for_previous();

#pragma unroll
    for (int r = 0; r < step::kColumns; r++) {
        if (r < rows) copy_async_whole<4 * sizeof(S)>(shared_address(held + r * 4 * kThreads), before);
        before += of_row;
    }
    copy_async_commit();
    const int pair = min(first + 2 * lane, D - 2);
    const T* const xz = static_cast<const T*>(a.xz) + 2 * int64_t{b0 + min(warp, rows - 1)} * D + pair;
    const Pack<T, 2> x = load<T, 2>(xz), z = load<T, 2>(xz + D);
    const unsigned used = __ballot_sync(~0u, lane < rows && a.seq_lens[b0 + min(lane, rows - 1)] > 0);  // bits of rows
    fetch_low<T, kWarps>(a, b0, rows, low, stride, states);
    __syncthreads();
    product.run(step::SharedX<T>{low, stride, rows});
    product.put_spread(sums, rows);
    __syncthreads();

    Pack<float, 4> needed[2];  // delta log2(e), delta x, D x and silu(z)
    if (warp < rows) {
        const float2 sum = Own::sum_of_pair(sums, rows, warp, 2 * lane);
        const float dt[2] = {sum.x, sum.y};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float bias = a.dt_bias != nullptr ? __ldg(a.dt_bias + pair + i) : 0.0f;
            const float skip = a.D != nullptr ? __ldg(a.D + pair + i) : 0.0f, value = to_float(x.v[i]);
            const float delta = softplus(to_float(from_float<T>(dt[i])) + bias);
            needed[i] = {kLog2E * delta, delta * value, skip * value, silu(to_float(z.v[i]))};
        }
    }
    const Pack<float, 4> A = load_constant<float, 4>(a.A + int64_t{c} * N + 4 * share);
    __syncthreads();
    if (warp < rows) {
#pragma unroll
        for (int i = 0; i < 2; i++) store(found + 4 * (warp * kChannels + 2 * lane + i), needed[i]);
    }
    copy_async_wait<0>();  // of what this thread alone reads
    __syncthreads();

    const bool exists = first + of_block < D;
    S* after = static_cast<S*>(a.ssm_state_out) + own_state;
    T* to = static_cast<T*>(a.y) + int64_t{b0} * D + c;
    const float *own = found + 4 * of_block, *B_row = states + 4 * share;
#pragma unroll 2
    for (int r = 0; r < rows; r++, after += of_row, to += D, own += 4 * kChannels, B_row += 2 * N) {
        const Pack<float, 4> B = load<float, 4>(B_row), C = load<float, 4>(B_row + N), of = load<float, 4>(own);
        const bool is_used = used >> r & 1;
        Neighbours<S, 4> state;
        state.load_written(held + r * 4 * kThreads);
        float h[4], y = 0.0f;
        state.get(h);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            h[i] = fmaf(exp2_approx(of.v[0] * A.v[i]), h[i], of.v[1] * B.v[i]);
            y = fmaf(h[i], C.v[i], y);
        }
        if (is_used) state.set(h);
        if (exists) state.store_streaming(after);
#pragma unroll
        for (int offset = kUpdateLanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
        if (share == 0 && exists) *to = from_float<T>(is_used ? (y + of.v[2]) * of.v[3] : 0.0f);
    }
#endif
}

}  // namespace scan
}  // namespace mamba
