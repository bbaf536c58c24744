// The operators as plugins of TensorRT 8.5 and 8.6: IPluginV2DynamicExt, without bfloat16, which those do not have.
// The library needs no libnvinfer; 8.6 reaches it through getPluginCreators and setLoggerFinder, 8.5 through
// plugin_register.cpp.

#include <NvInferRuntime.h>

#include <new>

#include "plugin_common.h"

namespace {

using namespace nvinfer1;
using mamba_plugin::Attributes;
using mamba_plugin::Call;
using mamba_plugin::Node;
using mamba_plugin::Op;

class Plugin final : public IPluginV2DynamicExt {
public:
    explicit Plugin(Node const& node) : node_(node) {}

    IPluginV2DynamicExt* clone() const noexcept override { return new (std::nothrow) Plugin(node_); }
    void destroy() noexcept override { delete this; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}

    AsciiChar const* getPluginType() const noexcept override { return node_.op.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return mamba_plugin::kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    void setPluginNamespace(AsciiChar const*) noexcept override {}  // is always ""

    size_t getSerializationSize() const noexcept override { return sizeof(Attributes); }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &node_.attributes, sizeof(Attributes)); }

    int32_t getNbOutputs() const noexcept override { return node_.n_outputs; }
    DataType getOutputDataType(int32_t output, DataType const* inputs, int32_t nbInputs) const noexcept override {
        bool const right = node_.counts(nbInputs, node_.n_outputs);
        return inputs[right ? node_.input_of_type(node_.output(output).type) : 0];
    }
    DimsExprs getOutputDimensions(
        int32_t output, DimsExprs const* inputs, int32_t nbInputs, IExprBuilder& builder) noexcept override {
        bool const right = node_.counts(nbInputs, node_.n_outputs) &&
                           node_.ranks([=](int32_t i) { return inputs[i].nbDims; });
        return right ? node_.output_shape(output, inputs, builder) : DimsExprs{-1, {}};
    }
    bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t nbInputs, int32_t nbOutputs) noexcept override {
        return node_.counts(nbInputs, nbOutputs) && tensors[position].format == TensorFormat::kLINEAR &&
               node_.supports(position, [=](int32_t i) { return tensors[i].type; });
    }
    void configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {}
    size_t getWorkspaceSize(
        PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
        return node_.workspace([=](int32_t i) -> PluginTensorDesc const& { return inputs[i]; });
    }
    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        Call call;
        bool const right = node_.describe(call, [=](int32_t i) -> PluginTensorDesc const& { return inputDesc[i]; });
        return right ? node_.launch(call, inputs, outputs, workspace, stream) : -1;
    }

private:
    Node const node_;
};

class Creator final : public IPluginCreator {
public:
    explicit Creator(Op const& op) : op_(op), names_(op, {}), fields_{op.n_attributes, names_.fields} {}

    Plugin* createPlugin(AsciiChar const*, PluginFieldCollection const* fields) noexcept override {
        Attributes attributes;
        return mamba_plugin::read_fields(op_, fields, attributes) ? make(attributes) : nullptr;
    }
    Plugin* deserializePlugin(AsciiChar const*, void const* data, size_t length) noexcept override {
        Attributes attributes;
        if (length != sizeof attributes) {
            mamba_plugin::fail(op_.name, "%zu serialized bytes: expected %zu", length, sizeof attributes);
            return nullptr;
        }
        std::memcpy(&attributes, data, length);
        return mamba_plugin::valid(op_, attributes) ? make(attributes) : nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return mamba_plugin::kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    void setPluginNamespace(AsciiChar const*) noexcept override {}  // is always ""

private:
    Plugin* make(Attributes const& attributes) const {
        return new (std::nothrow) Plugin(Node(op_, attributes));
    }

    Op const& op_;
    Node const names_;
    PluginFieldCollection const fields_;
};

}  // namespace

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
static ILoggerFinder* finder = nullptr;

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* given) {
    finder = given;
    mamba_plugin::find_logger = [] { return finder ? finder->findLogger() : nullptr; };
}
#endif

extern "C" __attribute__((visibility("default"))) IPluginCreator* const* getPluginCreators(int32_t& count) {
    using Creators = mamba_plugin::Creators<Creator, IPluginCreator>;
    static Creators creators;
    count = mamba_plugin::kN_OPS;
    return creators.pointers;
}
