"""Single tokens of some rows and short prompts, whose products have a kernel of their own on compute capability 9.0
(``rows.cu``): the sizes of published models, against the reference in float64. Elsewhere the same calls run otherwise,
and must be right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, needs_gpu
from gpu.test_model import PUBLISHED, PUBLISHED2, Call, Model, replays_that_differ
from gpu.test_step import PATTERN

pytestmark = needs_gpu

# Columns of a cluster follow from the widths: all for which there are kernels are among them.
MAMBA, MAMBA2 = PUBLISHED, PUBLISHED2
OTHERS: list[dict[str, Any]] = [
    {"d": 256, "D": 512, "R": 16, "bias": True, "tied": False},
    {"d": 256, "H": 16, "P": 32, "N": 64, "bias": True, "tied": False, "skip": "HP"},
    {"d": 512, "H": 16, "n_groups": 8},
    {"d": 512, "H": 16, "gate": False, "skip": ""},
    {"d": 384, "H": 16, "P": 96, "N": 32},
]
ROWS = (2, 3, 12, 17, 64, 65, 128)


@pytest.mark.parametrize(("T", "S"), [(F16, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("case", [*MAMBA, *MAMBA2], ids=str)
def test_equals_the_reference(case: dict[str, Any], T: torch.dtype, S: torch.dtype) -> None:
    for B in (2, 3, 17, 64, 65):
        Call(Model(T, B, 1, S, **{"layers": 2, "V": 257} | case), same=B == 17).run()


@pytest.mark.parametrize("B", ROWS)
@pytest.mark.parametrize("T", [F16, BF16], ids=str)
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_sizes(case: dict[str, Any], T: torch.dtype, B: int) -> None:
    Call(Model(T, B, 1, **{"V": 257} | case)).run()


@pytest.mark.parametrize("T", [F16, BF16], ids=str)
def test_one_row_of_a_wide_model_in_groups(T: torch.dtype) -> None:
    """Of Codestral Mamba's sizes."""
    Call(Model(T, 1, 1, layers=2, V=257, d=4096, H=128, n_groups=8)).run()


@pytest.mark.parametrize("T", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("case", "B", "L"),
    [
        *((case, B, L) for case in (*MAMBA, *MAMBA2) for B, L in ((2, 9), (1, 65))),
        *((case, B, L) for case in OTHERS for B, L in ((1, 3), (1, 64), (3, 40))),
    ],
    ids=str,
)
def test_short_prompts(case: dict[str, Any], B: int, L: int, T: torch.dtype) -> None:
    Call(Model(T, B, L, all_logits=L % 2 == 0, **{"layers": 2, "V": 257} | case)).run()


@pytest.mark.parametrize("case", [MAMBA[0], MAMBA2[0], MAMBA2[3]], ids=str)
def test_large_values_stay_in_range(case: dict[str, Any]) -> None:
    """What a norm divides by later may be out of float16's range before."""
    model = Model(F16, 16, 1, layers=1, **case)
    if "H" in case:
        model.layers[0]["D"] *= 1e3
        model.layers[0]["gate_norm"] *= 1e2
    model.embedding *= 100
    Call(model).run()


@pytest.mark.parametrize(
    ("case", "B"),
    # Of 64 rows of the sizes of mamba-1.4b some blocks of the scan read their states late.
    [*((case, B) for case in (MAMBA[0], MAMBA[4], MAMBA2[0], MAMBA2[4]) for B in (12, 65)), (MAMBA[3], 64)],
    ids=str,
)
def test_replays_are_bit_identical(case: dict[str, Any], B: int) -> None:
    call = Call(Model(F16, B, 1, **{"layers": 2, "V": 257} | case))
    different = replays_that_differ(call, [call, call], [PATTERN] * 100)
    assert different == 0, f"{different} outputs of 100 replays differ"
