"""PyTorch reference -> model.onnx: one graph for prompt and decode, weights beside it.

Inputs and outputs are the table of :mod:`mamba_deploy.contract`. The custom ops stand in the graph as nodes of
domain ``mamba_deploy``, each with a function body, so that stock ONNX Runtime runs the file and TensorRT finds its
plugins by the same names. The residual stream after layer i is named ``hidden.{i}``, for who wants to look at it.

PyTorch's exporter takes seconds for a layer, and all layers are alike: it is given the first one, which is repeated.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from mamba_deploy import ops
from mamba_deploy.contract import Contract
from mamba_deploy.errors import ExportError
from mamba_deploy.exporters.functions import DOMAIN, PLUGIN, VERSION, function_bodies, register_schemas
from mamba_deploy.exporters.layer_graph import TRANSPOSED, repeat_layer, transposed
from mamba_deploy.model import MambaModel, ModelState

__all__ = ["OPSETS", "WEIGHTS_NAME", "export_onnx"]

OPSETS = range(18, 24)
WEIGHTS_NAME = "model.onnx.data"


class Graph(nn.Module):
    """The model with the inputs and outputs of the contract, flat and in its order."""

    def __init__(self, model: MambaModel, all_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.all_logits = all_logits

    def forward(self, input_ids: Tensor, seq_lens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B, L] int32, seq_lens [B] int32, then conv and ssm state of each layer."""
        before = ModelState(list(state[0::2]), list(state[1::2]))
        logits, after = self.model(input_ids, before, seq_lens, self.all_logits)
        last = ops.last_token(logits, seq_lens) if self.all_logits else logits
        states = [tensor for pair in zip(after.conv, after.ssm, strict=True) for tensor in pair]
        return (logits, last.argmax(-1).to(torch.int32), *states)


def export_onnx(model: MambaModel, contract: Contract, path: Path, *, opset: int = 18) -> None:
    """Write a model as ``path`` and, beside it, its weights as ``model.onnx.data``.

    Args:
        model: In the activation dtype of the contract.
        contract: What the graph takes and gives.
        path: Of the graph, ``.../model.onnx``.
        opset: ONNX opset, 18 to 23.

    Raises:
        ExportError: The opset is not covered, or the graph does not come out as the contract says.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not covered", hint=f"choose one from {OPSETS[0]} to {OPSETS[-1]}")
    made = _traced(*_first_layer(model, contract), opset)
    repeat_layer(made.graph, model)
    for body in function_bodies(model.config, contract, opset):
        function = onnx_ir.serde.deserialize_function(body)
        made.functions[function.identifier()] = function
    made.opset_imports[DOMAIN] = VERSION
    _check_contract(made.graph, contract)
    onnx_ir.save(made, path, external_data=WEIGHTS_NAME, size_threshold_bytes=1024)
    onnx.checker.check_model(str(path), full_check=True)


def _first_layer(model: MambaModel, contract: Contract) -> tuple[MambaModel, Contract]:
    """The model without its other layers, over the same modules."""
    config = dataclasses.replace(model.config, n_layer=1)
    with torch.device("meta"):
        one = MambaModel(config)
    for name, module in model.named_children():
        setattr(one, name, nn.ModuleList([model.layers[0]]) if name == "layers" else module)
    c = contract
    return one.eval(), Contract.of(config, dtype=c.dtype, state_dtype=c.state_dtype, all_logits=c.all_logits)


def _traced(model: MambaModel, contract: Contract, opset: int) -> onnx_ir.Model:
    """As PyTorch's exporter makes it, simplified."""
    register_schemas()
    made = _capture(model, contract, opset).model
    for value in list(made.graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    _store_transposed(made.graph)
    _optimize(made)
    _keep_leading_axes(made.graph)
    common.RemoveUnusedNodesPass()(made)
    common.ClearMetadataAndDocStringPass()(made)  # the exporter's stack traces
    return made


def _capture(model: MambaModel, contract: Contract, opset: int) -> torch.onnx.ONNXProgram:
    # Sizes above 1, because torch.export takes a size of 1 for a constant.
    example = [torch.zeros(spec.shape(batch=2, seq=3), dtype=getattr(torch, spec.dtype)) for spec in contract.inputs]
    batch, seq = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim("seq", min=1, max=1 << 20)
    dims = {"batch": batch, "seq": seq}
    shapes = [{i: dims[a] for i, a in enumerate(spec.axes) if isinstance(a, str)} for spec in contract.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Graph(model, contract.all_logits),
            tuple(example),
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            dynamic_shapes=(shapes[0], shapes[1], tuple(shapes[2:])),
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    return program


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What each torch op becomes: a node without a body, which the exporter leaves alone."""
    nodes = onnxscript.values.Opset(DOMAIN, VERSION)

    def conv(x, weight, bias, conv_state, seq_lens, activation: str):  # type: ignore[no-untyped-def]
        return nodes.MambaCausalConv1d(x, weight, bias, conv_state, seq_lens, activation=activation, **PLUGIN)

    def selective(x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, dt_softplus: bool):  # type: ignore[no-untyped-def]
        return nodes.MambaSelectiveScan(
            x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, dt_softplus=int(dt_softplus), **PLUGIN
        )

    def ssd(  # type: ignore[no-untyped-def]
        x, dt, A, B, C, D, dt_bias, ssm_state, seq_lens,
        dt_softplus: bool, dt_min: float, dt_max: float, n_groups: int, chunk_size: int,
    ):  # fmt: skip
        return nodes.MambaSsdScan(
            x, dt, A, B, C, D, dt_bias, ssm_state, seq_lens,
            dt_softplus=int(dt_softplus), dt_min=dt_min, dt_max=dt_max, n_groups=n_groups, chunk_size=chunk_size,
            **PLUGIN,
        )  # fmt: skip

    def last(x, seq_lens):  # type: ignore[no-untyped-def]
        return nodes.MambaLastToken(x, seq_lens, **PLUGIN)

    torch_ops = torch.ops.mamba_deploy
    return {
        torch_ops.causal_conv1d.default: conv,
        torch_ops.selective_scan.default: selective,
        torch_ops.ssd_scan.default: ssd,
        torch_ops.last_token.default: last,
    }


def _store_transposed(graph: onnx_ir.Graph) -> None:
    """Turn Transpose(weight) into a weight stored as [in, out], named ``..._t``, where nothing else reads it.

    The tensors are transposed one by one as the file is written.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.consumers()) > 1:
            continue
        tensor = weight.const_value
        assert tensor is not None
        name = f"{weight.name}{TRANSPOSED}"
        turned = transposed(tensor, name)
        stored = onnx_ir.Value(name=name, shape=turned.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=turned)
        graph.register_initializer(stored)
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(weight.name))


