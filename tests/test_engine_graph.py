"""The graph that a parser of TensorRT is given: opsets, bound weights, marked tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mamba_deploy.bundle import PORTABLE, WEIGHTS, Bundle
from mamba_deploy.errors import ExportError
from mamba_deploy.exporters import engine_graph
from mamba_deploy.exporters.engine_graph import model_parser_graph, parser_graph
from mamba_deploy.exporters.export import export
from mamba_deploy.plugins.rules import DOMAIN, GIVEN_INPUTS, OPS

Bundles = Callable[..., Any]  # the factory of conftest.py
NEWEST = 17  # opset that TensorRT 8.6 documents
OPSETS = (18, 21, 23)


# --- single operators ---------------------------------------------------------------------------------------------


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def node(op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["x", *inputs], [f"y{i}" for i in range(outputs)], **attributes)


# A node over x [2, 6, 4], its small integer inputs, and the opsets that have it in this form.
NODES: dict[str, tuple[onnx.NodeProto, list[onnx.TensorProto], tuple[int, ...]]] = {
    "ReduceMean of an axis": (node("ReduceMean", "axes"), [ints("axes", -1)], OPSETS),
    "ReduceMean of two, kept": (node("ReduceMean", "axes", keepdims=1), [ints("axes", 0, 2)], OPSETS),
    "ReduceMean of one, dropped": (node("ReduceMean", "axes", keepdims=0), [ints("axes", 1)], OPSETS),
    "ReduceMean of all": (node("ReduceMean", keepdims=0), [], OPSETS),
    "ReduceMean of no axes": (node("ReduceMean", "axes"), [ints("axes")], OPSETS),
    "ReduceMean, an empty name": (node("ReduceMean", ""), [], OPSETS),
    "ReduceMean that may do nothing": (node("ReduceMean", "axes", noop_with_empty_axes=1), [ints("axes", 2)], OPSETS),
    "Split in parts": (node("Split", outputs=3, axis=1, num_outputs=3), [], OPSETS),
    "Split by sizes": (node("Split", "sizes", outputs=2, axis=-1), [ints("sizes", 1, 3)], OPSETS),
    "Cast": (node("Cast", to=TensorProto.FLOAT16), [], OPSETS),
    "Cast that saturates": (node("Cast", to=TensorProto.FLOAT16, saturate=1), [], OPSETS[1:]),
    "Identity": (node("Identity"), [], OPSETS),
    "Reshape": (node("Reshape", "shape"), [ints("shape", 0, -1)], OPSETS),
    "Shape": (node("Shape", start=1), [], OPSETS),
    "Squeeze": (node("Squeeze", "axes"), [ints("axes", 0)], OPSETS),
    "Transpose": (node("Transpose", perm=[2, 0, 1]), [], OPSETS),
    "Unsqueeze": (node("Unsqueeze", "axes"), [ints("axes", 1)], OPSETS),
}  # fmt: skip
SQUEEZED = (1, 6, 4)


def model_of(made: onnx.NodeProto, constants: list[onnx.TensorProto], opset: int) -> onnx.ModelProto:
    shape = SQUEEZED if made.op_type == "Squeeze" else (2, 6, 4)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    dtype = {"Cast": TensorProto.FLOAT16, "Shape": TensorProto.INT64}.get(made.op_type, TensorProto.FLOAT)
    outputs = [helper.make_tensor_value_info(name, dtype, None) for name in made.output]
    graph = helper.make_graph([made], "g", [x], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)  # of the outputs


def lowered(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    path = folder / "given.onnx"
    onnx.save(model, path)
    return onnx.load_from_string(parser_graph(path, newest_opset=NEWEST).content)


def answers(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


@pytest.mark.parametrize(("case", "opset"), [(case, opset) for case in NODES for opset in NODES[case][2]])
def test_an_operator_gives_what_it_gave(case: str, opset: int, tmp_path: Path) -> None:
    model = model_of(*NODES[case][:2], opset)
    onnx.checker.check_model(model, full_check=True)
    low = lowered(model, tmp_path)
    onnx.checker.check_model(low, full_check=True)
    assert [entry.version for entry in low.opset_import] == [NEWEST]
    shape = SQUEEZED if case == "Squeeze" else (2, 6, 4)
    feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    assert_same(answers(low, feeds), answers(model, feeds))


@pytest.mark.parametrize("opset", OPSETS)
def test_a_constant_gives_what_it_gave(opset: int, tmp_path: Path) -> None:
    """As a node: ReduceMean may read its axes from one."""
    held = helper.make_node("Constant", [], ["axes"], value=ints("", 1))
    made = node("ReduceMean", "axes", keepdims=0)
    model = model_of(made, [ints("axes", 1)], opset)
    del model.graph.initializer[:]
    model.graph.node.insert(0, held)
    low = lowered(model, tmp_path)
    onnx.checker.check_model(low, full_check=True)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 6, 4), dtype=np.float32)}
    assert_same(answers(low, feeds), answers(model, feeds))


def test_every_rewrite_is_tried() -> None:
    assert {made.op_type for made, *_ in NODES.values()} | {"Constant"} == set(engine_graph._REWRITES)


REFUSED: dict[str, tuple[onnx.NodeProto, list[onnx.TensorProto], int, str]] = {
    "new in 18": (node("Mish"), [], 18, "Mish of opset 18"),
    "new in 20": (node("Gelu"), [], 20, "Gelu of opset 20"),
    "new in 23": (node("Swish"), [], 24, "Swish of opset 24"),
    "changed, and not in the table": (node("Pad", "pads"), [ints("pads", 0, 0, 1, 0, 0, 1)], 18, "Pad of opset 18"),
    "axes that are computed": (node("ReduceMean", "computed"), [], 18, "ReduceMean of opset 18"),
    "parts that are not equal": (node("Split", outputs=4, axis=1, num_outputs=4), [], 18, "Split of opset 18"),
    "a mean of no axes that does nothing": (
        node("ReduceMean", "axes", noop_with_empty_axes=1), [ints("axes")], 18, "ReduceMean of opset 18"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(case: str, tmp_path: Path) -> None:
    made, constants, opset, text = REFUSED[case]
    with pytest.raises(ExportError, match=text) as caught:
        lowered(model_of(made, constants, opset), tmp_path)
    assert f"opset {NEWEST}" in str(caught.value)
    assert caught.value.hint


# --- whole models -------------------------------------------------------------------------------------------------


def with_bodies(content: bytes, original: onnx.ModelProto) -> onnx.ModelProto:
    """Undo for ONNX Runtime what was done for the parser: bodies, and the places of optional inputs.

    The bodies are the original's in the lower opset: of their operators Split alone differs, by num_outputs.
    """
    model = onnx.load_from_string(content)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    for ours in model.graph.node:
        if ours.domain != DOMAIN:
            continue
        [given] = [a.i for a in ours.attribute if a.name == GIVEN_INPUTS]
        present = iter(list(ours.input))
        names = [next(present) if given >> i & 1 else "" for i in range(len(OPS[ours.op_type].inputs))]
        del ours.input[:]
        ours.input.extend(names)
        drop(ours, GIVEN_INPUTS)
    model.functions.extend(original.functions)
    for function in model.functions:
        function.opset_import[0].version = opset
        for inner in function.node:
            if inner.op_type == "Split":
                drop(inner, "num_outputs")
    return model


def drop(of: onnx.NodeProto, name: str) -> None:
    kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in of.attribute if a.name != name]
    del of.attribute[:]
    of.attribute.extend(kept)


# Those that test_onnx_export.py runs too: an export takes seconds.
EXPORTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"opset": opset}) for kind in ("mamba-one-layer", "mamba2-one-layer") for opset in (18, 23)),
    *(("mamba-one-layer", {"opset": opset}) for opset in (20, 22)),
    *(("mamba2-one-layer", {"opset": opset}) for opset in (19, 21)),
    *((kind, {"all_logits": True}) for kind in ("mamba", "mamba2")),
]


@pytest.mark.parametrize(("kind", "options"), EXPORTS, ids=str)
def test_a_whole_model_gives_what_it_gave(bundle: Bundles, run_onnx: Any, kind: str, options: dict[str, Any]) -> None:
    exported = bundle(kind, **options)
    path = exported.path / PORTABLE
    original = onnx.load(path)
    content = parser_graph(path, newest_opset=NEWEST).content
    low = with_bodies(content, original)
    onnx.load_external_data_for_model(low, str(exported.path))
    assert {entry.domain: entry.version for entry in low.opset_import} == {"": NEWEST, DOMAIN: 1}
    feeds = exported.feeds(2, 7, [7, 4])
    found, expected = run_onnx(low, feeds), run_onnx(path, feeds)
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("newest", [None, 18, 23])
def test_an_opset_that_is_taken_stays(bundle: Bundles, newest: int | None) -> None:
    path = bundle("mamba-one-layer").path / PORTABLE
    model, original = onnx.load_from_string(parser_graph(path, newest_opset=newest).content), onnx.load(path)
    assert model.opset_import == original.opset_import
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in original.graph.node]
    assert not model.functions


# --- weights, dtypes, marks ---------------------------------------------------------------------------------------

LARGE = 1 << 16


@pytest.fixture(scope="module", params=[False, True], ids=["last", "all"])
def all_logits(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def larger(all_logits: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with weights on both sides of 64 KiB; with all logits its head is transposed."""
    checkpoint, _ = checkpoints.hugging_face(
        tmp_path_factory.mktemp("checkpoint"), "mamba", vocab_size=512, hidden_size=128, num_hidden_layers=1
    )
    out = tmp_path_factory.mktemp("bundle") / "out"
    return export(checkpoint, out, dtype="float16", all_logits=all_logits).path


