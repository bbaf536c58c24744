// MambaModel for prompts, and for single tokens of many rows: products by cuBLAS, and around them the kernels of the
// operators, or of a step, on columns of its results.
//
// A layer is seven launches and few bytes beside the products': norm, in_proj, convolution, then x_proj, dt_proj and the scan
// with its gate, or the scan, the gate and its norm, then out_proj, which adds to the float32 residual stream by itself.
// Nothing is split or copied, but for a P or N that is no multiple of 8, as no published model has. Of few tokens in_proj and
// out_proj are rows.cu's, where it takes them, and x_proj a step's.
#include <algorithm>
#include <climits>

#include "cublas.h"
#include "model.h"
#include "pad.cuh"
#include "prompt_rows.cuh"
#include "strided.h"

namespace mamba {
namespace model {
namespace {

bool is_valid(const MambaModel& m) {
    const int most = 32 * kMostNormWarps * kHeldValues;
    return are_sizes(m) && rows_of(m) <= INT_MAX && m.width <= most && m.inner <= most;
}

// Few tokens want the inputs split, in a workspace. Of many, cuBLAS 13 uses one to hand out tiles as its kernel runs, with a
// memset ahead, which costs 6 us a layer (in_proj of mamba2-2.7b, 2048 tokens) and gains nothing.
size_t blas_bytes(const MambaModel& m) { return rows_of(m) <= kMostRows ? blas::kWorkspace : blas::kLeastWorkspace; }

// Whether out_proj by cuBLAS comes in kSums sums, each of as many inputs, which the norm after it adds to the residual stream.
// Of few rows it has to split the inputs to fill the GPU, and would add the sums in a kernel of its own.
bool has_sums(const MambaModel& m) { return m.length == 1 && m.batch <= kMostRows && m.inner % (8 * kSums) == 0; }

int32_t low_row(const MambaModel& m) { return m.rank + 2 * m.state_size; }

// Whether the scan takes x, B and C as they stand, or dense copies of them.
bool is_split(const MambaModel& m) { return m.state_size % 8 != 0 || (is_mamba2(m) && m.head_dim % 8 != 0); }

MambaSelectiveScan selective_scan(const MambaModel& m) {
    MambaSelectiveScan a{};
    a.batch = m.batch, a.length = m.length, a.channels = m.inner, a.state_size = m.state_size;
    a.dtype = m.dtype, a.state_dtype = m.state_dtype, a.dt_softplus = 1, a.seq_lens = m.seq_lens;
    return a;
}

MambaSsdScan ssd_scan(const MambaModel& m) {
    MambaSsdScan a{};
    a.batch = m.batch, a.length = m.length, a.heads = m.heads, a.head_dim = m.head_dim, a.state_size = m.state_size;
    a.groups = m.groups, a.dtype = m.dtype, a.state_dtype = m.state_dtype, a.dt_softplus = 1;
    a.skip_per_channel = m.skip_per_channel, a.dt_min = m.dt_min, a.dt_max = m.dt_max, a.seq_lens = m.seq_lens;
    return a;
}

// What the calls leave to each other.
struct Buffers : Room {
    void* blas;
    float* hidden;     // [B, L, d]
    float* sums;       // [kSums, B, L, d], where out_proj comes in several
    void* normal;      // [B, L, d] T, of a layer's first half; y in its second
    void* y;           // [B, L, D] T
    void* projected;   // [B, L, M] T
    void* convolved;   // [B, L, C] T
    void *low, *dt;    // [B, L, R + 2 N], [B, L, D] T, of Mamba
    void *x, *B, *C;   // dense copies, where there are any
    void* scan;

