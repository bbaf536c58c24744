// The parts of a decode step but for Mamba-2's scan: which kernel takes a call.
#include <algorithm>
#include <type_traits>

#include "model.h"
#include "selective_update.cuh"
#include "step_row.cuh"
#include "step_tile.cuh"
#include "step_x_proj.cuh"

namespace mamba {
namespace step {
namespace {

template <typename... Parameters>
cudaError_t start_clusters(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster,
                           const Device& device, cudaStream_t stream, Parameters... arguments) {
    const cudaError_t allowed = allow_shared(kernel, shared);
    if (allowed != cudaSuccess) return allowed;
    return launch_early(kernel, grid, threads, shared, cluster, device.major >= 9, stream, arguments...);
}

template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, const Device& device,
                  cudaStream_t stream, Parameters... arguments) {
    return start_clusters(kernel, grid, threads, shared, 1, device, stream, arguments...);
}

int padded(int inputs) { return (inputs + 31) / 32 * 32; }

constexpr int kNormRows = 2, kHeadNormRows = 1;  // that a block of a product, of the head, norms by itself

// Of f(x), where rows are more than `most` and it has a kernel of its own.
size_t norm_bytes(int64_t batch, int most, int32_t inputs, int32_t dtype) {
    return batch <= most ? 0 : workspace_bytes(ceil_div(batch * padded(inputs) * item_bytes(dtype), 4));
}

// What follows from the sizes and addresses.
template <typename X>
Linear complete(Linear a) {
    a.group_size = a.inputs / a.groups;
    a.by_16 = a.x_stride % (16 / sizeof(X)) == 0 && a.inputs % (16 / sizeof(X)) == 0 && is_aligned(a.x, 16);
    return a;
}

// The most rows of a block, up to 8, whose x has room in shared memory; 0 where none has.
template <typename Bytes>
int most_rows(Linear a, const Device& device, Bytes&& bytes) {
    for (a.rows = std::min(a.batch, kColumns); a.rows > 0 && bytes(a) > device.shared_bytes; a.rows--) {}
    return a.rows;
}

// How many pieces of 16 bytes a block of row_kernel takes, so that there are as many blocks as multiprocessors, but no less
// than 64 bytes unless most would be left without a block; 0 where few_rows() is faster.
template <typename T>
int row_lanes(const Linear& a, const Device& device) {
    if (a.batch > kNormRows || a.inputs < (a.outputs > a.inputs ? 1536 : 3072)) return 0;
    const int64_t pieces = ceil_div(a.outputs, kPiece<T>);
    const int64_t waves = ceil_div(pieces, int64_t{kMostLanes} * device.multiprocessors);
    const int least = 2 * pieces > device.multiprocessors ? 4 : 1;
    const int lanes = std::max<int>(ceil_div(pieces, waves * device.multiprocessors), least);
    const int squares = 4 * kRowWarps * a.batch;  // which the kernel has besides
    return row_bytes<T>(a.inputs, a.batch, lanes) + squares <= device.shared_bytes ? lanes : 0;
}

template <typename T, typename X>
cudaError_t row_product(const Linear& a, int lanes, const Device& device, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(a.outputs, kPiece<T>), lanes)));
    const auto run = [&](auto rows) {
        return start(row_kernel<T, X, rows>, grid, 32 * kRowWarps, row_bytes<T>(a.inputs, rows, lanes), device, stream,
                     Linear(a), int(lanes));
    };
    return a.batch == 1 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
}

// Puts f(x), a norm, into the workspace, where the product then reads it.
template <typename T, typename X>
cudaError_t norm_apart(Linear& a, void* workspace, const Device& device, cudaStream_t stream) {
    if (workspace == nullptr) return cudaErrorInvalidValue;
    const int stride = padded(a.inputs);
    a.rows = 1;
    const int shared = Layout(a, sizeof(T), sizeof(X), 0, 0).bytes;
    if (shared > device.shared_bytes) return cudaErrorInvalidValue;
    const cudaError_t error = start(norm_kernel<T, X>, dim3(a.batch), 256, shared, device, stream, Linear(a),
                                    static_cast<T*>(workspace), int(stride));
    a.x = workspace, a.x_stride = stride, a.norm_weight = nullptr, a.groups = 1;
    a = complete<T>(a);
    return error;
}

