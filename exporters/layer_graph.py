"""The graph of a model from that of its first layer: the layer's nodes once for each layer, with weights of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from mamba_deploy.errors import ExportError
from mamba_deploy.model import MambaModel

__all__ = ["TRANSPOSED", "repeat_layer", "transposed"]

TRANSPOSED = "_t"  # ends the name of a weight that is stored as [in, out]
_FIRST = "layers.0."


class _Layer(NamedTuple):
    """The first one."""

    before: onnx_ir.Value  # the residual stream
    after: onnx_ir.Value
    nodes: list[onnx_ir.Node]
    outputs: list[onnx_ir.Value]  # of the graph, that it gives


def repeat_layer(graph: onnx_ir.Graph, model: MambaModel) -> None:
    """Make the graph of a model of that of its first layer, in place.

    What a layer computes is named ``layers.{i}.`` and as the exporter named it; the residual stream after it, [batch,
    seq, d_model], is ``hidden.{i}``.

    Args:
        graph: Of the model with one layer. Weights have the names of the model's, and state tensors end in ``.0``.
        model: With all layers.

    Raises:
        ExportError: The graph has no layer.
    """
    before, after = _residual_stream(graph, model.config.d_model)
    nodes = _nodes_between(graph, before, after)
    layer = _Layer(before, after, nodes, [value for value in graph.outputs if value.producer() in nodes])
    for node in nodes:
        node.name = f"{_FIRST}{node.name}"
        for value in node.outputs:
            if value not in layer.outputs:
                value.name = f"{_FIRST}{value.name}"
    after.name = "hidden.0"
    readers = list(after.uses())
    weights = model.state_dict()
    last = after
    for i in range(1, model.config.n_layer):
        last = _add_layer(graph, layer, i, last, weights)
    for node, index in readers:
        node.replace_input_with(index, last)


def _residual_stream(graph: onnx_ir.Graph, width: int) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Before and after the layer: the first sum of two computed tensors that the scan's y leads to is what is after."""
    behind: set[onnx_ir.Value | None] = set()  # what y leads to
    for node in graph:
        if node.outputs[-1].name == "ssm_state_out.0":
            behind = {node.outputs[0]}
        elif behind.intersection(node.inputs):
            result = node.outputs[0]
            is_sum = node.op_type == "Add" and all(v is not None and v.const_value is None for v in node.inputs)
            if is_sum and result.shape is not None and result.shape[-1] == width:
                return next(v for v in node.inputs if v is not None and v not in behind), result
            behind.update(node.outputs)
    raise ExportError("the graph has no sum of a layer's input and its output")


def _nodes_between(graph: onnx_ir.Graph, before: onnx_ir.Value, after: onnx_ir.Value) -> list[onnx_ir.Node]:
    """What the layer's input, its state and its weights lead to, but for what follows the layer; in order."""
    inside: set[onnx_ir.Value | None] = {before, *(v for v in graph.inputs if _is_state(v))}
    inside |= {value for name, value in graph.initializers.items() if name.startswith(_FIRST)}
    beyond: set[onnx_ir.Value | None] = {after}
    nodes = []
    for node in graph:
        if beyond.intersection(node.inputs):
            beyond.update(node.outputs)
        elif inside.intersection(node.inputs):
            inside.update(node.outputs)
            nodes.append(node)
    return nodes


def _is_state(value: onnx_ir.Value) -> bool:
    return value.is_graph_input() and str(value.name).endswith(".0")


def _add_layer(
    graph: onnx_ir.Graph, first: _Layer, number: int, last: onnx_ir.Value, weights: Mapping[str, Tensor]
) -> onnx_ir.Value:
    """A layer behind the one that ends with ``last``; the residual stream after it."""
    copies = {first.before: last}  # what stands in place of the first layer's values; others stand for themselves

    def renamed(name: str | None) -> str:
        name = str(name)
        return f"layers.{number}.{name.removeprefix(_FIRST)}" if name.startswith(_FIRST) else f"{name[:-1]}{number}"

    def copy(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
        if value is None:
            return None
        if value not in copies and _is_state(value):
            copies[value] = onnx_ir.Value(name=renamed(value.name), type=value.type, shape=value.shape)
            graph.inputs.append(copies[value])
        elif value not in copies and value.is_initializer() and str(value.name).startswith(_FIRST):
            copies[value] = _weight(renamed(value.name), value, weights)
            graph.register_initializer(copies[value])
        return copies.get(value, value)

    place = last.producer()
    assert place is not None
    for node in first.nodes:
        made = onnx_ir.Node(
            node.domain,
            node.op_type,
            [copy(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=renamed(node.name),
        )
        for value, new in zip(node.outputs, made.outputs, strict=True):
            new.name, new.type, new.shape = renamed(value.name), value.type, value.shape
            copies[value] = new
        graph.insert_after(place, made)
        place = made
    graph.outputs.extend(copies[value] for value in first.outputs)
    return copies[first.after]


def _weight(name: str, first: onnx_ir.Value, weights: Mapping[str, Tensor]) -> onnx_ir.Value:
    source = name if name in weights else name.removesuffix(TRANSPOSED)
    tensor: onnx_ir.TensorProtocol = TorchTensor(weights[source], name=name)
    if source != name:
        tensor = transposed(tensor, name)
    return onnx_ir.Value(name=name, type=first.type, shape=first.shape, const_value=tensor)


def transposed(tensor: onnx_ir.TensorProtocol, name: str) -> onnx_ir.LazyTensor:
    """A tensor over one of PyTorch, which is transposed when the file is written."""
    turn = functools.partial(_turned, tensor)
    shape = onnx_ir.Shape(tuple(reversed(tensor.shape.numpy())))
    return onnx_ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=name)


def _turned(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor(tensor.raw.detach().t().contiguous())
