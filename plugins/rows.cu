// Products of a few tokens, of many rows or of a short prompt, by rows_kernel: whether it takes them, and how they are cut.
#include <algorithm>
#include <iterator>

#include "model.h"
#include "prompt_rows.cuh"

#if CUDART_VERSION >= 12010
#include "rows_product.cuh"
#include "tensor_map.h"
#endif

namespace mamba {
namespace model {

constexpr int kOneRowWidth = 4096, kWidthStep = 128;

// From two rows on, or one of wide models, it is faster than the parts of a step: samples/results/step.txt, 52, 87 and 154.
bool are_rows_sizes(const MambaModel& c) {
    const int64_t rows = rows_of(c), least = c.width < kOneRowWidth ? 2 : 1;
    return rows >= least && rows <= kMostRows && c.dtype != MAMBA_FLOAT32 && c.width % kWidthStep == 0 &&
           c.inner % (kSums * kWidthStep) == 0 && c.outputs % 8 == 0;
}

#if CUDART_VERSION >= 12010
namespace {

using rows::kInputs;
using rows::kRows;
using rows::kSplit;
using rows::Product;
using rows::Tile;

static_assert(kMostRows == 2 * kRows && kWidthStep == kSplit * kInputs, "there are two tiles, and whole stages");
constexpr int kColumns[] = {192, 160, 144, 128, 96, 64};  // of a cluster, for which there are kernels

// Bytes of the next weights that a product asks for when it ends, as many as memory brings until what follows it reads: the norm
// behind out_proj; behind in_proj the scan, or soon x_proj, which is the sooner at work the fewer rows there are. With two tiles
// of rows memory is not idle then, unless they are a prompt's (samples/results/step.txt, 131 and 143).
constexpr int64_t kAsked = 4 << 20;
int64_t asked_by_out_proj(const MambaModel& c) { return c.length > 1 || c.batch <= kRows ? kAsked : 0; }
int64_t asked_by_in_proj(const MambaModel& c) {
    const bool soon = !is_mamba2(c) && c.length == 1 && c.batch <= kRows / 2;
    return asked_by_out_proj(c) * (soon ? 1 : 2);
}

// The columns with which the fullest multiprocessor reads the fewest weights; of several, the most.
int columns_of(int outputs, int parts, const Device& device) {
    const auto cost = [&](int columns) {
        const int64_t clusters = ceil_div(outputs, columns) * parts;
        return ceil_div(clusters, std::max(device.multiprocessors / kSplit, 1)) * columns;
    };
    return *std::min_element(kColumns, std::end(kColumns), [&](int a, int b) { return cost(a) < cost(b); });
}

// Weights [inputs, outputs], which a product will read in so many parts of its inputs; start() says how much a warp asks for.
rows::Next next_of(const void* weights, int inputs, int outputs, int parts) {
    return {static_cast<const char*>(weights), int64_t{2} * inputs / parts * outputs, parts, 0};
}

// asked: bytes of the next weights.
template <typename T, int COLUMNS, int TILES>
cudaError_t start(Product p, int parts, int64_t asked, int32_t dtype, cudaStream_t stream) {
    using Own = Tile<COLUMNS, TILES>;
    const auto kernel = rows::rows_kernel<T, COLUMNS, TILES>;
    const step::Linear& a = p.a;
    const Encode encode = encode_of_driver();
    const auto weights = [&](TensorMap& map, int columns) {
        return make_map(encode, map, a.weight, dtype, a.inputs, a.outputs, kInputs, columns);
    };
    p.stages = a.inputs / (kSplit * parts * kInputs);
    const int stage = Own::stage(a.batch);
    p.slots = std::min((rows::kShared - Own::kRing) / stage, Own::kMostSlots);
    const bool made = weights(p.weight, 64) && (Own::kRest == 0 || weights(p.rest, Own::kRest)) &&
                      make_map(encode, p.x, a.x, dtype, a.batch, a.inputs, Own::box_rows(a.batch), kInputs);
    if (!made) return cudaErrorInvalidValue;
    const int bytes = Own::kRing + p.slots * stage;
    const cudaError_t error = allow_shared(kernel, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.outputs, COLUMNS) * kSplit), parts);
    const int64_t warps = grid.x * grid.y * Own::kMultiply / p.next.parts;  // that share a part's
    p.next.asked = static_cast<int32_t>(std::min(asked / p.next.parts, p.next.part) / warps / 16 * 16);
    return launch_early(kernel, grid, dim3(rows::kThreads), bytes, kSplit, true, stream, p);
}

template <typename T, int TILES>
cudaError_t start(const Product& p, int parts, int64_t asked, int columns, int32_t dtype, cudaStream_t stream) {
    switch (columns) {
        case 64: return start<T, 64, TILES>(p, parts, asked, dtype, stream);
        case 96: return start<T, 96, TILES>(p, parts, asked, dtype, stream);
        case 128: return start<T, 128, TILES>(p, parts, asked, dtype, stream);
        case 144: return start<T, 144, TILES>(p, parts, asked, dtype, stream);
        case 160: return start<T, 160, TILES>(p, parts, asked, dtype, stream);
        default: return start<T, 192, TILES>(p, parts, asked, dtype, stream);
    }
}

cudaError_t start(const Product& p, int parts, int64_t asked, int32_t dtype, cudaStream_t stream) {
    Device device;
    const cudaError_t error = device.read(rows::rows_kernel<__half, 64, 1>);
    if (error != cudaSuccess) return error;
    const int columns = columns_of(p.a.outputs, parts, device);
    const auto run = [&](auto t) {
        using T = decltype(t);
        return p.a.batch <= kRows ? start<T, 1>(p, parts, asked, columns, dtype, stream)
                                  : start<T, 2>(p, parts, asked, columns, dtype, stream);
    };
    return dtype == MAMBA_FLOAT16 ? run(__half{}) : run(__nv_bfloat16{});
}

// Of x, which is normed. Without the convolution of a prompt, which is along it.
step::Linear linear_of(const MambaModel& c, const MambaLayer& l, const void* x, void* y) {
    step::Linear a = step::linear_of(in_proj(c, l, nullptr, y));
    a.x = x, a.norm_weight = nullptr;
    if (c.length == 1) return a;
    a.batch = static_cast<int32_t>(rows_of(c));
    a.conv_channels = 0;
    a.conv_weight = a.conv_bias = a.conv_state = a.conv_state_out = nullptr;
    return a;
}

}  // namespace

