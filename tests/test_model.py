"""The reference model against transformers, and against a float64 NumPy model for what transformers has not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import recurrence
import torch
from checkpoints import Family
from torch import Tensor
from transformers import PreTrainedModel

from mamba_deploy.checkpoint import load_checkpoint, model_weights
from mamba_deploy.config import MambaConfig
from mamba_deploy.model import MambaModel, ModelState

# Two float32 computations of one function: unit roundoff 6e-8, some 1,000 roundings one after the other in two layers
# (projections, norms, scan), of random sign: 5 * sqrt(1000) * 6e-8, relative to the largest value.
FLOAT32 = 1e-5


CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba-untied": ("mamba", {"tie_word_embeddings": False}),
    "mamba-odd-sizes": ("mamba", {"hidden_size": 19, "state_size": 7, "time_step_rank": 3, "vocab_size": 37}),
    "mamba-state-16": ("mamba", {"state_size": 16}),
    "mamba-state-128": ("mamba", {"state_size": 128}),
    "mamba-state-1": ("mamba", {"state_size": 1}),
    "mamba-expand-1": ("mamba", {"expand": 1}),
    "mamba-expand-3": ("mamba", {"expand": 3}),
    "mamba-conv-2": ("mamba", {"conv_kernel": 2}),
    "mamba-conv-3": ("mamba", {"conv_kernel": 3}),
    "mamba-conv-8": ("mamba", {"conv_kernel": 8}),
    "mamba-no-conv-bias": ("mamba", {"use_conv_bias": False}),
    "mamba-projection-bias": ("mamba", {"use_bias": True}),
    "mamba-large-epsilon": ("mamba", {"layer_norm_epsilon": 0.1}),
    "mamba-one-layer": ("mamba", {"num_hidden_layers": 1}),
    "mamba-five-layers": ("mamba", {"num_hidden_layers": 5}),
    "mamba-residual-option": ("mamba", {"residual_in_fp32": False}),
    "falcon": ("falcon_mamba", {}),
    "falcon-untied": ("falcon_mamba", {"tie_word_embeddings": False}),
    "falcon-odd-sizes": ("falcon_mamba", {"hidden_size": 19, "state_size": 7, "time_step_rank": 3}),
    "falcon-large-epsilon": ("falcon_mamba", {"mixer_rms_eps": 0.1}),
    "falcon-projection-bias": ("falcon_mamba", {"use_bias": True}),
    "mamba2": ("mamba2", {}),
    "mamba2-untied": ("mamba2", {"tie_word_embeddings": False}),
    "mamba2-groups-2": ("mamba2", {"n_groups": 2}),
    "mamba2-groups-8": ("mamba2", {"n_groups": 8, "hidden_size": 32, "head_dim": 4}),
    "mamba2-group-per-head": ("mamba2", {"n_groups": 4}),
    "mamba2-one-head": ("mamba2", {"head_dim": 32}),
    "mamba2-head-dim-1": ("mamba2", {"head_dim": 1}),
    "mamba2-odd-sizes": ("mamba2", {"hidden_size": 21, "head_dim": 7, "n_groups": 3, "state_size": 9}),
    "mamba2-state-128": ("mamba2", {"state_size": 128}),
    "mamba2-expand-1": ("mamba2", {"expand": 1}),
    "mamba2-conv-2": ("mamba2", {"conv_kernel": 2}),
    "mamba2-conv-7": ("mamba2", {"conv_kernel": 7}),
    "mamba2-no-conv-bias": ("mamba2", {"use_conv_bias": False}),
    "mamba2-projection-bias": ("mamba2", {"use_bias": True}),
    "mamba2-chunk-3": ("mamba2", {"chunk_size": 3}),
    "mamba2-chunk-1": ("mamba2", {"chunk_size": 1}),
    "mamba2-time-step-limit": ("mamba2", {"time_step_limit": (0.1, 0.4)}),
    "mamba2-large-epsilon": ("mamba2", {"layer_norm_epsilon": 0.1}),
    "mamba2-residual-option": ("mamba2", {"residual_in_fp32": False}),
}
FEW = ["mamba", "falcon", "mamba2-groups-2"]  # where the architecture is not the question


def make(directory: Path, case: str, dtype: torch.dtype | None = None, **changes: Any) -> tuple[MambaModel, Any]:
    """Our model, loaded from what transformers saved, and theirs."""
    family, options = CASES[case]
    directory, theirs = checkpoints.hugging_face(directory, family, **options | changes)
    return MambaModel.from_weights(*load_checkpoint(directory), dtype=dtype), theirs


def tokens(model: MambaModel, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def difference(got: Tensor, want: Tensor) -> float:
    """Largest, relative to the largest value wanted."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def roundings(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of the difference, relative to that of what is wanted, in unit roundoffs of ``dtype``.

    Of half precision the typical error says more than the largest, which is that of the worst conditioned logit.
    """
    assert got.shape == want.shape
    error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    return float(error) / (torch.finfo(dtype).eps / 2)


def assert_states_close(got: ModelState, want: ModelState, tolerance: float) -> None:
    for kind in ("conv", "ssm"):
        for layer, (g, w) in enumerate(zip(getattr(got, kind), getattr(want, kind), strict=True)):
            assert difference(g, w) < tolerance, f"{kind} state of layer {layer}"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers_at_every_position(tmp_path, case):
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 3, 23)
    want = theirs(ids).logits
    got, _ = ours(ids, all_logits=True)
    assert got.dtype == torch.float32
    assert difference(got, want) < FLOAT32
    last, _ = ours(ids)
    assert difference(last, want[:, -1]) < FLOAT32


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_long_prompt_gives_the_logits_of_transformers(tmp_path, case):
    """Past two chunks of either scan."""
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 2, 150)
    assert difference(ours(ids, all_logits=True)[0], theirs(ids).logits) < FLOAT32


GENERATING = [case for case in CASES if case != "mamba2-time-step-limit"]  # their step forgets the limits


@pytest.mark.parametrize("case", GENERATING)
@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(tmp_path, case):
    """Tokens, and the logits they were taken from, of a batch; theirs with their own cache."""
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 3, 9)
    n_new = 12
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, state = ours(ids)
    for i in range(n_new):
        assert difference(logits, out.logits[i]) < FLOAT32, f"step {i}"
        chosen = logits.argmax(-1)
        assert chosen.tolist() == out.sequences[:, ids.shape[1] + i].tolist()
        logits, state = ours.step(chosen, state)
    assert out.sequences[:, ids.shape[1] :].unique().numel() > 2, "the models say the same all the time"


@pytest.mark.parametrize("case", [*FEW, "mamba2-time-step-limit", "mamba-conv-8", "mamba2-conv-2"])
@torch.no_grad()
def test_one_piece_chunks_and_steps_agree(tmp_path, case):
    ours, _ = make(tmp_path, case)
    ids = tokens(ours, 2, 40)
    want, want_state = ours(ids, all_logits=True)
    for sizes in ([1] * 40, [40], [1, 39], [39, 1], [2, 3, 5, 30], [20, 20]):
        state, pieces = None, []
        for piece in ids.split(sizes, dim=1):
            if state is not None and piece.shape[1] == 1:
                logits, state = ours.step(piece[:, 0], state)
                logits = logits[:, None]
            else:
                logits, state = ours(piece, state, all_logits=True)
            pieces.append(logits)
        assert difference(torch.cat(pieces, dim=1), want) < FLOAT32, sizes
        assert_states_close(state, want_state, FLOAT32)


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_unequal_rows_are_each_row_alone(tmp_path, case):
    """Two calls, so that rows start from states of their own; a row may read nothing."""
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 4, 30)
    first, second = [17, 1, 0, 12], [3, 13, 5, 0]
    state = None
    results = []
    for lens, start in ((first, [0] * 4), (second, first)):
        length = max(lens) + 2  # nobody uses the last two
        given = torch.full((4, length), 5)
        for b, (n, s) in enumerate(zip(lens, start, strict=True)):
            given[b, :n] = ids[b, s : s + n]
        before = state or ours.new_state(4)
        logits, state = ours(given, before, torch.tensor(lens, dtype=torch.int32))
        results.append(logits)
        for kind_before, kind_after in zip(before, state, strict=True):
            for b in (b for b, n in enumerate(lens) if n == 0):
                for old, new in zip(kind_before, kind_after, strict=True):
                    assert torch.equal(old[b], new[b])
    for b in range(4):
        n, total = first[b], first[b] + second[b]
        alone, alone_state = ours(ids[b : b + 1, :total])
        if n:
            assert difference(results[0][b : b + 1], theirs(ids[b : b + 1, :n]).logits[:, -1]) < FLOAT32
        if second[b]:
            assert difference(results[1][b : b + 1], alone) < FLOAT32
        row = ModelState([s[b : b + 1] for s in state.conv], [s[b : b + 1] for s in state.ssm])
        assert_states_close(row, alone_state, FLOAT32)


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_padding_tokens_change_nothing(tmp_path, case):
    """To the bit, in logits and states."""
    ours, _ = make(tmp_path, case)
    ids = tokens(ours, 3, 12)
    lens = torch.tensor([12, 4, 1])
    want, want_state = ours(ids, seq_lens=lens)
    other = torch.where(torch.arange(12) < lens[:, None], ids, (ids + 7) % ours.config.vocab_size)
    got, got_state = ours(other, seq_lens=lens)
    assert torch.equal(got, want)
    for got_kind, want_kind in zip(got_state, want_state, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got_kind, want_kind, strict=True))


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_all_logits_hold_each_rows_last(tmp_path, case):
    ours, _ = make(tmp_path, case)
    ids = tokens(ours, 3, 10)
    lens = torch.tensor([10, 6, 1])
    every, _ = ours(ids, seq_lens=lens, all_logits=True)
    last, _ = ours(ids, seq_lens=lens)
    assert every.shape == (3, 10, ours.config.vocab_size)
    assert difference(every[torch.arange(3), lens - 1], last) < FLOAT32


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_given_state_is_not_written_to(tmp_path, case):
    ours, _ = make(tmp_path, case)
    _, state = ours(tokens(ours, 2, 5))
    before = [s.clone() for kind in state for s in kind]
    ours(tokens(ours, 2, 5), state)
    ours.step(tokens(ours, 2), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (s for kind in state for s in kind), strict=True))


@pytest.mark.parametrize("case", FEW)
def test_new_state_is_what_the_config_says(tmp_path, case):
    ours, _ = make(tmp_path, case, torch.bfloat16)
    state = ours.new_state(3, torch.float16)
    assert len(state.conv) == len(state.ssm) == ours.config.n_layer
    for conv, ssm in zip(*state, strict=True):
        assert (conv.shape, conv.dtype) == ((3, *ours.config.conv_state_shape), torch.bfloat16)
        assert (ssm.shape, ssm.dtype) == ((3, *ours.config.ssm_state_shape), torch.float16)
        assert not conv.any()
        assert not ssm.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_half_precision_is_close_to_float32(tmp_path, case, dtype):
    """Against transformers in float32 over the same rounded weights, prompt and steps.

    Some eight values a layer are rounded to T one after the other (norm, projections, convolution, scan, gate), each
    evenly within u: sqrt(2 * 8 / 3) u = 2.3 u. Transformers' own half precision is as far off (2.4 u to 3.4 u).
    """
    family, options = CASES[case]
    directory, theirs = checkpoints.hugging_face(tmp_path, family, dtype=dtype, **options)
    config, weights = load_checkpoint(directory)
    assert weights["layers.0.mixer.in_proj.weight"].dtype == dtype
    ours = MambaModel.from_weights(config, weights)
    ids = tokens(ours, 3, 30)
    want = theirs(ids).logits
    got, state = ours(ids[:, :20], all_logits=True)
    pieces = [got]
    for t in range(20, 30):
        logits, state = ours.step(ids[:, t], state)
        pieces.append(logits[:, None])
    got = torch.cat(pieces, dim=1)
    assert 0.5 < roundings(got, want, dtype) < 4  # below 0.5 it would not be half precision at all
    assert roundings(got, want, dtype) < 1.25 * roundings(theirs.to(dtype)(ids).logits, want, dtype)
    assert all(s.dtype == dtype for s in state.conv)
    assert all(s.dtype == torch.float32 for s in state.ssm)


@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_dtype_argument_rounds_the_weights(tmp_path, case):
    """A float32 checkpoint opened in bfloat16 is the checkpoint rounded to bfloat16, but for what stays float32."""
    ours, _ = make(tmp_path, case)
    config, weights = load_checkpoint(tmp_path)
    half = MambaModel.from_weights(config, weights, torch.bfloat16)
    for name, parameter in half.named_parameters():
        kept = name.endswith(("mixer.A", "mixer.D", "mixer.dt_bias", "norm.weight", "norm_f.weight"))
        want = weights[name] if kept else weights[name].to(torch.bfloat16)
        assert parameter.dtype == want.dtype, name
        assert torch.equal(parameter, want), name
    ids = tokens(ours, 2, 12)
    got = roundings(half(ids, all_logits=True)[0], ours(ids, all_logits=True)[0], torch.bfloat16)
    assert 0.5 < got < 5  # the weights, as many as the values above, are rounded too: sqrt(2) * 2.3


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", FEW)
@torch.no_grad()
def test_narrow_state_is_kept_and_close(tmp_path, case, state_dtype):
    """The state is rounded once a step, and a rounding fades as the state does: below one unit roundoff in all."""
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 2, 30)
    state = ours.new_state(2, state_dtype)
    logits = []
    for t in range(30):
        last, state = ours.step(ids[:, t], state)
        logits.append(last)
    assert all(s.dtype == state_dtype for s in state.ssm)
    assert 0.1 < roundings(torch.stack(logits, dim=1), theirs(ids).logits, state_dtype) < 1.5


@pytest.mark.parametrize("case", [*FEW, "mamba-untied", "mamba2-time-step-limit", "mamba2-projection-bias"])
def test_gradients_are_those_of_transformers(tmp_path, case):
    """Through checkpoint tensors, A_log folding, ops and tied head: what samples/train_tiny.py stands on."""
    ours, theirs = make(tmp_path, case)
    ids = tokens(ours, 2, 37)
    theirs(ids, labels=ids).loss.backward()
    named = {n.removeprefix("backbone."): p for n, p in theirs.named_parameters()}
    named["embedding.weight"] = named.pop("embeddings.weight")
    leaves = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    weights = model_weights(ours.config, leaves)
    logits, _ = torch.func.functional_call(ours, weights, (ids,), {"all_logits": True})
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in named.items():
        assert difference(leaves[name].grad, parameter.grad) < 10 * FLOAT32, name  # three passes, and sums over tokens


@pytest.mark.parametrize("case", ["mamba", "mamba-untied"])
def test_from_weights_copies_nothing_it_need_not(tmp_path, case):
    make(tmp_path, case)
    config, weights = load_checkpoint(tmp_path)
    model = MambaModel.from_weights(config, weights)
    assert not model.training
    state_dict = model.state_dict()
    assert set(state_dict) == set(weights)
    for name, tensor in state_dict.items():
        assert tensor.data_ptr() == weights[name].data_ptr(), name
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("wrong", ["missing", "extra"])
def test_from_weights_refuses_other_weights(tmp_path, wrong):
    make(tmp_path, "mamba")
    config, weights = load_checkpoint(tmp_path)
    if wrong == "missing":
        del weights["layers.1.mixer.D"]
    else:
        weights["layers.2.mixer.D"] = torch.ones(32)
    with pytest.raises(RuntimeError, match=r"layers.\d.mixer.D"):
        MambaModel.from_weights(config, weights)


# What mamba_ssm's Mamba2 has and transformers has not. --------------------------------------------------------------


def rms(x: np.ndarray, weight: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    parts = parts / np.sqrt(np.square(parts).mean(-1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * weight


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def official_mamba2(weights: dict[str, np.ndarray], cfg: dict[str, Any], u: np.ndarray) -> np.ndarray:
    """One mixer in float64, u [B, L, d] -> [B, L, d]: the formulas of mamba_ssm/modules/mamba2.py, ``forward``.

    in_proj gives, in this order, the gate and value of the plain MLP channels, the gate z, the convolved x, B and C,
    and dt.
    """
    N, P, G = cfg["d_state"], cfg["headdim"], cfg["ngroups"]
    heads = len(weights["A_log"])
    d_ssm = heads * P
    d_mlp = cfg["expand"] * u.shape[-1] - d_ssm
    batch, length, _ = u.shape
    full = [length] * batch
    widths = [d_mlp, d_mlp, d_ssm, d_ssm + 2 * G * N, heads]
    gate, value, z, xBC, dt = np.split(u @ weights["in_proj.weight"].T, np.cumsum(widths)[:-1], axis=-1)
    kernel = weights["conv1d.weight"][:, 0]
    nothing = np.zeros((batch, len(kernel), kernel.shape[1] - 1))
    xBC, _ = recurrence.causal_conv1d(xBC, kernel, weights["conv1d.bias"], nothing, full, "silu")
    x, B, C = np.split(xBC, [d_ssm, d_ssm + G * N], axis=-1)
    D = weights["D"].reshape(heads, -1) if cfg.get("D_has_hdim") else weights["D"]
    low, high = cfg.get("dt_limit", (0.0, math.inf))
    state = np.zeros((batch, heads, P, N))
    A = -np.exp(weights["A_log"])
    y, _ = recurrence.ssd_scan(x, dt, A, B, C, D, weights["dt_bias"], state, full, True, low, high, G)
    if not cfg.get("rmsnorm", True):
        y = y * silu(z)
    elif cfg.get("norm_before_gate"):
        y = rms(y, weights["norm.weight"], G) * silu(z)
    else:
        y = rms(y * silu(z), weights["norm.weight"], G)
    return np.concatenate([silu(gate) * value, y], axis=-1) @ weights["out_proj.weight"].T


def official_logits(directory: Path, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    config = json.loads((directory / "config.json").read_text())
    arrays = {n.removeprefix("backbone."): t.double().numpy() for n, t in tensors.items()}
    h = arrays["embedding.weight"][ids.numpy()]
    for i in range(config["n_layer"]):
        prefix = f"layers.{i}.mixer."
        mixer = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        h = h + official_mamba2(mixer, config["ssm_cfg"], rms(h, arrays[f"layers.{i}.norm.weight"]))
    return torch.from_numpy(rms(h, arrays["norm_f.weight"]) @ arrays["lm_head.weight"].T)


NATIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "D_has_hdim": {"D_has_hdim": True},
    "norm_before_gate": {"norm_before_gate": True},
    "norm_before_gate-groups": {"norm_before_gate": True, "ngroups": 2},
    "rmsnorm-false": {"rmsnorm": False},
    "d_ssm": {"d_ssm": 16},
    "d_ssm-one-head": {"d_ssm": 8, "ngroups": 1},
    "d_ssm-rmsnorm-false": {"d_ssm": 24, "rmsnorm": False},
    "dt_limit": {"dt_limit": [0.1, 0.5]},
    "all": {"D_has_hdim": True, "norm_before_gate": True, "ngroups": 2, "d_ssm": 16, "dt_limit": [0.2, 0.6]},
}


@pytest.mark.parametrize("ssm_cfg", [pytest.param(cfg, id=name) for name, cfg in NATIVE.items()])
@torch.no_grad()
def test_features_transformers_lacks_match_the_official_formulas(tmp_path, ssm_cfg):
    directory, tensors = checkpoints.native_mamba2(tmp_path, **ssm_cfg)
    ours = MambaModel.from_weights(*load_checkpoint(directory))
    ids = tokens(ours, 2, 21)
    want = official_logits(directory, tensors, ids)
    got, whole = ours(ids, all_logits=True)
    assert difference(got, want) < FLOAT32
    _, state = ours(ids[:, :20])
    logits, state = ours.step(ids[:, 20], state)
    assert difference(logits, want[:, -1]) < FLOAT32
    assert_states_close(state, whole, FLOAT32)


@pytest.mark.parametrize("name", [n for n in NATIVE if n != "plain"])
def test_each_such_feature_changes_the_answer(tmp_path, name):
    """Else the test above would prove nothing: the same tensors, the feature off where the shapes allow it."""
    cfg = NATIVE[name]
    changed = {"D_has_hdim", "rmsnorm", "d_ssm", "ngroups"} & set(cfg)
    if changed:
        directory, _ = checkpoints.native_mamba2(tmp_path, **cfg)
        plain, _ = checkpoints.native_mamba2(tmp_path / "plain")
        assert _shapes(directory) != _shapes(plain)
    else:
        directory, _ = checkpoints.native_mamba2(tmp_path, **cfg)
        config, weights = load_checkpoint(directory)
        off = {"norm_before_gate": False, "dt_min": 0.0, "dt_max": math.inf}
        ids = torch.arange(20)[None]
        on = MambaModel.from_weights(config, weights)
        without = MambaModel.from_weights(MambaConfig.from_dict({**config.to_dict(), **off}), weights)
        assert difference(without(ids)[0], on(ids)[0]) > 0.01


def _shapes(directory: Path) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in load_checkpoint(directory)[1].items()}


def test_the_model_of_transformers_is_a_real_one(tmp_path):
    """The helper perturbs every parameter: none is at the value transformers gives a new model."""
    for family in ("mamba", "mamba2", "falcon_mamba"):
        model: PreTrainedModel = checkpoints.random_model(family, use_bias=True)
        for name, parameter in model.named_parameters():
            assert parameter.unique().numel() == parameter.numel(), f"{family}: {name}"
