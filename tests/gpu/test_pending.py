"""Steps that leave tokens pending (``pending.cuh``): against the reference in float64 after every token, and to the bit
what steps give that write their states each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, MAJOR, bits, kernels, needs_gpu
from gpu.test_model import ALLOWED, MAMBA2, PUBLISHED2, Call, Model, close
from torch import Tensor

pytestmark = needs_gpu

# Rows enough for steps to leave tokens pending, on the GPUs that can.
CASES: list[tuple[int, dict[str, Any]]] = [
    (17, MAMBA2),
    (16, PUBLISHED2[4]),
    (64, {"d": 128, "H": 8, "P": 32, "N": 64, "K": 3, "bias": True, "tied": False, "V": 257}),
    (33, {"d": 512, "H": 16, "N": 64, "n_groups": 8, "skip": "HP"}),
    (70, {"d": 256, "H": 8, "gate": False, "skip": ""}),
    (26, {"d": 384, "H": 16, "P": 96, "N": 32}),
    (64, {"d": 128, "H": 8, "P": 64, "N": 16}),
    (64, {"d": 128, "H": 8, "P": 24, "N": 104}),
    (32, {"d": 256, "H": 16, "P": 16, "N": 256}),
]
TOKENS = 11


class Pending(Call):
    """Single tokens of a model's rows, one after the other, over states that go out where they came in."""

    def __init__(self, model: Model, defers: bool = True) -> None:
        super().__init__(model, same=True)
        sizes = {name: size for name, size in self._sizes().items() if not name.endswith("dtype")}
        words = kernels().pending_row(**sizes)
        self.pending = torch.zeros(model.B, words, device="cuda") if defers else None
        self.input_ids, self.seq_lens = self.own[:2]
        self.single_logits = torch.empty(model.B, model.V, device="cuda")

    def launch(self) -> None:
        kernels().model(
            *self.own, self.layers, **self.model.options, logits=self.logits, pending=self.pending,
            workspace=self.workspace, stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def tokens(self, start: int = 0, end: int = TOKENS) -> Iterator[Tensor]:
        """Logits [B, V] after each token; a row that has none any more reads nothing."""
        self.logits = self.single_logits
        for t in range(start, end):
            self.own[:2] = self.input_ids[:, t : t + 1].contiguous(), (self.seq_lens > t).int()
            self.launch()
            yield self.logits.clone()

    def read_nothing(self) -> None:
        self.own[:2] = self.input_ids[:, :1].contiguous(), torch.zeros_like(self.seq_lens)
        self.launch()

    @property
    def left(self) -> Tensor:
        """How many tokens of each row are pending."""
        assert self.pending is not None
        return self.pending[:, 0].view(torch.int32) >> 16

    def states(self) -> list[Tensor]:
        return [layer[f"{name}_state"] for layer in self.layers for name in ("conv", "ssm")]


def model_of(case: dict[str, Any], B: int, T: torch.dtype = F16, S: torch.dtype = F32, seed: int = 0) -> Model:
    """Some rows of which end in between."""
    return Model(T, B, TOKENS, S, seed=seed, **{"layers": 2, "V": 104, "all_logits": True} | case)


def assert_same_bits(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize(("T", "S"), [(F16, F32), (BF16, F32), (F16, F16), (BF16, BF16), (F32, F32)], ids=str)
@pytest.mark.parametrize(("B", "case"), CASES, ids=str)
def test_every_token_is_that_of_the_reference(B: int, case: dict[str, Any], T: torch.dtype, S: torch.dtype) -> None:
    call = Pending(model_of(case, B, T, S))
    logits, states = call.model.expected()
    most = 0
    for t, found in enumerate(call.tokens()):
        reads = call.model.seq_lens > t
        close(f"logits of token {t}", found.cpu()[reads], logits[reads, t], ALLOWED[T])
        most = max(most, int(call.left.max()))
    if MAJOR >= 9:
        assert most == 3, "nothing was pending"
    call.read_nothing()
    assert not call.left.any()
    for i, (layer, wanted) in enumerate(zip(call.layers, states, strict=True)):
        for name in ("conv_state", "ssm_state"):
            got = layer[name].cpu()
            close(f"{name}.{i}", got, wanted[name], max(ALLOWED[T], ALLOWED[got.dtype]))


@pytest.mark.parametrize(("B", "case"), CASES, ids=str)
def test_tokens_are_to_the_bit_those_of_states_that_are_written_each_time(B: int, case: dict[str, Any]) -> None:
    for seed in range(3):
        call, other = (Pending(model_of(case, B, seed=seed), defers) for defers in (True, False))
        assert_same_bits(call.tokens(), other.tokens())
        call.read_nothing()
        assert_same_bits(call.states(), other.states())


@pytest.mark.parametrize(("B", "case"), CASES[:4], ids=str)
def test_a_prompt_goes_on_from_what_is_pending(B: int, case: dict[str, Any]) -> None:
    found = []
    for defers in (True, False):
        call = Pending(model_of(case, B), defers)
        logits = list(call.tokens(0, 6))
        if defers and MAJOR >= 9:
            assert call.left.any()
        call.own[:2] = call.input_ids[:, 6:].contiguous(), (call.seq_lens - 6).clamp(min=0)
        call.logits = torch.zeros(B, TOKENS - 6, call.model.V, device="cuda")
        call.launch()
        if defers:
            assert not call.left.any()
        logits += list(call.logits.unbind(1))
        logits += list(call.tokens(0, 2))
        call.read_nothing()
        found.append([*logits, *call.states()])
    assert_same_bits(*found)


@pytest.mark.parametrize(("B", "case"), CASES[:4], ids=str)
def test_states_that_go_elsewhere_hold_all_tokens(B: int, case: dict[str, Any]) -> None:
    call, other = (Pending(model_of(case, B), defers) for defers in (True, False))
    assert_same_bits(call.tokens(0, 5), other.tokens(0, 5))
    assert call.pending is not None
    if MAJOR >= 9:
        assert call.left.any()
    elsewhere = torch.full_like(call.pending, float("nan"))
    outs = [
        {f"{name}_out": torch.full_like(layer[name], float("nan")) for name in ("conv_state", "ssm_state")}
        for layer in call.layers
    ]
    call.own[:2] = call.input_ids[:, 5:6].contiguous(), (call.seq_lens > 5).int()
    kernels().model(
        *call.own, [layer | out for layer, out in zip(call.layers, outs, strict=True)], **call.model.options,
        logits=call.logits, pending=call.pending, pending_out=elsewhere, workspace=call.workspace,
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    [wanted] = other.tokens(5, 6)
    assert torch.equal(bits(call.logits), bits(wanted))
    assert not (elsewhere[:, 0].view(torch.int32) >> 16).any()
    for out, layer in zip(outs, other.layers, strict=True):
        for name in ("conv_state", "ssm_state"):
            assert torch.equal(bits(out[f"{name}_out"]), bits(layer[name]))


def test_a_row_that_starts_over_leaves_the_others_alone() -> None:
    B, case = CASES[0]
    found = []
    for defers in (True, False):
        call = Pending(model_of(case, B), defers)
        logits = list(call.tokens(0, 6))
        for tensor in [*call.states(), *([call.pending] if call.pending is not None else [])]:
            tensor[5] = 0
        found.append([*logits, *call.tokens(6)])
    assert_same_bits(*found)
