// Takes what is pending into the states of all layers, and clears the marks: what a prompt, or a step whose states go out
// elsewhere, runs first. Where nothing is, which is nearly always, it takes a look at the marks.
#pragma once

#include "pending.cuh"
#include "selective_scan_common.cuh"

namespace mamba {
namespace pending {

constexpr int kSettleThreads = 256, kSettleBlocks = 4;  // of a row of a layer
constexpr int kSettleRows = 1024;  // side by side
constexpr int kSettleLayers = 127;

struct Settle {
    const uint32_t* marks;
    const float* records;  // of the first layer
    int32_t row, record, batch, heads, head_dim, state_size, groups, state_dtype;
    void* states[kSettleLayers];
};

// Blocks along x share a row's states of a layer, y; rows along z.
__global__ void __launch_bounds__(kSettleThreads) settle_kernel(const Settle a) {
    const int P = a.head_dim, N = a.state_size, all = a.heads * P * N;
    void* const states = a.states[blockIdx.y];
    for (int64_t b = blockIdx.z; b < a.batch; b += gridDim.z) {
        const int pending = static_cast<int>(a.marks[b * a.row] >> kAfter);
        if (pending == 0) continue;
        const float* const records = a.records + b * a.row + int64_t{blockIdx.y} * kMost * a.record;
        for (int i = blockIdx.x * kSettleThreads + threadIdx.x; i < all; i += kSettleBlocks * kSettleThreads) {
            const int head = i / N / P, p = i / N % P, group = head / (a.heads / a.groups);
            const float* const of_head = records + head * (kHeadWords + P);
            const float* const B = records + a.heads * (kHeadWords + P) + group * N + i % N;
            float h = scan::load_state(states, b * all + i, a.state_dtype);
            for (int j = 0; j < pending; j++) {
                const int at = j * a.record;
                h = fmaf(of_head[at + kHeadWords + p], B[at], of_head[at] * h);
            }
            scan::store_state(states, b * all + i, a.state_dtype, h);
        }
    }
}

// After it: nothing is pending in these rows.
__global__ void __launch_bounds__(kSettleThreads) clear_marks_kernel(uint32_t* marks, int row, int batch) {
    const int b = blockIdx.x * kSettleThreads + threadIdx.x;
    if (b < batch) marks[int64_t{b} * row] = 0;
}

}  // namespace pending
}  // namespace mamba