template <typename T, typename X, int BYTES, int WARPS, bool RING>
cudaError_t few_rows(Linear a, const Device& device, cudaStream_t stream) {
    using Own = Product<T, BYTES, WARPS, RING>;
    const auto bytes = [](const Linear& a) {
        return Layout(a, sizeof(T), sizeof(X), Own::kRingBytes, WARPS * Own::kOutputs).bytes;
    };
    a.rows = most_rows(a, device, bytes);
    if (a.rows == 0) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.outputs, Own::kOutputs)),
                    static_cast<unsigned>(ceil_div(a.batch, a.rows)));
    return start(linear_kernel<T, X, BYTES, WARPS, RING>, grid, 32 * WARPS, bytes(a), device, stream, a);
}

// Fewer outputs a block where there are too few blocks to read at full speed.
template <typename T, typename X>
cudaError_t few_rows(const Linear& a, const Device& device, cudaStream_t stream) {
    const int64_t tiles = ceil_div(a.outputs, 32 * 2 / sizeof(T));
    if (2 * tiles >= 3 * device.multiprocessors) return few_rows<T, X, 16, 8, false>(a, device, stream);
    if (3 * tiles < device.multiprocessors) return few_rows<T, X, 4, 16, false>(a, device, stream);
    if (a.inputs < 2048) return few_rows<T, X, 8, 8, false>(a, device, stream);
    const bool ring = device.major >= 8 && device.shared_bytes >= 160 << 10;
    return ring ? few_rows<T, X, 8, 16, true>(a, device, stream) : few_rows<T, X, 8, 16, false>(a, device, stream);
}

// Whether tile_kernel takes it. Where blocks have no clusters, to split the inputs, the other kernels are faster for up to 8 rows,
// and for as few outputs as x_proj's (samples/results/step.txt, 159); with clusters, for up to 8 rows and few inputs.
template <typename T, bool HEAD>
bool is_tile(const Linear& a, const Device& device) {
    if (sizeof(T) != 2 || device.major < 8 || a.norm_weight != nullptr || !a.by_16 || a.batch <= kNormRows) return false;
    if (HEAD || device.major >= 9) return a.batch > kColumns || a.inputs >= 2048;
    using Least = Tile<1, 1, HEAD>;
    const int64_t tiles = ceil_div(a.outputs, Least::kOutputs) * ceil_div(a.batch, Least::kRows);
    return a.batch > kColumns && 4 * tiles >= device.multiprocessors;
}

template <int ROW_TILES, bool HEAD, typename Run>
auto with_tile(int nt, Run&& run) {
    switch (nt) {
        case 1: return run(Tile<ROW_TILES, 1, HEAD>{});
        case 2: return run(Tile<ROW_TILES, 2, HEAD>{});
        case 3: return run(Tile<ROW_TILES, 3, HEAD>{});
        case 4: return run(Tile<ROW_TILES, 4, HEAD>{});
        default: return run(Tile<ROW_TILES, kMostTiles, HEAD>{});
    }
}

struct Cut {
    int row_tiles = 0, nt = 0, split = 1;  // ROW_TILES and NT of a tile, and blocks that split its inputs
    int64_t cost = 0;
};

struct TileSizes {
    int bytes, rows, outputs, turns;
};

