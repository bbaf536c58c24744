// What plugin_v2.cpp and plugin_v3.cpp share: the operators as a table, the rules of types and shapes that follow from
// it, the attributes, and the way from TensorRT's descriptions to a launch. rules.py has the same rules for Python; a
// test compares them. Include NvInferRuntime.h before: every TensorRT from 8.5 on has its own Dims and DataType.
//
// No TensorRT parser hands an empty optional input to a plugin: 8.x reads through a null pointer, addPluginV3 refuses
// it. So whoever builds the network leaves such inputs out, and says by the attribute given_inputs which are there:
// bit i for input i of the operator. Without the attribute all are. Of an operator with layers the bits of a layer follow
// those of the inputs before, and stand for every layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "mamba_kernels.h"

namespace mamba_plugin {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char const* kVERSION = "1";
constexpr int kNO_CUBLAS = 303;  // cudaErrorSharedObjectInitFailed, from mamba_model()
constexpr int32_t kMAX_INPUTS = 19;  // of an operator, those of a layer counted once
constexpr int32_t kMAX_OUTPUTS = 4;
constexpr int32_t kALL_INPUTS = (1 << kMAX_INPUTS) - 1;
constexpr int32_t kMAX_LAYERS = 127;  // TensorRT ends the process at more than 256 outputs
constexpr int32_t kMAX_ATTRIBUTES = 9;

// --- log ----------------------------------------------------------------------------------------------------------

inline nvinfer1::ILogger* (*find_logger)() = nullptr;  // set where TensorRT offers a logger

// Logs an error, to stderr where TensorRT offers no logger. Always false.
__attribute__((format(printf, 2, 3))) inline bool fail(char const* op, char const* format, ...) {
    char text[400];
    int const used = std::snprintf(text, sizeof text, "mamba_deploy: %s: ", op);
    va_list values;
    va_start(values, format);
    std::vsnprintf(text + used, sizeof text - used, format, values);
    va_end(values);
    nvinfer1::ILogger* const logger = find_logger ? find_logger() : nullptr;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
    return false;
}

// --- attributes ---------------------------------------------------------------------------------------------------

struct Attributes {
    int32_t activation = MAMBA_ACTIVATION_SILU;
    int32_t dt_softplus = 1;
    float dt_min = 0.0f;
    float dt_max = INFINITY;
    int32_t n_groups = 1;
    int32_t chunk_size = 256;  // a hint, which the kernels do without
    int32_t given_inputs = 0;
    float eps = 1e-5f;
    float norm_eps = -1.0f;
    int32_t layers = 0;
    int32_t all_logits = 0;
    int32_t only_dtype = -1, only_state_dtype = -1;  // numbers in mamba_kernels.h; -1: any
};

struct Attribute {
    char const* name;
    PluginFieldType type;
    size_t offset;  // in Attributes, of an int32_t or a float
    int32_t low, high;  // of an int32_t
};

constexpr Attribute kACTIVATION{"activation", PluginFieldType::kCHAR, offsetof(Attributes, activation), 0, 0};
constexpr Attribute kDT_SOFTPLUS{"dt_softplus", PluginFieldType::kINT32, offsetof(Attributes, dt_softplus), 0, 1};
constexpr Attribute kDT_MIN{"dt_min", PluginFieldType::kFLOAT32, offsetof(Attributes, dt_min), 0, 0};
constexpr Attribute kDT_MAX{"dt_max", PluginFieldType::kFLOAT32, offsetof(Attributes, dt_max), 0, 0};
constexpr Attribute kN_GROUPS{"n_groups", PluginFieldType::kINT32, offsetof(Attributes, n_groups), 1, INT32_MAX};
constexpr Attribute kCHUNK_SIZE{"chunk_size", PluginFieldType::kINT32, offsetof(Attributes, chunk_size), 1, INT32_MAX};
constexpr Attribute kEPS{"eps", PluginFieldType::kFLOAT32, offsetof(Attributes, eps), 0, 0};
constexpr Attribute kNORM_EPS{"norm_eps", PluginFieldType::kFLOAT32, offsetof(Attributes, norm_eps), 0, 0};
constexpr Attribute kLAYERS{"layers", PluginFieldType::kINT32, offsetof(Attributes, layers), 1, kMAX_LAYERS};
constexpr Attribute kALL_LOGITS{"all_logits", PluginFieldType::kINT32, offsetof(Attributes, all_logits), 0, 1};
// Left to choose among types, 8.6 took float32 for a model of float16, and converted all its weights in each call.
constexpr Attribute kDTYPE{"only_dtype", PluginFieldType::kINT32, offsetof(Attributes, only_dtype), -1, MAMBA_BFLOAT16};
constexpr Attribute kSTATE_DTYPE{
    "only_state_dtype", PluginFieldType::kINT32, offsetof(Attributes, only_state_dtype), -1, MAMBA_BFLOAT16};
constexpr Attribute kGIVEN{"given_inputs", PluginFieldType::kINT32, offsetof(Attributes, given_inputs), 1, kALL_INPUTS};

constexpr char const* kACTIVATIONS[] = {"none", "silu"};  // by their numbers in mamba_kernels.h

// --- the operators ------------------------------------------------------------------------------------------------

// Types: T activations, S state, F float32, I int32. An axis is one symbol; k is K - 1, i is H * P, g is G * N.
struct Tensor {
    char const* name;
    char type;
    char const* axes;
    bool optional = false;
    char const* other_axes = nullptr;  // also allowed; of an output, its axes where all_logits is set
};

// One call of an operator: sizes by symbol, addresses by the operator's inputs and outputs, layer after layer.
struct Call {
    Attributes attributes;
    int64_t size[128];  // -1: not known
    int32_t dtype, state_dtype, skip_rank;
    void const* in[kMAX_INPUTS * (1 + kMAX_LAYERS)];
    void* out[kMAX_OUTPUTS * (1 + kMAX_LAYERS)];