def test_large_weights_become_inputs(larger: Path) -> None:
    original = onnx_ir.load(larger / PORTABLE)
    found = parser_graph(larger / PORTABLE, bind_weights=True)
    graph = onnx.load_from_string(found.content).graph
    transposed = {n.inputs[0].name for n in original.graph if n.op_type == "Transpose"}
    values = original.graph.initializers
    expected = {n for n, v in values.items() if v.const_value.nbytes >= LARGE and n not in transposed}
    assert set(found.weights) == expected
    assert len(expected) >= 2
    assert any(v.const_value.nbytes < LARGE for v in values.values())
    content = (larger / WEIGHTS).read_bytes()
    for name, (offset, length) in found.weights.items():
        tensor = values[name].const_value
        assert length == tensor.nbytes
        assert content[offset : offset + length] == tensor.numpy().tobytes()
    contract = [value.name for value in original.graph.inputs]
    assert [value.name for value in graph.input[: len(contract)]] == contract
    inputs = {value.name: value.type.tensor_type for value in graph.input[len(contract) :]}
    assert set(inputs) == expected
    for name, value in inputs.items():
        assert [d.dim_value for d in value.shape.dim] == list(values[name].const_value.shape)
        assert value.elem_type == TensorProto.FLOAT16
    assert {tensor.name for tensor in graph.initializer} == set(values) - expected