// The cut that leaves the fullest multiprocessor the fewest bytes to move: those of the stages, each of which costs as much
// as 5 KiB besides, and sums that go to other blocks, there and back. H200: the fastest, or near it, of all that were tried.
template <int ROW_TILES, bool HEAD>
void choose_cut(const Linear& a, const Device& device, Cut& best) {
    const int64_t stages = ceil_div(a.inputs, kTileInputs);
    const int most = HEAD || device.major < 9 ? 1 : 8;
    for (Cut cut{ROW_TILES, 1, 1}; cut.nt <= kMostTiles; cut.nt++) {
        const TileSizes own = with_tile<ROW_TILES, HEAD>(cut.nt, [](auto tile) {
            using Own = decltype(tile);
            return TileSizes{Own::kBytes, Own::kRows, Own::kOutputs, Own::kTurns};
        });
        if (own.bytes > device.shared_bytes || (cut.nt == kMostTiles && !is_together(a))) break;
        for (cut.split = 1; cut.split <= most && cut.split <= stages; cut.split *= 2) {
            // A cluster lies in one part of the device; not all parts can be filled with those of more than two blocks.
            const int64_t room = device.multiprocessors * (cut.split <= 2 ? 1000 : 1000 - 35 * cut.split) / 1000;
            const int64_t blocks = ceil_div(a.outputs, own.outputs) * cut.split * ceil_div(a.batch, own.rows);
            const int64_t sums = cut.split == 1 ? 0 : 2 * 4 * own.turns * own.rows * own.outputs;
            const int64_t stage = 2 * kTileInputs * (own.outputs + own.rows) + (5 << 10);
            cut.cost = ceil_div(blocks, room) * (ceil_div(stages, cut.split) * stage + sums);
            if (best.nt == 0 || cut.cost < best.cost) best = cut;
        }
    }
}

template <typename T, int ROW_TILES, bool HEAD>
cudaError_t tile_rows(const Linear& a, const Cut& cut, const Device& device, cudaStream_t stream) {
    return with_tile<ROW_TILES, HEAD>(cut.nt, [&](auto tile) {
        using Own = decltype(tile);
        const dim3 grid(static_cast<unsigned>(ceil_div(a.outputs, Own::kOutputs) * cut.split),
                        static_cast<unsigned>(ceil_div(a.batch, Own::kRows)));
        return start_clusters(tile_kernel<T, ROW_TILES, Own::kTiles, HEAD>, grid, kTileThreads, Own::kBytes, cut.split,
                              device, stream, Linear(a), int(cut.split));
    });
}

