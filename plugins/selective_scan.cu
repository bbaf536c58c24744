// MambaSelectiveScan: which kernel takes a call, how it is cut into blocks, and its workspace.
//
// One token: selective_scan_step.cuh. More: selective_scan_prompt.cuh, which is fast where it may read eight states at once:
// so B and C of a long prompt with another N are first copied into rows padded by pad.cuh.
#include <algorithm>
#include <climits>

#include "pad.cuh"
#include "selective_scan_prompt.cuh"
#include "selective_scan_step.cuh"
#include "strided.h"

namespace mamba {
namespace scan {
namespace {

bool is_valid(const MambaSelectiveScan& a) {
    return a.batch > 0 && a.length > 0 && a.length <= 1 << 20 && a.channels > 0 && a.state_size > 0 &&
           a.state_size <= 256 && a.dtype >= MAMBA_FLOAT32 && a.dtype <= MAMBA_BFLOAT16 &&
           a.state_dtype >= MAMBA_FLOAT32 && a.state_dtype <= MAMBA_BFLOAT16;
}

// --- one token

template <typename T, typename S, int VEC, int LANES, int ITERS, int PASSES = LANES, int ROWS = 1>
cudaError_t step(const MambaSelectiveScan& a, int warps, cudaStream_t stream) {
    const int64_t channel_blocks = ceil_div(a.channels, warps * PASSES * 32 / LANES);
    const int64_t blocks = channel_blocks * ceil_div(a.batch, ROWS);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    step_kernel<T, S, VEC, LANES, ITERS, PASSES, ROWS><<<static_cast<unsigned>(blocks), 32 * warps, 0, stream>>>(
        a, static_cast<unsigned>(channel_blocks));
    return cudaGetLastError();
}

template <typename T, typename S>
cudaError_t step(const MambaSelectiveScan& a, cudaStream_t stream) {
    constexpr int kVec = 16 / sizeof(S), kLanes16 = 16 / kVec;
    const int N = a.state_size;
    const bool aligned = N % kVec == 0 && is_aligned(a.ssm_state, 16) && is_aligned(a.ssm_state_out, 16) &&
                         is_aligned(a.A, 16) && is_aligned(a.B, 16) && is_aligned(a.C, 16);
    if (aligned && N <= 16) {
        // The more rows share their part of A the better, as long as the GPU is full.
        const int64_t channels = int64_t{a.batch} * a.channels;
        if (channels >= 800000) return step<T, S, kVec, kLanes16, 1, kLanes16, 4>(a, 2, stream);
        if (channels >= 100000) return step<T, S, kVec, kLanes16, 1, kLanes16, 2>(a, 4, stream);
        if (channels >= 10000) return step<T, S, kVec, kLanes16, 1>(a, 4, stream);
        return step<T, S, kVec, kLanes16, 1, 1>(a, 4, stream);
    }
    if (aligned) {
        if (N <= 32) return step<T, S, kVec, 32 / kVec, 1>(a, 4, stream);
        if (N <= 64) return step<T, S, kVec, 64 / kVec, 1>(a, 4, stream);
        if (N <= 128) return step<T, S, kVec, 128 / kVec, 1>(a, 4, stream);
        return step<T, S, kVec, 32, 8 / kVec>(a, 4, stream);
    }
    if (N <= 8) return step<T, S, 1, 8, 1>(a, 4, stream);
    if (N <= 16) return step<T, S, 1, 8, 2>(a, 4, stream);
    if (N <= 24) return step<T, S, 1, 8, 3>(a, 4, stream);
    if (N <= 32) return step<T, S, 1, 16, 2>(a, 4, stream);
    if (N <= 64) return step<T, S, 1, 32, 2>(a, 4, stream);
    if (N <= 128) return step<T, S, 1, 32, 4>(a, 4, stream);
    return step<T, S, 1, 32, 8>(a, 4, stream);
}

// --- prompts

//                         states, lanes, step, tile, items, packs, wide, finished, quads, threads, blocks
using FewChannels = Shape<2, 8, 64, 64, 1, 1, 8, 1, 4, 640, 1>;  // N up to 16, as are the next two
using MediumChannels = Shape<2, 8, 32, 64, 2, 1, 8, 2, 10, 640, 1>;
using ManyChannels = Shape<4, 4, 32, 32, 4, 1, 8, 4, 8, 256, 3>;
using FewStates32 = Shape<2, 16, 64, 64, 1, 2, 8, 1, 3, 576, 1>;  // N up to 32, as are the next two
using States32 = Shape<4, 8, 16, 32, 2, 1, 8, 2, 8, 384, 2>;
using FewBlocks32 = Shape<4, 8, 32, 32, 2, 2, 8, 2, 5, 384, 2>;
using States64 = Shape<4, 16, 16, 16, 1, 2, 8, 1, 4, 384, 2>;
using States128 = Shape<4, 32, 16, 16, 1, 4, 8, 1, 2, 352, 2>;
using States256 = Shape<8, 32, 8, 8, 1, 4, 8, 1, 2, 352, 1>;

// Time is cut where rows are few and narrow: so many chunks that there are three blocks for each of 132 multiprocessors.
// The same on every GPU, for an engine may be built without one.
struct Chunks {
    int count, length;
};

// How many chunks the workspace has room for, which a longer call never makes fewer: 1 where time is not cut.
int64_t max_chunks(const MambaSelectiveScan& a) {
    const int64_t groups = a.batch * ceil_div(a.channels, 16);
    if (a.length == 1 || a.state_size > 32 || groups > 36) return 1;
    const int64_t count = std::min<int64_t>(396 / groups, a.length / 128);
    return count < 4 ? 1 : count;
}

// Of a multiple of 32 tokens: some fewer than there is room for.
Chunks cut(const MambaSelectiveScan& a) {
    const int64_t room = max_chunks(a);
    if (room == 1) return {1, a.length};
    const int64_t length = ceil_div(ceil_div(a.length, room), 32) * 32;
    return {static_cast<int>(ceil_div(a.length, length)), static_cast<int>(length)};
}

// Floats of the workspace that chunks may take.
int64_t chunk_floats(const MambaSelectiveScan& a) {
    const int64_t chunks = max_chunks(a);
    return chunks == 1 ? 0 : ceil_div(a.batch * chunks * a.channels * (a.state_size + 1), 64) * 64;
}

// Likewise a padded copy of B, or of C; 0 where none is made.
int64_t padded_floats(const MambaSelectiveScan& a) {
    if (a.state_size % 8 == 0 || a.channels % 4 != 0 || a.length < pad::kPadTokens) return 0;
    const int64_t values = int64_t{a.batch} * a.length * pad::padded(a.state_size);
    return ceil_div(values * item_bytes(a.dtype), 256) * 64;
}

template <typename Sh>
PromptPlan plan(const MambaSelectiveScan& a, const Rows& rows, const Chunks& chunks, int quads, void* workspace) {
    PromptPlan p{};
    p.quads = quads;
    p.groups = static_cast<int>(ceil_div(a.channels, 4 * quads));
    p.scanners = 4 * quads / Sh::kWarpRows;
    p.stagers = static_cast<int>(std::max(ceil_div(Sh::kStep * quads, 32 * Sh::kItems),
                                          ceil_div(Sh::kStep * Sh::kN / Sh::kWide, 32 * Sh::kPacks)));
    p.chunks = chunks.count;
    p.chunk_length = chunks.length;
    p.states = a.state_size;
    p.group_row = rows.group;
    p.z_rows = rows.z;
    p.B = a.B;
    p.C = a.C;
    const int64_t floats = workspace != nullptr ? padded_floats(a) : 0;
    if (floats > 0) {  // behind what the chunks take
        float* const start = static_cast<float*>(workspace) + chunk_floats(a);
        p.states = p.group_row = pad::padded(a.state_size);
        p.B = start;
        p.C = start + floats;
    }
    p.vectors = a.channels % 4 == 0 && p.states % Sh::kWide == 0 && is_aligned(p.B, 16) &&
                is_aligned(p.C, 16) && p.group_row * item_bytes(a.dtype) % 16 == 0;
    for (const void* x : {a.x, a.dt, a.z, const_cast<const void*>(a.y)}) {
        p.vectors = p.vectors && is_aligned(x, 4 * item_bytes(a.dtype));
    }
    if (chunks.count > 1) {
        p.chunk_states = static_cast<float*>(workspace);
        p.chunk_steps = p.chunk_states + int64_t{a.batch} * chunks.count * a.channels * a.state_size;
    }
    return p;
}

// Copies B and C to where the plan has them.
cudaError_t pad_states(const MambaSelectiveScan& a, const PromptPlan& p, cudaStream_t stream) {
    if (p.states == a.state_size) return cudaSuccess;
    const int64_t rows = int64_t{a.batch} * a.length;
    const pad::Copy copies[] = {
        {a.B, const_cast<void*>(p.B), rows, 1, a.state_size, 1, p.states, item_bytes(a.dtype)},
        {a.C, const_cast<void*>(p.C), rows, 1, a.state_size, 1, p.states, item_bytes(a.dtype)}};
    return pad::copy(copies, 2, stream);
}

template <typename T, typename Sh, bool kVectors, bool kSummary>
cudaError_t launch(const MambaSelectiveScan& a, const PromptPlan& p, cudaStream_t stream) {
    const auto kernel = prompt_kernel<T, Sh, kVectors, kSummary>;
    const int finishers = kSummary ? 0 : static_cast<int>(ceil_div(Sh::kStep * p.quads, 32 * Sh::kFinished));
    const size_t shared = sizeof(float) * PromptShared<Sh>::floats(p.quads, kSummary);
    const cudaError_t allowed = allow_shared(kernel, shared);
    if (allowed != cudaSuccess) return allowed;
    const int64_t blocks = int64_t{a.batch} * p.groups;
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), kSummary ? p.chunks - 1 : p.chunks);
    kernel<<<grid, 32 * (p.scanners + p.stagers + finishers), shared, stream>>>(a, p);
    return cudaGetLastError();
}

template <typename T, typename Sh, bool kSummary = false>
cudaError_t prompt(const MambaSelectiveScan& a, const PromptPlan& p, cudaStream_t stream) {
    return p.vectors ? launch<T, Sh, true, kSummary>(a, p, stream) : launch<T, Sh, false, kSummary>(a, p, stream);
}

template <typename T, typename Sh>
cudaError_t prompt(const MambaSelectiveScan& a, const Rows& rows, int quads, void* workspace, cudaStream_t stream) {
    const PromptPlan p = plan<Sh>(a, rows, {1, a.length}, quads, workspace);
    const cudaError_t error = pad_states(a, p, stream);
    return error == cudaSuccess ? prompt<T, Sh>(a, p, stream) : error;
}

template <typename T, typename Sh>
cudaError_t chunked_prompt(
    const MambaSelectiveScan& a, const Rows& rows, const Chunks& chunks, void* workspace, cudaStream_t stream) {
    if (workspace == nullptr) return cudaErrorInvalidValue;
    const PromptPlan p = plan<Sh>(a, rows, chunks, 4, workspace);
    cudaError_t error = pad_states(a, p, stream);
    if (error == cudaSuccess) error = prompt<T, Sh, true>(a, p, stream);
    if (error != cudaSuccess) return error;
    const int64_t elements = int64_t{a.batch} * a.channels * a.state_size;
    pass_kernel<<<static_cast<unsigned>(ceil_div(elements, 128)), 128, 0, stream>>>(a, p);
    error = cudaGetLastError();
    return error == cudaSuccess ? prompt<T, Sh>(a, p, stream) : error;
}

// Of the allowed sizes of a block the one whose busiest multiprocessor has the fewest channels; the last of equals.
int choose_quads(const MambaSelectiveScan& a, int multiprocessors, std::initializer_list<int> allowed) {
    int best = 0;
    int64_t fewest = INT64_MAX;
    for (const int quads : allowed) {
        const int64_t channels = ceil_div(a.batch * ceil_div(a.channels, 4 * quads), multiprocessors) * quads;
        if (channels <= fewest) {
            fewest = channels;
            best = quads;
        }
    }
    return best;
}

template <typename T>
cudaError_t prompt(const MambaSelectiveScan& a, const Rows& rows, void* workspace, cudaStream_t stream) {
    const int N = a.state_size;
    const Chunks chunks = cut(a);
    if (chunks.count > 1) {
        return N > 16 ? chunked_prompt<T, FewBlocks32>(a, rows, chunks, workspace, stream)
                      : chunked_prompt<T, ManyChannels>(a, rows, chunks, workspace, stream);
    }
    if (N > 128) return prompt<T, States256>(a, rows, 2, workspace, stream);
    if (N > 64) return prompt<T, States128>(a, rows, 2, workspace, stream);
    if (N > 32) return prompt<T, States64>(a, rows, 4, workspace, stream);
    Device device;
    const cudaError_t error = device.read(pass_kernel);
    if (error != cudaSuccess) return error;
    const int multiprocessors = device.multiprocessors;
    const auto fits = [&](int shared_floats) { return 4 * shared_floats <= device.shared_bytes; };  // not all on Turing
    if (N > 16) {
        const bool few = a.batch * ceil_div(a.channels, 12) <= multiprocessors;
        if (few && fits(PromptShared<FewStates32>::floats(3, false))) {
            return prompt<T, FewStates32>(a, rows, choose_quads(a, multiprocessors, {2, 3}), workspace, stream);
        }
        if (a.batch * ceil_div(a.channels, 20) <= 2 * multiprocessors) {  // all at once
            return prompt<T, FewBlocks32>(a, rows, choose_quads(a, multiprocessors, {4, 5}), workspace, stream);
        }
        return prompt<T, States32>(a, rows, choose_quads(a, multiprocessors, {4, 6, 8}), workspace, stream);
    }
    if (int64_t{a.batch} * a.channels >= 64 * multiprocessors) {
        return prompt<T, ManyChannels>(a, rows, choose_quads(a, multiprocessors, {4, 6, 8}), workspace, stream);
    }
    const bool few = a.batch * ceil_div(a.channels, 16) <= multiprocessors;
    if (few || !fits(PromptShared<MediumChannels>::floats(10, false))) {
        return prompt<T, FewChannels>(a, rows, choose_quads(a, multiprocessors, {2, 3, 4}), workspace, stream);
    }
    return prompt<T, MediumChannels>(a, rows, choose_quads(a, multiprocessors, {5, 6, 7, 8, 9, 10}), workspace, stream);
}

template <typename T>
cudaError_t run(const MambaSelectiveScan& a, const Rows& rows, void* workspace, cudaStream_t stream) {
    if (a.length > 1) return prompt<T>(a, rows, workspace, stream);
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(a.state_dtype, [&](auto s) { error = step<T, decltype(s)>(a, stream); });
    return error;
}

}  // namespace

cudaError_t run(const MambaSelectiveScan& a, const Rows& rows, void* workspace, cudaStream_t stream) {
    const bool dense = rows.group == a.state_size && rows.z == 1;
    if (!is_valid(a) || (!dense && a.length == 1) || (rows.group != a.state_size && a.state_size % 8 != 0)) {
        return cudaErrorInvalidValue;
    }
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(a.dtype, [&](auto t) { error = run<decltype(t)>(a, rows, workspace, stream); });
    return error;
}

}  // namespace scan
}  // namespace mamba

extern "C" size_t mamba_selective_scan_workspace(const MambaSelectiveScan* call) {
    using namespace mamba::scan;
    if (!is_valid(*call)) return 0;
    return mamba::workspace_bytes(chunk_floats(*call) + 2 * padded_floats(*call));
}

extern "C" int mamba_selective_scan(const MambaSelectiveScan* call, void* workspace, void* stream) {
    return mamba::scan::run(*call, {call->state_size, 1}, workspace, static_cast<cudaStream_t>(stream));
}