def test_all_weights_of_the_model_as_one_operator_become_inputs(larger: Path) -> None:
    """But those that lie in model.onnx itself: small ones, which TensorRT hands to the plugin as constants."""
    bundle = Bundle.open(larger)
    found = model_parser_graph(larger / PORTABLE, bundle.config, bundle.contract, newest_opset=NEWEST)
    graph = onnx.load_from_string(found.content).graph
    values = onnx_ir.load(larger / PORTABLE).graph.initializers
    content = (larger / WEIGHTS).read_bytes()
    [node] = graph.node
    own = {spec.name for spec in bundle.contract.inputs}
    weights = [name for name in node.input if name not in own]
    held = {tensor.name: tensor for tensor in graph.initializer}
    assert set(found.weights) | set(held) == set(weights)
    assert not set(found.weights) & set(held)
    assert len(weights) == len(set(weights))
    for name, (offset, length) in found.weights.items():
        assert content[offset : offset + length] == values[name].const_value.numpy().tobytes()
    for tensor in held.values():
        assert not tensor.external_data
        assert tensor.raw_data == values[tensor.name].const_value.numpy().tobytes()
        assert len(tensor.raw_data) < 2048
    inputs = [value.name for value in graph.input]
    assert inputs == [*(spec.name for spec in bundle.contract.inputs), *found.weights]
    assert [entry.version for entry in onnx.load_from_string(found.content).opset_import] == [NEWEST, 1]
    assert set(found.dtypes.values()) == {"float32", "float16", "int32"}


def test_a_weight_that_is_transposed_is_not_bound(larger: Path, all_logits: bool) -> None:
    graph = onnx.load(larger / PORTABLE, load_external_data=False).graph
    transposed = {n.input[0] for n in graph.node if n.op_type == "Transpose"}
    large = {t.name for t in graph.initializer for e in t.external_data if e.key == "length" and int(e.value) >= LARGE}
    assert not transposed & set(parser_graph(larger / PORTABLE, bind_weights=True).weights)
    assert transposed <= large
    assert bool(transposed) == all_logits


def test_nothing_is_bound_unless_asked(larger: Path) -> None:
    assert parser_graph(larger / PORTABLE).weights == {}


def test_the_file_stays_as_it_is(bundle: Bundles) -> None:
    path = bundle("mamba").path / PORTABLE
    before = path.read_bytes()
    parser_graph(path, newest_opset=NEWEST, bind_weights=True, mark=["logits"])
    assert path.read_bytes() == before


@pytest.mark.parametrize(("kind", "dtype"), [("mamba", "float32"), ("mamba", "bfloat16"), ("mamba2", "float16")])
def test_dtypes_of_every_tensor(bundle: Bundles, kind: str, dtype: str) -> None:
    exported = bundle(kind, dtype=dtype)
    path = exported.path / PORTABLE
    dtypes = parser_graph(path, newest_opset=NEWEST, bind_weights=True).dtypes
    graph = onnx.load(path, load_external_data=False).graph
    named = {name for n in graph.node for name in [*n.input, *n.output] if name}
    assert named <= set(dtypes)
    assert "" not in dtypes.values()
    for spec in [*exported.bundle.contract.inputs, *exported.bundle.contract.outputs]:
        assert dtypes[spec.name] == spec.dtype


def test_a_mark_becomes_an_output(bundle: Bundles) -> None:
    path = bundle("mamba").path / PORTABLE
    original = onnx.load(path, load_external_data=False).graph
    inner = original.node[2].output[0]
    graph = onnx.load_from_string(parser_graph(path, mark=[inner]).content).graph
    assert [v.name for v in graph.output] == [*(v.name for v in original.output), inner]
    with pytest.raises(ExportError, match="has no tensor nowhere") as caught:
        parser_graph(path, mark=["nowhere"])
    assert str(path) in str(caught.value)
    assert caught.value.hint
