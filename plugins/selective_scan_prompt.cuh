// MambaSelectiveScan for prompts: the recurrence token by token, its states spread over lanes, its channels over blocks.
//
// What bounds it on Hopper: B L D N exponentials at 16 a clock and multiprocessor; 8 issue slots of a scheduler for a warp's
// 32. So an element (a token, a channel, a state) may cost few instructions more than the five it needs at least (delta A,
// its exponential, delta x B, h, C h), and each exponential is computed once: cutting time into chunks that run side by
// side costs them twice. A token of a channel costs another 50 (softplus, silu, skip, conversions), spread over its states.
//
// A block takes up to 40 channels of a row, its warps two roles, a tile of tokens at a time:
//  - helpers: turn dt into delta and delta x, and B and C into float32, in shared memory, a tile ahead; add the skip, gate
//    and store y two tiles behind; hold what they load next in registers meanwhile. They decide: on an H200, of the 75 us
//    that one row of 2048 tokens and 1536 channels took with one stager, scanners alone need 30; it takes 44 with six.
//  - scanners: a lane holds 2 to 8 states of a channel in registers for the whole row; 2 where channels are few, so that
//    one row of 1536 channels fills 132 multiprocessors. The lanes of a channel sum C h of kGroup tokens at once, by
//    halves, so that each ends with tokens of its own; this is done while the next tokens are computed.
// One barrier a tile. Tokens past a row's end are staged as delta = 0, B = C = 0: they leave the state as it is.
//
// For rows with few channels time is cut into chunks all the same (N up to 32): what each chunk but the last makes of a
// state of zero, and its sum of delta, from which pass_kernel() makes the state every chunk starts from; then as above.
// Only pass_kernel() reads ssm_state then, and only the chunk with a row's last token writes ssm_state_out.
#pragma once

#include "selective_scan_common.cuh"

namespace mamba {
namespace scan {

struct PromptPlan {
    int quads;         // channels of a block, in fours
    int groups;        // blocks along the channels
    int scanners, stagers;  // warps; the others are finishers
    int chunks;
    int chunk_length;  // tokens
    bool vectors;      // four channels, and a shape's WIDE states, may be moved at once
    int states;        // values of B and of C: N, or more, zeros, in padded copies
    int group_row, z_rows;  // from one token to the next, of B and of C: values; of z: rows of x
    const void *B, *C;                    // [B, L, states]
    float* chunk_states;                  // [B, chunks, D, N]
    float* chunk_steps;                   // [B, chunks, D]: sums of delta
};

// States of a lane, lanes of a channel; tokens stagers and finishers take in a step, and tokens of a tile; quads of channels
// a stager takes in a step, packs of WIDE states likewise, quads a finisher takes; the most quads of a block, its threads
// then, and blocks on a multiprocessor.
template <int STATES, int LANES, int STEP, int TILE, int ITEMS, int PACKS, int WIDE, int FINISHED, int QUADS, int THREADS,
          int BLOCKS>
struct Shape {
    static constexpr int kStates = STATES, kLanes = LANES, kStep = STEP, kTile = TILE, kItems = ITEMS, kPacks = PACKS;
    static constexpr int kWide = WIDE, kFinished = FINISHED, kThreads = THREADS, kBlocks = BLOCKS;
    static constexpr int kN = STATES * LANES, kWarpRows = 32 / LANES;
    static constexpr int kGroup = LANES < 8 ? LANES : 8;
    static constexpr bool kAhead = STATES == 2;  // few warps: load operands a group ahead
    // Pitches in floats, free of bank conflicts: a row of (delta, delta x) over a tile; B and C of a token; y of a token.
    static constexpr int kRowPitch = 2 * kTile + 4, kTokenPitch = 2 * kN + (STATES == 2 ? 4 : kN < 32 ? 16 : 0);
    static constexpr int kOutputPitch = 4 * QUADS + 8;
};

template <typename Sh>
struct PromptShared {
    float *rows, *tokens, *outputs, *bias, *skip;

