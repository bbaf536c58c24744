// MambaModel: which kernels run it, and the chain of one token of few rows, the parts of a decode step over the workspace.
#include <algorithm>

#include "model.h"
#include "prompt_rows.cuh"
#include "settle.cuh"

namespace mamba {
namespace model {
namespace {

constexpr int kChainRows = 2;  // up to which cuBLAS does not take products from the parts of a step

// --- the chain ----------------------------------------------------------------------------------------------------

// What the chain keeps in the workspace. The residual stream alternates between two places: a part may still read one
// when the next has begun to write.
struct Buffers {
    float* hidden[2];  // [B, d]
    void *projected, *low, *y, *part;  // [B, M], [B, R + 2 N] and [B, D] T; the workspace of a part
    size_t bytes;

    Buffers(const MambaModel& c, void* workspace) {
        Room room{workspace};
        const auto take = [&](int64_t width, int64_t item) { return room.take(c.batch * width * item); };
        for (float*& stream : hidden) stream = static_cast<float*>(take(c.width, 4));
        projected = take(c.outputs, item_bytes(c.dtype));
        low = take(is_mamba2(c) ? 0 : c.rank + 2 * c.state_size, item_bytes(c.dtype));
        y = take(c.inner, item_bytes(c.dtype));
        part = room.take(of_parts(c));
        bytes = room.bytes;
    }

