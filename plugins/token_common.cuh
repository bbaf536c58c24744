// What the two halves of token_kernel share: sizes, and the ring of weights between them.
#pragma once

#include "bulk_copy.cuh"
#include "step_common.cuh"

namespace mamba {
namespace token {

constexpr int kWarps = 16, kThreads = 32 * kWarps;  // that compute; one more warp brings what they need
constexpr int kInRows = 256;                        // of in_proj, of a stage of own columns of x or z; of a cluster's, fewer
constexpr int kColumns = 256, kBoxColumns = 64;     // of x_proj and out_proj, of a stage, which comes in boxes
constexpr int kMostSlots = 32, kMostBlocks = 128, kMostWidth = 4096;
constexpr int kSlotAlign = 1024;  // of shared addresses, which decide where swizzled rows lie
constexpr int kTableLayers = 40;  // that are an argument, of at most 32 KiB; a kernel ahead puts the others in memory

// Blocks of a cluster. Rows of 80 bytes, which 40 columns have, come slower than rows of 160: where that is a block's share of
// x or z, two blocks take the columns of both, each for half of the inputs, and send each other sums.
constexpr int cluster_of(int units) { return units == 5 ? 2 : 1; }

struct TokenLayer {
    MambaLayer at;
    TensorMap in, low, dt, out;  // weights of products; low: x_proj, or Mamba-2's columns of in_proj for B, C and dt
};

struct LayerTable {
    TokenLayer each[kTableLayers];
};

// From this width on blocks pass each other parts of sums, below it they add to sums: what is faster where both were tried.
constexpr int kPartsFrom = 2048;

// `low` are the values of a layer that all blocks need: rank + 2 N of Mamba, 2 N + heads of Mamba-2.
struct Token {
    int32_t layers, width, inner, low, rank, heads, head_dim, vocab, state_dtype, skip_per_channel;
    int32_t own_width, width_factor;  // values of the residual stream of a block, and ceil(2^32 / that)
    int32_t own_low, low_factor;      // of low, likewise
    int32_t part;                     // words of a block's sums for another
    int32_t layer_sums;               // sums of a layer that blocks add to; 0 where they pass parts
    int32_t slot_bytes, slots;
    float eps, norm_eps, dt_min, dt_max;
    const int32_t *input_ids, *seq_lens;
    const void* embedding;
    const TokenLayer* others;    // layers behind the first kTableLayers
    uint64_t* sums;              // [layers, layer_sums] words
    uint64_t *low_parts, *lows;  // [to, blocks, own_low] and [low] words
    uint64_t *parts, *stream;    // [to, blocks, part] and [width] words
    float* hidden;               // [width]: the residual stream after the last layer
};

// A layer whose maps are an argument is copied by them at once; those in memory take a fence each.
__device__ __forceinline__ const TokenLayer& layer_of(const Token& a, const LayerTable& table, int l) {
    return l < kTableLayers ? table.each[l] : a.others[l - kTableLayers];
}

// What has a fixed place in shared memory; of the block's channels, if nothing else is said.
template <typename T, int OWN>
struct Own {
    uint64_t bars[2 * kMostSlots], sent_bars[2];
    float partial[2][kWarps][OWN], squares[kWarps];                 // partial: of x and z; also a warp's sums of 64 parts
    float x[OWN], gate[OWN], y[OWN], y_squared[OWN], sent[2][OWN];  // sent: by the cluster's other block, of x and of z
    T x_in[OWN], dt_in[kColumns];
};

// Where the rest is: x of the layer; low; if blocks add to sums, the residual stream and new states of low's convolution;
// pointers of all layers; then the ring.
struct Places {
    int low, stream, conv, layers, ring;

    __host__ __device__ explicit Places(const Token& a) {
        const bool sums = a.layer_sums > 0;
        low = (2 * a.width + 15) / 16 * 16;
        stream = low + 4 * a.low;
        conv = stream + (sums ? 4 * a.width : 0);
        layers = (conv + (sums && a.heads > 0 ? 6 * (a.low - a.heads) : 0) + 7) / 8 * 8;
        ring = layers + a.layers * static_cast<int>(sizeof(MambaLayer));
    }
};

// What the block's channels have besides weights of products is two stages, for no slot can be kept while z's columns pass;
// where each value begins. First what x needs:
template <int OWN>
struct Filters {
    static constexpr int filter = 0, before = filter + 8 * OWN, conv_bias = before + 6 * OWN, in_bias = conv_bias + 2 * OWN;
};

// Then z's bias and what the scan needs. Of Mamba-2's values of heads it has some neighbouring ones, from a multiple of four
// on, and its states are a stage of their own.
template <int OWN, bool MAMBA2>
struct Channels {
    static constexpr int kHeads = 8, kOfHeads = 4 * kHeads;
    static constexpr int in_bias = 0, A = in_bias + 2 * OWN, skip = A + (MAMBA2 ? kOfHeads : 64 * OWN);
    static constexpr int dt_bias = skip + (4 * OWN > kOfHeads ? 4 * OWN : kOfHeads);
    static constexpr int gate_norm = dt_bias + (MAMBA2 ? kOfHeads : 4 * OWN), states = gate_norm;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// --- the ring: slots with two barriers each, one of which opens when a stage is whole, the other when it is done with

struct Ring {
    uint32_t bars, first;  // shared addresses
    int count, bytes, slot = 0;
    uint32_t parity = 0;

    __device__ Ring(const void* bars, const void* behind, int count, int bytes)  // behind: a little before the first slot
        : bars(shared_address(bars)), first((shared_address(behind) + kSlotAlign - 1) / kSlotAlign * kSlotAlign), count(count),
          bytes(bytes) {}
    __device__ __forceinline__ uint32_t whole(int of) const { return bars + 16 * of; }
    __device__ __forceinline__ uint32_t done(int of) const { return bars + 16 * of + 8; }
    __device__ __forceinline__ uint32_t here() const { return first + slot * bytes; }
    __device__ __forceinline__ void go_on() {
        if (++slot == count) slot = 0, parity ^= 1;
    }
    // By warps that compute: until the stage is whole; where it is.
    __device__ __forceinline__ uint32_t wait() const {
        bar_wait(whole(slot), parity);
        return here();
    }
    __device__ __forceinline__ void give_back(int of) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) bar_arrive(done(of));
    }
    __device__ __forceinline__ void leave() {
        give_back(slot);
        go_on();
    }
};

// Where a unit of 16 bytes of a row of UNITS lies in a box, as copies leave it: eight rows then meet no bank
// conflict, but for ten units, where two meet.
template <int UNITS>
__device__ __forceinline__ int place_of(int row, int unit) {
    const int moved = UNITS == 8 ? row % 8 : UNITS == 4 ? row / 2 % 4 : UNITS == 2 ? row / 4 % 2 : 0;
    return row * 16 * UNITS + (unit ^ moved) * 16;
}

#endif

}  // namespace token
}  // namespace mamba