    __host__ __device__ static int floats(int quads, bool summary) {
        const int rows = 4 * quads;
        return 2 * rows * Sh::kRowPitch + 2 * Sh::kTile * Sh::kTokenPitch + 2 * rows +
               (summary ? 0 : 3 * Sh::kTile * Sh::kOutputPitch);
    }
    __device__ __forceinline__ PromptShared(float* base, int quads) {
        rows = base;
        tokens = rows + 2 * 4 * quads * Sh::kRowPitch;
        bias = tokens + 2 * Sh::kTile * Sh::kTokenPitch;
        skip = bias + 4 * quads;
        outputs = skip + 4 * quads;
    }
};

// Where a block stands. Channel of row r of a block: first + 4 * (r % quads) + r / quads, so that helpers, which take four
// neighbouring channels each, write and read rows without bank conflicts.
struct PromptPlace {
    int64_t b, first_token;  // of the row; of the chunk in [B * L]
    int chunk, first;        // chunk; channel
    int length, tokens, used;  // of the row; of the chunk, in all and used

    __device__ __forceinline__ PromptPlace(const MambaSelectiveScan& a, const PromptPlan& p) {
        const unsigned row = blockIdx.x / p.groups;
        first = static_cast<int>(blockIdx.x % p.groups) * 4 * p.quads;
        b = row;
        chunk = blockIdx.y;
        const int begin = chunk * p.chunk_length;
        length = row_length(a, b);
        tokens = min(p.chunk_length, a.length - begin);
        used = min(max(length - begin, 0), tokens);
        first_token = b * a.length + begin;
    }
};

__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 0;" : : : "memory"); }

// Loads into registers in use, if `used`, else leaves them alone. That, and volatile, keep the compiler from starting the
// load while they still are read: it then would give the load others, and wait for it at once to move them, a stager's
// largest wait.
__device__ __forceinline__ void load_over(uint16_t& v, const void* from, bool used) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u16 %0, [%1]; }"
                 : "+h"(v) : "l"(from), "r"(static_cast<int>(used)));
}
__device__ __forceinline__ void load_over(uint32_t& v, const void* from, bool used) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
                 : "+r"(v) : "l"(from), "r"(static_cast<int>(used)));
}
__device__ __forceinline__ void load_over(uint2& v, const void* from, bool used) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(v.x), "+r"(v.y) : "l"(from), "r"(static_cast<int>(used)));
}
__device__ __forceinline__ void load_over(uint4& v, const void* from, bool used) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(from), "r"(static_cast<int>(used)));
}

// kCount neighbours, 4 or 8, as they are in memory. In vectors all of them are there, at a multiple of their bytes or of
// 16; else each has a register, for putting 16-bit values together would wait for them.
template <typename T, int kCount, bool kVectors>
struct Raw {
    static constexpr int kBytes = kCount * sizeof(T), kWordBytes = !kVectors ? sizeof(T) : kBytes < 16 ? kBytes : 16;
    static constexpr int kWords = kBytes / kWordBytes;
    using Bits = typename Word<kWordBytes>::type;
    Bits bits[kWords] = {};

    // The first `left`, all in vectors; leaves alone the others, and all where they are not used.
    __device__ __forceinline__ void load(const T* from, int left, bool used) {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            load_over(bits[i], reinterpret_cast<const Bits*>(from) + i, used && (kVectors || i < left));
        }
    }
    __device__ __forceinline__ void get(float (&out)[kCount]) const {
        if constexpr (sizeof(T) == 4) {
            memcpy(out, bits, sizeof(bits));
        } else if constexpr (kVectors) {
            uint32_t pairs[kCount / 2];
            memcpy(pairs, bits, sizeof(bits));
#pragma unroll
            for (int k = 0; k < kCount / 2; k++) {
                const float2 v = unpack<T>(pairs[k]);
                out[2 * k] = v.x, out[2 * k + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int k = 0; k < kCount; k++) {
                T value;
                memcpy(&value, &bits[k], sizeof(value));
                out[k] = to_float(value);
            }
        }
#pragma unroll
        for (int k = 0; k < kCount; k++) asm volatile("" : "+f"(out[k]));  // now, before load() of the next
    }
};

