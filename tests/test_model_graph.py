"""The graph of a model that is one operator says what model.onnx says: its node, by the reference of one token."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from test_onnx_export import GENERATIONS, HALVES, VARIANTS

from mamba_deploy import step_ops
from mamba_deploy.bundle import PORTABLE
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, pending_specs
from mamba_deploy.exporters.functions import DOMAIN
from mamba_deploy.exporters.model_graph import covers, model_graph, pending_words
from mamba_deploy.plugins.rules import GIVEN_INPUTS, OF_GRAPH, OPS, Node, prepare_for_parser

NOT_COVERED = {"mamba2-mlp-part", "mamba2-norm-before-gate"}
KINDS = {
    **{kind: {"kind": kind} for kind in [*GENERATIONS, *VARIANTS]},
    **{name: options for name, options in HALVES.items() if "bf16-state" not in name},
    "mamba-all-logits": {"kind": "mamba", "all_logits": True},
    "mamba2-all-logits": {"kind": "mamba2", "all_logits": True},
}


def graph_of(made) -> onnx.ModelProto:
    model = onnx.load(made.path / PORTABLE)
    return model_graph(model, made.bundle.config, made.bundle.contract)


def run(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph as its one node's slots, attributes and types say, of one token a row."""
    values = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer} | feeds
    [node] = model.graph.node
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
    rule = Node(node.op_type, given)
    inputs = rule.by_slot([values[name] for name in node.input])
    slots = iter(inputs)
    own = [next(slots) for _ in rule.op.inputs]
    layers = [{tensor.name: next(slots) for tensor in rule.op.layer_inputs} for _ in range(given["layers"])]
    rule.sizes([values[name].shape for name in node.input])  # which looks whether they agree
    options = {name: given[name] for name in rule.op.attributes if name not in OF_GRAPH}
    before = own[:5]  # nothing is pending, before or after
    logits, states = step_ops.model(*before, layers, **options)
    found = [
        logits[:, None] if given["all_logits"] else logits,
        *own[5:],
        *(state for pair in states for state in pair),
    ]
    return dict(zip(node.output, found, strict=True))


def pending_of(made, batch: int) -> dict[str, torch.Tensor]:
    words = pending_words(made.bundle.config)
    return {"pending": torch.zeros(batch, words)} if words else {}


def _tensor(tensor: onnx.TensorProto) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NOT_COVERED])
def test_a_token_is_that_of_the_model(bundle, run_onnx, name):
    """Whatever the sizes: those the kernels ask for are another matter."""
    made = bundle(**KINDS[name])
    model = graph_of(made)
    prepare_for_parser(model)
    feeds = made.feeds(3, 1, [1, 1, 1])
    found = run(model, feeds | pending_of(made, 3))
    found.pop("pending_out", None)
    assert set(found) == {spec.name for spec in made.bundle.contract.outputs} - {"next_token"}
    found["next_token"] = found["logits"].reshape(3, -1).argmax(-1).int()  # which the graph leaves out
    half = made.bundle.contract.dtype != "float32" or made.bundle.contract.state_dtype != "float32"
    found = {spec.name: found[spec.name] for spec in made.bundle.contract.outputs}
    made.check(found, feeds, half=half)
    if not half:
        expected = run_onnx(made.path / PORTABLE, feeds)
        for spec in made.bundle.contract.outputs:
            error = (found[spec.name] - expected[spec.name]).abs().max()
            assert error <= 2 * made.tolerance * expected[spec.name].abs().max(), spec.name


def test_a_row_that_reads_nothing_keeps_its_state(bundle):
    for kind in GENERATIONS:
        made = bundle(kind)
        model = graph_of(made)
        prepare_for_parser(model)
        feeds = made.feeds(3, 1, [1, 0, 1])
        found = run(model, feeds | pending_of(made, 3))
        for spec in made.bundle.contract.states:
            assert torch.equal(found[spec.partner][1], feeds[spec.name][1]), spec.name


@pytest.mark.parametrize("kind", [*GENERATIONS, "mamba-untied-no-conv-bias", "mamba2-no-gated-norm"])
def test_one_node_of_the_contract(bundle, kind):
    made = bundle(kind)
    contract, model = made.bundle.contract, graph_of(made)
    [node] = model.graph.node
    generation = {"mamba": "Mamba", "mamba2": "Mamba2"}[made.bundle.config.generation]
    assert (node.domain, node.op_type) == (DOMAIN, f"{generation}Model")
    op, layers = OPS[node.op_type], made.bundle.config.n_layer
    assert len(node.input) == len(op.inputs) + layers * len(op.layer_inputs)
    pending = pending_specs(pending_words(made.bundle.config))
    assert len(pending) == (0 if generation == "Mamba" else 2)
    inputs = [*contract.inputs, *pending[:1]]
    assert [value.name for value in model.graph.input] == [spec.name for spec in inputs]
    outputs = [spec.name for spec in contract.outputs if spec.role != "next_token"]
    assert [value.name for value in model.graph.output] == [*outputs, *(spec.name for spec in pending[1:])]
    assert set(node.output) == {value.name for value in model.graph.output}
    axes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert axes == [list(spec.axes) for spec in inputs]
    held = {tensor.name for tensor in model.graph.initializer}
    assert {name for name in node.input if name} == held | {spec.name for spec in inputs}
    prepare_for_parser(model)
    missing = {"mamba-untied-no-conv-bias": {"conv_bias"}, "mamba2-no-gated-norm": {"gate_norm"}}.get(kind, set())
    missing |= {"in_proj_bias", "out_proj_bias"} | ({"head"} if made.bundle.config.tie_embeddings else set())
    [given] = [a.i for a in node.attribute if a.name == GIVEN_INPUTS]
    assert {tensor.name for i, tensor in enumerate(op.pattern) if not given >> i & 1} == missing