    int32_t operator[](char symbol) const { return static_cast<int32_t>(size[static_cast<int32_t>(symbol)]); }
    float const* floats(int32_t input) const { return static_cast<float const*>(in[input]); }
    int32_t const* integers(int32_t input) const { return static_cast<int32_t const*>(in[input]); }
};

inline MambaCausalConv1d conv_call(Call const& c) {
    return {c['B'], c['L'], c['C'], c['K'], c.dtype, c.attributes.activation,
            c.in[0], c.in[1], c.in[2], c.in[3], c.integers(4), c.out[0], c.out[1]};
}

inline MambaSelectiveScan selective_call(Call const& c) {
    return {c['B'], c['L'], c['D'], c['N'], c.dtype, c.state_dtype, c.attributes.dt_softplus,
            c.in[0], c.in[1], c.floats(2), c.in[3], c.in[4], c.floats(5), c.in[6], c.floats(7), c.in[8], c.integers(9),
            c.out[0], c.out[1]};
}

inline MambaSsdScan ssd_call(Call const& c) {
    return {c['B'], c['L'], c['H'], c['P'], c['N'], c.attributes.n_groups,
            c.dtype, c.state_dtype, c.attributes.dt_softplus, c.skip_rank == 2,
            c.attributes.dt_min, c.attributes.dt_max,
            c.in[0], c.in[1], c.floats(2), c.in[3], c.in[4], c.floats(5), c.floats(6), c.in[7], c.integers(8),
            c.out[0], c.out[1]};
}

inline MambaLastToken last_call(Call const& c) {
    return {c['B'], c['L'], c['d'], c.dtype, c.in[0], c.integers(1), c.out[0]};
}

// Without its layers, which a launch alone needs.
inline MambaModel model_call(Call const& c) {
    auto const& a = c.attributes;
    bool const is_mamba2 = c.size['H'] >= 0;
    int32_t const inner = is_mamba2 ? c['H'] * c['P'] : c['D'];
    return {c['B'], c['L'], a.layers, c['d'], c['M'], c['C'], c['K'], inner, c['N'],
            is_mamba2 ? 0 : c['R'], is_mamba2 ? c['H'] : 0, is_mamba2 ? c['P'] : 0, a.n_groups, c['V'],
            c.dtype, c.state_dtype, c.skip_rank == 2, a.all_logits, is_mamba2 ? c['Q'] : 0, a.eps, a.norm_eps, a.dt_min, a.dt_max,
            c.integers(0), c.integers(1), c.in[2], c.floats(3), c.in[4] ? c.in[4] : c.in[2],
            is_mamba2 ? c.floats(5) : nullptr, static_cast<float*>(c.out[0]),
            is_mamba2 ? static_cast<float*>(c.out[1]) : nullptr, nullptr};
}

constexpr int32_t kMODEL_INPUTS = 5, kMODEL_OUTPUTS = 1, kMODEL2_INPUTS = 6, kMODEL2_OUTPUTS = 2;  // beside those of layers
constexpr int32_t kLAYER_INPUTS = 14, kLAYER2_INPUTS = 13, kLAYER_OUTPUTS = 2;

inline MambaLayer layer(Call const& c, int32_t i) {
    int32_t const at = kMODEL_INPUTS + i * kLAYER_INPUTS;
    void* const* const out = c.out + kMODEL_OUTPUTS + i * kLAYER_OUTPUTS;
    void const* const* const in = c.in + at;
    return {c.floats(at), in[1], in[2], in[3], in[4], in[5], in[6], in[7], c.floats(at + 8), c.floats(at + 9),
            c.floats(at + 10), in[11], nullptr, in[12], in[13], out[0], out[1]};
}

inline MambaLayer layer2(Call const& c, int32_t i) {
    int32_t const at = kMODEL2_INPUTS + i * kLAYER2_INPUTS;
    void* const* const out = c.out + kMODEL2_OUTPUTS + i * kLAYER_OUTPUTS;
    void const* const* const in = c.in + at;
    return {c.floats(at), in[1], in[2], in[3], in[4], in[5], nullptr, nullptr, c.floats(at + 6), c.floats(at + 7),
            c.floats(at + 8), in[9], c.floats(at + 10), in[11], in[12], out[0], out[1]};
}

template <auto make, auto workspace>
size_t workspace_of(Call const& call) {
    auto const kernel = make(call);
    return workspace(&kernel);
}

template <auto make, auto launch>
int launch_of(Call const& call, void* workspace, void* stream) {
    auto const kernel = make(call);
    return launch(&kernel, workspace, stream);
}

template <auto make_layer>
int launch_model(Call const& call, void* workspace, void* stream) {
    MambaLayer each[kMAX_LAYERS];
    MambaModel kernel = model_call(call);
    for (int32_t i = 0; i < kernel.layers; ++i) each[i] = make_layer(call, i);
    kernel.each = each;
    return mamba_model(&kernel, workspace, stream);
}

struct Op {
    char const* name;
    int32_t n_inputs;
    Tensor inputs[kMAX_INPUTS];
    int32_t n_outputs;
    Tensor outputs[kMAX_OUTPUTS];
    int32_t n_attributes;
    Attribute attributes[kMAX_ATTRIBUTES];
    size_t (*workspace)(Call const&);
    int (*launch)(Call const&, void* workspace, void* stream);
    int32_t n_layer_inputs = 0, n_layer_outputs = 0;  // the last of them, which come again for every layer
};

inline constexpr Op kOPS[] = {
    {"MambaCausalConv1d",
     5, {{"x", 'T', "BLC"}, {"weight", 'T', "CK"}, {"bias", 'T', "C", true}, {"conv_state", 'T', "BCk"},
         {"seq_lens", 'I', "B"}},
     2, {{"y", 'T', "BLC"}, {"conv_state_out", 'T', "BCk"}},
     2, {kACTIVATION, kGIVEN},
     workspace_of<conv_call, mamba_causal_conv1d_workspace>, launch_of<conv_call, mamba_causal_conv1d>},
    {"MambaSelectiveScan",
     10, {{"x", 'T', "BLD"}, {"dt", 'T', "BLD"}, {"A", 'F', "DN"}, {"B", 'T', "BLN"}, {"C", 'T', "BLN"},
          {"D", 'F', "D", true}, {"z", 'T', "BLD", true}, {"dt_bias", 'F', "D", true}, {"ssm_state", 'S', "BDN"},
          {"seq_lens", 'I', "B"}},
     2, {{"y", 'T', "BLD"}, {"ssm_state_out", 'S', "BDN"}},
     2, {kDT_SOFTPLUS, kGIVEN},
     workspace_of<selective_call, mamba_selective_scan_workspace>, launch_of<selective_call, mamba_selective_scan>},
    {"MambaSsdScan",
     9, {{"x", 'T', "BLi"}, {"dt", 'T', "BLH"}, {"A", 'F', "H"}, {"B", 'T', "BLg"}, {"C", 'T', "BLg"},
         {"D", 'F', "H", true, "HP"}, {"dt_bias", 'F', "H", true}, {"ssm_state", 'S', "BHPN"}, {"seq_lens", 'I', "B"}},
     2, {{"y", 'T', "BLi"}, {"ssm_state_out", 'S', "BHPN"}},
     6, {kDT_SOFTPLUS, kDT_MIN, kDT_MAX, kN_GROUPS, kCHUNK_SIZE, kGIVEN},
     workspace_of<ssd_call, mamba_ssd_scan_workspace>, launch_of<ssd_call, mamba_ssd_scan>},
    {"MambaLastToken",
     2, {{"x", 'T', "BLd"}, {"seq_lens", 'I', "B"}},
     1, {{"y", 'T', "Bd"}},
     1, {kGIVEN},
     workspace_of<last_call, mamba_last_token_workspace>, launch_of<last_call, mamba_last_token>},
    {"MambaModel",
     19, {{"input_ids", 'I', "BL"}, {"seq_lens", 'I', "B"}, {"embedding", 'T', "Vd"}, {"norm_weight", 'F', "d"},
          {"head", 'T', "Vd", true},
          {"norm_weight", 'F', "d"}, {"in_proj", 'T', "dM"}, {"in_proj_bias", 'T', "M", true}, {"conv_weight", 'T', "CK"},
          {"conv_bias", 'T', "C", true}, {"conv_state", 'T', "BCk"}, {"x_proj", 'T', "DE"}, {"dt_proj", 'T', "RD"},
          {"A", 'F', "DN"}, {"D", 'F', "D", true}, {"dt_bias", 'F', "D", true}, {"ssm_state", 'S', "BDN"},
          {"out_proj", 'T', "Dd"}, {"out_proj_bias", 'T', "d", true}},
     3, {{"logits", 'F', "BV", false, "BLV"}, {"conv_state_out", 'T', "BCk"}, {"ssm_state_out", 'S', "BDN"}},
     7, {kLAYERS, kEPS, kNORM_EPS, kALL_LOGITS, kDTYPE, kSTATE_DTYPE, kGIVEN},
     workspace_of<model_call, mamba_model_workspace>, launch_model<layer>, kLAYER_INPUTS, kLAYER_OUTPUTS},
    {"Mamba2Model",
     19, {{"input_ids", 'I', "BL"}, {"seq_lens", 'I', "B"}, {"embedding", 'T', "Vd"}, {"norm_weight", 'F', "d"},
          {"head", 'T', "Vd", true}, {"pending", 'F', "BQ"},
          {"norm_weight", 'F', "d"}, {"in_proj", 'T', "dM"}, {"in_proj_bias", 'T', "M", true}, {"conv_weight", 'T', "CK"},
          {"conv_bias", 'T', "C", true}, {"conv_state", 'T', "BCk"}, {"A", 'F', "H"}, {"D", 'F', "H", true, "HP"},
          {"dt_bias", 'F', "H", true}, {"ssm_state", 'S', "BHPN"}, {"gate_norm", 'F', "i", true}, {"out_proj", 'T', "id"},
          {"out_proj_bias", 'T', "d", true}},
     4, {{"logits", 'F', "BV", false, "BLV"}, {"pending_out", 'F', "BQ"}, {"conv_state_out", 'T', "BCk"},
         {"ssm_state_out", 'S', "BHPN"}},
     9, {kLAYERS, kEPS, kDT_MIN, kDT_MAX, kN_GROUPS, kALL_LOGITS, kDTYPE, kSTATE_DTYPE, kGIVEN},
     workspace_of<model_call, mamba_model_workspace>, launch_model<layer2>, kLAYER2_INPUTS, kLAYER_OUTPUTS},
};
constexpr int32_t kN_OPS = sizeof kOPS / sizeof kOPS[0];

// A creator of each operator, as TensorRT wants them.
template <typename Creator, typename Interface>
struct Creators {
    Creators() : Creators(std::make_index_sequence<kN_OPS>{}) {}
    template <size_t... i>
    explicit Creators(std::index_sequence<i...>) : made{Creator(kOPS[i])...}, pointers{&made[i]...} {}

