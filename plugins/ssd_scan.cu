// MambaSsdScan: which kernel takes a call, and its workspace.
//
// One token: ssd_step.cuh, or ssd_late.cuh, which may leave it pending. Prompts of 16-bit activations on sm_80 and newer, P and
// N multiples of 8 as in every published model: ssd_prompt.cuh, on the tensor cores, or ssd_helped.cuh where heads are fewer
// than multiprocessors, but not so few that segments are faster. Longer ones of other sizes too, on copies padded by pad.cuh.
// What is left, that is float32, older GPUs, a few tokens, and tiles too large for a GPU's shared memory: ssd_recurrent.cuh.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "model.h"
#include "pad.cuh"
#include "ssd_helped.cuh"
#include "ssd_late.cuh"
#include "ssd_recurrent.cuh"
#include "ssd_step.cuh"
#include "step_common.cuh"

namespace mamba {
namespace ssd {
namespace {

constexpr int64_t kMaxLength = 1 << 20;
constexpr int kFewTokens = 4;    // up to here one after the other is faster than in chunks

int64_t heads_of(const MambaSsdScan& a) { return static_cast<int64_t>(a.batch) * a.heads; }

Rows dense_rows(const MambaSsdScan& a) {
    return {static_cast<int32_t>(int64_t{a.heads} * a.head_dim), static_cast<int32_t>(int64_t{a.groups} * a.state_size),
            a.heads};
}

bool is_valid(const MambaSsdScan& a) {
    const bool sizes = a.batch > 0 && a.length > 0 && a.length <= kMaxLength && a.heads > 0 && a.head_dim > 0 &&
                       a.state_size > 0 && a.state_size <= 256 && a.groups > 0 && a.heads % a.groups == 0;
    return sizes && a.dtype >= MAMBA_FLOAT32 && a.dtype <= MAMBA_BFLOAT16 && a.state_dtype >= MAMBA_FLOAT32 &&
           a.state_dtype <= MAMBA_BFLOAT16;
}

// How many segments the workspace has room for: the same on every GPU, for an engine may be built without one.
int64_t max_segments(const MambaSsdScan& a) {
    return std::max<int64_t>(1, std::min(ceil_div(a.length, kChunk), 512 / heads_of(a)));
}

int64_t floats_of_segment(const MambaSsdScan& a) {  // its states, a multiple of 64
    return ceil_div(heads_of(a) * a.head_dim * a.state_size, 64) * 64;
}

int64_t floats_of_segments(const MambaSsdScan& a) {  // all of them with their decays, a multiple of 64
    const int64_t segments = max_segments(a);
    return segments == 1 ? 0 : ceil_div(segments * (floats_of_segment(a) + heads_of(a)), 64) * 64;
}

constexpr int64_t kMostHelped = 120;          // blocks of heads: no GPU has room for more
constexpr int64_t kMostHelpFloats = 1 << 24;  // of what they leave: more would not stay in an L2 cache
constexpr int64_t kLeastHelpedChunks = 8;

// Blocks of heads where helpers may be of use: of kHelpedChannels, few enough, with enough to do. Else 0.
int64_t helped_blocks(const MambaSsdScan& a) {
    const int64_t tiles = ceil_div(a.head_dim, kHelpedChannels), blocks = heads_of(a) * tiles;
    const bool fits = a.head_dim > tiles * (kHelpedChannels - 16) && a.state_size <= 128 && a.dtype != MAMBA_FLOAT32;
    return fits && blocks <= kMostHelped && ceil_div(a.length, kChunk) >= kLeastHelpedChunks ? blocks : 0;
}

// Of a row's chunks, how many a head's own block takes where `heads` of them share a helper: as long as the helper takes for
// the others. Its line has to fill again for the second, which takes as long as a chunk.
int64_t own_chunks(int64_t chunks, int64_t heads) { return ceil_div(heads * chunks + heads - 1, heads + 1); }

int64_t floats_of_help(const MambaSsdScan& a, int64_t heads) {
    const int64_t chunks = ceil_div(a.length, kChunk);
    const int64_t left = left_floats(a.state_size <= 64 ? 64 : 128, chunks - own_chunks(chunks, heads));
    return ceil_div(helped_blocks(a) * (left + 1), 64) * 64;  // and the flags
}

// What kernels leave to others, in the one way or the other: the same on every GPU, and no less for longer prompts.
int64_t floats_between(const MambaSsdScan& a) {
    return std::max(floats_of_segments(a), std::min(floats_of_help(a, 1), kMostHelpFloats));
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   Parameters... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = allow_shared(kernel, shared);
    if (error == cudaSuccess && shared > 48 << 10) {
        error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    }
    if (error != cudaSuccess) return error;
    void* pointers[] = {&arguments...};
    return cudaLaunchKernel(function, grid, dim3(threads), pointers, shared, stream);
}

// --- one token

Divisor make_divisor(int64_t divisor) {
    Divisor by = {static_cast<uint32_t>(divisor), 1, 0};
    while ((uint64_t{1} << by.shift) < static_cast<uint64_t>(divisor)) by.shift++;
    by.factor = static_cast<uint32_t>((((uint64_t{1} << by.shift) - divisor) << 32) / divisor + 1);
    return by;
}

// How a step is launched: where its tokens lie, and whether it starts early.
template <typename T>
struct StepCall {
    const MambaSsdScan& a;
    StepPlaces<T> at;
    bool apart, early;
    cudaStream_t stream;
};

template <typename T, typename S, int VEC, int LANES, int ITERS, int SETS>
cudaError_t step(const StepCall<T>& call, int warps) {
    const MambaSsdScan& a = call.a;
    constexpr int kWarpRows = SETS * 32 / LANES;
    const int64_t rows = heads_of(a) * a.head_dim, blocks = ceil_div(ceil_div(rows, kWarpRows), warps);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    StepDivisors by;
    by.small = rows <= INT_MAX;
    by.warps = make_divisor(std::max(a.head_dim / kWarpRows, 1));
    by.rows = make_divisor(a.head_dim);
    by.heads = make_divisor(a.heads);
    by.group = make_divisor(a.heads / a.groups);
    const bool uniform = by.small && a.head_dim % kWarpRows == 0;
    const auto kernel = uniform ? step_kernel<T, S, VEC, LANES, ITERS, SETS, true>
                                : step_kernel<T, S, VEC, LANES, ITERS, SETS, false>;
    if (call.apart && !uniform) return cudaErrorInvalidValue;
    return launch_early(kernel, dim3(static_cast<unsigned>(blocks)), 32 * warps, 0, 1, call.early, call.stream, a,
                        call.at, by);
}

// Many states: more of them a warp, and small blocks, whose ends leave no gaps. Few: as many warps as there are.
template <typename T, typename S, int VEC, int LANES, int ITERS>
cudaError_t step(const StepCall<T>& call) {
    const MambaSsdScan& a = call.a;
    const int64_t bytes = heads_of(a) * a.head_dim * a.state_size * static_cast<int64_t>(sizeof(S));
    if (bytes >= 64 << 20) return step<T, S, VEC, LANES, ITERS, 4>(call, 2);
    return step<T, S, VEC, LANES, ITERS, 2>(call, 8);
}

// Calls run(lanes, iterations): lanes that share a row of states, each with 16 bytes of it at a time.
template <typename S, typename Run>
cudaError_t with_lanes(int states, Run&& run) {
    constexpr int kVec = 16 / sizeof(S);
    const std::integral_constant<int, 1> once{};
    if (states <= 4 * kVec) return run(std::integral_constant<int, 4>{}, once);
    if (states <= 8 * kVec) return run(std::integral_constant<int, 8>{}, once);
    if (states <= 16 * kVec) return run(std::integral_constant<int, 16>{}, once);
    if (states <= 32 * kVec) return run(std::integral_constant<int, 32>{}, once);
    return run(std::integral_constant<int, 32>{}, std::integral_constant<int, sizeof(S) == 4 ? 2 : 1>{});
}

template <typename T, typename S>
cudaError_t step(const StepCall<T>& call) {
    const MambaSsdScan& a = call.a;
    constexpr int kVec = 16 / sizeof(S);
    const int N = a.state_size;
    const bool aligned = is_aligned(a.ssm_state, 16) && is_aligned(a.ssm_state_out, 16) && is_aligned(call.at.B, 16) &&
                         is_aligned(call.at.C, 16);
    if (N % kVec == 0 && aligned) {
        return with_lanes<S>(N, [&](auto lanes, auto iterations) {
            return step<T, S, kVec, decltype(lanes)::value, decltype(iterations)::value>(call);
        });
    }
    if (N <= 32) return step<T, S, 1, 8, 4>(call);
    if (N <= 64) return step<T, S, 1, 16, 4>(call);
    if (N <= 128) return step<T, S, 1, 32, 4>(call);
    return step<T, S, 1, 32, 8>(call);
}

// --- one token, with tokens that are pending

template <typename T, typename S, int LANES, int ITERS>
cudaError_t late_step(const StepCall<T>& call, const pending::Pending& before) {
    const MambaSsdScan& a = call.a;
    constexpr int kItem = sizeof(S), kBytes = kLateWarps<S> << 12;  // of a block's states where it takes several turns
    const int turns = kLateTurns * kLateRows<S, LANES> * a.state_size * kItem <= kBytes ? kLateTurns : 1;
    const int rows = std::min(turns * kLateRows<S, LANES>, a.head_dim);
    const int shared = late_bytes(a, rows, kItem, LANES * ITERS * 16 / kItem, kLateRows<S, LANES>);
    const auto kernel = late_step_kernel<T, S, LANES, ITERS>;
    const cudaError_t allowed = allow_shared(kernel, shared);
    if (allowed != cudaSuccess) return allowed;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.head_dim, rows) * a.heads), static_cast<unsigned>(a.batch));
    return launch_early(kernel, grid, 32 * kLateWarps<S>, shared, 1, call.early, call.stream, a, call.at, before, int(rows));
}

