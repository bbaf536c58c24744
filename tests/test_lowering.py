"""model.cpu.onnx: no op of ours left, the same weights file, the same contract, and PyTorch's answers.

Op by op the lowered graphs are held to float64 in test_functions.py; architectures beyond the two of this file run
lowered in test_onnx_export.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import VARIANTS
from onnx import TensorProto

from mamba_deploy.bundle import LOWERED, PORTABLE, WEIGHTS
from mamba_deploy.contract import from_float32, to_float32
from mamba_deploy.exporters import functions
from mamba_deploy.exporters.lowering import lower_for_cpu
from mamba_deploy.runtime.ort import OrtBackend

GENERATIONS = ["mamba", "mamba2"]


def read(path: Path, graph: str = LOWERED) -> onnx.ModelProto:
    return onnx.load(path / graph, load_external_data=False)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of its subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from all_nodes(inner)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_op_of_ours_is_left(bundle, name):
    model = read(bundle(**VARIANTS[name]).path)
    domains = {node.domain for node in all_nodes(model.graph)}
    assert not model.functions
    assert functions.DOMAIN not in domains | {o.domain for o in model.opset_import}
    assert domains == ({"", "com.microsoft"} if "mamba2" in name else {""})
    assert {o.domain for o in model.opset_import} == domains


@pytest.mark.parametrize("name", ["mamba2", "mamba2-fp16", "mamba2-bf16-with-its-state"])
def test_mamba2_runs_through_linear_attention(bundle, name):
    """In each layer once for a step and once for a prompt; no loop over tokens is left."""
    nodes = list(all_nodes(read(bundle(**VARIANTS[name]).path).graph))
    contrib = [node.op_type for node in nodes if node.domain == "com.microsoft"]
    assert contrib == ["LinearAttention"] * 4
    assert "Scan" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("kind", GENERATIONS)
def test_what_is_float32_is_not_cast(bundle, kind):
    """ONNX Runtime would copy a state that goes through a Cast or an Identity."""
    nodes = read(bundle(kind).path).graph.node
    cast = {(node.op_type, node.input[0]) for node in nodes if node.op_type in ("Cast", "Identity")}
    assert cast == {("Cast", "seq_lens"), ("Cast", "argmax")}


@pytest.mark.parametrize("kind", GENERATIONS)
def test_which_tokens_are_used_is_found_once(bundle, kind):
    made = bundle(kind)
    assert made.bundle.config.n_layer > 1
    ops = [node.op_type for node in read(made.path).graph.node]
    assert [ops.count(op) for op in ("Shape", "Range", "Less")] == [1, 1, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_both_graphs_read_the_same_weights(bundle, name):
    """To the byte range, by the same names; the lowered graph carries no weights of its own."""
    made = bundle(**VARIANTS[name])

    def placed(graph: str) -> dict[str, Any]:
        return {
            t.name: (list(t.dims), t.data_type, {e.key: e.value for e in t.external_data})
            for t in read(made.path, graph).graph.initializer
            if t.external_data
        }

    portable, lowered = placed(PORTABLE), placed(LOWERED)
    assert lowered == portable
    assert {entry[2]["location"] for entry in lowered.values()} == {WEIGHTS}
    assert not [p.name for p in made.path.iterdir() if p.name.endswith(".data") and p.name != WEIGHTS]
    assert (made.path / LOWERED).stat().st_size < 64_000
    for node in all_nodes(read(made.path).graph):  # nor hidden in a constant
        assert all(a.t.ByteSize() < 1024 for a in node.attribute), node.name


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_and_outputs_are_the_contract(bundle, name):
    """As those of model.onnx, which test_onnx_export.py compares with the design."""
    made = bundle(**VARIANTS[name])
    model = read(made.path)
    for values, specs in (
        (model.graph.input, made.bundle.contract.inputs),
        (model.graph.output, made.bundle.contract.outputs),
    ):
        found = [
            (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        ]
        element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
        wanted = [(s.name, element.get(s.dtype, TensorProto.INT32), list(s.axes)) for s in specs]
        assert found == wanted


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_pytorch(bundle, run_onnx, name):
    """Half precision is widened: its logits are held to the tolerance of float32, and states to one rounding more."""
    made = bundle(**VARIANTS[name])
    for feeds in (made.feeds(1, 1), made.feeds(3, 1, [1, 0, 1]), made.feeds(4, 13, [13, 0, 6, 1]), made.feeds(2, 2)):
        made.check(run_onnx(made.path / LOWERED, feeds), feeds)


@pytest.mark.parametrize("kind", GENERATIONS)
def test_prompt_then_steps_is_the_whole(bundle, run_onnx, kind):
    """The two branches of the graph hand the state to each other: one call of 6 tokens, 3 of 1, one of 4."""
    made = bundle(kind)
    whole = made.feeds(2, 13)
    feeds, start = dict(whole), 0
    for length in (6, 1, 1, 1, 4):
        feeds["input_ids"] = whole["input_ids"][:, start : start + length]
        feeds["seq_lens"] = torch.full((2,), length, dtype=torch.int32)
        found = run_onnx(made.path / LOWERED, feeds)
        feeds |= {spec.name: found[str(spec.partner)] for spec in made.bundle.contract.states}
        start += length
    made.check(found, whole)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "all-logits" not in name])
def test_states_bound_by_address(bundle, name):
    """As the runtime feeds it, through I/O binding; bfloat16 travels as uint16."""
    made = bundle(**VARIANTS[name])
    contract = made.bundle.contract
    backend = OrtBackend(made.path / LOWERED, contract, threads=1)
    feeds = made.feeds(3, 5, [5, 2, 0])
    state = backend.new_state(3)
    for spec in contract.states:
        state.current[spec.name][:] = from_float32(feeds[spec.name].float().numpy(), spec.dtype)
    logits = backend.run(feeds["input_ids"].numpy(), feeds["seq_lens"].numpy(), state)
    want = made.answer(feeds)
    assert np.abs(logits[:2] - want["logits"][:2].numpy()).max() <= made.tolerance * want["logits"][:2].abs().max()
    for spec in contract.states:
        got, expected = to_float32(state.current[spec.name], spec.dtype), want[str(spec.partner)].numpy()
        roundoff = torch.finfo(getattr(torch, spec.dtype)).eps / 2 if spec.dtype != "float32" else 0.0
        bound = made.tolerance * np.abs(expected).max() + roundoff * np.abs(expected) + 1e-7  # subnormal in float16
        assert (np.abs(got - expected) <= bound).all(), spec.name
    backend.close()


@pytest.mark.parametrize("kind", GENERATIONS)
def test_lowering_changes_nothing_else(bundle, tmp_path, kind):
    """The portable graph and the weights stay as they are, and lowering again gives the same file."""
    made = bundle(kind)
    for name in (PORTABLE, WEIGHTS):
        shutil.copy(made.path / name, tmp_path / name)
    lower_for_cpu(tmp_path / PORTABLE, tmp_path / LOWERED, made.bundle.config, made.bundle.contract)
    for name in (PORTABLE, WEIGHTS, LOWERED):
        assert (tmp_path / name).read_bytes() == (made.path / name).read_bytes(), name
    assert len(list(tmp_path.iterdir())) == 3