    static size_t of_parts(const MambaModel& c) {
        const MambaLayer none{};
        const MambaInProj first = in_proj(c, none, nullptr, nullptr);
        const MambaOutProj last = out_proj(c, none, nullptr, nullptr, nullptr);
        const MambaHead after = head(c, nullptr);
        const size_t most = std::max(
            {mamba_in_proj_workspace(&first), mamba_out_proj_workspace(&last), mamba_head_workspace(&after)});
        if (is_mamba2(c)) {
            const MambaSsdUpdate update = ssd_update(c, none, nullptr, nullptr);
            return std::max(most, mamba_ssd_update_workspace(&update));
        }
        const MambaXProj low = x_proj(c, none, nullptr, nullptr);
        const MambaSelectiveUpdate update = selective_update(c, none, nullptr, nullptr, nullptr);
        return std::max({most, mamba_x_proj_workspace(&low), mamba_selective_update_workspace(&update)});
    }
};

int chain(const MambaModel& c, void* workspace, cudaStream_t stream) {
    if (workspace == nullptr) return cudaErrorInvalidValue;
    const Buffers at(c, workspace);
    int error = cudaErrorInvalidValue;
    const bool may_defer = defers(c);
    with_dtype(c.dtype, [&](auto t) { error = embed<decltype(t)>(c, at.hidden[0], may_defer, stream); });
    const auto run = [&](auto launch, const auto& part) {
        if (error == cudaSuccess) error = launch(&part, at.part, stream);
    };
    for (int32_t i = 0; i < c.layers; i++) {
        const MambaLayer& l = c.each[i];
        float* const before = at.hidden[i % 2];
        const pending::Pending late = may_defer ? pending_of(c, i) : pending::Pending{};
        run(mamba_in_proj, in_proj(c, l, before, at.projected));
        if (is_mamba2(c)) {
            if (error == cudaSuccess) error = ssd_update_pending(ssd_update(c, l, at.projected, at.y), late, stream);
        } else {
            run(mamba_x_proj, x_proj(c, l, at.projected, at.low));
            const MambaSelectiveUpdate update = selective_update(c, l, at.projected, at.low, at.y);
            if (error == cudaSuccess) error = selective_update_early(update, stream);
        }
        run(mamba_out_proj, out_proj(c, l, at.y, before, at.hidden[(i + 1) % 2]));
    }
    run(mamba_head, head(c, at.hidden[c.layers % 2]));
    return error;
}

// --- checks and choice --------------------------------------------------------------------------------------------

bool is_dtype(int32_t dtype) { return dtype >= MAMBA_FLOAT32 && dtype <= MAMBA_BFLOAT16; }

bool sizes_agree(const MambaModel& c) {
    const int64_t D = c.inner, states = int64_t{c.groups} * c.state_size;
    if (!is_mamba2(c)) return c.rank > 0 && c.channels == D && c.outputs == 2 * D;
    return c.rank == 0 && c.head_dim > 0 && c.groups > 0 && c.heads % c.groups == 0 &&
           D == int64_t{c.heads} * c.head_dim && c.channels == D + 2 * states && c.outputs == D + c.channels + c.heads;
}

}  // namespace

bool are_sizes(const MambaModel& c) {
    const bool bounds = c.batch > 0 && c.length > 0 && c.length <= 1 << 20 && c.layers > 0 && c.width > 0 && c.vocab > 0 &&
                        c.conv_width >= 2 && c.conv_width <= 8 && c.inner > 0 && c.state_size > 0 && c.state_size <= 256;
    return bounds && sizes_agree(c) && is_dtype(c.dtype) && is_dtype(c.state_dtype);
}

namespace {

// Weights of products are read 16 bytes at a time.
bool is_valid(const MambaModel& c) {
    const auto weight = [&](const void* at, int64_t outputs) {
        return at != nullptr && is_aligned(at, 16) && outputs * item_bytes(c.dtype) % 16 == 0;
    };
    if (!are_sizes(c) || c.each == nullptr) return false;
    if (!weight(c.embedding, c.width) || !weight(c.head, c.width)) return false;
    return std::all_of(c.each, c.each + c.layers, [&](const MambaLayer& l) {
        const bool scan = is_mamba2(c) || (weight(l.x_proj, c.rank + 2 * c.state_size) && weight(l.dt_proj, c.inner));
        return scan && weight(l.in_proj, c.outputs) && weight(l.out_proj, c.width);
    });
}

// Whether products by cuBLAS, and what then are kernels of their own around them, are faster than the parts of a step. What
// decides on an H200 is the work of a product, rows d^2, from which on they are: of d 2048 that is 3 rows of Mamba-2, 12 of
// Mamba, of d 768 22 and 86. samples/results/step.txt, 35, has both times of ten models.
bool is_wide(const MambaModel& c) {
    const int64_t work = int64_t{c.batch} * c.width * c.width, from = is_mamba2(c) ? 12 << 20 : 48 << 20;
    return c.length > 1 || (c.batch > kChainRows && work >= from);
}

// --- what is pending

int64_t record_words(const MambaModel& c) {
    return ceil_div(c.heads * (pending::kHeadWords + c.head_dim) + int64_t{c.groups} * c.state_size, 4) * 4;
}

int64_t pending_row(const MambaModel& c) {
    return is_mamba2(c) ? ceil_div(pending::kMarkWords + c.layers * pending::kMost * record_words(c), 64) * 64 : 0;
}

bool is_in_place(const MambaModel& c) {
    return c.pending == c.pending_out && std::all_of(c.each, c.each + c.layers, [](const MambaLayer& l) {
               return l.ssm_state == l.ssm_state_out;
           });
}

// What comes before a call that does not look at what is pending.
cudaError_t settle(const MambaModel& c, cudaStream_t stream) {
    if (c.layers > pending::kSettleLayers || c.pending_out == nullptr || c.pending_row < pending_row(c)) {
        return cudaErrorInvalidValue;
    }
    pending::Settle a{};
    a.marks = reinterpret_cast<const uint32_t*>(c.pending), a.records = c.pending + pending::kMarkWords;
    a.row = c.pending_row, a.record = static_cast<int32_t>(record_words(c));
    a.batch = c.batch, a.heads = c.heads, a.head_dim = c.head_dim, a.state_size = c.state_size, a.groups = c.groups;
    a.state_dtype = c.state_dtype;
    for (int32_t i = 0; i < c.layers; i++) a.states[i] = const_cast<void*>(c.each[i].ssm_state);
    const dim3 grid(pending::kSettleBlocks, static_cast<unsigned>(c.layers),
                    static_cast<unsigned>(std::min(c.batch, pending::kSettleRows)));
    pending::settle_kernel<<<grid, pending::kSettleThreads, 0, stream>>>(a);
    const unsigned blocks = static_cast<unsigned>(ceil_div(c.batch, pending::kSettleThreads));
    for (float* const marks : {const_cast<float*>(c.pending), c.pending_out}) {
        pending::clear_marks_kernel<<<blocks, pending::kSettleThreads, 0, stream>>>(
            reinterpret_cast<uint32_t*>(marks), c.pending_row, c.batch);
        if (c.pending == c.pending_out) break;
    }
    return cudaGetLastError();
}

int run(const MambaModel& c, void* workspace, cudaStream_t stream) {
    if (!is_valid(c)) return cudaErrorInvalidValue;
    if (is_mamba2(c) && c.pending != nullptr && (c.length > 1 || !is_in_place(c))) {
        const cudaError_t error = settle(c, stream);
        if (error != cudaSuccess) return error;
    }
    if (is_token(c)) return token_of_row(c, workspace, stream);
    return is_wide(c) || is_rows(c) ? prompt(c, workspace, stream) : chain(c, workspace, stream);
}

// Enough for fewer tokens too: for one, where there are more; and for one of one row.
size_t workspace(const MambaModel& c) {
    const size_t of_chain = std::max(Buffers(c, nullptr).bytes, token_workspace(c));
    MambaModel one = c;
    one.length = 1;
    return is_wide(c) || are_rows_sizes(c) ? std::max({of_chain, prompt_workspace(c), prompt_workspace(one)}) : of_chain;
}

}  // namespace

bool defers(const MambaModel& c) {
    return is_mamba2(c) && c.pending != nullptr && c.length == 1 && c.pending_row >= pending_row(c) && is_in_place(c) &&
           std::all_of(c.each, c.each + c.layers,
                       [&](const MambaLayer& l) { return ssd_update_defers(ssd_update(c, l, nullptr, nullptr)); });
}

pending::Pending pending_of(const MambaModel& c, int layer) {
    const int64_t record = record_words(c), first = pending::kMarkWords + layer * pending::kMost * record;
    return {reinterpret_cast<uint32_t*>(c.pending_out), c.pending_out + first, c.pending_row, static_cast<int32_t>(record)};
}

}  // namespace model
}  // namespace mamba

extern "C" size_t mamba_model_workspace(const MambaModel* call) { return mamba::model::workspace(*call); }

extern "C" int32_t mamba_pending_row(const MambaModel* call) {
    return static_cast<int32_t>(mamba::model::pending_row(*call));
}

extern "C" int mamba_model(const MambaModel* call, void* workspace, void* stream) {
    return mamba::model::run(*call, workspace, static_cast<cudaStream_t>(stream));
}
