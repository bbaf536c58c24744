"""model.onnx: its contract, nodes, functions and weights file, and that stock ONNX Runtime gives PyTorch's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mamba_deploy.bundle import LOWERED, PORTABLE, WEIGHTS
from mamba_deploy.checkpoint import load_checkpoint
from mamba_deploy.contract import Contract
from mamba_deploy.errors import ExportError
from mamba_deploy.exporters import functions, layer_graph, onnx_export
from mamba_deploy.exporters.export import export
from mamba_deploy.exporters.onnx_export import OPSETS, export_onnx
from mamba_deploy.exporters.reference import bundle_weights
from mamba_deploy.limits import parameter_count
from mamba_deploy.model import MambaModel, cast_weight
from mamba_deploy.runtime.verify import tolerance

GENERATIONS = ["mamba", "mamba2"]
HALVES: dict[str, dict[str, Any]] = {
    "mamba-fp16-with-its-state": {"kind": "mamba", "dtype": "float16", "state_dtype": "float16"},
    "mamba2-fp16": {"kind": "mamba2", "dtype": "float16"},
    "mamba-bf16": {"kind": "mamba", "dtype": "bfloat16"},
    "mamba2-bf16-with-its-state": {"kind": "mamba2", "dtype": "bfloat16", "state_dtype": "bfloat16"},
    "mamba-fp32-with-bf16-state": {"kind": "mamba", "state_dtype": "bfloat16"},
}
NATIVE = ["mamba2-mlp-part", "mamba2-skip-per-channel", "mamba2-norm-before-gate", "mamba2-no-gated-norm"]
VARIANTS = [  # NATIVE and those that transformers has too
    "falcon",
    "mamba-untied-no-conv-bias",
    "mamba-projection-bias",
    "mamba2-untied",
    "mamba2-no-conv-bias",
    "mamba2-projection-bias",
    "mamba2-dt-limits",
    "codestral-groups-8",
    *NATIVE,
]


def read(path: Path, graph: str = PORTABLE) -> onnx.ModelProto:
    """Without the weights."""
    return onnx.load(path / graph, load_external_data=False)


def signature(values: Any) -> list[tuple[str, str, list[Any]]]:
    """Name, dtype and axes of a graph's inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        axes = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        found.append((value.name, TensorProto.DataType.Name(tensor.elem_type).lower(), axes))
    return found


def custom_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == functions.DOMAIN]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}


# The graph ------------------------------------------------------------------------------------------------------------