    Creator made[kN_OPS];
    Interface* pointers[kN_OPS];
};

// --- one node: an operator, its attributes, and the inputs that are there -------------------------------------------

// The number of a type in mamba_kernels.h; -1 for what is neither an activation nor a state.
inline int32_t float_code(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return MAMBA_FLOAT32;
        case DataType::kHALF: return MAMBA_FLOAT16;
#ifdef MAMBA_PLUGIN_BFLOAT16
        case DataType::kBF16: return MAMBA_BFLOAT16;
#endif
        default: return -1;
    }
}

class Node {
public:
    Node(Op const& op, Attributes const& attributes) : op(op), attributes(attributes) {
        for (int32_t slot = 0; slot < op.n_inputs; ++slot) {
            if (slot == op.n_inputs - op.n_layer_inputs) n_before = n_slots;
            if (attributes.given_inputs >> slot & 1) slots[n_slots++] = slot;
        }
        if (op.n_layer_inputs == 0) n_before = n_slots;
        n_given = n_before + attributes.layers * (n_slots - n_before);
        n_outputs = op.n_outputs + (attributes.layers - 1) * op.n_layer_outputs;
        for (int32_t i = 0; i < op.n_attributes; ++i) {
            fields[i] = field(op.attributes[i]);
        }
        auto const& a = attributes;
        std::snprintf(timing_id, sizeof timing_id, "%s %d %d %a %a %d %d %a %a %d %d %d %d", op.name,
                      a.activation, a.dt_softplus, a.dt_min, a.dt_max, a.n_groups, a.given_inputs, a.eps, a.norm_eps,
                      a.layers, a.all_logits, a.only_dtype, a.only_state_dtype);
    }
    Node(Node const& other) : Node(other.op, other.attributes) {}
    Node& operator=(Node const&) = delete;