template <typename T>
__device__ __forceinline__ void store_quad(T* to, const Pack<T, 4>& quad, int left, bool vectors) {
    if (vectors) {
        store(to, quad);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k < left) to[k] = quad.v[k];
    }
}

// --- stagers and finishers

// What a thread of theirs takes of a step: its items, four channels of a token each. All items at once, so that a thread
// need not wait for one after another.
template <typename T, typename Sh, int kItems>
struct Items {
    static constexpr int kStep = Sh::kStep, kNone = 1 << 21;  // past any token

    const MambaSelectiveScan& a;
    const PromptPlan& p;
    const PromptPlace& at;
    const PromptShared<Sh>& shared;
    const int thread, threads;  // among those of the role
    const int64_t step_elements = static_cast<int64_t>(kStep) * a.channels;
    int64_t next = at.first_token * a.channels;  // elements before the step to load next
    // An item's token in the step, or kNone, its quad of channels, how many of them there are, and its element from the
    // step's first token.
    int token[kItems], quad[kItems], left[kItems];
    unsigned offset[kItems];

    __device__ __forceinline__ Items(const MambaSelectiveScan& a, const PromptPlan& p, const PromptPlace& at,
                                     const PromptShared<Sh>& shared, int thread, int threads)
        : a(a), p(p), at(at), shared(shared), thread(thread), threads(threads) {
#pragma unroll
        for (int k = 0; k < kItems; k++) {
            const int item = thread + k * threads;
            token[k] = item / p.quads;
            quad[k] = item % p.quads;
            left[k] = a.channels - at.first - 4 * quad[k];
            offset[k] = token[k] * a.channels + at.first + 4 * quad[k];
            if (left[k] <= 0 || token[k] >= kStep) token[k] = kNone, quad[k] = 0;
        }
    }
};

// A tile ahead: dt to delta and delta x, B and C to float32.
template <typename T, typename Sh, bool kVectors, bool kSummary>
struct Stager : Items<T, Sh, Sh::kItems> {
    using Base = Items<T, Sh, Sh::kItems>;
    using Base::a, Base::p, Base::at, Base::shared, Base::thread, Base::threads, Base::next, Base::step_elements,
        Base::token, Base::quad, Base::left, Base::offset, Base::kNone;
    static constexpr int kItems = Sh::kItems, kPacks = Sh::kPacks, kStep = Sh::kStep, kWide = Sh::kWide;

    int64_t next_states = this->at.first_token * this->p.group_row;
    int pack_token[kPacks], pack_state[kPacks];  // a pack is kWide states of B and of C of a token
    Raw<T, 4, kVectors> dt[kItems], x[kItems];
    Raw<T, kWide, kVectors> B[kPacks], C[kPacks];

    __device__ __forceinline__ Stager(const MambaSelectiveScan& a, const PromptPlan& p, const PromptPlace& at,
                                      const PromptShared<Sh>& shared, int thread, int threads)
        : Base(a, p, at, shared, thread, threads) {
#pragma unroll
        for (int k = 0; k < kPacks; k++) {
            const int item = thread + k * threads;
            pack_token[k] = item / (Sh::kN / kWide);
            pack_state[k] = item % (Sh::kN / kWide) * kWide;
            if (pack_token[k] >= kStep) pack_token[k] = kNone;
        }
    }

    // Of the step at token `from` of the chunk, the next.
    __device__ __forceinline__ void load_item(int k, int from) {
        const bool used = from + token[k] < at.used;
        dt[k].load(static_cast<const T*>(a.dt) + next + offset[k], left[k], used);
        x[k].load(static_cast<const T*>(a.x) + next + offset[k], left[k], used);
    }
    __device__ __forceinline__ void load_pack(int k, int from) {
        const int n = pack_state[k], own = pack_token[k] * p.group_row + n;
        const bool used = from + pack_token[k] < at.used && n < p.states;
        B[k].load(static_cast<const T*>(p.B) + next_states + own, p.states - n, used);
        if (!kSummary) C[k].load(static_cast<const T*>(p.C) + next_states + own, p.states - n, used);
    }

