// A decode step of MambaSsdScan that may leave its token pending (pending.cuh): as ssd_step.cuh, but with the tokens before, on
// compute capability 9.0.
//
// A block has rows p of one head. Their old states come to shared memory by a bulk copy, and so do the records of what is
// pending, which alone is enough to keep memory busy; what the own token adds is found meanwhile, and laid beside them as a
// record. LANES lanes then share rows p, a few neighbouring ones at a time.
#pragma once

#include "bulk_copy.cuh"
#include "pending.cuh"
#include "ssd_step.cuh"

namespace mamba {
namespace ssd {

constexpr int kLateSets = 4;   // rows of a lane at a time
constexpr int kLateTurns = 2;  // of a block, at most
constexpr int kOwnRecord = pending::kMost;  // where the own token's is, behind what is pending
constexpr int kLateHeadDim = 1024;          // P at most, for records have to find room

// Of a block; and blocks of a multiprocessor, by which the compiler gives out registers. With published sizes a block has 32 KB
// of float32 states, or 16 KB of others.
template <typename S>
constexpr int kLateWarps = sizeof(S) == 4 ? 8 : 4;
template <typename S>
constexpr int kLateResident = sizeof(S) == 4 ? 5 : 8;
template <typename S, int LANES>
constexpr int kLateRows = kLateWarps<S> * kLateSets * 32 / LANES;  // of a block at a time

// Calls use(i, from[i]) for each i < MOST, by a warp; from `count` on the value is 0. All are read before one is used.
template <int MOST, typename T, typename Use>
__device__ __forceinline__ void for_lane(int count, const T* from, Use&& use) {
    constexpr int kEach = (MOST + 31) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    T values[kEach];
#pragma unroll
    for (int k = 0; k < kEach; k++) values[k] = lane + 32 * k < count ? from[lane + 32 * k] : from_float<T>(0.0f);
#pragma unroll
    for (int k = 0; k < kEach; k++) {
        if (lane + 32 * k < MOST) use(lane + 32 * k, values[k]);
    }
}

// In shared memory: states of `rows` rows, then records of a head, as in pending.cuh. Behind them is what lanes read of rows
// that a turn has and the head has not.
inline __host__ __device__ int late_record(const MambaSsdScan& a, int states) {
    return pending::kHeadWords + a.head_dim + states;
}
inline __host__ __device__ int late_bytes(const MambaSsdScan& a, int rows, int item, int states, int rows_of_turn) {
    const int beyond = rows < rows_of_turn ? rows_of_turn - rows : 0;
    return rows * a.state_size * item + 4 * ((kOwnRecord + 1) * late_record(a, states) + beyond);
}

template <typename T, typename S, int LANES, int ITERS>
__global__ void __launch_bounds__(32 * kLateWarps<S>, resident_blocks(kLateResident<S>, 1)) late_step_kernel(
    const MambaSsdScan a, const StepPlaces<T> at, const pending::Pending before, const int rows_of_block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int kVec = 16 / sizeof(S), kSets = kLateSets, kStates = LANES * kVec * ITERS, kHead = pending::kHeadWords;
    constexpr int kMostRows = kLateTurns * kLateRows<S, LANES>, kThreads = 32 * kLateWarps<S>;
    __shared__ alignas(16) float Cs[kStates];
    __shared__ float xs[kMostRows], skips[kMostRows], gates[kMostRows];  // x, D and silu(z)
    extern __shared__ float4 memory[];
    const int N = a.state_size, P = a.head_dim, tiles = (P + rows_of_block - 1) / rows_of_block;
    const int b = blockIdx.y, h = blockIdx.x / tiles, p0 = blockIdx.x % tiles * rows_of_block, rows = min(rows_of_block, P - p0);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = threadIdx.x / 32;
    const int channels = a.heads * P, group = h / (a.heads / a.groups), record = late_record(a, kStates);
    const int64_t first = ((int64_t{b} * a.heads + h) * P + p0) * N;
    const S* const states = static_cast<const S*>(a.ssm_state) + first;
    S* const held = reinterpret_cast<S*>(memory);
    float* const records = reinterpret_cast<float*>(held + rows_of_block * N);  // of each the head's part, then B
    const auto record_of = [&](int j) { return before.records + int64_t{b} * before.row + j * before.record; };
    const auto head_of = [&](int j) { return record_of(j) + h * (kHead + P); };
    const auto B_of = [&](int j) { return record_of(j) + a.heads * (kHead + P) + group * N; };
    __shared__ uint64_t states_bar;
    const uint32_t bar = shared_address(&states_bar);
    const pending::Mark mark(before, b);
    if (threadIdx.x == 0) {
        const int bytes = rows * N * static_cast<int>(sizeof(S)), of_head = 4 * (kHead + P), of_B = 4 * N;
        bar_init(bar, 1);
        bars_are_there();
        copy_line(shared_address(held), states, bytes, bar, evict_first());
        bar_expect(bar, bytes + mark.pending * (of_head + of_B));
        for (int j = 0; j < mark.pending; j++) {
            copy_line(shared_address(records + j * record), head_of(j), of_head, bar);
            copy_line(shared_address(records + j * record + kHead + P), B_of(j), of_B, bar);
        }
    }
    for (int i = N + static_cast<int>(threadIdx.x); i < kStates; i += kThreads) {
        for (int j = 0; j < mark.pending; j++) records[j * record + kHead + P + i] = 0.0f;
    }
    let_next_start();
    wait_for_previous();

    const bool used = a.seq_lens[b] > 0;
    const T* const x = at.x + b * at.x_row + h * P + p0;
    float *const own = records + kOwnRecord * record, *const kept = mark.writes ? nullptr : head_of(mark.pending);
    if (warp == 0) {
        const float bias = a.dt_bias == nullptr ? 0.0f : __ldg(a.dt_bias + h), A = __ldg(a.A + h);
        const float delta = step_size(a, to_float(at.dt[b * at.dt_row + h]), bias), decay = expf(delta * A);
        for_lane<kMostRows>(rows, x, [&](int i, T value) {
            const float drive = delta * to_float(value);
            if (i < rows) own[kHead + p0 + i] = drive;
            if (i < rows && kept != nullptr) kept[kHead + p0 + i] = drive;
        });
        if (lane == 0) own[0] = decay;
        if (lane == 0 && p0 == 0 && kept != nullptr) kept[0] = decay;
    } else if (warp == 1) {
        const bool keeps = kept != nullptr && p0 == 0 && h == group * (a.heads / a.groups);
        for_lane<kStates>(N, at.B + b * at.group_row + group * N, [&](int n, T value) {
            own[kHead + P + n] = to_float(value);
            if (keeps && n < N) B_of(mark.pending)[n] = to_float(value);
        });
    } else if (warp == 2) {
        for_lane<kStates>(N, at.C + b * at.group_row + group * N, [&](int n, T value) { Cs[n] = to_float(value); });
    } else if (warp == 3) {
        for_lane<kMostRows>(rows, x, [&](int i, T value) { xs[i] = to_float(value); });
        for_lane<kMostRows>(rows, at.z + b * at.z_row + h * P + p0, [&](int i, T z) {
            gates[i] = silu(to_float(z));
            skips[i] = i < rows ? skip_of(a, h, p0 + i) : 0.0f;
        });
    }
    const int share = lane % LANES;
    const auto row_of = [&](int s) { return (warp * (32 / LANES) + lane / LANES) * kSets + s; };  // of a turn
    const int own_set = share / (LANES / kSets);  // whose y the lane has in the end
    __syncthreads();
    bar_wait(bar, 0);

#pragma unroll 1
    for (int begin = 0; begin < rows; begin += kLateRows<S, LANES>) {
        Neighbours<S, kVec> state[kSets][ITERS];
        float v[kSets][ITERS][kVec];
        const auto at_lane = [&](int s, int i) { return (begin + row_of(s)) * N + (share + i * LANES) * kVec; };
        const auto is_there = [&](int s, int i) { return begin + row_of(s) < rows && (share + i * LANES) * kVec < N; };
        const auto of_lane = [&](const float* from, float(&to)[ITERS][kVec]) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
#pragma unroll
                for (int k = 0; k < kVec; k += 4) {
                    const Pack<float, 4> four = load<float, 4>(from + (share + i * LANES) * kVec + k);
                    memcpy(to[i] + k, &four, sizeof(four));
                }
            }
        };
#pragma unroll
        for (int s = 0; s < kSets; s++) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
                state[s][i] = {};
                if (is_there(s, i)) state[s][i].load_written(held + at_lane(s, i));
                state[s][i].get(v[s][i]);
            }
        }
        const auto take = [&](const float* token) {
            float B[ITERS][kVec];
            of_lane(token + kHead + P, B);
            const Pack<float, kSets> drive = load<float, kSets>(token + kHead + p0 + begin + row_of(0));
            const float decay = token[0];
#pragma unroll
            for (int s = 0; s < kSets; s++) {
#pragma unroll
                for (int i = 0; i < ITERS; i++) {
#pragma unroll
                    for (int k = 0; k < kVec; k++) v[s][i][k] = fmaf(drive.v[s], B[i][k], decay * v[s][i][k]);
                }
            }
        };
        for (int j = 0; j < mark.pending; j++) take(records + j * record);
        if (used) take(own);
        if (mark.writes) {
            S* const out = static_cast<S*>(a.ssm_state_out) + first;
#pragma unroll
            for (int s = 0; s < kSets; s++) {
#pragma unroll
                for (int i = 0; i < ITERS; i++) {
                    state[s][i].set(v[s][i]);
                    if (is_there(s, i)) state[s][i].store_streaming(out + at_lane(s, i));
                }
            }
        }
        float C[ITERS][kVec], y[kSets]{};
        of_lane(Cs, C);
#pragma unroll
        for (int s = 0; s < kSets; s++) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
#pragma unroll
                for (int k = 0; k < kVec; k++) y[s] = fmaf(v[s][i][k], C[i][k], y[s]);
            }
        }
        // Half of the lanes go on with half of the sums, then a quarter with one each.
        const bool upper = share & LANES / 2, odd = share & LANES / 4;
        float half[2];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const float kept = upper ? y[2 + s] : y[s], given = upper ? y[s] : y[2 + s];
            half[s] = kept + __shfl_xor_sync(~0u, given, LANES / 2);
        }
        float sum = (odd ? half[1] : half[0]) + __shfl_xor_sync(~0u, odd ? half[0] : half[1], LANES / 4);
#pragma unroll
        for (int offset = LANES / 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        const int row = begin + row_of(own_set);
        if (share % (LANES / kSets) == 0 && row < rows) {
            const float out = used ? fmaf(skips[row], xs[row], sum) * gates[row] : 0.0f;
            static_cast<T*>(a.y)[int64_t{b} * channels + h * P + p0 + row] = from_float<T>(out);
        }
    }
#endif
}

}  // namespace ssd
}  // namespace mamba