# Written by hand from the table of the design, for 2 layers with C = 32 (Mamba) and 48 (Mamba-2), K = 4, V = 61.
STATES = {
    "mamba": [("conv_state", ["batch", 32, 3]), ("ssm_state", ["batch", 32, 8])],
    "mamba2": [("conv_state", ["batch", 48, 3]), ("ssm_state", ["batch", 4, 8, 8])],
}


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("all_logits", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_inputs_and_outputs_are_those_of_the_design(bundle, kind, all_logits, graph):
    made = bundle(kind, all_logits=True) if all_logits else bundle(kind)
    model = read(made.path, graph)
    inputs: list[Any] = [("input_ids", "int32", ["batch", "seq"]), ("seq_lens", "int32", ["batch"])]
    outputs: list[Any] = [
        ("logits", "float", ["batch", "seq", 61] if all_logits else ["batch", 61]),
        ("next_token", "int32", ["batch"]),
    ]
    for i in range(2):
        inputs += [(f"{name}.{i}", "float", axes) for name, axes in STATES[kind]]
        outputs += [(f"{name}_out.{i}", "float", axes) for name, axes in STATES[kind]]
    assert signature(model.graph.input) == inputs
    assert signature(model.graph.output) == outputs


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("name", HALVES)
def test_dtypes_are_those_asked_for(bundle, name, graph):
    made = bundle(**HALVES[name])
    onnx_name = {"float32": "float"}
    activation = HALVES[name].get("dtype", "float32")
    state = HALVES[name].get("state_dtype", "float32")
    model = read(made.path, graph)
    for values in (model.graph.input, model.graph.output):
        for tensor, dtype, _ in signature(values):
            kind = tensor.split(".")[0].removesuffix("_out")
            wanted = {"conv_state": onnx_name.get(activation, activation), "ssm_state": onnx_name.get(state, state)}
            assert dtype == wanted.get(kind, "float" if kind == "logits" else "int32"), tensor
    stored = {i.name: TensorProto.DataType.Name(i.data_type).lower() for i in model.graph.initializer}
    assert stored["embedding.weight"] == stored["layers.0.mixer.conv_weight"] == onnx_name.get(activation, activation)
    for weight in ("layers.0.norm.weight", "layers.1.mixer.A", "layers.1.mixer.D", "layers.0.mixer.dt_bias"):
        assert stored[weight] == "float", weight


INPUTS = {  # of layer i; None: computed in the graph
    "MambaCausalConv1d": [None, "layers.{i}.mixer.conv_weight", "{bias}", "conv_state.{i}", "seq_lens"],
    "MambaSelectiveScan": [
        None, None, "layers.{i}.mixer.A", None, None, "layers.{i}.mixer.D", None, "layers.{i}.mixer.dt_bias",
        "ssm_state.{i}", "seq_lens",
    ],
    "MambaSsdScan": [
        None, None, "layers.{i}.mixer.A", None, None, "layers.{i}.mixer.D", "layers.{i}.mixer.dt_bias",
        "ssm_state.{i}", "seq_lens",
    ],
    "MambaLastToken": [None, "seq_lens"],
}  # fmt: skip
PLUGIN = {"plugin_version": "1", "plugin_namespace": ""}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "MambaCausalConv1d": {"activation": "silu"},
    "MambaSelectiveScan": {"dt_softplus": 1},
    "MambaSsdScan": {
        "dt_softplus": 1, "dt_min": 0.0, "dt_max": float("inf"), "n_groups": 1, "chunk_size": 16,
    },
    "MambaLastToken": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layers", "scan", "bias", "changes"),
    [
        ("mamba", 2, "MambaSelectiveScan", True, {}),
        ("mamba2", 2, "MambaSsdScan", True, {}),
        ("falcon", 1, "MambaSelectiveScan", True, {}),
        ("mamba-untied-no-conv-bias", 1, "MambaSelectiveScan", False, {}),
        ("mamba2-no-conv-bias", 1, "MambaSsdScan", False, {}),
        ("mamba2-dt-limits", 1, "MambaSsdScan", True, {"dt_min": 0.1, "dt_max": 0.4}),
        ("codestral-groups-8", 1, "MambaSsdScan", True, {"n_groups": 8, "chunk_size": 256}),
    ],
    ids=lambda value: value if isinstance(value, str) and not value.startswith("MambaS") else "",
)
def test_custom_nodes(bundle, kind, layers, scan, bias, changes):
    """Their order, the position of every input and every attribute, as a TensorRT plugin will see them."""
    nodes = custom_nodes(read(bundle(kind).path))
    assert [n.op_type for n in nodes] == ["MambaCausalConv1d", scan] * layers + ["MambaLastToken"]
    assert len({n.name for n in nodes}) == len(nodes), "two nodes of one name"
    made = set()
    for node in read(bundle(kind).path).graph.node:
        made.update(node.output)
    for position, node in enumerate(nodes):
        i = position // 2
        names = {"i": i, "bias": f"layers.{i}.mixer.conv_bias" if bias else ""}
        wanted = [None if name is None else name.format(**names) for name in INPUTS[node.op_type]]
        assert [None if name in made else name for name in node.input] == wanted, node.name
        assert attributes(node) == pytest.approx(ATTRIBUTES[node.op_type] | changes_of(node, changes) | PLUGIN)
        state = {"MambaCausalConv1d": f"conv_state_out.{i}", scan: f"ssm_state_out.{i}"}
        assert list(node.output[1:]) == ([state[node.op_type]] if node.op_type in state else [])