template <typename T, typename S>
cudaError_t late_step(const StepCall<T>& call, const pending::Pending& before) {
    return with_lanes<S>(call.a.state_size, [&](auto lanes, auto iterations) {
        return late_step<T, S, decltype(lanes)::value, decltype(iterations)::value>(call, before);
    });
}

// --- prompts

// What a chunk of a kernel costs, roughly, as seen on Hopper: times in microseconds.
struct Costs {
    double chunk_us;  // in a block alone on its multiprocessor
    double state;     // the part of that for the states of segments alone
    double turn;      // of each of several blocks on one multiprocessor: 1 where they follow one another
};

constexpr double kPassUs = 5.0;  // what a second kernel costs, or that blocks meet

struct Cut {
    Segments segments;
    double us;  // it takes, as the costs have it
};

// Into how many segments: the fewer the less work, the more the fuller the GPU.
Cut cut(const MambaSsdScan& a, int64_t blocks, int multiprocessors, const Costs& costs, void* workspace) {
    const int64_t chunks = ceil_div(a.length, kChunk), room = workspace == nullptr ? 1 : max_segments(a);
    const auto load = [&](int64_t n) {  // in turns of one block alone
        const int64_t turns = ceil_div(n, multiprocessors);
        return turns < 2 ? 1.0 : costs.turn * static_cast<double>(turns);
    };
    const double state_bytes = 16.0 * static_cast<double>(floats_of_segment(a));  // four times through memory
    int64_t best = chunks;  // chunks of a segment
    double least = static_cast<double>(chunks) * costs.chunk_us * load(blocks);
    for (int64_t count = 2; count <= room; count++) {
        const int64_t length = ceil_div(chunks, count);
        if (ceil_div(chunks, length) != count) continue;
        const double in_turns = load(blocks * count) + costs.state * load(blocks * (count - 1));
        const double time = static_cast<double>(length) * costs.chunk_us * in_turns + kPassUs +
                            static_cast<double>(count) * state_bytes / 3e6;
        if (time < least) {
            least = time;
            best = length;
        }
    }
    Segments segments;
    segments.length = static_cast<int32_t>(best * kChunk);
    segments.count = static_cast<int32_t>(ceil_div(chunks, best));
    segments.states = static_cast<float*>(workspace);
    segments.decays = segments.states;
    if (segments.count > 1) segments.decays += segments.count * floats_of_segment(a);
    return {segments, least};
}