    Tensor const& input(int32_t i) const { return op.inputs[slots[in_pattern(i, n_before, n_slots)]]; }
    Tensor const& output(int32_t i) const {
        return op.outputs[in_pattern(i, op.n_outputs - op.n_layer_outputs, op.n_outputs)];
    }
    Tensor const& tensor(int32_t position) const {
        return position < n_given ? input(position) : output(position - n_given);
    }

    bool counts(int32_t inputs, int32_t outputs) const {
        return (inputs == n_given && outputs == n_outputs) ||
               fail(op.name, "%d inputs and %d outputs: expected %d and %d. An optional input that is not there is "
                    "left out, and the attribute given_inputs, a bit for each input, says so", inputs, outputs,
                    n_given, n_outputs);
    }
    template <typename RankOf>
    bool ranks(RankOf&& rank_of) const {
        for (int32_t i = 0; i < n_given; ++i) {
            if (!axes_of(i, rank_of(i))) return false;
        }
        return true;
    }

    // Where types and symbols come from: the first input that has them.
    int32_t input_of_type(char type) const {
        int32_t i = 0;
        while (input(i).type != type) ++i;
        return i;
    }
    void find(char symbol, int32_t& index, int32_t& axis) const {
        for (index = 0; index < n_given; ++index) {
            if (char const* const at = std::strchr(input(index).axes, symbol)) {
                axis = static_cast<int32_t>(at - input(index).axes);
                return;
            }
        }
    }

