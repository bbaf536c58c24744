"""The graph of a model that is one operator: what a TensorRT engine is made of, for prompts and single tokens alike.

It takes and gives what model.onnx does, but for ``next_token``, over the same weights, and besides the tokens that
states do not hold yet. Where a model has what the operator's kernels do not cover there is none.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, TensorSpec, pending_specs
from mamba_deploy.exporters.functions import DOMAIN, PLUGIN, VERSION, element_type
from mamba_deploy.plugins.pending import pending_row
from mamba_deploy.plugins.rules import FLOATS, MAX_LAYERS, ONLY_DTYPE, ONLY_STATE_DTYPE, OPS
from mamba_deploy.plugins.structs import MambaModel

__all__ = ["covers", "model_graph", "pending_words"]

_MOST_SHARED = 96_000  # bytes for a row, of every GPU from compute capability 8.0 on; 7.5 has two thirds of that
_WIDEST = 1 << 15  # of d and D: what the threads of a prompt's norm hold of a row

# Inputs of a layer, by the names of their weights after ``layers.{i}.``; states have names of their own.
_WEIGHTS = {
    "norm_weight": "norm.weight",
    "in_proj": "mixer.in_proj.weight_t",
    "in_proj_bias": "mixer.in_proj.bias",
    "conv_weight": "mixer.conv_weight",
    "conv_bias": "mixer.conv_bias",
    "x_proj": "mixer.x_proj.weight_t",
    "dt_proj": "mixer.dt_proj.weight_t",
    "A": "mixer.A",
    "D": "mixer.D",
    "dt_bias": "mixer.dt_bias",
    "gate_norm": "mixer.norm.weight",
    "out_proj": "mixer.out_proj.weight_t",
    "out_proj_bias": "mixer.out_proj.bias",
}


def covers(config: MambaConfig, contract: Contract) -> bool:
    """Whether the operator can be the model: see the sizes that ``mamba_kernels.h`` asks for."""
    c = config
    item = 4 if contract.dtype == "float32" else 2
    vector = 16 // item
    widths = [c.d_model, c.d_inner]
    # What a block keeps of a row in shared memory: the norm's weights in float32, the row, its norm.
    in_shared = [(8 if item == 4 else 10) * c.d_model, (item + (4 if c.generation == "mamba2" else 0)) * c.d_inner]
    if max(in_shared) > _MOST_SHARED or max(widths) > _WIDEST or c.n_layer > MAX_LAYERS:
        return False
    if contract.all_logits and not c.tie_embeddings:  # model.onnx then holds the head as [d, V]
        return False
    if c.generation == "mamba":
        widths += [2 * c.d_inner, c.dt_rank + 2 * c.d_state]
    else:
        if c.d_mlp or (c.gated_norm and c.norm_before_gate):
            return False
        widths += [c.d_inner + c.conv_channels + c.n_heads, c.n_groups * c.d_state]
        state = 16 // (4 if contract.state_dtype == "float32" else 2)
        lanes = min(32, max(4, 1 << max(c.d_state // state - 1, 0).bit_length()))
        if c.d_state % state or c.head_dim % (4 * 32 // lanes):
            return False
    return all(width % vector == 0 for width in widths)


def pending_words(config: MambaConfig) -> int:
    """Float32 values of a row of what is pending; 0 where nothing ever is: of Mamba."""
    if config.generation == "mamba":
        return 0
    c = config
    sizes = {"heads": c.n_heads, "head_dim": c.head_dim, "groups": c.n_groups, "state_size": c.d_state}
    return pending_row(MambaModel(layers=c.n_layer, **sizes))


def model_graph(model: onnx.ModelProto, config: MambaConfig, contract: Contract) -> onnx.ModelProto:
    """The graph, of one node: inputs and outputs of the contract, but ``next_token``, and :func:`pending_specs`.

    Args:
        model: ``model.onnx``, whose weights it refers to, loaded without them.
        config: The architecture, which :func:`covers` covers.
        contract: Of the model.

    Raises:
        KeyError: The model lacks a weight.
    """
    op_type = "MambaModel" if config.generation == "mamba" else "Mamba2Model"
    op = OPS[op_type]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    head = "" if config.tie_embeddings else "lm_head.weight"
    pending = pending_specs(pending_words(config))
    inputs = ["input_ids", "seq_lens", "embedding.weight", "norm_f.weight", head, *(spec.name for spec in pending[:1])]
    for i in range(config.n_layer):
        for tensor in op.layer_inputs:
            state, weight = f"{tensor.name}.{i}", f"layers.{i}.{_WEIGHTS.get(tensor.name, '')}"
            is_there = weight in weights or not tensor.optional
            inputs.append(state if tensor.name not in _WEIGHTS else weight if is_there else "")
    outputs = ["logits", *(spec.name for spec in pending[1:])]
    outputs += [f"{tensor.name}.{i}" for i in range(config.n_layer) for tensor in op.layer_outputs]
    values: dict[str, Any] = {
        "layers": config.n_layer,
        "eps": config.norm_eps,
        "norm_eps": -1.0 if config.scan_norm_eps is None else config.scan_norm_eps,
        "dt_min": config.dt_min,
        "dt_max": config.dt_max,
        "n_groups": config.n_groups,
        "all_logits": int(contract.all_logits),
        ONLY_DTYPE: FLOATS.index(contract.dtype),
        ONLY_STATE_DTYPE: FLOATS.index(contract.state_dtype),
    }
    attributes = {name: values[name] for name in op.attributes}
    node = helper.make_node(op_type, inputs, outputs, name="node_model", domain=DOMAIN, **attributes, **PLUGIN)
    taken = [*contract.inputs, *pending[:1]]
    given = [*(spec for spec in contract.outputs if spec.role != "next_token"), *pending[1:]]
    own = {spec.name for spec in taken}
    graph = helper.make_graph(
        [node],
        "model",
        [_value(spec) for spec in taken],
        [_value(spec) for spec in given],
        [weights[name] for name in inputs if name and name not in own],
    )
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, element_type(spec.dtype), list(spec.axes))