def changes_of(node: onnx.NodeProto, changes: dict[str, Any]) -> dict[str, Any]:
    return changes if node.op_type == "MambaSsdScan" else {}


def test_data_inputs_come_in_the_order_of_the_schema(bundle):
    """Those whose shapes do not tell them apart: x, dt and z, and B and C."""
    path = bundle("mamba").path
    model = onnx.shape_inference.infer_shapes(read(path))
    node = custom_nodes(model)[1]
    producers = {name: n for n in model.graph.node for name in n.output}
    x, dt, _, B, C, _, z = node.input[:7]
    split = producers[B]
    assert producers[x].op_type == "MambaCausalConv1d"
    assert producers[dt].op_type == "MatMul"
    assert producers[dt].input[1] == "layers.0.mixer.dt_proj.weight_t"
    assert split.op_type == "Split"
    assert list(split.output) == [producers[dt].input[0], B, C]
    assert z == producers[producers[x].input[0]].output[1], "z is the second half of in_proj"


LAYERED: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in [*GENERATIONS, *VARIANTS, "mamba2-untrained"]},
    **{f"{kind}-all-logits": {"kind": kind, "all_logits": True} for kind in GENERATIONS},
    **HALVES,
}


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("name", LAYERED)
def test_the_residual_stream_has_a_name_after_each_layer(bundle, name, graph):
    """Each is a sum that the next norm and the next sum read, and its dtype and axes are in the file."""
    made = bundle(**LAYERED[name])
    model = read(made.path, graph)
    config = made.bundle.config
    producers = {output: node for node in model.graph.node for output in node.output}
    named = [output for output in producers if output.startswith("hidden.")]
    assert named == [f"hidden.{i}" for i in range(config.n_layer)]
    known = {entry[0]: entry for entry in signature(model.graph.value_info)}
    for i, each in enumerate(named):
        assert producers[each].op_type == "Add"
        assert known[each] == (each, "float", ["batch", "seq", config.d_model])
        if i:
            assert named[i - 1] in producers[each].input


@pytest.mark.parametrize("name", [name for name in LAYERED if "bf16" not in name])
def test_what_has_the_name_of_a_layer_is_what_pytorch_gives_there(bundle, run_onnx, name):
    made = bundle(**LAYERED[name])
    model = onnx.load(made.path / PORTABLE)
    names = [f"hidden.{i}" for i in range(made.bundle.config.n_layer)]
    model.graph.output.extend(value for value in model.graph.value_info if value.name in names)
    feeds = made.feeds(2, 5)
    feeds |= {spec.name: torch.zeros_like(feeds[spec.name]) for spec in made.bundle.contract.states}
    found = run_onnx(model, feeds)
    kept = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, result: kept.append(result[0]))
        for layer in made.reference.layers
    ]
    made.answer(feeds)
    for hook in hooks:
        hook.remove()
    allowed = tolerance(made.bundle.config, made.bundle.contract)
    for each, want in zip(names, kept, strict=True):
        assert (found[each] - want).abs().max() <= allowed * want.abs().max(), each


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("opset", [18, 23])
def test_no_axis_of_a_reshape_is_computed(bundle, graph, opset):
    """TensorRT 8.6 does not find the rank of what follows one that is; zeros stand for batch and seq as they are."""
    model = read(bundle("codestral-groups-8", opset=opset).path, graph)
    held = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer if not t.external_data}
    shapes = [held[node.input[1]] for node in model.graph.node if "node_view" in node.name]
    assert shapes == [[0, 0, 8, 64], [0, 0, 512]]


