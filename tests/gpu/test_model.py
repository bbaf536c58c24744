"""The model as one operator against its reference in float64, token by token, which other tests hold to the model.

Errors are those of a chain of roundings to T, so they are compared by their root mean square, relative to that of a
result: the largest is that of the worst conditioned value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, bits, kernels, needs_gpu
from gpu.test_step import PATTERN, Draw
from torch import Tensor

from mamba_deploy import step_ops

pytestmark = needs_gpu

ALLOWED = {F32: 2e-5, F16: 1e-2, BF16: 8e-2}
Layers = list[dict[str, Any]]


class Model:
    """Random weights, states and tokens of a model of three layers."""

    def __init__(self, T: torch.dtype, B: int, L: int, S: torch.dtype = F32, *, seed: int = 0, **sizes: Any) -> None:
        self.T, self.S, self.B, self.L = T, S, B, L
        self.options = {"eps": 1e-5, **{name: sizes.pop(name) for name in ("norm_eps", "n_groups") if name in sizes}}
        self.all_logits = sizes.pop("all_logits", False)
        draw = Draw(T, B, seed=1000 * seed + 10 * B + L)
        self.draw, self.V = draw, sizes.pop("V", 1003)
        make = self._mamba2 if "H" in sizes else self._mamba
        self.d = sizes.pop("d", 768)
        tied, layers = sizes.pop("tied", True), sizes.pop("layers", 3)
        self.embedding, self.norm_weight = draw.normal(self.V, self.d), draw.norm(self.d)
        self.head = None if tied else draw.weight(self.d, self.V).t().contiguous()
        self.layers = [make(**sizes) for _ in range(layers)]
        self.input_ids = torch.randint(0, self.V, (B, L), generator=draw.generator, dtype=torch.int32)
        self.seq_lens = torch.randint(0, L + 1, (B,), generator=draw.generator, dtype=torch.int32)
        self.seq_lens[0] = L  # the first row reads all; others may read less, or nothing

    def _shared(self, M: int, C: int, D: int, K: int, bias: bool) -> dict[str, Any]:
        draw, d = self.draw, self.d
        return {
            "norm_weight": draw.norm(d), "in_proj": draw.weight(d, M), "in_proj_bias": draw.normal(M) if bias else None,
            "conv_weight": draw.normal(C, K, scale=0.5), "conv_bias": draw.normal(C, scale=0.1) if bias else None,
            "conv_state": draw.normal(self.B, C, K - 1), "out_proj": draw.weight(D, d),
            "out_proj_bias": draw.normal(d, scale=0.1) if bias else None,
        }  # fmt: skip

    def _mamba(self, D: int = 1536, N: int = 16, R: int = 48, K: int = 4, bias: bool = False) -> dict[str, Any]:
        draw = self.draw
        return {
            **self._shared(2 * D, D, D, K, bias), "x_proj": draw.weight(D, R + 2 * N), "dt_proj": draw.weight(R, D),
            "A": draw.negative(D, N), "D": draw.normal(D, dtype=F32), "dt_bias": draw.normal(D, dtype=F32),
            "ssm_state": draw.normal(self.B, D, N, dtype=self.S),
        }  # fmt: skip

    def _mamba2(
        self, H: int, P: int = 64, N: int = 128, K: int = 4, bias: bool = False, gate: bool = True, skip: str = "H"
    ) -> dict[str, Any]:
        draw, D, GN = self.draw, H * P, self.options.get("n_groups", 1) * N
        D_skip = {"H": lambda: draw.normal(H, dtype=F32), "HP": lambda: draw.normal(H, P, dtype=F32), "": lambda: None}
        return {
            **self._shared(2 * D + 2 * GN + H, D + 2 * GN, D, K, bias), "A": draw.negative(H), "D": D_skip[skip](),
            "dt_bias": draw.normal(H, dtype=F32), "ssm_state": draw.normal(self.B, H, P, N, dtype=self.S),
            "gate_norm": draw.norm(D) if gate else None,
        }  # fmt: skip

    def expected(self) -> tuple[Tensor, Layers]:
        """Logits [B, L, V] and the states of each layer, in float64, token by token."""
        wide = [{name: _wide(value) for name, value in layer.items()} for layer in self.layers]
        own = [_wide(value) for value in (self.embedding, self.norm_weight, self.head)]
        logits = []
        for t in range(self.L):
            reads = (t < self.seq_lens).int()
            now, states = step_ops.model(self.input_ids[:, t : t + 1], reads, *own, wide, **self.options)
            logits.append(now)
            for layer, (conv, ssm) in zip(wide, states, strict=True):
                layer |= {"conv_state": conv, "ssm_state": ssm}
        return torch.stack(logits, dim=1), wide


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


class Call:
    """A call with its arguments on the device; what it writes, the workspace too, is full of NaN before."""

    def __init__(self, model: Model, *, same: bool = False) -> None:
        self.model, self.same = model, same
        own = (model.input_ids, model.seq_lens, model.embedding, model.norm_weight, model.head)
        self.own = [None if value is None else value.cuda() for value in own]
        self.layers: Layers = [{n: None if v is None else v.cuda() for n, v in one.items()} for one in model.layers]
        for layer in self.layers:
            for name in ("conv_state", "ssm_state"):
                layer[f"{name}_out"] = layer[name] if same else _poison(torch.empty_like(layer[name]))
        axes = (model.B, model.L, model.V) if model.all_logits else (model.B, model.V)
        self.logits = _poison(torch.empty(axes, device="cuda"))
        self.needed = kernels().workspace_bytes("model", **self._sizes())
        self.workspace = torch.full((self.needed + 256,), PATTERN, dtype=torch.uint8, device="cuda")

    def _sizes(self) -> dict[str, Any]:
        model, layer = self.model, self.model.layers[0]
        d, M = layer["in_proj"].shape
        C, K = layer["conv_weight"].shape
        sizes = {"batch": model.B, "length": model.L, "layers": len(model.layers), "width": d, "outputs": M}
        sizes |= {"channels": C, "conv_width": K, "state_size": layer["ssm_state"].shape[-1], "vocab": model.V}
        if "x_proj" in layer:
            sizes |= {"inner": len(layer["out_proj"]), "rank": len(layer["dt_proj"])}
        else:
            _, heads, head_dim, _ = layer["ssm_state"].shape
            sizes |= {"heads": heads, "head_dim": head_dim, "groups": model.options.get("n_groups", 1)}
        return {**sizes, "dtype": _name(model.T), "state_dtype": _name(model.S)}

    def launch(self) -> None:
        kernels().model(
            *self.own, self.layers, **self.model.options, logits=self.logits, workspace=self.workspace,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def outputs(self) -> list[Tensor]:
        return [self.logits, *(one[f"{name}_out"] for one in self.layers for name in ("conv_state", "ssm_state"))]

    def run(self) -> None:
        """Launch, and hold the result against the reference and what is promised of any call."""
        self.launch()
        torch.cuda.synchronize()
        model = self.model
        assert self.workspace[-256:].eq(PATTERN).all(), "written past the workspace"
        for before, after in zip(model.layers, self.layers, strict=True):
            for name, value in before.items():
                if value is not None and not (self.same and name.endswith("_state")):
                    assert torch.equal(bits(value), bits(after[name].cpu())), f"{name} was written to"
        logits, states = model.expected()
        last = (model.seq_lens.long() - 1).clamp(min=0)
        reads = model.seq_lens > 0
        found = self.logits.cpu()
        if model.all_logits:
            used = torch.arange(model.L) < model.seq_lens[:, None]
            close("logits", found[used], logits[used], ALLOWED[model.T])
        else:
            close("logits", found[reads], logits[torch.arange(model.B), last][reads], ALLOWED[model.T])
        for i, (layer, wanted) in enumerate(zip(self.layers, states, strict=True)):
            for name in ("conv_state", "ssm_state"):
                got, kept = layer[f"{name}_out"].cpu(), model.layers[i][name]
                close(f"{name}.{i}", got, wanted[name], max(ALLOWED[model.T], ALLOWED[got.dtype]))
                assert torch.equal(bits(got[~reads]), bits(kept[~reads])), "a row of length 0 changed its state"


def replays_that_differ(call: Call, of: Sequence[Call], fills: Iterable[int]) -> int:
    """How many outputs of a call are not to the bit what it gives alone, in replays of a graph of calls, it among them.

    Args:
        call: What is replayed.
        of: What the graph launches, in this order, over the workspace of ``call``.
        fills: A byte for each replay, of which the workspace is full before it.
    """
    call.launch()
    torch.cuda.synchronize()
    wanted = [out.clone() for out in call.outputs()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in of:
            one.launch()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for fill in fills:
        call.workspace.fill_(fill)
        for out in call.outputs():
            _poison(out)
        graph.replay()
        for out, want in zip(call.outputs(), wanted, strict=True):
            different += (bits(out) != bits(want)).any()
    return int(different.item())


def close(name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    assert found.isfinite().all(), f"{name} is not finite"
    error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= allowed, f"{name}: {error:.1e} of {allowed:.1e}"


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(math.nan)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Of state-spaces, and Falcon-Mamba.
PUBLISHED: list[dict[str, Any]] = [
    {"d": 768, "D": 1536, "R": 48},
    {"d": 1024, "D": 2048, "R": 64},
    {"d": 1536, "D": 3072, "R": 96},
    {"d": 2048, "D": 4096, "R": 128},
    {"d": 2560, "D": 5120, "R": 160},
    {"d": 4096, "D": 8192, "R": 256, "norm_eps": 1e-6},
]
PUBLISHED2: list[dict[str, Any]] = [
    {"d": 768, "H": 24},
    {"d": 1024, "H": 32},
    {"d": 1536, "H": 48},
    {"d": 2048, "H": 64},
    {"d": 2560, "H": 80},
]
MAMBA: dict[str, Any] = {}
MAMBA2: dict[str, Any] = {"H": 24}
CASES: list[dict[str, Any]] = [
    MAMBA,
    MAMBA2,
    {"d": 2560, "D": 5120, "R": 160, "layers": 2},
    {"d": 128, "D": 256, "R": 8, "K": 2, "bias": True, "tied": False, "V": 257},
    {"d": 512, "D": 1024, "R": 32, "norm_eps": 1e-6},
    {"d": 2560, "H": 80, "layers": 2},
    {"d": 128, "H": 8, "P": 32, "N": 64, "K": 3, "bias": True, "tied": False, "V": 257},
    {"d": 512, "H": 16, "N": 64, "n_groups": 8, "skip": "HP"},
    {"d": 256, "H": 8, "gate": False, "skip": ""},
]  # fmt: skip
TYPES = (F32, F16, BF16)
BATCHES = (1, 2, 3, 8, 67)
LENGTHS = (1, 2, 7, 130)  # a token; prompts shorter than a convolution, and longer than a chunk of a scan


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("S", [F32, F16], ids=str)
@pytest.mark.parametrize("T", TYPES, ids=str)
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_equals_the_reference(case: dict[str, Any], L: int, T: torch.dtype, S: torch.dtype, same: bool) -> None:
    for B in BATCHES if L == 1 else (1, 3):
        Call(Model(T, B, L, S, **case), same=same).run()


@pytest.mark.parametrize("T", TYPES, ids=str)
@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_other_sizes(case: dict[str, Any], L: int, T: torch.dtype) -> None:
    for B in (1, 3, 8) if L == 1 else (2,):
        Call(Model(T, B, L, **case), same=True).run()


@pytest.mark.parametrize("L", [1, 9])
@pytest.mark.parametrize("case", [MAMBA, MAMBA2], ids=str)
def test_all_logits(case: dict[str, Any], L: int) -> None:
    for B in (1, 3):
        Call(Model(F16, B, L, all_logits=True, **case)).run()


@pytest.mark.parametrize("case", [MAMBA, MAMBA2], ids=str)
def test_ids_out_of_range_read_nothing_else(case: dict[str, Any]) -> None:
    """They stand for the nearest id that is there."""
    for B in (1, 4):
        model = Model(F16, B, 1, **case)
        model.input_ids[:] = torch.tensor([2**31 - 1, -1, model.V, -(2**31)])[:B, None]
        Call(model).run()


@pytest.mark.parametrize("L", [1, 40])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("case", [MAMBA, MAMBA2], ids=str)
def test_a_graph_replays_bit_identical(case: dict[str, Any], B: int, L: int) -> None:
    call = Call(Model(F16, B, L, **case))
    call.launch()
    torch.cuda.synchronize()
    eager = [out.clone() for out in call.outputs()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):  # one starts while the other ends
            call.launch()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(300):
        for out in call.outputs():
            _poison(out)
        graph.replay()
        for out, want in zip(call.outputs(), eager, strict=True):
            different += (bits(out) != bits(want)).any()
    assert different.item() == 0, f"{different.item()} outputs of 300 replays differ from eager"


@pytest.mark.parametrize("case", [MAMBA, MAMBA2], ids=str)
def test_a_token_after_another_is_the_prompt(case: dict[str, Any]) -> None:
    """A prompt's last logits and states are those of its tokens one by one, to rounding."""
    model = Model(F16, 2, 6, **case)
    model.seq_lens[:] = 6
    whole = Call(model)
    whole.launch()
    step = Call(model, same=True)
    step.own[1].fill_(1)
    ids = step.own[0]
    for t in range(6):
        step.own[0] = ids[:, t : t + 1].contiguous()
        step.launch()
    torch.cuda.synchronize()
    for got, want in zip(step.outputs(), whole.outputs(), strict=True):
        close("a step", got.cpu(), want.cpu().double(), ALLOWED[F16])