    // type_of(i) is that of input i, then of the outputs; those past position are not looked at.
    template <typename TypeOf>
    bool supports(int32_t position, TypeOf&& type_of) const {
        DataType const type = type_of(position);
        char const letter = tensor(position).type;
        if (letter == 'F') return type == DataType::kFLOAT;
        if (letter == 'I') return type == DataType::kINT32;
        int32_t const first = input_of_type(letter), only = letter == 'S' ? attributes.only_state_dtype : attributes.only_dtype;
        if (position != first) return type == type_of(first);
        return float_code(type) >= 0 && (only < 0 || float_code(type) == only);
    }

    // Exprs is DimsExprs, whose elements point to what is not known yet; builder multiplies them.
    template <typename Exprs, typename Builder>
    Exprs output_shape(int32_t output, Exprs const* inputs, Builder& builder) const {
        Tensor const& tensor = this->output(output);
        char const* const axes = attributes.all_logits && tensor.other_axes ? tensor.other_axes : tensor.axes;
        auto const size = [&](char symbol) {
            int32_t index = 0, axis = 0;
            find(symbol, index, axis);
            return index < n_given ? inputs[index].d[axis] : nullptr;
        };
        Exprs shape{};
        for (; axes[shape.nbDims]; ++shape.nbDims) {
            char const symbol = axes[shape.nbDims];
            auto const* found = size(symbol);
            if (!found) found = builder.operation(nvinfer1::DimensionOperation::kPROD, *size('H'), *size('P'));
            shape.d[shape.nbDims] = found;
        }
        return shape;
    }