def canonical(graph: onnx_ir.Graph) -> list[Any]:
    """The nodes, whatever the exporter called what they compute."""
    known = {value: value.name for value in graph.inputs}
    for value in graph.initializers.values():
        is_weight = str(value.name).endswith(("weight", "weight_t", "bias", ".A", ".D")) or "mixer" in str(value.name)
        known[value] = value.name if is_weight else str(value.const_value.numpy().tolist())
    found = []
    for node in graph:
        inputs = [None if value is None else known[value] for value in node.inputs]
        given = sorted((name, str(a.value)) for name, a in node.attributes.items())
        found.append((node.domain, node.op_type, inputs, given, [str(value.shape) for value in node.outputs]))
        known.update((value, (len(found), i)) for i, value in enumerate(node.outputs))
    return [*found, [(value.name, known[value]) for value in graph.outputs]]


@pytest.mark.parametrize("kind", GENERATIONS)
def test_a_layer_repeated_is_what_the_exporter_makes_of_the_whole_model(bundle, kind):
    made = bundle(kind)
    assert made.bundle.config.n_layer > 1
    whole = onnx_export._traced(made.reference, made.bundle.contract, 18).graph
    assert canonical(onnx_ir.load(made.path / PORTABLE).graph) == canonical(whole)


def test_a_model_made_in_inference_mode(bundle, tmp_path):
    """Its parameters cannot be made others, which require gradients."""
    made = bundle("mamba2")
    with torch.inference_mode():
        weights = {name: tensor.clone() for name, tensor in made.reference.state_dict().items()}
        model = MambaModel.from_weights(made.bundle.config, weights)
    export_onnx(model, made.bundle.contract, tmp_path / PORTABLE)
    assert (tmp_path / WEIGHTS).read_bytes() == (made.path / WEIGHTS).read_bytes()


def test_a_graph_without_a_layer_is_refused(bundle):
    made = bundle("mamba")
    graph = onnx_ir.load(made.path / PORTABLE).graph
    for value in graph.outputs:
        value.name = f"not_{value.name}"
    with pytest.raises(ExportError, match="the graph has no sum of a layer's input and its output"):
        layer_graph.repeat_layer(graph, made.reference)


def test_all_logits_takes_the_last_token_of_the_logits(bundle):
    nodes = custom_nodes(read(bundle("mamba2", all_logits=True).path))
    assert [n.op_type for n in nodes[-3:]] == ["MambaCausalConv1d", "MambaSsdScan", "MambaLastToken"]
    assert list(nodes[-1].input) == ["logits", "seq_lens"]


SCHEMAS = {  # the design: inputs, a question mark where optional; attributes
    "MambaCausalConv1d": ("x weight bias? conv_state seq_lens", "activation"),
    "MambaSelectiveScan": ("x dt A B C D? z? dt_bias? ssm_state seq_lens", "dt_softplus"),
    "MambaSsdScan": ("x dt A B C D? dt_bias? ssm_state seq_lens", "dt_softplus dt_min dt_max n_groups chunk_size"),
    "MambaLastToken": ("x seq_lens", ""),
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_is_that_of_the_design(op):
    functions.register_schemas()
    functions.register_schemas()  # twice does no harm
    schema = onnx.defs.get_schema(op, 1, "mamba_deploy")
    inputs, names = SCHEMAS[op]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [f"{i.name}{'?' if i.option == optional else ''}" for i in schema.inputs] == inputs.split()
    assert set(schema.attributes) == {*names.split(), "plugin_version", "plugin_namespace"}
    state = {"MambaCausalConv1d": ["conv_state_out"], "MambaLastToken": []}.get(op, ["ssm_state_out"])
    assert [o.name for o in schema.outputs] == ["y", *state]


@pytest.mark.parametrize("kind", [*GENERATIONS, "codestral-groups-8", "mamba2-no-conv-bias"])
def test_function_bodies_are_those_of_the_ops_used(bundle, kind):
    model = read(bundle(kind).path)
    assert sorted(f.name for f in model.functions) == sorted({n.op_type for n in custom_nodes(model)})
    for function in model.functions:
        schema = onnx.defs.get_schema(function.name, 1, functions.DOMAIN)
        assert function.domain == functions.DOMAIN
        assert list(function.input) == [i.name for i in schema.inputs]
        assert list(function.output) == [o.name for o in schema.outputs]
        assert set(function.attribute) == set(schema.attributes)
        assert {n.domain for n in function.node} == {""}
    imports = {o.domain: o.version for o in model.opset_import}
    assert imports == {"": 18, functions.DOMAIN: 1}


# Opsets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "kind"),
    [
        (18, "mamba"),
        (19, "mamba2-one-layer"),
        (20, "mamba-one-layer"),
        (21, "mamba2-one-layer"),
        (22, "mamba-one-layer"),
        (23, "mamba-one-layer"),
        (23, "mamba2-one-layer"),
    ],
)
def test_opset_is_the_one_asked_for(bundle, run_onnx, opset, kind):
    """In the model and in each function; the file passes the full check and gives PyTorch's answers, lowered too."""
    made = bundle(kind) if opset == 18 else bundle(kind, opset=opset)
    model = read(made.path)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, functions.DOMAIN: 1}
    for function in model.functions:
        assert [(o.domain, o.version) for o in function.opset_import] == [("", opset)]
    lowered = read(made.path, LOWERED)
    assert {o.domain: o.version for o in lowered.opset_import if not o.domain} == {"": opset}
    feeds = made.feeds(3, 5, [5, 2, 0])
    for graph in (PORTABLE, LOWERED):
        onnx.checker.check_model(made.path / graph, full_check=graph == PORTABLE)
        made.check(run_onnx(made.path / graph, feeds), feeds)


