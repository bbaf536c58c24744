"""MambaCausalConv1d's kernels against the float64 recurrence: a base case, then one thing changed at a time.

Every call goes through ``Call.run``, so each also proves that every output is written, that y is zero past a row's end,
that what stands there (NaN, always) is not looked at, that a row of length 0 keeps its state to the bit, and that no
input but a state bound to both is written to.
"""

from __future__ import annotations

from typing import Any

import pytest
import recurrence
import torch
from gpu.device import BF16, F16, F32, NAN, Call, Draw, bits, compare, needs_gpu
from torch import Tensor

pytestmark = needs_gpu

# The base goes by vectors (K = 4, channels a multiple of them); C = 37 and other K an element at a time.
CASES: list[dict[str, Any]] = [
    {},
    *({"B": n} for n in (1, 5)),
    *({"L": n} for n in (1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 127, 128, 129, 300)),
    *({"C": n} for n in (1, 7, 8, 37, 136, 1032)),
    *({"K": n} for n in (2, 3, 5, 6, 7, 8)),
    *({"K": n, "L": 1} for n in (2, 3, 5, 8)),
    *({"C": n, "L": 1} for n in (1, 37, 136, 1032)),
    *({"K": 8, "L": n} for n in (2, 6, 9)),
    *({"T": T, "L": L, "C": C} for T in (F16, BF16) for L in (1, 40) for C in (64, 37)),
    *({"bias": False, "L": L} for L in (1, 40)),
    *({"activation": "none", "L": L} for L in (1, 40)),
    {"B": 6, "seq_lens": [0, 40, 1, 2, 3, 17]},
    {"B": 6, "seq_lens": [0, 40, 1, 2, 3, 17], "K": 7},
    {"B": 3, "L": 1, "seq_lens": [0, 1, 0]},
    {"B": 3, "L": 1, "C": 37, "seq_lens": [0, 1, 0]},
    {"B": 2, "seq_lens": [0, 0]},
]


def arguments(
    *, B=3, L=40, C=64, K=4, T=F32, bias=True, activation="silu", seq_lens=None, seed=0
) -> tuple[list[Any], dict[str, int]]:
    draw = Draw(B, L, T, seq_lens, seed)
    args = [
        draw.tokens(C), draw.normal(C, K), draw.normal(C) if bias else None, draw.state(B, C, K - 1), draw.seq_lens,
        activation,
    ]  # fmt: skip
    return args, {"batch": B, "length": L, "channels": C, "width": K}


def check(args: list[Any], y: Tensor, state_out: Tensor) -> None:
    """Roundings: K products and sums, the bias, and about 8 for silu. The new state is a copy."""
    want_y, want_state = recurrence.causal_conv1d(*args)
    size_y, _ = recurrence.magnitude(recurrence.causal_conv1d, *args)
    assert torch.equal(state_out.double(), torch.from_numpy(want_state))
    compare(y, want_y, size_y, args[1].shape[1] + 9)


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_recurrence(case: dict, same: bool) -> None:
    args, sizes = arguments(**case)
    check(args, *Call("causal_conv1d", args, sizes, same=same).run())


@pytest.mark.parametrize("K", [4, 5])
def test_a_prompt_in_parts_is_the_prompt(K: int) -> None:
    args, sizes = arguments(B=2, L=64, K=K, seq_lens=[64, 64])
    whole, state_after = Call("causal_conv1d", args, sizes).run()
    outputs, state = [], args[3]
    for start, stop in ((0, 1), (1, 3), (3, 40), (40, 64)):
        part = [args[0][:, start:stop].contiguous(), *args[1:3], state, torch.full_like(args[4], stop - start), args[5]]
        y, state = Call("causal_conv1d", part, sizes | {"length": stop - start}).run()
        outputs.append(y)
    assert torch.equal(bits(torch.cat(outputs, dim=1)), bits(whole))
    assert torch.equal(bits(state), bits(state_after))


@pytest.mark.parametrize("L", [1, 40])
@pytest.mark.parametrize("C", [64, 37])
def test_nan_stays_in_its_row_and_channel(L: int, C: int) -> None:
    args, sizes = arguments(L=L, C=C, seq_lens=[L, L, L])
    clean, clean_state = Call("causal_conv1d", args, sizes).run()
    args[0][1, 0, 5], args[3][2, 6, 0] = NAN, NAN
    y, state = Call("causal_conv1d", args, sizes).run()
    touched = torch.zeros(3, C, dtype=torch.bool)
    touched[1, 5] = touched[2, 6] = True
    assert y[1, 0, 5].isnan()
    assert y[2, 0, 6].isnan()
    assert torch.equal(bits(y.transpose(1, 2)[~touched]), bits(clean.transpose(1, 2)[~touched]))
    assert torch.equal(bits(state[~touched]), bits(clean_state[~touched]))


def test_more_rows_than_a_grid_is_high() -> None:
    B = 70_000
    args, sizes = arguments(B=B, L=2, C=8, T=BF16, seq_lens=[b % 3 for b in range(B)])
    y, state_out = Call("causal_conv1d", args, sizes).run()
    rows = [*range(0, B, 4999), 65_534, 65_535, 65_536, B - 1]
    picked = [a[rows] if isinstance(a, Tensor) and len(a) == B else a for a in args]
    check(picked, y[rows], state_out[rows])


@pytest.mark.parametrize("case", [{}, {"L": 1}, {"K": 5}], ids=str)
def test_a_graph_replays_bit_identical(case: dict) -> None:
    args, sizes = arguments(**case)
    Call("causal_conv1d", args, sizes).check_graph()
