// The ways in which MambaModel is run, of which model.cu chooses. Host code alone.
#pragma once

#include "pending.cuh"

namespace mamba {
namespace model {

// model.cu: whether sizes and dtypes are within bounds and agree.
bool are_sizes(const MambaModel& call);

inline int64_t rows_of(const MambaModel& c) { return int64_t{c.batch} * c.length; }  // tokens, all of which products see

// prompt.cu: of more tokens than one and of many rows, products by cuBLAS.
size_t prompt_workspace(const MambaModel& call);
cudaError_t prompt(const MambaModel& call, void* workspace, cudaStream_t stream);

// model.cu: whether a step may leave its tokens pending (pending.cuh), and where they then lie of a layer.
bool defers(const MambaModel& call);
pending::Pending pending_of(const MambaModel& call, int layer);

// rows.cu: products of up to kMostRows tokens by its kernel, where they can be and are faster: in_proj, of a single token a row
// with the convolution, and out_proj in kSums sums [kSums, B, L, d] of as many inputs each. Whether a device can, is_rows() asks
// besides. Each asks the L2 cache for weights of the product behind it.
constexpr int kMostRows = 128;
bool are_rows_sizes(const MambaModel& call);
bool is_rows(const MambaModel& call);
cudaError_t rows_in_proj(const MambaModel& call, const MambaLayer& layer, const void* x, void* y, cudaStream_t stream);
cudaError_t rows_out_proj(const MambaModel& call, int layer, const void* x, float* sums, cudaStream_t stream);

// step.cu: mamba_selective_update() that reads old states before the kernel ahead has ended. What wrote them must have ended
// before that began.
cudaError_t selective_update_early(const MambaSelectiveUpdate& call, cudaStream_t stream);

// ssd_scan.cu: mamba_ssd_update() that may leave tokens pending, where it can and that is faster. It reads states, marks and
// records before the kernel ahead has ended. What wrote them must have ended before that began.
bool ssd_update_defers(const MambaSsdUpdate& call);
cudaError_t ssd_update_pending(const MambaSsdUpdate& call, const pending::Pending& before, cudaStream_t stream);

// token.cu: one row's token in one kernel, where that can be and is faster. The workspace is enough for it, whatever the
// call's batch and length.
bool is_token(const MambaModel& call);
size_t token_workspace(const MambaModel& call);
cudaError_t token_of_row(const MambaModel& call, void* workspace, cudaStream_t stream);

// Takes places of a workspace, one after the other, each at a multiple of 256 bytes.
struct Room {
    void* start;
    size_t bytes = 0;

    explicit Room(void* start) : start(start) {}
    void* take(int64_t count) {
        void* const place = static_cast<char*>(start) + bytes;
        bytes += static_cast<size_t>(ceil_div(count, 256) * 256);
        return place;
    }
};

inline bool is_mamba2(const MambaModel& c) { return c.heads > 0; }

// The parts of a step, as calls.
inline MambaInProj in_proj(const MambaModel& c, const MambaLayer& l, const float* hidden, void* y) {
    const int32_t first = is_mamba2(c) ? c.inner : 0;
    return {c.batch, 1, c.width, c.outputs, c.channels, c.conv_width, c.dtype, first, c.eps,
            hidden, l.norm_weight, l.in_proj, l.in_proj_bias, l.conv_weight, l.conv_bias, l.conv_state, c.seq_lens,
            y, l.conv_state_out};
}

inline MambaXProj x_proj(const MambaModel& c, const MambaLayer& l, const void* projected, void* low) {
    return {c.batch, 1, c.outputs, c.inner, c.rank + 2 * c.state_size, c.dtype, projected, l.x_proj, low};
}

inline MambaSelectiveUpdate selective_update(
    const MambaModel& c, const MambaLayer& l, const void* projected, const void* low, void* y) {
    return {c.batch, 1, c.outputs, c.rank + 2 * c.state_size, c.rank, c.inner, c.state_size, c.dtype, c.state_dtype,
            c.norm_eps, projected, low, l.dt_proj, l.A, l.D, l.dt_bias, l.ssm_state, c.seq_lens, y, l.ssm_state_out};
}

inline MambaSsdUpdate ssd_update(const MambaModel& c, const MambaLayer& l, const void* projected, void* y) {
    return {c.batch, 1, c.outputs, c.heads, c.head_dim, c.state_size, c.groups, c.dtype, c.state_dtype, 1,
            c.skip_per_channel, c.dt_min, c.dt_max, projected, l.A, l.D, l.dt_bias, l.ssm_state, c.seq_lens,
            y, l.ssm_state_out};
}

inline MambaOutProj out_proj(const MambaModel& c, const MambaLayer& l, const void* x, const float* residual, float* y) {
    const int32_t groups = l.gate_norm ? c.groups : 1;
    return {c.batch, 1, c.inner, c.width, groups, c.dtype, c.eps, x, l.gate_norm, l.out_proj, l.out_proj_bias,
            residual, y};
}

inline MambaHead head(const MambaModel& c, const float* hidden) {
    return {c.batch, 1, c.width, c.vocab, c.dtype, c.eps, hidden, c.norm_weight, c.head, c.logits};
}

}  // namespace model
}  // namespace mamba