// Rows in one tile, or in several smaller ones, which read the weights again: of few outputs there are blocks to spare.
template <typename T, bool HEAD>
cudaError_t many_rows(const Linear& a, const Device& device, cudaStream_t stream) {
    Cut cut;
    choose_cut<1, HEAD>(a, device, cut);
    if (a.batch > 16) choose_cut<2, HEAD>(a, device, cut);
    if (a.batch > 32) choose_cut<4, HEAD>(a, device, cut);
    switch (cut.row_tiles) {
        case 1: return tile_rows<T, 1, HEAD>(a, cut, device, stream);
        case 2: return tile_rows<T, 2, HEAD>(a, cut, device, stream);
        case 4: return tile_rows<T, 4, HEAD>(a, cut, device, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <typename T, typename X>
cudaError_t linear(Linear a, void* workspace, cudaStream_t stream) {
    Device device;
    cudaError_t error = device.read(norm_kernel<float, float>);
    if (error != cudaSuccess) return error;
    a = complete<X>(a);
    const int lanes = row_lanes<T>(a, device);
    if (lanes > 0) return row_product<T, X>(a, lanes, device, stream);
    const bool apart = a.batch > kNormRows && a.norm_weight != nullptr;
    if (apart) error = norm_apart<T, X>(a, workspace, device, stream);
    if (error != cudaSuccess) return error;
    if constexpr (sizeof(T) == 2) {
        if ((apart || sizeof(X) == 2) && is_tile<T, false>(a, device)) return many_rows<T, false>(a, device, stream);
    }
    return apart ? few_rows<T, T>(a, device, stream) : few_rows<T, X>(a, device, stream);
}

bool is_valid(int32_t batch, int32_t length, int32_t dtype, const void* weight, int64_t weight_row) {
    return batch > 0 && length == 1 && dtype >= MAMBA_FLOAT32 && dtype <= MAMBA_BFLOAT16 && is_aligned(weight, 16) &&
           weight_row > 0 && weight_row * item_bytes(dtype) % 16 == 0;
}

template <typename T>
cudaError_t run(const MambaInProj& c, void* workspace, cudaStream_t stream) {
    if (!is_valid(c.batch, c.length, c.dtype, c.weight, c.outputs) || c.width < 1 || c.conv_width < 2 ||
        c.conv_width > 8 || c.conv_first < 0 || c.channels < 1 || c.conv_first > c.outputs - c.channels) {
        return cudaErrorInvalidValue;
    }
    return linear<T, float>(linear_of(c), workspace, stream);
}

// Whether x_proj_kernel takes it, so many rows a cluster: of some rows, where blocks have clusters.
template <int ROW_TILES>
bool is_low(const Linear& a, const Device& device) {
    using Own = LowTile<ROW_TILES>;
    return device.major >= 9 && a.batch > 1 && a.by_16 && a.outputs % 8 == 0 &&
           is_aligned(a.y, 8) && Own::bytes(Own::inputs(a)) <= device.shared_bytes - kLowSpare;
}

// Its row tiles, and its blocks.
int low_tiles(int batch) { return batch <= LowTile<1>::kRows ? 1 : 2; }
dim3 low_grid(int outputs, int batch) {
    const int rows = LowTile<1>::kRows * low_tiles(batch);
    return dim3(static_cast<unsigned>(ceil_div(outputs, kLowOutputs) * kLowSplit), static_cast<unsigned>(ceil_div(batch, rows)));
}

// Each block is given so much shared memory that none of the scan, which start early and would slow it, has room beside it.
template <typename T, int ROW_TILES>
cudaError_t low(const Linear& a, const Device& device, cudaStream_t stream) {
    const dim3 grid = low_grid(a.outputs, a.batch);
    using Own = LowTile<ROW_TILES>;
    const int bytes = std::max(Own::bytes(Own::inputs(a)), std::min(kLowShared, device.shared_bytes - kLowSpare));
    return start_clusters(x_proj_kernel<T, ROW_TILES>, grid, kLowThreads, bytes, kLowSplit, device, stream, Linear(a));
}

template <typename T>
cudaError_t run(const MambaXProj& c, void* workspace, cudaStream_t stream) {
    if (!is_valid(c.batch, c.length, c.dtype, c.weight, c.outputs) || c.channels < 1 || c.row < c.channels) {
        return cudaErrorInvalidValue;
    }
    Linear a{};
    a.batch = c.batch, a.inputs = c.channels, a.outputs = c.outputs, a.x_stride = c.row, a.groups = 1;
    a.x = c.x, a.weight = c.weight, a.y = c.y;
    if constexpr (sizeof(T) == 2) {
        Device device;
        const cudaError_t error = device.read(norm_kernel<float, float>);
        if (error != cudaSuccess) return error;
        a = complete<T>(a);
        const int tiles = low_tiles(a.batch);
        if (tiles == 1 && is_low<1>(a, device)) return low<T, 1>(a, device, stream);
        if (tiles == 2 && is_low<2>(a, device)) return low<T, 2>(a, device, stream);
    }
    return linear<T, T>(a, workspace, stream);
}

template <typename T>
cudaError_t run(const MambaOutProj& c, void* workspace, cudaStream_t stream) {
    if (!is_valid(c.batch, c.length, c.dtype, c.weight, c.width) || c.channels < 1 || c.groups < 1 ||
        c.channels % c.groups != 0) {
        return cudaErrorInvalidValue;
    }
    Linear a{};
    a.batch = c.batch, a.inputs = c.channels, a.outputs = c.width, a.x_stride = c.channels, a.groups = c.groups;
    a.eps = c.eps, a.x = c.x, a.weight = c.weight, a.bias = c.bias, a.norm_weight = c.norm_weight;
    a.residual = c.residual, a.y = c.y;
    return linear<T, T>(a, workspace, stream);
}

template <typename T>
cudaError_t run(const MambaHead& c, void* workspace, cudaStream_t stream) {
    if (!is_valid(c.batch, c.length, c.dtype, c.weight, c.width) || c.vocab < 1) return cudaErrorInvalidValue;
    Device device;
    cudaError_t error = device.read(norm_kernel<float, float>);
    if (error != cudaSuccess) return error;
    Linear a{};
    a.batch = c.batch, a.inputs = c.width, a.outputs = c.vocab, a.x_stride = c.width, a.groups = 1, a.eps = c.eps;
    a.x = c.hidden, a.weight = c.weight, a.norm_weight = c.norm_weight, a.y = c.y;
    a = complete<float>(a);
    if (a.batch <= kHeadNormRows) {
        const int64_t warps = std::min<int64_t>(ceil_div(a.inputs, 32 * kPiece<T>), kRowHeadWarps);
        const dim3 grid(static_cast<unsigned>(ceil_div(a.outputs, kRowHeadOutputs)));
        return start(row_head_kernel<T>, grid, static_cast<int>(32 * warps), 0, device, stream, Linear(a));
    }
    error = norm_apart<T, float>(a, workspace, device, stream);
    if (error != cudaSuccess) return error;
    if constexpr (sizeof(T) == 2) {
        if (is_tile<T, true>(a, device)) return many_rows<T, true>(a, device, stream);
    }
    const auto bytes = [](const Linear& a) { return Layout(a, sizeof(T), sizeof(T), 0, 0).bytes; };
    a.rows = most_rows(a, device, bytes);
    if (a.rows == 0) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.outputs, kHeadWarps * kHeadOutputs)),
                    static_cast<unsigned>(ceil_div(a.batch, a.rows)));
    return start(head_kernel<T>, grid, 32 * kHeadWarps, bytes(a), device, stream, a);
}

