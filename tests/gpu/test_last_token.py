"""MambaLastToken's kernel picks what NumPy picks, bit by bit."""

from __future__ import annotations

import pytest
import torch
from gpu.device import BF16, F16, F32, Call, Draw, bits, needs_gpu

pytestmark = needs_gpu

BASE = {"B": 3, "L": 7, "d": 64, "T": F32}
CASES = [
    {},
    *({"B": n} for n in (1, 65, 70_000)),
    *({"L": n} for n in (1, 2, 1000)),
    *({"d": n} for n in (1, 7, 33, 8192)),
    *({"T": dtype, "d": d} for dtype in (F16, BF16) for d in (64, 33)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_picks_each_rows_last_token(case: dict) -> None:
    B, L, d, T = (BASE | case).values()
    lens = torch.randint(0, L + 1, (B,), generator=torch.Generator().manual_seed(0)).tolist()
    lens[0], lens[-1] = L, 0 if B > 1 else L
    draw = Draw(B, L, T, lens, seed=1)
    x = draw.tokens(d)
    y, _ = Call("last_token", [x, draw.seq_lens], {"batch": B, "length": L, "width": d}).run()
    for b in range(B) if B < 100 else range(0, B, 997):
        if lens[b]:
            assert torch.equal(bits(y[b]), bits(x[b, lens[b] - 1]))


def test_a_graph_replays_bit_identical() -> None:
    draw = Draw(3, 5, BF16, [5, 0, 2], seed=2)
    Call("last_token", [draw.tokens(72), draw.seq_lens], {"batch": 3, "length": 5, "width": 72}).check_graph()