    Buffers(const MambaModel& m, void* workspace) : Room(workspace) {
        const int64_t tokens = rows_of(m), row = tokens * item_bytes(m.dtype);
        blas = take(blas::kWorkspace);
        hidden = static_cast<float*>(take(4 * tokens * m.width));
        // Of more tokens unused, but there, for workspaces do not shrink as prompts grow.
        sums = static_cast<float*>(take(4 * kSums * std::min<int64_t>(tokens, kMostRows) * m.width));
        normal = y = take(row * std::max(m.width, m.inner));
        projected = take(row * m.outputs);
        convolved = take(row * m.channels);
        low = dt = x = B = C = nullptr;
        if (!is_mamba2(m)) {
            low = take(row * low_row(m));
            dt = take(row * m.inner);
        }
        if (is_split(m)) {
            const int64_t states = is_mamba2(m) ? m.groups * m.state_size : m.state_size;
            if (is_mamba2(m)) x = take(row * m.inner);
            B = take(row * states);
            C = take(row * states);
        }
        const auto selective = selective_scan(m);
        const auto ssd = ssd_scan(m);
        scan = take(static_cast<int64_t>(is_mamba2(m) ? mamba_ssd_scan_workspace(&ssd)
                                                      : mamba_selective_scan_workspace(&selective)));
    }
};

// Calls one after the other until one fails.
template <typename... Calls>
cudaError_t in_turn(Calls&&... calls) {
    cudaError_t error = cudaSuccess;
    ((error = error == cudaSuccess ? calls() : error), ...);
    return error;
}

template <typename T>
class Prompt {
  public:
    Prompt(const MambaModel& m, void* workspace, cudaStream_t stream)
        : m_(m), at_(m, workspace), products_(m.dtype, at_.blas, blas_bytes(m), stream),
          stream_(stream) {}

    cudaError_t run() {
        return in_turn([&] { return products_.error(); },
                       [&] { return device_.read(norm_kernel<T, float, 1, kFewValues>); },
                       [&] { return embed<T>(m_, at_.hidden, may_defer_, stream_); }, [&] { return layers(); },
                       [&] { return head(); });
    }

  private:
    static const T* at(const void* values, int64_t i) { return static_cast<const T*>(values) + i; }

    cudaError_t layers() const {
        cudaError_t error = cudaSuccess;
        for (int i = 0; i < m_.layers && error == cudaSuccess; i++) {
            const MambaLayer& layer = m_.each[i];
            error = in_turn([&] { return norm_hidden(layer.norm_weight, false, i > 0); },
                            [&] { return in_proj(layer); },
                            [&] {
                                return m_.length == 1 ? step(i) : is_mamba2(m_) ? second(layer) : first(layer);
                            },
                            [&] { return out_proj(i); });
        }
        return error;
    }

    cudaError_t head() const {
        const bool last = !m_.all_logits;
        return in_turn([&] { return norm_hidden(m_.norm_weight, last, true); },
                       [&] { return products_.run({last ? m_.batch : tokens_, m_.width, m_.vocab, at_.normal, m_.width,
                                                   m_.head, true, m_.logits, true, false}); });
    }

    // --- the parts of a layer

    cudaError_t in_proj(const MambaLayer& layer) const {
        return in_turn(
            [&] {
                if (by_rows_) return rows_in_proj(m_, layer, at_.normal, at_.projected, stream_);
                return product(at_.normal, m_.width, layer.in_proj, layer.in_proj_bias, m_.outputs, at_.projected);
            },
            [&] { return by_rows_ && m_.length == 1 ? cudaSuccess : convolution(layer); });
    }

    // Of a single token in place, where a step's scan reads it.
    cudaError_t convolution(const MambaLayer& layer) const {
        T* const x = static_cast<T*>(at_.projected) + (is_mamba2(m_) ? m_.inner : 0);
        return conv::run({m_.batch, m_.length, m_.channels, m_.conv_width, m_.dtype, MAMBA_ACTIVATION_SILU, x,
                          layer.conv_weight, layer.conv_bias, layer.conv_state, m_.seq_lens,
                          m_.length == 1 ? x : at_.convolved, layer.conv_state_out}, m_.outputs, by_rows_, stream_);
    }

    // The scan of a single token, as in the chain of model.cu.
    cudaError_t step(int i) const {
        const MambaLayer& layer = m_.each[i];
        if (!is_mamba2(m_)) {
            const MambaXProj low = x_proj(m_, layer, at_.projected, at_.low);
            return in_turn([&] { return static_cast<cudaError_t>(mamba_x_proj(&low, nullptr, stream_)); }, [&] {
                return selective_update_early(selective_update(m_, layer, at_.projected, at_.low, at_.y), stream_);
            });
        }
        const pending::Pending late = may_defer_ ? pending_of(m_, i) : pending::Pending{};
        return in_turn([&] { return ssd_update_pending(ssd_update(m_, layer, at_.projected, at_.y), late, stream_); }, [&] {
            if (layer.gate_norm == nullptr) return cudaSuccess;
            return norm<T>({at_.y, nullptr, layer.gate_norm, at_.y, nullptr, nullptr, nullptr, tokens_, 0, m_.inner, 0, 1,
                            m_.groups, m_.inner / m_.groups, m_.eps});
        });
    }

