"""A token of one row, which compute capability 9.0 runs in one kernel (``token.cu``): the sizes of published models,
against the reference in float64. Elsewhere the same calls run as a chain, and must be right too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, MAJOR, bits, needs_gpu
from gpu.test_model import PUBLISHED, PUBLISHED2, Call, Model, replays_that_differ
from gpu.test_step import PATTERN

pytestmark = needs_gpu

# Below d = 2048 blocks have 32 channels and add to sums. From there on they pass parts of them, and have 32, 40 or 64.
MAMBA = PUBLISHED
MAMBA2 = [*PUBLISHED2, {"d": 2048, "H": 128, "P": 32}]
OTHERS: list[dict[str, Any]] = [
    {"d": 768, "D": 1536, "bias": True, "tied": False},
    {"d": 768, "D": 1536, "R": 16},
    {"d": 256, "D": 512, "R": 16},
    {"d": 512, "D": 2048, "R": 256},
    {"d": 1792, "D": 3584, "R": 112, "norm_eps": 1e-6, "bias": True},
    {"d": 512, "H": 16, "bias": True, "tied": False, "skip": "HP"},
    {"d": 1792, "H": 56},
    {"d": 2048, "H": 64, "bias": True, "tied": False, "skip": "HP"},
    {"d": 1024, "H": 32, "gate": False, "skip": ""},
    {"d": 1024, "H": 128, "P": 16},
    {"d": 1536, "H": 48, "layers": 41},  # more than are an argument
]
CASES = [*MAMBA, *MAMBA2, *OTHERS]


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize(("T", "S"), [(F16, F32), (BF16, F32), (F16, F16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: dict[str, Any], T: torch.dtype, S: torch.dtype, same: bool) -> None:
    Call(Model(T, 1, 1, S, **{"layers": 2} | case), same=same).run()


@pytest.mark.parametrize("case", [MAMBA[4], MAMBA2[0], MAMBA2[4], OTHERS[0]], ids=str)
def test_a_row_of_length_0_keeps_its_state(case: dict[str, Any]) -> None:
    model = Model(F16, 1, 1, layers=2, **case)
    model.seq_lens[:] = 0
    call = Call(model)
    call.launch()
    torch.cuda.synchronize()
    for before, after in zip(model.layers, call.layers, strict=True):
        for name in ("conv_state", "ssm_state"):
            assert torch.equal(bits(before[name]), bits(after[f"{name}_out"].cpu()))


@pytest.mark.parametrize("case", [MAMBA[0], MAMBA[4], MAMBA2[0], MAMBA2[4]], ids=str)
def test_large_values_stay_in_range(case: dict[str, Any]) -> None:
    """What a norm divides by later may be out of float16's range before."""
    model = Model(F16, 1, 1, layers=1, **case)
    if "H" in case:
        model.layers[0]["D"] *= 1e3
    model.embedding *= 100
    Call(model).run()


@pytest.mark.skipif(MAJOR != 9, reason="needs compute capability 9.0: elsewhere no sum is one of integers")
@pytest.mark.parametrize("scale", [1e12, -1e12, float("nan")])
@pytest.mark.parametrize("case", [MAMBA[0], MAMBA2[0]], ids=str)
def test_what_is_out_of_range_is_no_number(case: dict[str, Any], scale: float) -> None:
    """A sum of integers would take any bits for a number."""
    model = Model(BF16, 1, 1, layers=2, **case)
    model.layers[0]["D"][..., :1] = scale
    call = Call(model)
    call.launch()
    torch.cuda.synchronize()
    assert call.logits.isnan().all()


@pytest.mark.parametrize("case", [MAMBA[0], MAMBA[4], MAMBA2[0], MAMBA2[4]], ids=str)
def test_replays_are_bit_identical(case: dict[str, Any]) -> None:
    """Whatever the workspace holds, numbers of a token before or of another model among it."""
    call, other = Call(Model(F16, 1, 1, layers=3, **case)), Call(Model(F16, 1, 1, layers=5, seed=1, **case))
    for one in (call, other):
        one.workspace = torch.full((max(call.needed, other.needed),), PATTERN, dtype=torch.uint8, device="cuda")
    other.workspace = call.workspace
    different = replays_that_differ(call, [other, call, call], [i % 256 for i in range(300)])
    assert different == 0, f"{different} outputs of 300 replays differ"