    // Reads sizes and types of a call off its inputs; -1 is a size that is not known. False, with the reason logged,
    // where they contradict.
    template <typename DescOf>
    bool describe(Call& call, DescOf&& desc_of) const {
        return read(call, desc_of, true) &&
               related(call, 'k', call.size['K'] - 1, "K - 1 of conv_state") &&
               related(call, 'i', call.size['H'] * call.size['P'], "H * P") &&
               related(call, 'g', attributes.n_groups * call.size['N'], "n_groups * N of B") &&
               (call.size['H'] < 0 || call.size['H'] % attributes.n_groups == 0 ||
                fail(op.name, "n_groups is %d: expected a divisor of the %d heads", attributes.n_groups, call['H']));
    }

    // What any call of at most these sizes needs. Fewer rows may need more than many, for then the kernels cut a prompt
    // into more parts; fewer tokens never do.
    template <typename DescOf>
    size_t workspace(DescOf&& largest_of) const {
        Call call;
        if (!read(call, largest_of, false)) return 0;
        size_t most = 0;
        for (int64_t& batch = call.size['B']; batch > 0; --batch) {
            size_t const bytes = op.workspace(call);
            if (bytes > most) most = bytes;
        }
        return most;
    }

    int launch(Call& call, void const* const* inputs, void* const* outputs, void* workspace, void* stream) const {
        for (int32_t i = 0; i < n_given; ++i) {
            int32_t const k = in_pattern(i, n_before, n_slots), layer = (i - k) / std::max(n_slots - n_before, 1);
            call.in[slots[k] + layer * op.n_layer_inputs] = inputs[i];
        }
        for (int32_t i = 0; i < n_outputs; ++i) call.out[i] = outputs[i];
        int const error = op.launch(call, workspace, stream);
        if (error == kNO_CUBLAS) {
            fail(op.name, "libcublas was not found: install the libraries of CUDA, or open it before");
        } else if (error) {
            fail(op.name, "CUDA error %d", error);
        }
        return error;
    }