def test_opsets_covered():
    assert list(OPSETS) == [18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("opset", [17, 24])
def test_other_opset_is_refused(tmp_path, opset):
    directory, _ = checkpoints.hugging_face(tmp_path / "checkpoint", "mamba", num_hidden_layers=1)
    with pytest.raises(ExportError, match=f"opset {opset}") as caught:
        export(directory, tmp_path / "out", opset=opset)
    assert "18 to 23" in caught.value.hint
    config, weights = load_checkpoint(directory)
    with pytest.raises(ExportError, match=f"opset {opset}"):
        export_onnx(MambaModel.from_weights(config, weights), Contract.of(config), tmp_path / "m.onnx", opset=opset)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


# The weights file -----------------------------------------------------------------------------------------------------

STORED: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in [*GENERATIONS, *VARIANTS, "mamba2-untrained"]},
    **{f"{kind}-all-logits": {"kind": kind, "all_logits": True} for kind in GENERATIONS},
    **HALVES,
}


@pytest.mark.parametrize("name", STORED)
def test_every_weight_is_stored_once_as_it_was(bundle, name):
    """Byte by byte against the checkpoint; nothing else is in the weights file, and nothing twice."""
    made = bundle(**STORED[name])
    dtype = getattr(torch, made.bundle.contract.dtype)
    config, weights = load_checkpoint(made.checkpoint)
    wanted = {n: cast_weight(n, w, dtype) for n, w in weights.items()}
    model = read(made.path)
    size = (made.path / WEIGHTS).stat().st_size
    spans, total, seen = [], 0, set()
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        length = np.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        weight = tensor.name.removesuffix("_t")
        if weight not in wanted:  # a constant that the exporter made
            assert not where
            assert length <= 64, tensor.name
            continue
        assert bool(where) == (length > 1024), f"{tensor.name}, {length} bytes"
        if where:
            assert where["location"] == WEIGHTS
            spans.append((int(where["offset"]), int(where["length"])))
            assert spans[-1][1] == length
        value = numpy_helper.to_array(tensor, base_dir=str(made.path))
        expected = wanted[weight].t() if tensor.name.endswith("_t") else wanted[weight]
        assert value.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes(), tensor.name
        assert weight not in seen
        seen.add(weight)
        total += wanted[weight].numel()
    assert seen == set(wanted)
    assert total == parameter_count(config)
    spans.sort()
    for (start, length), (following, _) in zip(spans, [*spans[1:], (size, 0)], strict=True):
        assert start + length <= following, "two weights share bytes, or the file is short"
    assert size <= sum(length for _, length in spans) + 4096 * len(spans), "the file holds more than the weights"
    assert bundle_weights(made.bundle).keys() == wanted.keys()
    for weight, tensor in bundle_weights(made.bundle).items():
        assert tensor.dtype == wanted[weight].dtype
        assert torch.equal(tensor, wanted[weight]), weight


