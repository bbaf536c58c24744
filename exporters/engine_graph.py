"""model.onnx as a parser of TensorRT takes it, made in memory: the file stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import helper, numpy_helper

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import ExportError
from mamba_deploy.exporters.model_graph import model_graph
from mamba_deploy.plugins.rules import prepare_for_parser

__all__ = ["ParserGraph", "model_parser_graph", "parser_graph"]

_LARGE = 1 << 16  # bytes from which on a weight is bound
_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
}


class ParserGraph(NamedTuple):
    """What the parser is given, and what it does not keep."""

    content: bytes
    dtypes: dict[str, str]  # of every tensor that has a name in the file
    weights: dict[str, tuple[int, int]]  # bound ones: where they lie in the weights file, offset and bytes


def parser_graph(
    path: Path, *, newest_opset: int | None = None, bind_weights: bool = False, mark: Sequence[str] = ()
) -> ParserGraph:
    """Read and change.

    Function bodies of our operators go (see :func:`mamba_deploy.plugins.rules.prepare_for_parser`).

    Args:
        path: ``model.onnx``.
        newest_opset: Write what a later opset brought in the words of this one.
        bind_weights: Make the large weights inputs.
        mark: Tensors to make outputs as well.

    Raises:
        ExportError: The graph holds an operator that has no counterpart in that opset, or no such tensor.
    """
    model = onnx.load(path, load_external_data=False)
    return _prepared(model, path, newest_opset, _LARGE if bind_weights else None, mark)


def model_parser_graph(
    path: Path, config: MambaConfig, contract: Contract, *, newest_opset: int | None = None
) -> ParserGraph:
    """The graph that is one operator, with all weights of the weights file as inputs; smaller ones lie in model.onnx.

    Args:
        path: ``model.onnx``, whose weights it has.
        config: The architecture, which the operator covers.
        contract: Of the model.
        newest_opset: As for :func:`parser_graph`.
    """
    model = model_graph(onnx.load(path, load_external_data=False), config, contract)
    return _prepared(model, path, newest_opset, 0, ())


def _prepared(
    model: Any, path: Path, newest_opset: int | None, bind_from: int | None, mark: Sequence[str]
) -> ParserGraph:
    prepare_for_parser(model)
    if newest_opset is not None:
        _lower_opset(model, newest_opset)
    graph = model.graph
    values = {v.name: v for v in [*graph.input, *graph.value_info, *graph.output]}
    dtypes = {name: _DTYPES.get(v.type.tensor_type.elem_type, "") for name, v in values.items()}
    dtypes |= {t.name: _DTYPES.get(t.data_type, "") for t in graph.initializer}
    for name in mark:
        if name not in values:
            raise ExportError(f"{path} has no tensor {name}", hint="export the model again")
        graph.output.append(values[name])
    weights = {} if bind_from is None else _bind_weights(graph, bind_from)
    return ParserGraph(model.SerializeToString(), dtypes, weights)


# --- weights ------------------------------------------------------------------------------------------------------


def _bind_weights(graph: Any, smallest: int) -> dict[str, tuple[int, int]]:
    """Weights of so many bytes become inputs; not those that are transposed, as that would be done in every run."""
    transposed = {node.input[0] for node in graph.node if node.op_type == "Transpose"}
    bound = {}
    for tensor in list(graph.initializer):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place or int(place["length"]) < smallest or tensor.name in transposed:
            continue
        bound[tensor.name] = (int(place.get("offset", 0)), int(place["length"]))
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.initializer.remove(tensor)
    return bound


# --- opsets -------------------------------------------------------------------------------------------------------


class _UnwritableError(Exception):
    """This node has no counterpart; what it says is why."""


class _Known(NamedTuple):
    """What is known of the graph's tensors."""

    constants: dict[str, list[int]]
    shapes: dict[str, list[int]]  # 0 for an axis whose size is not fixed


def _axes_as_attribute(node: Any, known: _Known) -> None:
    """ReduceMean-18 takes its axes as an input, 13 as an attribute."""
    axes: list[int] = []
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in known.constants:
            raise _UnwritableError("its axes are computed")
        axes = known.constants[node.input[1]]
    if not axes and any(a.name == "noop_with_empty_axes" and a.i for a in node.attribute):
        raise _UnwritableError("it has no axes and noop_with_empty_axes")
    attributes = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
    if axes:
        attributes.append(helper.make_attribute("axes", axes))
    del node.input[1:]
    _set_attributes(node, attributes)


def _parts_by_outputs(node: Any, known: _Known) -> None:
    """Split-18 may be told the number of parts, the last one smaller; 13 makes equal ones, as many as outputs."""
    given = {a.name: a.i for a in node.attribute}
    shape = known.shapes.get(node.input[0])
    if "num_outputs" in given and shape and shape[given.get("axis", 0)] % given["num_outputs"]:
        raise _UnwritableError("its parts are not equal")
    _set_attributes(node, [a for a in node.attribute if a.name != "num_outputs"])


def _without_saturate(node: Any, known: _Known) -> None:
    """Cast-19 says how float8 is made."""
    _set_attributes(node, [a for a in node.attribute if a.name != "saturate"])


def _as_it_is(node: Any, known: _Known) -> None:
    """Only dtypes were added."""


def _set_attributes(node: Any, attributes: list[Any]) -> None:
    kept = [type(a).FromString(a.SerializeToString()) for a in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)


_REWRITES: dict[str, Callable[[Any, _Known], None]] = {
    "Cast": _without_saturate,
    "ReduceMean": _axes_as_attribute,
    "Split": _parts_by_outputs,
    **dict.fromkeys(("Constant", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"), _as_it_is),
}


def _lower_opset(model: Any, newest: int) -> None:
    standard = next(entry for entry in model.opset_import if entry.domain == "")
    if standard.version <= newest:
        return
    known = _known(model.graph)
    for node in model.graph.node:
        if node.domain:
            continue
        if onnx.defs.get_schema(node.op_type, standard.version, "").since_version <= newest:
            continue
        try:
            if node.op_type not in _REWRITES:
                raise _UnwritableError("there is no rule for it")
            _REWRITES[node.op_type](node, known)
        except _UnwritableError as why:
            raise ExportError(
                f"{node.op_type} of opset {standard.version} cannot be written in opset {newest}, the newest that this "
                f"TensorRT takes: {why}",
                hint="export again with --opset 18, or use TensorRT 10",
            ) from None
    standard.version = newest


def _known(graph: Any) -> _Known:
    held = [(t.name, t) for t in graph.initializer]
    nodes = (node for node in graph.node if node.op_type == "Constant")
    held += [(node.output[0], a.t) for node in nodes for a in node.attribute if a.name == "value"]
    constants = {
        name: numpy_helper.to_array(t).ravel().tolist()
        for name, t in held
        if t.data_type == onnx.TensorProto.INT64 and not t.external_data
    }
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    return _Known(constants, shapes)