cudaError_t pass_states(const MambaSsdScan& a, const Segments& segments, cudaStream_t stream) {
    const int64_t blocks = ceil_div(heads_of(a) * a.head_dim * a.state_size, 256);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    return launch(pass_states_kernel, dim3(static_cast<unsigned>(blocks)), 256, 0, stream, a, segments);
}

template <typename Layout>
struct Kernel {
    void (*run)(MambaSsdScan, Rows, Segments, Layout);
    int threads;
    size_t shared;
};

// All kernels of a prompt: states of the segments, what each starts from, outputs.
template <typename Layout>
cudaError_t prompt(const MambaSsdScan& a, const Rows& rows, const Segments& segments, int64_t tiles,
                   const Kernel<Layout>& states, const Kernel<Layout>& output, const Layout& layout, cudaStream_t stream) {
    const int64_t blocks = heads_of(a) * tiles;
    const int64_t row = std::max(static_cast<int64_t>(a.heads) * a.head_dim, static_cast<int64_t>(a.groups) * a.state_size);
    if (blocks > INT_MAX || row > INT_MAX) return cudaErrorInvalidValue;
    const unsigned width = static_cast<unsigned>(blocks), count = static_cast<unsigned>(segments.count);
    if (count > 1) {
        cudaError_t error =
            launch(states.run, dim3(width, count - 1), states.threads, states.shared, stream, a, rows, segments, layout);
        if (error == cudaSuccess) error = pass_states(a, segments, stream);
        if (error != cudaSuccess) return error;
    }
    return launch(output.run, dim3(width, count), output.threads, output.shared, stream, a, rows, segments, layout);
}