    // Of Mamba: projected is x, z.
    cudaError_t first(const MambaLayer& layer) const {
        const int32_t row = low_row(m_), N = m_.state_size;
        MambaSelectiveScan a = selective_scan(m_);
        a.x = at_.convolved, a.dt = at_.dt, a.A = layer.A, a.D = layer.D, a.z = at(at_.projected, m_.inner);
        a.B = at(at_.low, m_.rank), a.C = at(at_.low, m_.rank + N);
        a.dt_bias = layer.dt_bias, a.ssm_state = layer.ssm_state, a.ssm_state_out = layer.ssm_state_out, a.y = at_.y;
        scan::Rows rows = {row, 2};
        return in_turn(
            [&] {
                if (!by_rows_) return product(at_.convolved, m_.inner, layer.x_proj, nullptr, row, at_.low);
                const MambaXProj few = {static_cast<int32_t>(tokens_), 1, m_.inner, m_.inner, row, m_.dtype, at_.convolved,
                                        layer.x_proj, at_.low};
                return static_cast<cudaError_t>(mamba_x_proj(&few, nullptr, stream_));
            },
            [&] { return m_.norm_eps < 0.0f ? cudaSuccess : norm_parts(); },
            [&] { return products_.run({tokens_, m_.rank, m_.inner, at_.low, row, layer.dt_proj, false, at_.dt, false,
                                        false}); },
            [&] {
                if (!is_split(m_)) return cudaSuccess;
                rows.group = N;
                return split({{&a.B, at_.B, row, N}, {&a.C, at_.C, row, N}});
            },
            [&] { return scan::run(a, rows, at_.scan, stream_); });
    }

    // Of Mamba-2: projected is z, x, B, C, dt; convolved x, B, C.
    cudaError_t second(const MambaLayer& layer) const {
        const int32_t states = m_.groups * m_.state_size;
        MambaSsdScan a = ssd_scan(m_);
        a.x = at_.convolved, a.B = at(at_.convolved, m_.inner), a.C = at(at_.convolved, m_.inner + states);
        a.dt = at(at_.projected, m_.inner + m_.channels), a.A = layer.A, a.D = layer.D, a.dt_bias = layer.dt_bias;
        a.ssm_state = layer.ssm_state, a.ssm_state_out = layer.ssm_state_out, a.y = at_.y;
        ssd::Rows rows = {m_.channels, m_.channels, m_.outputs};
        const bool normed = layer.gate_norm != nullptr;
        const int32_t groups = normed ? m_.groups : 1;
        const Norm gate = {at_.y, at_.projected, layer.gate_norm, at_.y, nullptr, nullptr, nullptr, tokens_, 0, m_.inner,
                           m_.outputs, m_.length, groups, m_.inner / groups, normed ? m_.eps : -1.0f};
        return in_turn(
            [&] {
                if (!is_split(m_)) return cudaSuccess;
                rows = {m_.inner, states, m_.outputs};
                return split({{&a.x, at_.x, m_.channels, m_.inner}, {&a.B, at_.B, m_.channels, states},
                              {&a.C, at_.C, m_.channels, states}});
            },
            [&] { return ssd::run(a, rows, at_.scan, stream_); },
            [&] { return norm<T>(gate); });
    }

    cudaError_t out_proj(int i) const {
        const MambaLayer& layer = m_.each[i];
        const bool apart = sums_ != nullptr;
        return in_turn(
            [&] {
                if (by_rows_) return rows_out_proj(m_, i, at_.y, sums_, stream_);
                return products_.run({tokens_, m_.inner, m_.width, at_.y, m_.inner, layer.out_proj, false,
                                      apart ? sums_ : at_.hidden, true, !apart, apart ? kSums : 1});
            },
            [&] { return bias<float, true>(layer.out_proj_bias, at_.hidden, m_.width); });
    }

    // --- their pieces