    Op const& op;
    Attributes const attributes;
    int32_t n_given = 0, n_outputs = 0;
    char timing_id[160];
    PluginField fields[kMAX_ATTRIBUTES];  // the attributes, to be serialized

private:
    // Where tensor i stands in a table whose rows from `before` to `all` come again for every layer.
    static int32_t in_pattern(int32_t i, int32_t before, int32_t all) {
        return i < all ? i : before + (i - before) % (all - before);
    }

    // The axes of an input of this rank; null, with the reason logged, where it may not have it.
    char const* axes_of(int32_t i, int32_t rank) const {
        for (char const* const axes : {input(i).axes, input(i).other_axes}) {
            if (axes && static_cast<int32_t>(std::strlen(axes)) == rank) return axes;
        }
        fail(op.name, "%s has %d axes: expected %zu", input(i).name, rank, std::strlen(input(i).axes));
        return nullptr;
    }

    // Where two tensors name one size: with agree they must agree, else the larger counts.
    template <typename DescOf>
    bool read(Call& call, DescOf&& desc_of, bool agree) const {
        call = {};
        call.attributes = attributes;
        for (int64_t& size : call.size) size = -1;
        for (int32_t i = 0; i < n_given; ++i) {
            auto const& desc = desc_of(i);
            Dims const& dims = desc.dims;
            char const* const axes = axes_of(i, dims.nbDims);
            if (!axes) return false;
            for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
                int64_t& size = call.size[static_cast<int32_t>(axes[axis])];
                if (agree && size >= 0 && dims.d[axis] >= 0 && size != dims.d[axis]) {
                    return fail(op.name, "axis %d of %s is %lld: expected %lld", axis, input(i).name,
                                static_cast<long long>(dims.d[axis]), static_cast<long long>(size));
                }
                if (dims.d[axis] > size) size = dims.d[axis];
            }
            if (input(i).other_axes) {
                if (agree && call.skip_rank && call.skip_rank != dims.nbDims) {
                    return fail(op.name, "%s has %d axes: expected %d", input(i).name, dims.nbDims, call.skip_rank);
                }
                call.skip_rank = dims.nbDims;
            }
            if (input(i).type == 'S') call.state_dtype = float_code(desc.type);
            if (input(i).type == 'T' && i == input_of_type('T')) call.dtype = float_code(desc.type);
        }
        return true;
    }

    bool related(Call const& call, char symbol, int64_t expected, char const* what) const {
        int64_t const size = call.size[static_cast<int32_t>(symbol)];
        return size < 0 || expected < 0 || size == expected ||
               fail(op.name, "%s is %lld: expected %lld", what, static_cast<long long>(size),
                    static_cast<long long>(expected));
    }
    PluginField field(Attribute const& attribute) const {
        void const* data = reinterpret_cast<char const*>(&attributes) + attribute.offset;
        int32_t length = 1;
        if (attribute.type == PluginFieldType::kCHAR) {
            data = kACTIVATIONS[attributes.activation];
            length = static_cast<int32_t>(std::strlen(kACTIVATIONS[attributes.activation])) + 1;
        }
        return {attribute.name, data, attribute.type, length};
    }

    // Of the inputs that are there, in the operator's own order, those of a layer once; before those, and all.
    int32_t slots[kMAX_INPUTS], n_before = 0, n_slots = 0;
};