def test_weights_file_has_no_gaps(bundle):
    """Where tensors are small, an alignment of each to pages would be most of the file."""
    model = read(bundle("codestral-groups-8").path)
    stored = sum(int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "length")
    size = (bundle("codestral-groups-8").path / WEIGHTS).stat().st_size
    assert stored <= size <= 1.02 * stored


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("mamba", 1),
        ("mamba2", 1),
        ("mamba-all-logits", 1),
        ("mamba2-all-logits", 1),
        ("mamba2-untied", 2),
        ("mamba-untied-no-conv-bias", 2),
    ],
)
def test_tied_embedding_is_stored_once(bundle, name, tables):
    """Of the true vocabulary, 61; the checkpoint of ``mamba`` is padded to 64."""
    model = read(bundle(**STORED[name]).path)
    found = {t.name: list(t.dims) for t in model.graph.initializer if sorted(t.dims) == [16, 61]}
    assert found == {"embedding.weight": [61, 16]} | ({"lm_head.weight": [61, 16]} if tables == 2 else {})


def test_graph_is_small_whatever_the_weights(bundle):
    made = bundle("codestral-groups-8")
    assert (made.path / WEIGHTS).stat().st_size > 1_500_000
    for graph in (PORTABLE, LOWERED):
        assert (made.path / graph).stat().st_size < 64_000
        inside = [t for t in read(made.path, graph).graph.initializer if not t.external_data]
        assert all(len(t.raw_data) <= 1024 for t in inside)


@pytest.mark.parametrize("kind", [*GENERATIONS, "codestral-groups-8"])
def test_nothing_tells_where_it_was_made(bundle, kind):
    """No path of this machine and no stack trace of the exporter."""
    made = bundle(kind)
    for name in (PORTABLE, LOWERED):
        content = (made.path / name).read_bytes()
        for trace in (
            str(Path(__file__).parents[1]), str(made.checkpoint), str(made.path), str(Path.home()) + "/",
            sys.prefix, "site-packages", ".py", "File ", "torch.nn", "stack_trace",
        ):  # fmt: skip
            assert trace.encode() not in content, f"{trace} in {name}"


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [1, 2, 37])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", GENERATIONS)
@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
def test_any_batch_and_length_from_one_file(bundle, run_onnx, graph, kind, batch, seq):
    made = bundle(kind)
    feeds = made.feeds(batch, seq)
    made.check(run_onnx(made.path / graph, feeds), feeds)


@pytest.mark.parametrize("kind", GENERATIONS)
@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
def test_long_prompt(bundle, run_onnx, graph, kind):
    made = bundle(kind)
    feeds = made.feeds(2, 2048, [2048, 1500])
    made.check(run_onnx(made.path / graph, feeds), feeds)


@pytest.mark.parametrize("kind", GENERATIONS)
def test_unequal_rows(bundle, run_onnx, kind):
    """A row of length 0 keeps its state to the bit (``check``); what stands past a row's end changes no bit at all."""
    made = bundle(kind)
    lens = [9, 0, 4, 1, 0, 8]
    feeds = made.feeds(6, 9, lens)
    found = run_onnx(made.path / PORTABLE, feeds)
    made.check(found, feeds)
    past = torch.arange(9) >= feeds["seq_lens"][:, None]
    other = feeds | {"input_ids": torch.where(past, (feeds["input_ids"] + 7) % 61, feeds["input_ids"])}
    again = run_onnx(made.path / PORTABLE, other)
    used = feeds["seq_lens"] > 0
    for name in found:
        rows = slice(None) if "state" in name else used
        assert torch.equal(found[name][rows], again[name][rows]), name


