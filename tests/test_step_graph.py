"""The fused graph of a decode step says what model.onnx says of one token, in ONNX Runtime, by its function bodies."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from test_onnx_export import GENERATIONS, HALVES, VARIANTS

from mamba_deploy import step_ops
from mamba_deploy.bundle import PORTABLE
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.exporters.functions import DOMAIN
from mamba_deploy.exporters.step_graph import covers, step_bodies, step_graph

NOT_COVERED = {"mamba2-mlp-part", "mamba2-norm-before-gate"}
KINDS = {
    **{kind: {"kind": kind} for kind in [*GENERATIONS, *VARIANTS]},
    **{name: options for name, options in HALVES.items() if "bf16" not in name},
    "mamba-all-logits": {"kind": "mamba", "all_logits": True},
}


def graph_of(made):
    """With function bodies and the weights in it, and the same file as loaded."""
    model = onnx.load(made.path / PORTABLE)
    step = step_graph(model, made.bundle.config, made.bundle.contract)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    step.functions.extend(step_bodies(made.bundle.config, made.bundle.contract, opset))
    return step


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NOT_COVERED])
def test_a_step_is_that_of_the_model(bundle, run_onnx, name):
    """Whatever the sizes: those the kernels ask for are another matter."""
    made = bundle(**KINDS[name])
    feeds = made.feeds(3, 1, [1, 1, 1])
    found = run_onnx(graph_of(made), feeds)
    assert set(found) == {spec.name for spec in made.bundle.contract.outputs} - {"next_token"}
    found["next_token"] = found["logits"].reshape(3, -1).argmax(-1).int()  # which a step leaves out
    half = made.bundle.contract.dtype != "float32" or made.bundle.contract.state_dtype != "float32"
    made.check({spec.name: found[spec.name] for spec in made.bundle.contract.outputs}, feeds, half=half)


def test_a_row_that_reads_nothing_keeps_its_state(bundle, run_onnx):
    for kind in GENERATIONS:
        made = bundle(kind)
        feeds = made.feeds(3, 1, [1, 0, 1])
        found = run_onnx(graph_of(made), feeds)
        for spec in made.bundle.contract.states:
            assert torch.equal(found[spec.partner][1], feeds[spec.name][1]), spec.name


@pytest.mark.parametrize(("kind", "operators"), [("mamba", 4), ("mamba2", 3)])
def test_so_many_operators_a_layer(bundle, kind, operators):
    made = bundle(kind)
    step = graph_of(made)
    ours = [node for node in step.graph.node if node.domain == DOMAIN]
    assert len(ours) == operators * made.bundle.config.n_layer + 1  # and the head
    assert [node.op_type for node in step.graph.node if node.domain != DOMAIN] == ["Gather", "Cast"]
    onnx.checker.check_model(step)


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


def test_odd_sizes_are_not_covered():
    for changes in ({"d_model": 769}, {"d_inner": 1537}, {"dt_rank": 47}):
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
