// A decode step of MambaSelectiveScan from what the projections give, dt's own projection in it: delta = softplus(low W +
// bias); h = exp(delta A) h + delta x B; y = (C . h + D x) silu(z).
//
// A block takes 64 channels (32 in float32) of some rows of the batch. First the product, whose weights it reads before the
// kernel ahead has ended; then lanes share a channel. With 16 states, which all published models have, old states are on
// their way before the product begins: of up to two rows in registers, of more in shared memory, so that blocks are small
// and many share a multiprocessor. What bounds it then: all blocks wait for the same at the same time, dt's input, and then
// write their states together, which fewer instructions do not help (samples/results/step.txt, 89 and 92).
#pragma once

#include "bulk_copy.cuh"
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
    int states, low, held, bytes;  // where B and C, dt's input and old states begin; before them sums

    // held_rows: whose old states, held_states each, are there at once.
    __host__ __device__ UpdateLayout(
        const MambaSelectiveUpdate& a, int rows, int item, int sums_of_row, int held_rows = 0, int held_states = 0) {
        states = 4 * rows * sums_of_row;
        low = states + 4 * ((rows * 2 * a.state_size + 3) / 4 * 4);
        held = low + (rows * step::shared_stride(a.rank) * item + 15) / 16 * 16;
        bytes = held + held_rows * held_states * (a.state_dtype == MAMBA_FLOAT32 ? 4 : 2);
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
    // From shared memory, `from` being the first of all.
    __device__ __forceinline__ void load_shared(const char* from, int at, int32_t dtype) {
        if (dtype == MAMBA_FLOAT32) {
            bits = *reinterpret_cast<const uint4*>(from + 4 * at);
        } else {
            const uint2 half = *reinterpret_cast<const uint2*>(from + 2 * at);
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

// dt's input, and B and C, of up to ROWS rows to shared memory, Falcon-Mamba's norms in it; this thread's share.
template <typename T, int WARPS, int ROWS>
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
    const bool wide = a.norm_eps < 0.0f && R % kWide == 0 && N % kWide == 0;
    const T* const given = static_cast<const T*>(a.low);
    Pack<T, kWide> values[(ROWS + WARPS - 1) / WARPS];  // of rows warp, warp + WARPS
    const auto fetch = [&](int i) {
        int r = warp;
#pragma unroll
        for (auto& of_row : values) {
            if (r < rows && i < a.low_row) of_row = load<T, kWide>(given + int64_t{b0 + r} * a.low_row + i);
            r += WARPS;
        }
    };
    if (wide) {
        fetch(kWide * lane);
#pragma unroll 1
        for (int i = kWide * lane; i < a.low_row; i += kWide * 32) {
            int r = warp;
#pragma unroll
            for (const auto& of_row : values) {
                if (r < rows && i < R) store(low + r * stride + i, of_row);
                if (r < rows && i >= R) {
#pragma unroll
                    for (int v = 0; v < kWide; v += 4) {
                        Pack<float, 4> four;
#pragma unroll
                        for (int k = 0; k < 4; k++) four.v[k] = to_float(of_row.v[v + k]);
                        store(states + r * 2 * N + i - R + v, four);
                    }
                }
                r += WARPS;
            }
            fetch(i + kWide * 32);
        }
    } else if (a.norm_eps >= 0.0f) {  // each part by itself, without weights
        for (int pair = warp; pair < 3 * rows; pair += WARPS) {
            const int r = pair / 3, part = pair % 3, size = part == 0 ? R : N, from = part == 0 ? 0 : R + (part - 1) * N;
            const T* const of_part = given + int64_t{b0 + r} * a.low_row + from;
            float sum = 0.0f;
#pragma unroll 4
            for (int i = lane; i < size; i += 32) sum = fmaf(to_float(of_part[i]), to_float(of_part[i]), sum);
            const float scale = 1.0f / sqrtf(sum_of_warp(sum) / size + a.norm_eps);
#pragma unroll 2
            for (int i = lane; i < size; i += 32) put(r, from + i, from_float<T>(to_float(of_part[i]) * scale));
        }
    } else {
        const int log_share = step::log_warps_of_row<WARPS>(rows), own = threadIdx.x % (32 << log_share);
        for (int r = warp >> log_share; r < rows; r += WARPS >> log_share) {
            const T* const of_row = given + int64_t{b0 + r} * a.low_row;
#pragma unroll 4
            for (int i = own; i < a.low_row; i += 32 << log_share) put(r, i, of_row[i]);
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
    const UpdateLayout layout(a, rows_of_block, sizeof(T), kWarps * kChannels);
    char* const shared = reinterpret_cast<char*>(memory);
    float* const sums = reinterpret_cast<float*>(shared);
    float* const states = reinterpret_cast<float*>(shared + layout.states);  // [rows, 2 N]
    T* const low = reinterpret_cast<T*>(shared + layout.low);                // [rows, stride]
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
    fetch_low<T, kWarps, ROWS>(a, b0, rows, low, stride, states);
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

constexpr int kUpdateAlong = 4;  // warps along the inputs of the product of update_rows_kernel
constexpr int kUpdateSums = kUpdateChannels<__half> * kUpdateAlong;  // of a row
constexpr int kUpdateResident = 4;  // blocks on a multiprocessor, if there is shared memory for them

// Of 16 states of type S, 16-bit weights, on tensor cores, of up to 8 rows. A warp finds what the lanes of all channels need
// of its row, and leaves it in shared memory, four values a channel, where its sums were. Then four lanes share a channel.
// Weights and old states are on their way before the kernel ahead has ended; where there are bulk copies a thread brings the
// states of all, which leaves more of the multiprocessor to that kernel. But of blocks from `at_once` on states come after
// dt's input: many start together, and what each of them needs first would wait for the states of all.
template <typename T, typename S>
__global__ void __launch_bounds__(32 * kUpdateWarps<T>, resident_blocks(kUpdateResident, 1)) update_rows_kernel(
    const MambaSelectiveUpdate a, const int rows_of_block, const int at_once) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    constexpr int kWarps = kUpdateWarps<T>, kChannels = kUpdateChannels<T>, kRows = step::kColumns, N = 16;
    constexpr int kLanes = kUpdateLanes, kOwn = N / kLanes, kHeld = kChannels * N;  // of a channel; of a lane; of a row
    using Own = step::Product<T, 8, kUpdateAlong, false, 3>;
    constexpr int kShares = kChannels / Own::kOutputs;  // warps across the outputs
    static_assert(kWarps == kRows && kChannels == 64, "a lane has two channels of its warp's row");
    static_assert(32 * kWarps == kChannels * kLanes, "all threads have their part of each row");
    static_assert(kWarps == kShares * kUpdateAlong && kUpdateSums == 4 * kChannels, "sums lie where what is found will");
#if __CUDA_ARCH__ >= 900
    __shared__ uint64_t states_bar;
    const uint32_t bar = shared_address(&states_bar);
#endif
    extern __shared__ float4 memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    const int R = a.rank, D = a.channels, stride = step::shared_stride(R);
    const UpdateLayout layout(a, rows_of_block, sizeof(T), kUpdateSums);
    float* const sums = reinterpret_cast<float*>(shared);                    // [rows, kUpdateAlong, channels], then
    float* const found = sums;                                               // [rows, channels, 4]
    float* const states = reinterpret_cast<float*>(shared + layout.states);  // [rows, 2 N]
    T* const low = reinterpret_cast<T*>(shared + layout.low);                // [rows, stride]
    S* const held = reinterpret_cast<S*>(shared + layout.held) + kOwn * threadIdx.x;  // [rows, threads, kOwn]
    const int b0 = blockIdx.y * rows_of_block, rows = min(rows_of_block, a.batch - b0), first = blockIdx.x * kChannels;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, output = warp % kShares * Own::kOutputs;

    Own product(static_cast<const T*>(a.dt_weight), R, D, first + output, warp / kShares, nullptr);
    product.begin();
    const int of_block = threadIdx.x / kLanes % kChannels;  // all of it; told its range, the compiler spills nothing
    const int share = threadIdx.x % kLanes, c = min(first + of_block, D - 1), pair = min(first + 2 * lane, D - 2);
    prefetch(a.A + int64_t{c} * N + kOwn * share);
    if (a.dt_bias != nullptr) prefetch(a.dt_bias + pair);
    if (a.D != nullptr) prefetch(a.D + pair);
    const int64_t of_row = int64_t{D} * N, own_state = (int64_t{b0} * D + c) * N + kOwn * share;
    const S* from = static_cast<const S*>(a.ssm_state) + own_state;
#if __CUDA_ARCH__ >= 900
    const bool late = blockIdx.y * gridDim.x + blockIdx.x >= static_cast<uint32_t>(at_once);
    const auto bring = [&] {
        const int bytes = min(kChannels, D - first) * N * static_cast<int>(sizeof(S));
        bar_init(bar, 1);
        bars_are_there();
        bar_expect(bar, rows * bytes);
        const uint64_t policy = evict_first();
        for (int r = 0; r < rows; r++) copy_line(shared_address(held + r * kHeld), from + r * of_row, bytes, bar, policy);
    };
    if (threadIdx.x == 0 && !late) bring();
#else
#pragma unroll
    for (int r = 0; r < kRows; r++, from += of_row) {
        copy_async_if<kOwn * sizeof(S)>(r < rows, shared_address(held) + r * kHeld * sizeof(S), from);
    }
    copy_async_commit();
#endif
    let_next_start();
    wait_for_previous();

    fetch_low<T, kWarps, kRows>(a, b0, rows, low, stride, states);
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && late) bring();
#endif
    product.run(step::SharedX<T>{low, stride, rows});
    const int length = a.seq_lens[b0 + min(lane, rows - 1)];
    const T* const xz = static_cast<const T*>(a.xz) + 2 * int64_t{b0 + min(warp, rows - 1)} * D + pair;
    const Pack<T, 2> x = load<T, 2>(xz), z = load<T, 2>(xz + D);
    const uint4 rates = step::load_weights<16>(a.A + int64_t{c} * N + kOwn * share);  // volatile, or the compiler would read
    uint32_t biases[2]{}, skips[2]{};                                                // it where it is needed; so these
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (a.dt_bias != nullptr) biases[i] = step::load_weights<4>(a.dt_bias + pair + i);
        if (a.D != nullptr) skips[i] = step::load_weights<4>(a.D + pair + i);
    }
    product.template put_spread<kChannels>(sums + output, rows);
    const unsigned used = __ballot_sync(~0u, length > 0);  // bits of rows
    __syncthreads();

    if (warp < rows) {
        float* const here = sums + warp * kUpdateSums;
        const float2 sum = Own::template sum_of_pair<kChannels>(here, warp, 2 * lane);
        __syncwarp();  // what this warp alone reads it also writes
        const float dt[2] = {sum.x, sum.y};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float value = to_float(x.v[i]);
            const float delta = softplus(to_float(from_float<T>(dt[i])) + __uint_as_float(biases[i]));
            const Pack<float, 4> needed{  // delta log2(e), delta x, D x and silu(z)
                kLog2E * delta, delta * value, __uint_as_float(skips[i]) * value, silu(to_float(z.v[i]))};
            store(here + 4 * (2 * lane + i), needed);
        }
    }
    __syncthreads();

    const bool exists = first + of_block < D;
    Pack<float, kOwn> A;
    memcpy(&A, &rates, sizeof(A));
    S* after = static_cast<S*>(a.ssm_state_out) + own_state;
    T* to = static_cast<T*>(a.y) + int64_t{b0} * D + c;
    const float *found_row = found + 4 * of_block, *B_row = states + kOwn * share;
#if __CUDA_ARCH__ >= 900
    bar_wait(bar, 0);
#else
    copy_async_wait<0>();  // of what this thread alone reads
#endif
#pragma unroll 2
    for (int r = 0; r < rows; r++) {
        const Pack<float, kOwn> B = load<float, kOwn>(B_row), C = load<float, kOwn>(B_row + N);
        const Pack<float, 4> of = load<float, 4>(found_row);
        const bool is_used = used >> r & 1;
        Neighbours<S, kOwn> state;
        state.load_written(held + r * kHeld);
        float h[kOwn], y = 0.0f;
        state.get(h);
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            h[i] = fmaf(exp2_approx(of.v[0] * A.v[i]), h[i], of.v[1] * B.v[i]);
            y = fmaf(h[i], C.v[i], y);
        }
        if (is_used) state.set(h);
        if (exists) state.store_streaming(after);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
        if (share == 0 && exists) *to = from_float<T>(is_used ? (y + of.v[2]) * of.v[3] : 0.0f);
        after += of_row, to += D, found_row += kUpdateSums, B_row += 2 * N;
    }
#endif
}

}  // namespace scan
}  // namespace mamba