// Blocks of update_rows_kernel, of `all` with `shared` bytes each, that read old states at once: those that find room beside
// x_proj's. But all, where they run in turns (samples/results/step.txt, 90).
int64_t blocks_at_once(const MambaSelectiveUpdate& c, int64_t all, int shared, const Device& device) {
    const dim3 low = low_grid(c.low_row, c.batch);
    const int64_t of_one = std::min(scan::kUpdateResident, (device.shared_bytes + 1024) / (shared + 1024));
    if (all > of_one * device.multiprocessors) return all;
    return of_one * std::max<int64_t>(device.multiprocessors - int64_t{low.x} * low.y, 0);
}

// Of 16 states and 16-bit weights, with as many rows a block as there are, up to 8. `early`: whether what wrote the old states
// has ended before the kernel ahead began, for they are read before it has ended.
template <typename T, typename S>
cudaError_t update_rows(
    const MambaSelectiveUpdate& c, int64_t groups, bool early, const Device& device, cudaStream_t stream) {
    const auto bytes = [&](int rows) {
        return scan::UpdateLayout(c, rows, sizeof(T), scan::kUpdateSums, rows, 16 * scan::kUpdateChannels<T>).bytes;
    };
    int rows = std::min(c.batch, kColumns);
    while (rows > 1 && bytes(rows) > device.shared_bytes) rows--;
    const int shared = bytes(rows);
    if (shared > device.shared_bytes) return cudaErrorInvalidValue;
    const auto kernel = scan::update_rows_kernel<T, S>;
    const cudaError_t allowed = allow_shared(kernel, shared);
    if (allowed != cudaSuccess) return allowed;
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(ceil_div(c.batch, rows)));
    early = early && device.major >= 9;
    const int64_t all = int64_t{grid.x} * grid.y, at_once = early ? blocks_at_once(c, all, shared, device) : all;
    return launch_early(kernel, grid, dim3(32 * scan::kUpdateWarps<T>), shared, 1, early, stream, MambaSelectiveUpdate(c),
                        int(rows), static_cast<int>(at_once));
}