template <typename T, int LANES>
cudaError_t recurrent(const MambaSsdScan& a, const Rows& rows, const Device& device, void* workspace, cudaStream_t stream) {
    using Sizes = Recurrent<LANES>;
    const int64_t tiles = ceil_div(a.head_dim, Sizes::kRows);
    const Segments segments = cut(a, heads_of(a) * tiles, device.multiprocessors, {4.0, 0.6, 0.7}, workspace).segments;
    const auto kernel = [](auto run) { return Kernel<uint32_t>{run, 32 * Sizes::kWarps, Sizes::kSharedBytes}; };
    return prompt(a, rows, segments, tiles, kernel(recurrent_kernel<T, LANES, false>),
                  kernel(recurrent_kernel<T, LANES, true>), static_cast<uint32_t>(tiles), stream);
}

template <typename T>
cudaError_t recurrent(const MambaSsdScan& a, const Rows& rows, const Device& device, void* workspace, cudaStream_t stream) {
    if (a.state_size <= 32) return recurrent<T, 4>(a, rows, device, workspace, stream);
    if (a.state_size <= 64) return recurrent<T, 8>(a, rows, device, workspace, stream);
    if (a.state_size <= 128) return recurrent<T, 16>(a, rows, device, workspace, stream);
    return recurrent<T, 32>(a, rows, device, workspace, stream);
}

// --- sizes that the tensor cores do not take

bool is_padded(const MambaSsdScan& a) {
    if (a.dtype == MAMBA_FLOAT32 || a.length < pad::kPadTokens || (a.head_dim % 8 == 0 && a.state_size % 8 == 0)) return false;
    const int64_t P = ceil_div(a.head_dim, 8) * 8, N = ceil_div(a.state_size, 8) * 8;
    return std::max(a.heads * P, a.groups * N) <= INT_MAX;  // or prompt() would refuse
}

// The call that the tensor cores run in place of one of other sizes, and the copies around it. Nothing else changes: what
// B, C and the state have beyond N adds 0 to y, and channels beyond P, which see no other, are cut off. The state goes out
// into the copy it came in from.
struct Padding {
    MambaSsdScan call;
    Rows rows;
    pad::Copy before[5], after[2];
    int befores = 0, afters = 0;
    uintptr_t end = 0;  // of the workspace
};

// The call as it is.
Padding no_padding(const MambaSsdScan& a, const Rows& rows) {
    Padding padding;
    padding.call = a;
    padding.rows = rows;
    return padding;
}