    // Puts what was loaded of the step at `from` where token tile_token of a tile is in the buffers, and starts the loads
    // of the step after.
    __device__ __forceinline__ void stage(int buffer, int tile_token, int from) {
        float* tokens = shared.tokens + (buffer * Sh::kTile + tile_token) * Sh::kTokenPitch;
        float* rows = shared.rows + buffer * 4 * p.quads * Sh::kRowPitch + 2 * tile_token;
        const bool past = from + kStep > at.used;  // some tokens are not used, and what was loaded before is in their place
#pragma unroll
        for (int k = 0; k < kPacks; k++) {
            float b[kWide], c[kWide];
            B[k].get(b);
            C[k].get(c);
            load_pack(k, from + kStep);
            if (past && from + pack_token[k] >= at.used) {
#pragma unroll
                for (int n = 0; n < kWide; n++) b[n] = c[n] = 0.0f;
            }
            if (pack_token[k] == kNone) continue;
            float4* to = reinterpret_cast<float4*>(
                tokens + pack_token[k] * Sh::kTokenPitch + (Sh::kStates == 2 ? 2 : 1) * pack_state[k]);
#pragma unroll
            for (int n = 0; n < kWide; n += 4) {
                if (Sh::kStates == 2) {  // B and C of a lane's two states side by side
                    to[n / 2] = make_float4(b[n], b[n + 1], c[n], c[n + 1]);
                    to[n / 2 + 1] = make_float4(b[n + 2], b[n + 3], c[n + 2], c[n + 3]);
                } else {
                    to[n / 4] = make_float4(b[n], b[n + 1], b[n + 2], b[n + 3]);
                    to[n / 4 + Sh::kN / 4] = make_float4(c[n], c[n + 1], c[n + 2], c[n + 3]);
                }
            }
        }
        next_states += static_cast<int64_t>(kStep) * p.group_row;
        float delta[kItems][4], u[kItems][4];
#pragma unroll
        for (int k = 0; k < kItems; k++) {
            dt[k].get(delta[k]);
            x[k].get(u[k]);
            load_item(k, from + kStep);
            const float4 bias = *reinterpret_cast<const float4*>(shared.bias + 4 * quad[k]);
            delta[k][0] += bias.x, delta[k][1] += bias.y, delta[k][2] += bias.z, delta[k][3] += bias.w;
        }
        next += step_elements;
        if (a.dt_softplus) {
#pragma unroll
            for (int i = 0; i < 4 * kItems; i++) delta[i / 4][i % 4] = softplus(delta[i / 4][i % 4]);
        }
        if (past) {
#pragma unroll
            for (int i = 0; i < 4 * kItems; i++) {
                if (from + token[i / 4] >= at.used) delta[i / 4][i % 4] = u[i / 4][i % 4] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < kItems; k++) {
            float* to = rows + quad[k] * Sh::kRowPitch + 2 * token[k];
            if (token[k] == kNone) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                *reinterpret_cast<float2*>(to + j * p.quads * Sh::kRowPitch) =
                    make_float2(delta[k][j], delta[k][j] * u[k][j]);
            }
        }
    }

    __device__ __forceinline__ void run(int tiles) {
#pragma unroll
        for (int k = 0; k < kPacks; k++) load_pack(k, 0);
#pragma unroll
        for (int k = 0; k < kItems; k++) load_item(k, 0);
        next_states += static_cast<int64_t>(kStep) * p.group_row;
        next += step_elements;
        for (int i = 0; i < tiles; i++) {
#pragma unroll 1
            for (int s = 0; s < Sh::kTile; s += kStep) stage(i & 1, s, i * Sh::kTile + s);
            block_barrier();
        }
        if (!kSummary) {
#pragma unroll
            for (int i = 0; i < 3; i++) block_barrier();
        } else {
            block_barrier();
        }
    }
};