@pytest.mark.parametrize("kind", GENERATIONS)
def test_row_of_a_batch_is_the_row_alone(bundle, run_onnx, kind):
    made = bundle(kind)
    feeds = made.feeds(3, 12, [12, 5, 9])
    together = run_onnx(made.path / PORTABLE, feeds)
    for row, length in enumerate([12, 5, 9]):
        alone = {name: tensor[row : row + 1] for name, tensor in feeds.items()}
        alone["input_ids"] = alone["input_ids"][:, :length]
        found = run_onnx(made.path / PORTABLE, alone)
        for name in found:
            got, want = together[name][row].double(), found[name][0].double()
            assert (got - want).abs().max() <= made.tolerance * want.abs().max(), name


@pytest.mark.parametrize("kind", GENERATIONS)
def test_all_logits(bundle, run_onnx, kind):
    made = bundle(kind, all_logits=True)
    for feeds in (made.feeds(3, 7, [7, 3, 0]), made.feeds(2, 1)):
        made.check(run_onnx(made.path / PORTABLE, feeds), feeds)


@pytest.mark.parametrize("name", [name for name in HALVES if "bf16" not in name or "fp32" in name])
def test_half_precision(bundle, run_onnx, name):
    """ONNX Runtime has no bfloat16 products on a CPU; those graphs run lowered, in test_lowering.py."""
    made = bundle(**HALVES[name])
    half = made.bundle.contract.dtype != "float32"
    for feeds in (made.feeds(4, 13, [13, 0, 6, 1]), made.feeds(3, 1)):
        made.check(run_onnx(made.path / PORTABLE, feeds), feeds, half=half)


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_passes_the_checker(bundle, name):
    made = bundle(**HALVES[name])
    onnx.checker.check_model(made.path / PORTABLE, full_check=True)
    onnx.checker.check_model(made.path / LOWERED)


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("kind", VARIANTS)
def test_variant_of_the_architecture(bundle, run_onnx, kind, graph):
    made = bundle(kind)
    for feeds in (made.feeds(3, 11, [11, 0, 4]), made.feeds(2, 1)):
        made.check(run_onnx(made.path / graph, feeds), feeds)


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("kind", [*GENERATIONS, *(kind for kind in VARIANTS if kind not in NATIVE)])
def test_logits_are_those_of_transformers(bundle, run_onnx, kind, graph):
    """With no state before: each row a prefix of one text, so that every position is compared."""
    made = bundle(kind)
    assert made.theirs is not None
    feeds = made.feeds(9, 9, list(range(1, 10)))
    feeds["input_ids"][:] = feeds["input_ids"][:1].clone()
    feeds |= {spec.name: torch.zeros_like(feeds[spec.name]) for spec in made.bundle.contract.states}
    with torch.no_grad():
        want = made.theirs(feeds["input_ids"][:1].long()).logits[0]
    found = run_onnx(made.path / graph, feeds)["logits"]
    assert found.shape == want.shape
    assert (found - want).abs().max() <= made.tolerance * want.abs().max()


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, re, sys
from mamba_deploy.exporters.export import export

def status(key):  # VmHWM, not getrusage's ru_maxrss, which a child inherits from the process that started it
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

small, large, out = sys.argv[1:]
export(small, out + "/small")  # everything that is imported when first used
before = status("VmRSS")
export(large, out + "/large")
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_below_three_times_the_weights(tmp_path):
    """A random model of 15 million parameters, 60 MB."""
    small, _ = checkpoints.hugging_face(tmp_path / "small", "mamba", num_hidden_layers=1)
    large, theirs = checkpoints.state_spaces(
        tmp_path / "large",
        "mamba",
        hidden_size=512,
        num_hidden_layers=4,
        vocab_size=16000,
        state_size=16,
        time_step_rank=32,
    )
    size = 4 * sum(p.numel() for p in theirs.parameters())
    assert size > 55e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert peak < 3 * size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