// In the workspace, first what kernels leave to others.
Padding make_padding(const MambaSsdScan& a, const Rows& rows, uintptr_t workspace) {
    Padding padding = no_padding(a, rows);
    MambaSsdScan& to = padding.call;
    to.head_dim = pad::padded(a.head_dim);
    to.state_size = pad::padded(a.state_size);
    padding.rows.x = a.heads * to.head_dim;
    padding.rows.group = a.groups * to.state_size;
    padding.end = workspace + 4 * floats_between(to);
    const auto take = [&](int64_t count, int32_t rows, int32_t cols, int32_t bytes) {
        void* const taken = reinterpret_cast<void*>(padding.end);
        padding.end += ceil_div(count * rows * cols * bytes, 256) * 256;
        return taken;
    };
    const int64_t tokens = static_cast<int64_t>(a.batch) * a.length;
    const int32_t P = a.head_dim, N = a.state_size, to_P = to.head_dim, to_N = to.state_size;
    if (to_P != P) {
        const int64_t rows = tokens * a.heads;
        void *const x = take(rows, 1, to_P, 2), *const y = take(rows, 1, to_P, 2), *const D = take(a.heads, 1, to_P, 4);
        padding.before[padding.befores++] = {a.x, x, rows, 1, P, 1, to_P, 2};
        padding.after[padding.afters++] = {y, a.y, rows, 1, to_P, 1, P, 2};
        to.x = x;
        to.y = y;
        if (a.skip_per_channel && a.D != nullptr) {
            padding.before[padding.befores++] = {a.D, D, a.heads, 1, P, 1, to_P, 4};
            to.D = static_cast<const float*>(D);
        }
    }
    if (to_N != N) {
        const int64_t rows = tokens * a.groups;
        void *const B = take(rows, 1, to_N, 2), *const C = take(rows, 1, to_N, 2);
        padding.before[padding.befores++] = {a.B, B, rows, 1, N, 1, to_N, 2};
        padding.before[padding.befores++] = {a.C, C, rows, 1, N, 1, to_N, 2};
        to.B = B;
        to.C = C;
    }
    const int32_t bytes = item_bytes(a.state_dtype);
    void* const state = take(heads_of(a), to_P, to_N, bytes);
    padding.before[padding.befores++] = {a.ssm_state, state, heads_of(a), P, N, to_P, to_N, bytes};
    padding.after[padding.afters++] = {state, a.ssm_state_out, heads_of(a), to_P, to_N, P, N, bytes};
    to.ssm_state = to.ssm_state_out = state;
    return padding;
}

// --- on the tensor cores

// How many heads share a helper, so that all blocks are on the GPU at once; 0: none does.
int heads_of_helper(const MambaSsdScan& a, const Layout& layout, const Device& device, void* workspace) {
    const int64_t blocks = helped_blocks(a);
    const bool fits = layout.channels == kHelpedChannels && blocks == heads_of(a) * layout.tiles;
    if (device.major < 9 || workspace == nullptr || !fits) return 0;
    const int heads = 2 * blocks <= device.multiprocessors ? 1 : 2;
    const bool at_once = blocks + ceil_div(blocks, heads) <= device.multiprocessors;
    return at_once && floats_of_help(a, heads) <= kMostHelpFloats ? heads : 0;
}

constexpr double kFinish = 0.2;  // what finishing a chunk of a helper takes, in chunks

double helped_us(const MambaSsdScan& a, int heads, const Costs& costs) {
    const int64_t chunks = ceil_div(a.length, kChunk), own = own_chunks(chunks, heads);
    return (static_cast<double>(own) + kFinish * static_cast<double>(chunks - own)) * costs.chunk_us + kPassUs;
}

template <typename T, int NT>
cudaError_t helped(const MambaSsdScan& a, const Rows& rows, int heads, const Layout& layout, size_t shared,
                   void* workspace, cudaStream_t stream) {
    const int64_t chunks = ceil_div(a.length, kChunk), own = own_chunks(chunks, heads), blocks = helped_blocks(a);
    Help help{};
    help.heads = heads, help.blocks = static_cast<int32_t>(blocks);
    help.length = static_cast<int32_t>(own * kChunk), help.chunks = static_cast<int32_t>(chunks - own);
    help.left = static_cast<float*>(workspace);
    help.done = reinterpret_cast<uint32_t*>(help.left + blocks * left_floats(NT, help.chunks));
    const cudaError_t error = launch(clear_done_kernel, dim3(1), 128, 0, stream, Help(help));
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(help.helpers() + help.blocks));
    return launch(helped_kernel<T, NT>, grid, kHelpedThreads, shared, stream, MambaSsdScan(a), Rows(rows), Help(help),
                  Layout(layout));
}

