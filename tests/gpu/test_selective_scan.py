"""MambaSelectiveScan's kernels against the float64 recurrence: base cases, then one thing changed at a time.

Every call goes through ``Call.run``, so each also proves that every output is written, that y is zero past a row's end,
that what stands there (NaN, always) is not looked at, that a row of length 0 keeps its state to the bit, and that no
input but a state bound to both is written to.

Which kernel takes a call hangs on its sizes: one token (N = 16, other N; many rows); prompts in chunks (few channels),
on few channels, on more than that, on many (a base for each), and every width of N.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import recurrence
import torch
from gpu.device import BF16, F16, F32, NAN, Call, Draw, bits, compare, needs_gpu
from torch import Tensor

pytestmark = needs_gpu

RAGGED = [0, 100, 1, 33, 64, 65]
# Of N = 16 on 132 multiprocessors. Channels are in blocks of at most 16, 40 and 32.
FEW, MEDIUM, MANY, CHUNKED = {"B": 1, "D": 1020}, {"B": 2, "D": 1304}, {"B": 3, "D": 2820}, {"B": 2, "D": 40, "L": 1100}
CASES: list[dict[str, Any]] = [
    # one token
    {"L": 1},
    *({"L": 1, "B": n} for n in (1, 7)),
    *({"L": 1, "D": n} for n in (1, 7, 33)),
    *({"L": 1, "N": n} for n in (1, 3, 5, 15, 17, 64, 100, 129, 256)),
    *({"L": 1, "T": T, "S": S} for T in (F32, F16, BF16) for S in (F32, F16, BF16)),
    *({"L": 1, "N": 24, "S": S} for S in (F16, BF16)),
    {"L": 1, "B": 258, "D": 1030},  # rows of the batch share a thread
    {"L": 1, "B": 258, "D": 2050, "S": F16},
    *({"L": 1, option: False} for option in ("skip", "gate", "bias", "softplus")),
    *({"L": 1, "N": 5, option: False} for option in ("skip", "gate", "bias", "softplus")),
    {"L": 1, "B": 3, "seq_lens": [0, 1, 0]},
    {"L": 1, "B": 3, "N": 5, "seq_lens": [0, 1, 0]},
    # prompts: few channels
    {},
    *({"L": n} for n in (2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 400)),
    *({"D": n} for n in (1, 3, 4, 7, 33)),
    *({"N": n} for n in (1, 2, 5, 7, 8, 15)),
    *({"T": T, "S": S} for T in (F16, BF16) for S in (F32, T)),
    *({"T": T, "D": 41} for T in (F16, BF16)),
    *({option: False} for option in ("skip", "gate", "bias", "softplus")),
    {"B": 6, "seq_lens": RAGGED},
    {"B": 6, "seq_lens": RAGGED, "D": 7},
    {"B": 2, "seq_lens": [0, 0]},
    FEW,
    FEW | {"T": BF16},
    FEW | {"T": BF16, "D": 1021},
    MEDIUM,
    MEDIUM | {"T": BF16},
    MEDIUM | {"T": BF16, "D": 1305},
    MEDIUM | {"B": 1, "D": 5120, "T": BF16},  # the largest blocks
    MEDIUM | {"B": 3, "seq_lens": [0, 100, 37], "T": F16},
    # prompts: many channels
    MANY,
    MANY | {"T": BF16, "S": BF16},
    MANY | {"T": F16, "N": 9},
    MANY | {"D": 2821, "L": 33},
    MANY | {"D": 2821, "L": 33, "T": BF16},
    MANY | {"seq_lens": [0, 65, 31]},
    MANY | {"L": 2},
    # prompts: time in chunks
    CHUNKED,
    *(CHUNKED | {"L": n} for n in (512, 513, 1056, 1057)),
    *(CHUNKED | {"D": n} for n in (1, 7, 33)),
    CHUNKED | {"N": 5},
    *(CHUNKED | {"N": n} for n in (17, 32)),
    *(CHUNKED | {"T": T, "S": T} for T in (F16, BF16)),
    CHUNKED | {"softplus": False, "gate": False, "skip": False, "bias": False},
    CHUNKED | {"B": 7, "D": 16, "seq_lens": [0, 1100, 1, 160, 161, 320, 700]},
    # prompts: other widths of the state
    *({"N": n, "L": 70} for n in (17, 24, 31, 32, 33, 48, 64, 65, 100, 128, 129, 200, 256)),
    *({"N": n, "L": 70, "T": BF16} for n in (24, 64, 128, 250)),
    *({"N": n, "D": 7, "L": 20} for n in (20, 64, 128, 256)),
    *(sizes | {"N": 24, "T": BF16} for sizes in (FEW, MEDIUM, MANY)),
    *(sizes | {"N": 17} for sizes in (FEW | {"D": 1021}, MEDIUM, MANY)),
    MANY | {"N": 32, "seq_lens": [0, 65, 31]},
    *({"N": n, "B": 6, "seq_lens": RAGGED} for n in (20, 40, 80, 160)),
]


def arguments(
    *, B=2, L=100, D=40, N=16, T=F32, S=F32, skip=True, gate=True, bias=True, softplus=True, seq_lens=None, seed=0
) -> tuple[list[Any], dict[str, int]]:
    draw = Draw(B, L, T, seq_lens, seed)
    dt = draw.tokens(D)
    args = [
        draw.tokens(D), dt if softplus else dt.abs(), draw.negative(D, N), draw.tokens(N), draw.tokens(N),
        draw.normal(D, dtype=F32) if skip else None, draw.tokens(D) if gate else None,
        draw.normal(D, dtype=F32).abs() * (-1 if softplus else 1) if bias else None, draw.state(B, D, N, dtype=S),
        draw.seq_lens, softplus,
    ]  # fmt: skip
    return args, {"batch": B, "length": L, "channels": D, "state_size": N}


def check(args: list[Any], y: Tensor, state_out: Tensor) -> None:
    """Roundings: two a token for the state, N for the contraction with C, about 16 for softplus, exp, skip and gate."""
    want_y, want_state = recurrence.selective_scan(*args)
    size_y, size_state = recurrence.magnitude(recurrence.selective_scan, *args)
    roundings = 2 * args[0].shape[1] + want_state.shape[-1] + 16
    compare(state_out, want_state, size_state, roundings)
    compare(y, want_y, size_y, roundings)


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_recurrence(case: dict, same: bool) -> None:
    args, sizes = arguments(**case)
    y, state_out = Call("selective_scan", args, sizes, same=same).run()
    rows = slice(None) if args[0].numel() < 2**20 else slice(0, None, 16)
    picked = [a[rows] if i in (0, 1, 3, 4, 6, 8, 9) and a is not None else a for i, a in enumerate(args)]
    check(picked, y[rows], state_out[rows])


@pytest.mark.parametrize("case", [{}, {"N": 20}, MANY | {"B": 1, "D": 8460}, CHUNKED], ids=str)
def test_a_prompt_in_parts_is_the_prompt(case: dict) -> None:
    args, sizes = arguments(**case)
    args[9] = torch.full_like(args[9], sizes["length"])
    for i in (0, 1, 3, 4, 6):
        args[i] = args[i].nan_to_num(0.5)
    outputs, state = [], args[8]
    for start, stop in ((0, 1), (1, 34), (34, sizes["length"])):
        part = [a[:, start:stop].contiguous() if i in (0, 1, 3, 4, 6) else a for i, a in enumerate(args)]
        part[8], part[9] = state, torch.full_like(args[9], stop - start)
        y, state = Call("selective_scan", part, sizes | {"length": stop - start}).run()
        outputs.append(y)
    check(args, torch.cat(outputs, dim=1), state)


@pytest.mark.parametrize("case", [{"L": 1}, {"L": 1, "N": 5}, {}, {"N": 20}, CHUNKED], ids=str)
def test_nan_stays_in_its_row_and_channel(case: dict) -> None:
    args, sizes = arguments(**case | {"B": 3})
    L, D = sizes["length"], sizes["channels"]
    args[9] = torch.full_like(args[9], L)
    for i in (0, 1, 3, 4, 6):
        args[i] = args[i].nan_to_num(0.5)
    clean, clean_state = Call("selective_scan", args, sizes).run()
    args[0][1, L // 2, 5], args[1][1, L // 2, 9], args[8][2, 6, 3] = NAN, NAN, NAN
    y, state = Call("selective_scan", args, sizes).run()
    touched = torch.zeros(3, D, dtype=torch.bool)
    touched[1, 5] = touched[1, 9] = touched[2, 6] = True
    assert y[1, L // 2 :, 5].isnan().all()
    assert y[1, L // 2 :, 9].isnan().all()
    assert y[2, :, 6].isnan().all()
    assert torch.equal(bits(y[1, : L // 2]), bits(clean[1, : L // 2])), "NaN went back in time"
    assert torch.equal(bits(y.transpose(1, 2)[~touched]), bits(clean.transpose(1, 2)[~touched]))
    assert torch.equal(bits(state[~touched]), bits(clean_state[~touched]))


@pytest.mark.parametrize("case", [{"L": 1}, {}, MANY, CHUNKED], ids=str)
@pytest.mark.parametrize("step", [1e-4, 30.0, 625.0])
def test_steps_from_hardly_any_to_all_forgotten(case: dict, step: float) -> None:
    """A dt between -16 * 625 = -1e4 and -6e-6; softplus in its exponential and in its linear range."""
    args, sizes = arguments(**case)
    shift = float(np.log(np.expm1(step))) if step < 20 else step
    args[1] = (args[1] * 0.1 + shift).to(args[1].dtype)
    args[7] = None
    check(args, *Call("selective_scan", args, sizes).run())


@pytest.mark.parametrize("L", [1, 2])
def test_more_rows_than_a_grid_is_high(L: int) -> None:
    B = 70_000
    args, sizes = arguments(B=B, L=L, D=8, T=BF16, seq_lens=[b % (L + 1) for b in range(B)])
    y, state_out = Call("selective_scan", args, sizes).run()
    rows = [*range(0, B, 4999), 65_534, 65_535, 65_536, B - 1]
    picked = [a[rows] if isinstance(a, Tensor) and len(a) == B else a for a in args]
    check(picked, y[rows], state_out[rows])


@pytest.mark.parametrize(
    "case", [{"L": 1}, {"L": 1, "N": 5}, {}, {"N": 20}, MEDIUM, MANY, CHUNKED, MANY | {"N": 20}], ids=str
)
def test_a_graph_replays_bit_identical(case: dict) -> None:
    args, sizes = arguments(**case | {"T": BF16})
    Call("selective_scan", args, sizes).check_graph()


@pytest.mark.slow
@pytest.mark.parametrize("D", [8, 608], ids=["chunked", "whole"])
def test_no_drift_in_a_hundred_thousand_steps(D: int) -> None:
    """Both as one prompt and token by token; the slowest state remembers 10,000 tokens."""
    L, compared = 100_000, 8
    args, sizes = arguments(B=1, L=L, D=D, seq_lens=[L])
    args[1] = (args[1] * 0.3 - 6.4).contiguous()  # steps near 1.7e-3; A down to -1/16
    args[7] = None
    prompt = Call("selective_scan", args, sizes).run()
    few = [a[:, :, :compared] if i in (0, 1, 6) else a for i, a in enumerate(args)]
    few[2], few[5], few[8] = args[2][:compared], args[5][:compared], args[8][:, :compared]
    want = recurrence.selective_scan(*few)
    sizes_of = recurrence.magnitude(recurrence.selective_scan, *few)
    roundings = 2 * 20_000 + 32  # of what a state remembers
    compare(prompt[1][:, :compared], want[1], sizes_of[1], roundings)
    compare(prompt[0][:, :, :compared], want[0], sizes_of[0], roundings)
    if compared < D:
        return
    device = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    first = [a[:, :1].contiguous() if i in (0, 1, 3, 4, 6) else a for i, a in enumerate(args)]
    first[9] = torch.ones_like(args[9])
    step = Call("selective_scan", first, sizes | {"length": 1}, same=True)
    graph, t = torch.cuda.CUDAGraph(), torch.zeros(1, dtype=torch.int64, device="cuda")
    ys = torch.empty(L, D, device="cuda")
    with torch.cuda.graph(graph):
        for i in (0, 1, 3, 4, 6):
            step.device_args[i].copy_(device[i].index_select(1, t))
        step.launch()
        ys.index_copy_(0, t, step.outputs["y"][:, 0])
        t.add_(1)
    for _ in range(L):
        graph.replay()
    compare(step.outputs["state_out"].cpu(), want[1], sizes_of[1], roundings)
    compare(ys.cpu()[None], want[0], sizes_of[0], roundings)