bool is_rows(const MambaModel& c) {
    Device device;
    if (!are_rows_sizes(c) || device.read(rows::rows_kernel<__half, 64, 1>) != cudaSuccess) return false;
    if (!has_bulk_copies(device) || device.own_major != 9) return false;  // PTX of 9.0, for newer devices, has no wgmma
    return std::all_of(c.each, c.each + c.layers, [&](const MambaLayer& l) {
        return step::is_together(linear_of(c, l, nullptr, nullptr));
    });
}

cudaError_t rows_in_proj(const MambaModel& c, const MambaLayer& l, const void* x, void* y, cudaStream_t stream) {
    Product p{};
    p.a = linear_of(c, l, x, y);
    p.next = next_of(l.out_proj, c.inner, c.width, kSums * kSplit);
    return start(p, 1, asked_by_in_proj(c), c.dtype, stream);
}

cudaError_t rows_out_proj(const MambaModel& c, int layer, const void* x, float* sums, cudaStream_t stream) {
    Product p{};
    step::Linear& a = p.a;
    a.batch = static_cast<int32_t>(rows_of(c)), a.inputs = a.x_stride = c.inner, a.outputs = c.width;
    a.x = x, a.weight = c.each[layer].out_proj;
    p.sums = sums;
    const bool last = layer + 1 == c.layers;
    p.next = next_of(last ? nullptr : c.each[layer + 1].in_proj, c.width, c.outputs, kSplit);
    return start(p, kSums, last ? 0 : asked_by_out_proj(c), c.dtype, stream);
}

#else

bool is_rows(const MambaModel&) { return false; }
cudaError_t rows_in_proj(const MambaModel&, const MambaLayer&, const void*, void*, cudaStream_t) {
    return cudaErrorNotSupported;
}
cudaError_t rows_out_proj(const MambaModel&, int, const void*, float*, cudaStream_t) {
    return cudaErrorNotSupported;
}

#endif

}  // namespace model
}  // namespace mamba