// Two tiles behind: skip, gate and store of y.
template <typename T, typename Sh, bool kVectors>
struct Finisher : Items<T, Sh, Sh::kFinished> {
    using Base = Items<T, Sh, Sh::kFinished>;
    using Base::a, Base::p, Base::at, Base::shared, Base::next, Base::step_elements, Base::token, Base::quad, Base::left,
        Base::offset, Base::kNone;
    static constexpr int kItems = Sh::kFinished, kStep = Sh::kStep;

    Raw<T, 4, kVectors> z[kItems], x[kItems];

    using Base::Base;

    __device__ __forceinline__ void load_item(int k, int from) {
        const bool used = from + token[k] < at.used;
        const unsigned gate = offset[k] + token[k] * static_cast<unsigned>((p.z_rows - 1) * a.channels);
        z[k].load(static_cast<const T*>(a.z) + p.z_rows * next + gate, left[k], used && a.z != nullptr);
        x[k].load(static_cast<const T*>(a.x) + next + offset[k], left[k], used && a.D != nullptr);
    }

    // The step at `from`; starts the loads of the one after. Zeros past the end.
    __device__ __forceinline__ void finish(int slot, int tile_token, int from) {
        const float* outputs = shared.outputs + (slot * Sh::kTile + tile_token) * Sh::kOutputPitch;
        const int64_t step = next - step_elements;
        float y[kItems][4], gate[kItems][4];
#pragma unroll
        for (int k = 0; k < kItems; k++) {
            float u[4];
            z[k].get(gate[k]);
            x[k].get(u);
            load_item(k, from + kStep);
            const float4 skip = *reinterpret_cast<const float4*>(shared.skip + 4 * quad[k]);
            const float* own = outputs + (token[k] == kNone ? 0 : token[k]) * Sh::kOutputPitch + quad[k];
#pragma unroll
            for (int j = 0; j < 4; j++) y[k][j] = own[j * p.quads];
            if (a.D != nullptr) {
                y[k][0] = fmaf(skip.x, u[0], y[k][0]), y[k][1] = fmaf(skip.y, u[1], y[k][1]);
                y[k][2] = fmaf(skip.z, u[2], y[k][2]), y[k][3] = fmaf(skip.w, u[3], y[k][3]);
            }
        }
        next += step_elements;
        if (a.z != nullptr) {
#pragma unroll
            for (int i = 0; i < 4 * kItems; i++) y[i / 4][i % 4] *= silu(gate[i / 4][i % 4]);
        }
        if (from + kStep > at.used) {
#pragma unroll
            for (int i = 0; i < 4 * kItems; i++) {
                if (from + token[i / 4] >= at.used) y[i / 4][i % 4] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < kItems; k++) {
            Pack<T, 4> out;
#pragma unroll
            for (int j = 0; j < 4; j++) out.v[j] = from_float<T>(y[k][j]);
            if (from + token[k] < at.tokens) store_quad(static_cast<T*>(a.y) + step + offset[k], out, left[k], kVectors);
        }
    }

    __device__ __forceinline__ void run(int tiles) {
#pragma unroll
        for (int k = 0; k < kItems; k++) load_item(k, 0);
        next += step_elements;
        block_barrier();
        block_barrier();
        block_barrier();
        for (int i = 0, slot = 0; i < tiles; i++) {
#pragma unroll 1
            for (int s = 0; s < Sh::kTile; s += kStep) finish(slot, s, i * Sh::kTile + s);
            slot = slot == 2 ? 0 : slot + 1;
            block_barrier();
        }
    }
};

// --- scanners

// condition ? a : b in one instruction; left to itself the compiler swaps the two with moves.
__device__ __forceinline__ float select(bool condition, float a, float b) {
    float out;
    asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(out) : "f"(a), "f"(b), "r"(static_cast<int>(condition)));
    return out;
}