    // With a bias in the sum before it is rounded.
    cudaError_t product(const void* x, int32_t inputs, const void* w, const void* added, int32_t outputs, void* y) const {
        return in_turn([&] { return bias<T, false>(added, y, outputs); },
                       [&] { return products_.run({tokens_, inputs, outputs, x, inputs, w, false, y, false,
                                                   added != nullptr}); });
    }

    template <typename Y, bool ADD>
    cudaError_t bias(const void* bias, void* y, int32_t width) const {
        if (bias == nullptr) return cudaSuccess;
        bias_kernel<T, Y, ADD><<<static_cast<unsigned>(tokens_), kRowThreads, 0, stream_>>>(at(bias, 0),
                                                                                             static_cast<Y*>(y), width);
        return cudaGetLastError();
    }

    // Of the residual stream; `after`: a layer.
    cudaError_t norm_hidden(const float* weight, bool last, bool after) const {
        return norm<float>({at_.hidden, nullptr, weight, at_.normal, after ? sums_ : nullptr, at_.hidden,
                            last ? m_.seq_lens : nullptr, last ? m_.batch : tokens_, tokens_, m_.width, 0, m_.length, 1,
                            m_.width, m_.eps});
    }

    template <typename X>
    cudaError_t norm(const Norm& a) const {
        constexpr int kWide = 16 / sizeof(X);
        bool vectors = is_aligned(a.weight, 16);
        for (const int32_t size : {a.width, a.x_row, a.z_row}) vectors = vectors && size % kWide == 0;
        const bool few = a.rows * a.groups * a.width <= kManyValues && a.width <= 32 * kMostNormWarps * kFewValues;
        if (few) return vectors ? norm<X, kWide, kFewValues>(a) : norm<X, 1, kFewValues>(a);
        return vectors ? norm<X, kWide, kHeldValues>(a) : norm<X, 1, kHeldValues>(a);
    }

    template <typename X, int VEC, int VALUES>
    cudaError_t norm(const Norm& a) const {
        const int warps = static_cast<int>(ceil_div(a.width, 32 * VALUES)), rows = std::max(8 / warps, 1);
        const int64_t blocks = ceil_div(a.rows * a.groups, rows);
        if (blocks > INT_MAX) return cudaErrorInvalidValue;
        return launch_early(norm_kernel<T, X, VEC, VALUES>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps, rows), 0,
                            1, device_.major >= 9, stream_, Norm(a));
    }

    cudaError_t norm_parts() const {
        part_norms_kernel<<<static_cast<unsigned>(ceil_div(tokens_, kPartWarps)), 32 * kPartWarps, 0, stream_>>>(
            static_cast<T*>(at_.low), tokens_, m_.rank, m_.state_size, m_.norm_eps);
        return cudaGetLastError();
    }

    struct Split {
        const void** from;  // the first of `width` columns; the dense copy's address is put there
        void* to;
        int32_t row, width;
    };

    cudaError_t split(std::initializer_list<Split> columns) const {
        cudaError_t error = cudaSuccess;
        for (const Split& s : columns) {
            const pad::Copy copy = {*s.from, s.to, tokens_, 1, s.row, 1, s.width, static_cast<int32_t>(sizeof(T))};
            if (error == cudaSuccess) error = pad::copy(copy, stream_);
            *s.from = s.to;
        }
        return error;
    }

    const MambaModel& m_;
    const Buffers at_;
    const blas::Products products_;
    const cudaStream_t stream_;
    const int64_t tokens_ = rows_of(m_);
    const bool by_rows_ = is_rows(m_);
    const bool may_defer_ = defers(m_);
    float* const sums_ = by_rows_ || has_sums(m_) ? at_.sums : nullptr;  // where out_proj comes in several
    Device device_;
};

}  // namespace

size_t prompt_workspace(const MambaModel& call) { return is_valid(call) ? Buffers(call, nullptr).bytes : 0; }

cudaError_t prompt(const MambaModel& call, void* workspace, cudaStream_t stream) {
    if (!is_valid(call) || call.each == nullptr || workspace == nullptr) return cudaErrorInvalidValue;
    cudaError_t error = cudaErrorInvalidValue;
    with_dtype(call.dtype, [&](auto t) { error = Prompt<decltype(t)>(call, workspace, stream).run(); });
    return error;
}

}  // namespace model
}  // namespace mamba
