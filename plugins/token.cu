// A token of one row by token_kernel: whether it can be, how it is cut, and the maps by which it copies weights.
#include <algorithm>

#include "model.h"

// From here on a kernel's arguments may take the 28 KiB of a table.
#if CUDART_VERSION >= 12010
#include "tensor_map.h"
#include "token.cuh"
#endif

namespace mamba {
namespace model {

#if CUDART_VERSION >= 12010
namespace {

using token::LayerTable;
using token::Token;
using token::TokenLayer;

constexpr int kUnits[] = {4, 5, 8}, kSumUnits = 4;  // of 8 channels of a block, for which there are kernels
constexpr int kTableBlocks = 128, kTableThreads = 256;
constexpr int kTables = 2;  // of layers: the first is an argument of token_kernel, the other of the kernel ahead
constexpr int kMostLayers = kTables * token::kTableLayers;  // whose pointers leave room in it for five slots of any size

int64_t even(int64_t v) { return (v + 1) / 2 * 2; }

uint32_t factor_of(uint32_t divisor) { return static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor); }

bool adds_to_sums(const MambaModel& c) { return c.width < token::kPartsFrom; }

// What follows from the sizes and the channels of a block.
Token cut(const MambaModel& c, int units) {
    const int blocks = c.inner / (8 * units);
    Token a{};
    a.layers = c.layers, a.width = c.width, a.inner = c.inner;
    a.low = is_mamba2(c) ? c.outputs - 2 * c.inner : c.rank + 2 * c.state_size;
    a.rank = c.rank, a.heads = c.heads, a.head_dim = c.head_dim, a.vocab = c.vocab, a.state_dtype = c.state_dtype;
    a.skip_per_channel = c.skip_per_channel;
    a.own_width = c.width / blocks, a.width_factor = factor_of(a.own_width);
    a.own_low = even(ceil_div(a.low, blocks)), a.low_factor = factor_of(a.own_low);
    a.part = a.own_width + (is_mamba2(c) ? 2 : 0);
    if (adds_to_sums(c)) a.layer_sums = a.low + c.width + (is_mamba2(c) ? c.width / 32 : 0);
    a.slot_bytes = 512 * std::max<int>(8 * units, is_mamba2(c) ? ceil_div(a.own_width, 8) * 8 : 0);
    a.eps = c.eps, a.norm_eps = c.norm_eps, a.dt_min = c.dt_min, a.dt_max = c.dt_max;
    a.input_ids = c.input_ids, a.seq_lens = c.seq_lens, a.embedding = c.embedding;
    return a;
}

// Whether channels can be cut so.
bool is_cut(const MambaModel& c, int units) {
    const int own = 8 * units, blocks = c.inner / own;
    if (c.inner % own != 0 || blocks == 0 || blocks > token::kMostBlocks) return false;
    const Token a = cut(c, units);
    const bool shares_width = c.width % (2 * blocks) == 0;
    if (adds_to_sums(c)) {  // own_width: for more a slot would be larger, and slots too few for those that are held
        const bool shares_x = !is_mamba2(c) || (shares_width && a.own_width <= own);
        return units == kSumUnits && a.low <= token::kThreads && shares_x;
    }
    return shares_width && blocks % token::kWarps == 0 && a.part <= 32 && a.own_low <= 2 * token::kWarps;
}

// Whether sizes are such as the kernel has been written for, all of published models but those with groups of states.
bool are_token_sizes(const MambaModel& c) {
    if (c.batch != 1 || c.length != 1 || c.dtype == MAMBA_FLOAT32 || c.conv_width != 4) return false;
    if (c.layers > kMostLayers) return false;
    if (c.width % token::kColumns != 0 || c.width > token::kMostWidth || c.outputs % 8 != 0) return false;
    if (is_mamba2(c)) return c.state_size == 128 && c.groups == 1 && c.head_dim >= 16 && c.heads % 4 == 0;
    return c.state_size == 16 && c.rank % 16 == 0 && c.rank <= token::kColumns;
}

// Units of a block, the fewest with which all blocks fit on the device at once, unless they leave a third of it empty; or 0.
// Blocks that add to sums are fast where they are few.
int units_of(const MambaModel& c, int multiprocessors) {
    for (const int units : kUnits) {
        const int blocks = c.inner / (8 * units);
        if (blocks > multiprocessors || !is_cut(c, units)) continue;
        return adds_to_sums(c) || 3 * blocks >= 2 * multiprocessors ? units : 0;
    }
    return 0;
}

// What is copied 16 bytes at a time besides weights of products.
bool are_aligned(const MambaModel& c) {
    return std::all_of(c.each, c.each + c.layers, [](const MambaLayer& l) {
        for (const void* p : {static_cast<const void*>(l.norm_weight), l.in_proj_bias, l.conv_weight, l.conv_bias, l.conv_state,
                              static_cast<const void*>(l.A), static_cast<const void*>(l.D),
                              static_cast<const void*>(l.dt_bias), l.ssm_state, static_cast<const void*>(l.gate_norm),
                              static_cast<const void*>(l.ssm_state_out)}) {
            if (!is_aligned(p, 16)) return false;
        }
        return true;
    });
}

// Layers that are no argument of token_kernel.
int others_of(int layers) { return std::max(layers - token::kTableLayers, 0); }

// Takes places in the workspace, from its start on; what begins as zeros is side by side.
struct Workspace {
    TokenLayer* others;
    size_t zeros, zeros_end, bytes;

