// Tokens that a state of Mamba-2 does not hold yet. A step of many rows is bound by their states, which it reads and writes.
// What a token does to a state can be done later, from a fiftieth as many values: so a step keeps those beside the state, and
// writes the state once in some steps. It reads the state, takes the tokens that are pending into it, then its own, just as
// each would have been when it came: what it finds is the same, to the bit where states are float32.
//
// A row of `pending` is a mark, which all layers share, and for each layer the records of up to kMost tokens, float32:
//     of every head exp(delta A), nothing three times, and delta x [P]; then B [G, N]
// Rows write their states at different steps, so that all steps take as long. In a row of zeros nothing is pending.
#pragma once

#include "step_common.cuh"

namespace mamba {
namespace pending {

constexpr int kMost = 3;       // tokens: more of them write states less often, but are read, and done again, in each step
constexpr int kMarkWords = 4;  // of 4 bytes, before the first layer's records
constexpr int kHeadWords = 4;  // before delta x of a head

// Of a layer. Without marks there are none: states are written in every step.
struct Pending {
    uint32_t* marks;      // of row b at [b * row]
    float* records;       // of row b at [b * row], one after the other
    int32_t row, record;  // words
};

// A mark: tokens pending before this step, whether the step writes the state, whether one has before, tokens pending after.
constexpr uint32_t kWrites = 1 << 8, kHasWritten = 1 << 9;
constexpr int kAfter = 16;

// A row that reads nothing keeps its state, but has it written if something is pending.
__device__ __forceinline__ uint32_t next_mark(uint32_t before, bool used, int row) {
    const uint32_t pending = before >> kAfter, limit = before & kHasWritten ? kMost : row % (kMost + 1);
    const bool writes = used ? pending >= limit : pending > 0;
    const uint32_t after = writes || !used ? 0 : pending + 1;
    return pending | (writes ? kWrites | kHasWritten : before & kHasWritten) | after << kAfter;
}

struct Mark {
    int pending;
    bool writes;

    __device__ __forceinline__ Mark(const Pending& of, int64_t b) {
        const uint32_t mark = of.marks[b * of.row];
        pending = static_cast<int>(mark & 255);
        writes = mark & kWrites;
    }
};

}  // namespace pending
}  // namespace mamba