// Adds up values[t] over the lanes of a channel for every t; a lane ends with the sum of t = its index % kGroup.
template <typename Sh>
__device__ __forceinline__ float sum_lanes(float (&values)[Sh::kGroup], int lane) {
    constexpr int kStride = Sh::kWarpRows > 1 ? 2 : 1;
#pragma unroll
    for (int half = Sh::kGroup / 2; half > 0; half /= 2) {
        const bool upper = (lane & half) != 0;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float keep = select(upper, values[i + half], values[i]), send = select(upper, values[i], values[i + half]);
            values[i] = keep + __shfl_xor_sync(~0u, send, half * kStride);
        }
    }
#pragma unroll
    for (int other = Sh::kGroup; other < Sh::kLanes; other *= 2) {
        values[0] += __shfl_xor_sync(~0u, values[0], other * kStride);
    }
    return values[0];
}

template <typename Sh>
struct Operands {
    float4 steps[Sh::kGroup / 2];  // (delta, delta x) of two tokens
    float B[Sh::kGroup][Sh::kStates], C[Sh::kGroup][Sh::kStates];

    // Of the group at `token` of a tile.
    __device__ __forceinline__ void load(const float* row, const float* tokens, int token, bool outputs) {
#pragma unroll
        for (int t = 0; t < Sh::kGroup; t += 2) steps[t / 2] = *reinterpret_cast<const float4*>(row + 2 * (token + t));
#pragma unroll
        for (int t = 0; t < Sh::kGroup; t++) {
            const float* from = tokens + (token + t) * Sh::kTokenPitch;
            if constexpr (Sh::kStates == 2) {
                const float4 v = *reinterpret_cast<const float4*>(from);
                B[t][0] = v.x, B[t][1] = v.y, C[t][0] = v.z, C[t][1] = v.w;
            } else {
#pragma unroll
                for (int j = 0; j < Sh::kStates; j += 4) {
                    const float4 v = *reinterpret_cast<const float4*>(from + j * Sh::kLanes);
                    B[t][j] = v.x, B[t][j + 1] = v.y, B[t][j + 2] = v.z, B[t][j + 3] = v.w;
                    if (outputs) {
                        const float4 w = *reinterpret_cast<const float4*>(from + Sh::kN + j * Sh::kLanes);
                        C[t][j] = w.x, C[t][j + 1] = w.y, C[t][j + 2] = w.z, C[t][j + 3] = w.w;
                    }
                }
            }
        }
    }
};