// Sets done where the GPU can run it.
template <typename T, int NT>
cudaError_t chunked(const Padding& padding, const Device& device, void* workspace, cudaStream_t stream, bool* done) {
    const MambaSsdScan& a = padding.call;
    using Shared = ChunkShared<NT, true>;
    using Warps = ChunkWarps<NT, true>;
    const auto states = chunk_kernel<T, NT, false>, output = chunk_kernel<T, NT, true>;
    const size_t available = static_cast<size_t>(device.shared_bytes);
    Layout layout;
    layout.tiles = static_cast<uint32_t>(ceil_div(a.head_dim, Warps::kMaxChannels)) - 1;
    do {  // tiles of equal width
        layout.tiles++;
        layout.channels = static_cast<int32_t>(ceil_div(ceil_div(a.head_dim, layout.tiles), 16) * 16);
    } while (layout.channels > 16 && Shared::bytes(layout.channels, 2) > available);
    layout.stages = 4;
    while (layout.stages > 2 && Shared::bytes(layout.channels, layout.stages) > available) layout.stages--;
    const size_t shared = Shared::bytes(layout.channels, layout.stages);
    *done = device.major >= 8 && shared <= available;
    if (!*done) return cudaSuccess;
    // Of the counts tried this takes the fastest: 1 for H 128 and for B 8 H 24, 2 for H 64, 5 for H 24 (L 2048).
    const Costs costs = {1.9, 0.4, 1.0};
    const Cut best = cut(a, heads_of(a) * layout.tiles, device.multiprocessors, costs, workspace);
    const auto threads = [&](int warps) { return 32 * warps + 2 * layout.channels; };
    const Kernel<Layout> states_kernel = {states, threads(ChunkWarps<NT, false>::kChannels),
                                          ChunkShared<NT, false>::bytes(layout.channels, layout.stages)};
    const Kernel<Layout> output_kernel = {output, threads(Warps::kChannels), shared};
    cudaError_t error = pad::copy(padding.before, padding.befores, stream);
    if (error != cudaSuccess) return error;
    const int heads = heads_of_helper(a, layout, device, workspace);
    if (heads > 0 && helped_us(a, heads, costs) < best.us) {
        if constexpr (NT <= 128) error = helped<T, NT>(a, padding.rows, heads, layout, shared, workspace, stream);
    } else {
        error = prompt(a, padding.rows, best.segments, layout.tiles, states_kernel, output_kernel, layout, stream);
    }
    return error == cudaSuccess ? pad::copy(padding.after, padding.afters, stream) : error;
}

// Rows of x, y, B and C of a head begin at multiples of 16 bytes.
bool is_aligned(const MambaSsdScan& a, const Rows& rows) {
    return a.head_dim % 8 == 0 && a.state_size % 8 == 0 && rows.x % 8 == 0 && rows.group % 8 == 0 &&
           mamba::is_aligned(a.x, 16) && mamba::is_aligned(a.y, 16) && mamba::is_aligned(a.B, 16) && mamba::is_aligned(a.C, 16);
}

template <typename T>
cudaError_t scan(const MambaSsdScan& a, const Rows& rows, void* workspace, cudaStream_t stream) {
    if (a.length == 1) {
        cudaError_t error = cudaErrorInvalidValue;
        const auto at = [](const void* p) { return static_cast<const T*>(p); };
        const int64_t channels = int64_t{a.heads} * a.head_dim, group_row = int64_t{a.groups} * a.state_size;
        const StepPlaces<T> places = {at(a.x), at(a.B), at(a.C), at(a.dt), nullptr, channels, group_row, a.heads, 0};
        const StepCall<T> call = {a, places, false, false, stream};
        with_dtype(a.state_dtype, [&](auto s) { error = step<T, decltype(s)>(call); });
        return error;
    }
    Device device;
    cudaError_t error = device.read(pass_states_kernel);
    if (error != cudaSuccess) return error;
    if constexpr (sizeof(T) == 2) {
        bool done = false;
        const Padding padding = is_padded(a) && workspace != nullptr
                                    ? make_padding(a, rows, reinterpret_cast<uintptr_t>(workspace))
                                    : no_padding(a, rows);
        if (a.length > kFewTokens && is_aligned(padding.call, padding.rows)) {
            if (a.state_size <= 64) {
                error = chunked<T, 64>(padding, device, workspace, stream, &done);
            } else if (a.state_size <= 128) {
                error = chunked<T, 128>(padding, device, workspace, stream, &done);
            } else {
                error = chunked<T, 256>(padding, device, workspace, stream, &done);
            }
        }
        if (done || error != cudaSuccess) return error;
    }
    return recurrent<T>(a, rows, device, workspace, stream);
}