// --- attributes from fields -----------------------------------------------------------------------------------------

inline bool read_field(Op const& op, Attribute const& attribute, PluginField const& field, Attributes& into) {
    void* const value = reinterpret_cast<char*>(&into) + attribute.offset;
    if (field.type != attribute.type || !field.data || field.length < 1 ||
        (attribute.type != PluginFieldType::kCHAR && field.length != 1)) {
        return fail(op.name, "the attribute %s has %d values of type %d: expected %s of type %d", attribute.name,
                    field.length, static_cast<int32_t>(field.type),
                    attribute.type == PluginFieldType::kCHAR ? "text" : "one", static_cast<int32_t>(attribute.type));
    }
    if (attribute.type == PluginFieldType::kFLOAT32) {
        std::memcpy(value, field.data, sizeof(float));
        return true;
    }
    int32_t number = 0;
    if (attribute.type == PluginFieldType::kCHAR) {
        char const* const text = static_cast<char const*>(field.data);
        int32_t const length = static_cast<int32_t>(strnlen(text, field.length));
        for (char const* const name : kACTIVATIONS) {
            if (std::strncmp(name, text, length) == 0 && !name[length]) {
                std::memcpy(value, &number, sizeof number);
                return true;
            }
            ++number;
        }
        return fail(op.name, "%s is '%.*s': expected 'silu' or 'none'", attribute.name, length, text);
    }
    std::memcpy(&number, field.data, sizeof number);
    if (number < attribute.low || number > attribute.high) {
        return fail(op.name, "%s is %d: expected %d to %d", attribute.name, number, attribute.low, attribute.high);
    }
    std::memcpy(value, &number, sizeof number);
    return true;
}

inline bool valid(Op const& op, Attributes const& a) {
    if (a.activation != MAMBA_ACTIVATION_NONE && a.activation != MAMBA_ACTIVATION_SILU) {
        return fail(op.name, "activation is %d: expected 0 or 1", a.activation);
    }
    if (op.n_layer_inputs ? a.layers < 1 || a.layers > kMAX_LAYERS : a.layers != 0) {
        return fail(op.name, "layers is %d: expected 1 to %d", a.layers, kMAX_LAYERS);
    }
    if (a.n_groups < 1) return fail(op.name, "n_groups is %d: expected at least 1", a.n_groups);
    if (!(a.dt_min <= a.dt_max)) {
        return fail(op.name, "dt_min is %g and dt_max is %g: expected dt_min <= dt_max", a.dt_min, a.dt_max);
    }
    if (a.given_inputs >> op.n_inputs) {
        return fail(op.name, "given_inputs is %#x: expected a bit for each of %d inputs", a.given_inputs, op.n_inputs);
    }
    for (int32_t slot = 0; slot < op.n_inputs; ++slot) {
        if (!op.inputs[slot].optional && !(a.given_inputs >> slot & 1)) {
            return fail(op.name, "given_inputs is %#x: expected bit %d, for %s, to be set", a.given_inputs, slot,
                        op.inputs[slot].name);
        }
    }
    return true;
}

// The attributes of a node; false, with the reason logged, where one is unknown or out of range.
inline bool read_fields(Op const& op, nvinfer1::PluginFieldCollection const* fields, Attributes& into) {
    into.given_inputs = (1 << op.n_inputs) - 1;
    into.layers = op.n_layer_inputs > 0;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
        PluginField const& field = fields->fields[i];
        Attribute const* known = nullptr;
        for (int32_t j = 0; j < op.n_attributes; ++j) {
            if (std::strcmp(op.attributes[j].name, field.name) == 0) known = &op.attributes[j];
        }
        if (!known) return fail(op.name, "no attribute %s is known", field.name);
        if (!read_field(op, *known, field, into)) return false;
    }
    return valid(op, into);
}

}  // namespace mamba_plugin