MAMBA2 = {"generation": "mamba2", "d_state": 128, "head_dim": 64}
PUBLISHED = {
    "mamba-130m": MambaConfig(
        generation="mamba", vocab_size=50280, d_model=768, n_layer=24, d_inner=1536, d_state=16, dt_rank=48
    ),
    "mamba-2.8b": MambaConfig(
        generation="mamba", vocab_size=50280, d_model=2560, n_layer=64, d_inner=5120, d_state=16, dt_rank=160
    ),
    "mamba2-130m": MambaConfig(vocab_size=50288, d_model=768, n_layer=24, d_inner=1536, **MAMBA2),
    "mamba2-2.7b": MambaConfig(vocab_size=50288, d_model=2560, n_layer=64, d_inner=5120, **MAMBA2),
    "codestral": MambaConfig(vocab_size=32768, d_model=4096, n_layer=64, d_inner=8192, n_groups=8, **MAMBA2),
    "heads of 80": MambaConfig(
        vocab_size=1000, d_model=3840, n_layer=2, d_inner=7680, n_groups=8, **{**MAMBA2, "head_dim": 80}
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_covered(name, dtype):
    for state in ("float32", "float16", "bfloat16"):
        assert covers(PUBLISHED[name], Contract.of(PUBLISHED[name], dtype=dtype, state_dtype=state))


@pytest.mark.parametrize("kind", sorted(NOT_COVERED))
def test_what_is_not_covered(bundle, kind):
    made = bundle(kind)
    assert not covers(made.bundle.config, made.bundle.contract)


def test_no_more_layers_than_outputs_are_allowed():
    for name in ("mamba-130m", "mamba2-130m"):
        for layers, covered in ((127, True), (128, False)):
            config = dataclasses.replace(PUBLISHED[name], n_layer=layers)
            assert covers(config, Contract.of(config, dtype="float16")) == covered
            n_outputs = 1 + 2 * layers
            assert (n_outputs <= 256) == covered


def test_all_logits_of_a_head_of_its_own_are_not_covered(bundle):
    """The file then has it transposed."""
    made = bundle("mamba2-untied", all_logits=True)
    held = {tensor.name for tensor in onnx.load(made.path / PORTABLE).graph.initializer}
    assert "lm_head.weight" not in held
    for all_logits in (False, True):
        config = dataclasses.replace(PUBLISHED["codestral"], tie_embeddings=False)
        assert covers(config, Contract.of(config, all_logits=all_logits)) != all_logits


def test_odd_and_huge_sizes_are_not_covered():
    for changes in ({"d_model": 769}, {"d_inner": 1537}, {"dt_rank": 47}, {"d_inner": 40960}):
        values = {"generation": "mamba", "vocab_size": 61, "d_model": 768, "n_layer": 1, "d_inner": 1536, "d_state": 16}
        config = MambaConfig(**{**values, "dt_rank": 48, **changes})
        assert not covers(config, Contract.of(config, dtype="float16"))


def inputs_of_a_layer(config):
    """The residual stream, both states and the lengths of two rows of a token."""
    shapes = [(1, config.d_model), config.conv_state_shape, config.ssm_state_shape]
    generator = torch.Generator().manual_seed(0)
    return *(torch.randn(2, *shape, generator=generator) for shape in shapes), torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_bodies_are_the_references(bundle, kind):
    """The reference in torch of a whole layer is the model's layer."""
    made = bundle(kind)
    layer, config = made.reference.layers[0], made.bundle.config
    mixer = layer.mixer
    hidden, conv, ssm, lengths = inputs_of_a_layer(config)
    weight = [w.weight.t() for w in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)]
    projected, conv_out = step_ops.in_proj(
        hidden, layer.norm.weight, weight[0], mixer.in_proj.bias, mixer.conv_weight, mixer.conv_bias, conv, lengths,
        config.norm_eps, 0,
    )  # fmt: skip
    low = step_ops.x_proj(projected, weight[1])
    eps = -1.0 if config.scan_norm_eps is None else config.scan_norm_eps
    y, ssm_out = step_ops.selective_update(
        projected, low, weight[2], mixer.A, mixer.D, mixer.dt_bias, ssm, lengths, eps
    )
    found = step_ops.out_proj(y, None, weight[3], mixer.out_proj.bias, hidden, 1e-5, 1)
    for got, want in zip((found, conv_out, ssm_out), layer(hidden, conv, ssm, lengths), strict=True):
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba2", "codestral-groups-8", "mamba2-no-gated-norm"])
def test_bodies_are_the_references_of_mamba2(bundle, kind):
    made = bundle(kind)
    layer, c = made.reference.layers[0], made.bundle.config
    mixer = layer.mixer
    hidden, conv, ssm, lengths = inputs_of_a_layer(c)
    projected, conv_out = step_ops.in_proj(
        hidden, layer.norm.weight, mixer.in_proj.weight.t(), None, mixer.conv_weight, mixer.conv_bias, conv, lengths,
        c.norm_eps, c.d_inner,
    )  # fmt: skip
    y, ssm_out = step_ops.ssd_update(
        projected, mixer.A, mixer.D, mixer.dt_bias, ssm, lengths, True, c.dt_min, c.dt_max, c.n_groups
    )
    gate = None if mixer.norm is None else mixer.norm.weight
    groups = c.n_groups if gate is not None else 1
    found = step_ops.out_proj(y, gate, mixer.out_proj.weight.t(), None, hidden, c.norm_eps, groups)
    for got, want in zip((found, conv_out, ssm_out), layer(hidden, conv, ssm, lengths), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want.detach().numpy(), rtol=1e-4, atol=1e-5)