template <typename T>
cudaError_t update(const MambaSelectiveUpdate& c, bool early, cudaStream_t stream) {
    if (!is_valid(c.batch, c.length, c.dtype, c.dt_weight, c.channels) || c.rank < 1 || c.state_size < 1 ||
        c.state_size > 256 || c.row != 2 * int64_t{c.channels} || c.low_row != c.rank + 2 * c.state_size ||
        c.state_dtype < MAMBA_FLOAT32 || c.state_dtype > MAMBA_BFLOAT16 || !is_aligned(c.xz, 16) ||
        !is_aligned(c.low, 16)) {
        return cudaErrorInvalidValue;
    }
    Device device;
    const cudaError_t error = device.read(norm_kernel<float, float>);
    if (error != cudaSuccess) return error;
    const int64_t groups = ceil_div(c.channels, scan::kUpdateChannels<T>);
    if constexpr (sizeof(T) == 2) {
        const int more_than = device.major >= 9 ? 1 : 2;  // rows; samples/results/step.txt, 154
        if (device.major >= 8 && c.state_size == 16 && c.batch > more_than && is_aligned(c.ssm_state, 16)) {
            cudaError_t started = cudaErrorInvalidValue;
            with_dtype(
                c.state_dtype, [&](auto s) { started = update_rows<T, decltype(s)>(c, groups, early, device, stream); });
            return started;
        }
    }
    // The fewest rows a block with which all blocks, two on a multiprocessor, run at once, if there is room for them.
    int rows = 1;
    while (rows < std::min(c.batch, kColumns) && groups * ceil_div(c.batch, rows) > 2 * int64_t{device.multiprocessors}) rows++;
    const auto kernel = rows == 1   ? scan::update_kernel<T, 1>
                        : rows == 2 ? scan::update_kernel<T, 2>
                                    : scan::update_kernel<T, kColumns>;
    const auto bytes = [&] {
        return scan::UpdateLayout(c, rows, sizeof(T), scan::kUpdateWarps<T> * scan::kUpdateChannels<T>).bytes;
    };
    while (rows > 1 && bytes() > device.shared_bytes) rows--;
    if (bytes() > device.shared_bytes) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(ceil_div(c.batch, rows)));
    return start(kernel, grid, 32 * scan::kUpdateWarps<T>, bytes(), device, stream, MambaSelectiveUpdate(c), int(rows));
}

template <typename T>
cudaError_t run(const MambaSelectiveUpdate& c, void*, cudaStream_t stream) {
    return update<T>(c, false, stream);
}

template <typename Call>
int with_type(const Call* call, void* workspace, void* stream) {
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(call->dtype, [&](auto t) { error = run<decltype(t)>(*call, workspace, static_cast<cudaStream_t>(stream)); });
    return error;
}

}  // namespace
}  // namespace step

// A call of MambaModel reads a layer's state once, after a kernel that does not start early: embed.
cudaError_t model::selective_update_early(const MambaSelectiveUpdate& call, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(call.dtype, [&](auto t) { error = step::update<decltype(t)>(call, true, stream); });
    return error;
}

}  // namespace mamba

extern "C" size_t mamba_in_proj_workspace(const MambaInProj* c) {
    return mamba::step::norm_bytes(c->batch, mamba::step::kNormRows, c->width, c->dtype);
}
extern "C" size_t mamba_x_proj_workspace(const MambaXProj*) { return 0; }
extern "C" size_t mamba_selective_update_workspace(const MambaSelectiveUpdate*) { return 0; }
extern "C" size_t mamba_out_proj_workspace(const MambaOutProj* c) {
    return mamba::step::norm_bytes(c->batch, mamba::step::kNormRows, c->channels, c->dtype);
}
extern "C" size_t mamba_head_workspace(const MambaHead* c) {
    return mamba::step::norm_bytes(c->batch, mamba::step::kHeadNormRows, c->width, c->dtype);
}

extern "C" int mamba_in_proj(const MambaInProj* call, void* workspace, void* stream) {
    return mamba::step::with_type(call, workspace, stream);
}
extern "C" int mamba_x_proj(const MambaXProj* call, void* workspace, void* stream) {
    return mamba::step::with_type(call, workspace, stream);
}
extern "C" int mamba_selective_update(const MambaSelectiveUpdate* call, void* workspace, void* stream) {
    return mamba::step::with_type(call, workspace, stream);
}
extern "C" int mamba_out_proj(const MambaOutProj* call, void* workspace, void* stream) {
    return mamba::step::with_type(call, workspace, stream);
}
extern "C" int mamba_head(const MambaHead* call, void* workspace, void* stream) {
    return mamba::step::with_type(call, workspace, stream);
}