template <typename Sh, bool kSummary>
__device__ __forceinline__ void run_scanner(const MambaSelectiveScan& a, const PromptPlan& p, const PromptPlace& at,
                                            const PromptShared<Sh>& shared, int tiles, int warp) {
    constexpr int kStates = Sh::kStates, kGroup = Sh::kGroup, kGroups = Sh::kTile / kGroup;
    // Neighbouring lanes: two channels, then two shares of the states. So the four lanes around one share its delta or
    // its B and C in pairs, and half a warp is served at once.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int share = Sh::kWarpRows > 1 ? lane / 2 % Sh::kLanes : lane;
    const int warp_row = Sh::kWarpRows > 1 ? lane % 2 + lane / (2 * Sh::kLanes) * 2 : 0;
    const int row = warp * Sh::kWarpRows + warp_row, channel = at.first + 4 * (row % p.quads) + row / p.quads;
    const bool last_chunk = at.chunk * p.chunk_length + at.used == at.length;
    const int64_t chunk_channel = (at.b * p.chunks + at.chunk) * a.channels + channel;
    const int64_t state = (at.b * a.channels + channel) * a.state_size;
    const auto index = [&](int j) {  // of the lane's j-th state
        return kStates == 2 ? 2 * share + j : j / 4 * 4 * Sh::kLanes + 4 * share + j % 4;
    };
    const auto exists = [&](int j) { return channel < a.channels && index(j) < a.state_size; };

    float A[kStates], h[kStates];
#pragma unroll
    for (int j = 0; j < kStates; j++) {
        A[j] = h[j] = 0.0f;
        if (exists(j)) {
            A[j] = kLog2E * a.A[int64_t{channel} * a.state_size + index(j)];
            if (!kSummary) {
                h[j] = p.chunks > 1 ? p.chunk_states[chunk_channel * a.state_size + index(j)]
                                    : load_state(a.ssm_state, state + index(j), a.state_dtype);
            }
        }
    }

    float pending[kGroup], steps = 0.0f;  // what is to be summed over lanes; the sum of delta
#pragma unroll
    for (int t = 0; t < kGroup; t++) pending[t] = 0.0f;
    float* const outputs = shared.outputs + share % kGroup * Sh::kOutputPitch + row;
    // Where a tile's first sums go, and those pending from the tile before; before the first tile, where nobody reads.
    float *to = outputs, *before = outputs + 2 * Sh::kTile * Sh::kOutputPitch;
    constexpr int kLast = (Sh::kTile - kGroup) * Sh::kOutputPitch;
    const bool writes = share < kGroup;

    block_barrier();  // tile 0 is staged
    for (int i = 0; i < tiles; i++) {
        const float* row_steps = shared.rows + ((i & 1) * 4 * p.quads + row) * Sh::kRowPitch;
        const float* tokens = shared.tokens + (i & 1) * Sh::kTile * Sh::kTokenPitch + 4 * share;
        Operands<Sh> next;
        if (Sh::kAhead) next.load(row_steps, tokens, 0, !kSummary);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
            Operands<Sh> now = next;
            if (!Sh::kAhead) now.load(row_steps, tokens, g * kGroup, !kSummary);
            if (Sh::kAhead && g + 1 < kGroups) next.load(row_steps, tokens, (g + 1) * kGroup, !kSummary);
            float sums[kGroup];
#pragma unroll
            for (int t = 0; t < kGroup; t++) {
                const float4 pair = now.steps[t / 2];
                const float delta = t % 2 ? pair.z : pair.x, drive = t % 2 ? pair.w : pair.y;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < kStates; j++) {
                    h[j] = fmaf(exp2_approx(delta * A[j]), h[j], drive * now.B[t][j]);
                    if (!kSummary) sum = j == 0 ? h[j] * now.C[t][j] : fmaf(h[j], now.C[t][j], sum);
                }
                sums[t] = sum;
                if (kSummary) steps += delta;
            }
            if (!kSummary) {
                const float y = sum_lanes<Sh>(pending, share);
                if (writes) *(g == 0 ? before + kLast : to + (g - 1) * kGroup * Sh::kOutputPitch) = y;
#pragma unroll
                for (int t = 0; t < kGroup; t++) pending[t] = sums[t];
            }
        }
        before = to;
        to = to == outputs + 2 * Sh::kTile * Sh::kOutputPitch ? outputs : to + Sh::kTile * Sh::kOutputPitch;
        block_barrier();
    }
    if (!kSummary) {
        const float y = sum_lanes<Sh>(pending, share);
        if (writes) before[kLast] = y;
        block_barrier();
        block_barrier();
    }
#pragma unroll
    for (int j = 0; j < kStates; j++) {
        if (!exists(j)) continue;
        if (kSummary) {
            p.chunk_states[chunk_channel * a.state_size + index(j)] = h[j];
        } else if (last_chunk) {
            store_state(a.ssm_state_out, state + index(j), a.state_dtype, h[j]);
        }
    }
    if (kSummary && share == 0 && channel < a.channels) p.chunk_steps[chunk_channel] = steps;
}

// --- kernels

// What moves element by element, or in float32, needs more registers.
template <typename T, typename Sh, bool kVectors, bool kSummary>
constexpr int kResidentBlocks =
    kVectors && !kSummary && sizeof(T) == 2 ? resident_blocks(Sh::kBlocks, Sh::kBlocks < 2 ? 1 : 2)
                                            : Sh::kBlocks > 1 ? Sh::kBlocks - 1 : 1;