// Of a row of the projection: z, x, B, C, dt side by side.
template <typename T>
cudaError_t step(const MambaSsdUpdate& c, const pending::Pending& before, cudaStream_t stream) {
    Device device;
    cudaError_t error = device.read(pass_states_kernel);
    if (error != cudaSuccess) return error;
    const int64_t channels = int64_t{c.heads} * c.head_dim, states = int64_t{c.groups} * c.state_size;
    const int64_t row = 2 * channels + 2 * states + c.heads;
    const T* const x = static_cast<const T*>(c.projected) + channels;
    const StepPlaces<T> at = {x, x + channels, x + channels + states, x + channels + 2 * states, x - channels,
                              row, row, row, row};
    const MambaSsdScan a = {
        c.batch, 1, c.heads, c.head_dim, c.state_size, c.groups, c.dtype, c.state_dtype, c.dt_softplus,
        c.skip_per_channel, c.dt_min, c.dt_max, at.x, at.dt, c.A, at.B, at.C, c.D, c.dt_bias, c.ssm_state, c.seq_lens,
        c.y, c.ssm_state_out};
    const auto by_16 = [](int64_t values) { return values * sizeof(T) % 16 == 0; };
    if (!is_valid(a) || c.length != 1 || c.row != row || !mamba::is_aligned(c.projected, 16) || !by_16(row) ||
        !by_16(channels) || !by_16(states)) {
        return cudaErrorInvalidValue;
    }
    const StepCall<T> call = {a, at, true, device.major >= 9, stream};
    error = cudaErrorInvalidValue;
    with_dtype(c.state_dtype, [&](auto s) {
        using S = decltype(s);
        error = before.marks == nullptr ? step<T, S>(call) : late_step<T, S>(call, before);
    });
    return error;
}

}  // namespace

cudaError_t run(const MambaSsdScan& a, const Rows& rows, void* workspace, cudaStream_t stream) {
    if (!is_valid(a)) return cudaErrorInvalidValue;
    const Rows dense = dense_rows(a);
    const bool apart = rows.x != dense.x || rows.group != dense.group, by_8 = a.head_dim % 8 == 0 && a.state_size % 8 == 0;
    if ((apart && !by_8) || (a.length == 1 && (apart || rows.dt != dense.dt))) return cudaErrorInvalidValue;
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(a.dtype, [&](auto t) { error = scan<decltype(t)>(a, rows, workspace, stream); });
    return error;
}

}  // namespace ssd

// Of few heads a block each does not fill the device (samples/results/step.txt, 146).
bool model::ssd_update_defers(const MambaSsdUpdate& call) {
    Device device;
    return device.read(ssd::pass_states_kernel) == cudaSuccess && device.major >= 9 && call.batch <= 65535 &&
           2 * int64_t{call.batch} * call.heads > 3 * int64_t{device.multiprocessors} && call.head_dim % 4 == 0 &&
           call.head_dim <= ssd::kLateHeadDim && call.state_size * item_bytes(call.state_dtype) % 16 == 0 &&
           is_aligned(call.ssm_state, 16);
}

cudaError_t model::ssd_update_pending(const MambaSsdUpdate& call, const pending::Pending& before, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(call.dtype, [&](auto t) { error = ssd::step<decltype(t)>(call, before, stream); });
    return error;
}

}  // namespace mamba

extern "C" size_t mamba_ssd_scan_workspace(const MambaSsdScan* call) {
    using namespace mamba::ssd;
    if (!is_valid(*call)) return 0;
    if (is_padded(*call)) return make_padding(*call, dense_rows(*call), 0).end;
    return mamba::workspace_bytes(floats_between(*call));
}

extern "C" int mamba_ssd_scan(const MambaSsdScan* call, void* workspace, void* stream) {
    return mamba::ssd::run(*call, mamba::ssd::dense_rows(*call), workspace, static_cast<cudaStream_t>(stream));
}

extern "C" size_t mamba_ssd_update_workspace(const MambaSsdUpdate*) { return 0; }

extern "C" int mamba_ssd_update(const MambaSsdUpdate* call, void*, void* stream) {
    return mamba::model::ssd_update_pending(*call, {}, static_cast<cudaStream_t>(stream));
}