def _optimize(model: onnx_ir.Model) -> None:
    """Fold and simplify, but no weights: they would be stored twice, or become one where small ones are equal."""
    weights = [(value, value.const_value) for value in model.graph.initializers.values()]
    for value, _ in weights:
        value.const_value = None
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every one of them
    try:
        onnxscript.optimizer.optimize(model, input_size_limit=16)
    finally:
        logger.setLevel(level)
    for value, tensor in weights:
        value.const_value = tensor


def _keep_leading_axes(graph: onnx_ir.Graph) -> None:
    """Where a Reshape leaves the first axes as they are, say so with zeros instead of computing their sizes.

    TensorRT 8.6 does not find the rank of what follows a computed shape.
    """
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if node.inputs[1].const_value is not None or before is None or after is None:
            continue
        kept = 0
        while kept < min(len(before), len(after)) and before[kept] == after[kept]:
            kept += 1
        sizes = [0] * kept + [size for size in after[kept:] if isinstance(size, int)]
        if len(sizes) < len(after):
            raise ExportError(f"{node.name} reshapes {before} to {after}, whose sizes are not known")
        shape = onnx_ir.Value(name=f"{node.name}_shape", const_value=onnx_ir.tensor(np.array(sizes, np.int64)))
        graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)


def _check_contract(graph: onnx_ir.Graph, contract: Contract) -> None:
    """The exporter's graph has the names, dtypes and axes of the contract."""
    for values, specs in ((graph.inputs, contract.inputs), (graph.outputs, contract.outputs)):
        if len(values) != len(specs):
            raise ExportError(f"the graph has {len(values)} tensors where the contract has {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            value.shape = onnx_ir.Shape(spec.axes)
            dtype = onnx_ir.DataType[{"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())]
            if value.name != spec.name or value.dtype != dtype:
                raise ExportError(
                    f"the graph gives {value.name} {value.dtype} where the contract says {spec.name} {spec.dtype}"
                )