// kVectors: p.vectors is set.
template <typename T, typename Sh, bool kVectors, bool kSummary>
__global__ void __launch_bounds__(Sh::kThreads, kResidentBlocks<T, Sh, kVectors, kSummary>)
    prompt_kernel(MambaSelectiveScan a, PromptPlan p) {
    extern __shared__ float4 memory[];
    const PromptPlace at(a, p);
    const PromptShared<Sh> shared(reinterpret_cast<float*>(memory), p.quads);
    const int tiles = (at.used + Sh::kTile - 1) / Sh::kTile, channels = min(4 * p.quads, a.channels - at.first);
    if (kSummary && (at.chunk + 1) * p.chunk_length >= at.length) return;  // no later chunk needs it

    if (tiles > 0) {
        for (int c = threadIdx.x; c < 4 * p.quads; c += blockDim.x) {
            shared.bias[c] = a.dt_bias != nullptr && c < channels ? a.dt_bias[at.first + c] : 0.0f;
            shared.skip[c] = a.D != nullptr && c < channels ? a.D[at.first + c] : 0.0f;
        }
        __syncthreads();
        // Through a shuffle, for the compiler to see that it is the same in the whole warp.
        const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
        const int stagers = 32 * p.scanners, finishers = stagers + 32 * p.stagers, thread = threadIdx.x;
        if (warp < p.scanners) {
            run_scanner<Sh, kSummary>(a, p, at, shared, tiles, warp);
        } else if (kSummary || warp < p.scanners + p.stagers) {
            Stager<T, Sh, kVectors, kSummary>(a, p, at, shared, thread - stagers, 32 * p.stagers).run(tiles);
        } else {
            Finisher<T, Sh, kVectors>(a, p, at, shared, thread - finishers, blockDim.x - finishers).run(tiles);
        }
    } else if (at.length == 0 && p.chunks == 1 && a.ssm_state != a.ssm_state_out) {
        const int64_t from = (at.b * a.channels + at.first) * a.state_size;
        for (int64_t i = threadIdx.x; i < int64_t{channels} * a.state_size; i += blockDim.x) copy_state(a, from + i);
    }
    if (kSummary) return;
    const int cleared = tiles * Sh::kTile;  // up to there finish() has written
    for (int64_t i = threadIdx.x; i < int64_t{max(at.tokens - cleared, 0)} * p.quads; i += blockDim.x) {
        const int quad = static_cast<int>(i % p.quads), left = channels - 4 * quad;
        const int64_t t = at.first_token + cleared + i / p.quads;
        if (left > 0) {
            store_quad(static_cast<T*>(a.y) + t * a.channels + at.first + 4 * quad, Pack<T, 4>{}, left, kVectors);
        }
    }
}

// From what chunks make of zero to the states they start from, a thread for each element of ssm_state.
__global__ void __launch_bounds__(128) pass_kernel(MambaSelectiveScan a, PromptPlan p) {
    constexpr int kAtOnce = 8;
    const int64_t elements = int64_t{a.channels} * a.state_size, i = int64_t{blockIdx.x} * 128 + threadIdx.x;
    if (i >= a.batch * elements) return;
    const int64_t b = i / elements, element = i % elements, channel = element / a.state_size;
    const int length = row_length(a, b), used = (length + p.chunk_length - 1) / p.chunk_length;
    if (used == 0) {
        if (a.ssm_state != a.ssm_state_out) copy_state(a, i);
        return;
    }
    const float A = kLog2E * a.A[element];
    float h = load_state(a.ssm_state, i, a.state_dtype);
    for (int from = 0; from < used; from += kAtOnce) {
        float sums[kAtOnce], steps[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            const int64_t chunk = b * p.chunks + from + k;
            if (from + k + 1 < used) {
                sums[k] = p.chunk_states[chunk * elements + element];
                steps[k] = p.chunk_steps[chunk * a.channels + channel];
            }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            if (from + k < used) p.chunk_states[(b * p.chunks + from + k) * elements + element] = h;
            if (from + k + 1 < used) h = fmaf(exp2_approx(A * steps[k]), h, sums[k]);
        }
    }
}

}  // namespace scan
}  // namespace mamba
