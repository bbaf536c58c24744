// The operators as plugins of TensorRT 10.0 and newer, and of TensorRT-RTX: IPluginV3. The library needs no libnvinfer;
// TensorRT reaches it through getCreators and setLoggerFinder.

#include <NvInferRuntime.h>

#include <new>

#define MAMBA_PLUGIN_BFLOAT16
#include "plugin_common.h"

namespace {

using namespace nvinfer1;
using mamba_plugin::Call;
using mamba_plugin::Node;
using mamba_plugin::Op;

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Node const& node) : node_(node) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(node_); }

    AsciiChar const* getPluginName() const noexcept override { return node_.op.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return mamba_plugin::kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

    // --- build

    int32_t getNbOutputs() const noexcept override { return node_.n_outputs; }
    char const* getTimingCacheID() noexcept override { return node_.timing_id; }

    int32_t getOutputDataTypes(
        DataType* outputs, int32_t nbOutputs, DataType const* inputs, int32_t nbInputs) const noexcept override {
        if (!node_.counts(nbInputs, nbOutputs)) return -1;
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputs[i] = inputs[node_.input_of_type(node_.output(i).type)];
        }
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t nbOutputs, IExprBuilder& builder) noexcept override {
        if (!node_.counts(nbInputs, nbOutputs) || !node_.ranks([=](int32_t i) { return inputs[i].nbDims; })) return -1;
        for (int32_t i = 0; i < nbOutputs; ++i) outputs[i] = node_.output_shape(i, inputs, builder);
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override {
        return node_.counts(nbInputs, nbOutputs) && tensors[position].desc.format == TensorFormat::kLINEAR &&
               node_.supports(position, [=](int32_t i) { return tensors[i].desc.type; });
    }
    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*,
                            int32_t nbOutputs) noexcept override {
        Call call;
        bool const right = node_.counts(nbInputs, nbOutputs) &&
                           node_.describe(call, [=](int32_t i) -> PluginTensorDesc const& { return inputs[i].desc; });
        return right ? 0 : -1;
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return node_.workspace([=](int32_t i) {
            PluginTensorDesc largest = inputs[i].desc;
            largest.dims = inputs[i].max;
            return largest;
        });
    }

    // --- runtime

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }
    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        Call call;
        bool const right = node_.describe(call, [=](int32_t i) -> PluginTensorDesc const& { return inputDesc[i]; });
        return right ? node_.launch(call, inputs, outputs, workspace, stream) : -1;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_ = {node_.op.n_attributes, node_.fields};
        return &fields_;
    }

private:
    Node const node_;
    PluginFieldCollection fields_{};
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(Op const& op) : op_(op), names_(op, {}), fields_{op.n_attributes, names_.fields} {}

    // Of a node of a network, and of a serialized plugin: the fields are the same.
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        mamba_plugin::Attributes attributes;
        return mamba_plugin::read_fields(op_, fields, attributes) ? new (std::nothrow) Plugin(Node(op_, attributes))
                                                                  : nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    AsciiChar const* getPluginVersion() const noexcept override { return mamba_plugin::kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

private:
    Op const& op_;
    Node const names_;
    PluginFieldCollection const fields_;
};

ILoggerFinder* finder = nullptr;

}  // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* given) {
    finder = given;
    mamba_plugin::find_logger = [] { return finder ? finder->findLogger() : nullptr; };
}

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
    using Creators = mamba_plugin::Creators<Creator, IPluginCreatorInterface>;
    static Creators creators;
    count = mamba_plugin::kN_OPS;
    return creators.pointers;
}