    Workspace(Token& a, int blocks, void* workspace) {
        Room room{workspace};
        const auto take_words = [&](int64_t count) { return static_cast<uint64_t*>(room.take(8 * count)); };
        const bool parts = a.layer_sums == 0;
        a.others = others = static_cast<TokenLayer*>(room.take(others_of(a.layers) * sizeof(TokenLayer)));
        zeros = room.bytes;
        a.sums = take_words(int64_t{a.layers} * a.layer_sums);
        a.low_parts = take_words(parts ? ceil_div(a.low, a.own_low) * blocks * a.own_low : 0);
        a.lows = take_words(parts ? a.low : 0);
        a.parts = take_words(parts ? int64_t{blocks} * blocks * a.part : 0);
        a.stream = take_words(parts ? a.width : 0);
        zeros_end = room.bytes;
        a.hidden = static_cast<float*>(room.take(4 * a.width));
        bytes = room.bytes;
    }
};

bool make_layer(Encode encode, TokenLayer& to, const MambaModel& c, const MambaLayer& l, const Token& a, int own) {
    const auto map = [&](TensorMap& of, const void* weights, int rows, int columns, int box_rows, int box_columns) {
        return make_map(encode, of, weights, c.dtype, rows, columns, box_rows, box_columns);
    };
    to.at = l;
    const int cluster = token::cluster_of(own / 8);
    if (!map(to.in, l.in_proj, c.width, c.outputs, token::kInRows / cluster, cluster * own)) return false;
    if (!map(to.out, l.out_proj, c.inner, c.width, own, token::kBoxColumns)) return false;
    if (is_mamba2(c)) {
        return map(to.low, l.in_proj, c.width, c.outputs, ceil_div(a.own_width, 8) * 8, token::kBoxColumns);
    }
    return map(to.low, l.x_proj, c.inner, a.low, own, token::kBoxColumns) &&
           map(to.dt, l.dt_proj, c.rank, c.inner, c.rank, own);
}

// All blocks run at once, those of a cluster side by side, or the launch is refused.
template <typename T, bool MAMBA2, int UNITS, bool SUMS>
cudaError_t start(const Token& given, const LayerTable& table, int limit, cudaStream_t stream) {
    const auto kernel = token::token_kernel<T, MAMBA2, UNITS, SUMS>;
    Token a = given;
    const int ring = token::Places(a).ring + token::kSlotAlign, fixed = sizeof(token::Own<T, 8 * UNITS>);
    a.slots = std::min((limit - fixed - ring) / a.slot_bytes, token::kMostSlots);
    const size_t shared = ring + a.slots * static_cast<size_t>(a.slot_bytes);
    const cudaError_t error = allow_shared(kernel, shared);
    if (error != cudaSuccess) return error;
    constexpr unsigned kCluster = token::cluster_of(UNITS);
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {kCluster, 1, 1};
    const int blocks = a.inner / (8 * UNITS);
    return launch_with(attributes, kCluster == 1 ? 1 : 2, kernel, blocks, token::kThreads + 32, shared, stream, a, table);
}

template <typename T, bool MAMBA2>
cudaError_t start(const Token& a, const LayerTable& table, int units, int limit, cudaStream_t stream) {
    if (a.layer_sums > 0) return start<T, MAMBA2, kSumUnits, true>(a, table, limit, stream);
    switch (units) {
        case 4: return start<T, MAMBA2, 4, false>(a, table, limit, stream);
        case 5: return start<T, MAMBA2, 5, false>(a, table, limit, stream);
        default: return start<T, MAMBA2, 8, false>(a, table, limit, stream);
    }
}

}  // namespace

// On compute capability 9.0, where it was measured, it is faster.
bool is_token(const MambaModel& c) {
    if (!are_token_sizes(c) || !are_aligned(c)) return false;
    Device device;
    return device.read(token::token_table_kernel) == cudaSuccess && has_bulk_copies(device) &&
           units_of(c, device.multiprocessors) > 0;
}

size_t token_workspace(const MambaModel& given) {
    MambaModel c = given;
    c.batch = c.length = 1;
    size_t most = 0;
    for (const int units : kUnits) {
        if (!are_token_sizes(c) || !is_cut(c, units)) continue;
        Token a = cut(c, units);
        most = std::max(most, Workspace(a, c.inner / (8 * units), nullptr).bytes);
    }
    return most;
}

cudaError_t token_of_row(const MambaModel& c, void* workspace, cudaStream_t stream) {
    const Encode encode = encode_of_driver();
    Device device;
    cudaError_t error = device.read(token::token_table_kernel);
    if (error != cudaSuccess) return error;
    if (workspace == nullptr) return cudaErrorInvalidValue;
    const int units = units_of(c, device.multiprocessors);
    Token a = cut(c, units);
    const Workspace at(a, c.inner / (8 * units), workspace);
    uint4* const zeros = reinterpret_cast<uint4*>(static_cast<char*>(workspace) + at.zeros);
    const int64_t all = (at.zeros_end - at.zeros) / sizeof(uint4);
    LayerTable tables[kTables]{};
    for (int i = 0; i < c.layers; i++) {
        TokenLayer& to = tables[i / token::kTableLayers].each[i % token::kTableLayers];
        if (!make_layer(encode, to, c, c.each[i], a, 8 * units)) return cudaErrorInvalidValue;
    }
    token::token_table_kernel<<<kTableBlocks, kTableThreads, 0, stream>>>(
        tables[1], others_of(c.layers), at.others, zeros, all);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    error = cudaErrorInvalidValue;
    const auto run = [&](auto t) {
        using T = decltype(t);
        const auto start_it = is_mamba2(c) ? start<T, true> : start<T, false>;
        error = start_it(a, tables[0], units, device.shared_bytes, stream);
    };
    if (c.dtype == MAMBA_FLOAT16) {
        run(__half{});
    } else {
        run(__nv_bfloat16{});
    }
    if (error != cudaSuccess) return error;
    const MambaHead last = head(c, a.hidden);
    return static_cast<cudaError_t>(mamba_head(&last, nullptr, stream));
}

#else

bool is_token(const MambaModel&) { return false; }
size_t token_workspace(const MambaModel&) { return 0; }
cudaError_t token_of_row(const MambaModel&, void*, cudaStream_t) { return cudaErrorNotSupported; }

#endif

}  // namespace model
}  // namespace mamba
