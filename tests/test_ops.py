"""Every op against the float64 recurrences of tests/recurrence.py: a base case, then one thing changed at a time.

Every call in this file goes through ``checked``, so each case also proves that y is zero past a row's end, that what
stands there (NaN, always) is not looked at, that a row of length 0 keeps its state to the bit, that no input is written
to or shared with an output.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import recurrence
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_deploy import ops

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAN = math.nan
SEQ_LENS = {"causal_conv1d": 4, "selective_scan": 9, "ssd_scan": 8, "last_token": 1}  # where this argument is
TOKENS = {"causal_conv1d": (0,), "selective_scan": (0, 1, 3, 4, 6), "ssd_scan": (0, 1, 3, 4), "last_token": (0,)}


class Draw:
    """Random tensors of one case, NaN past each row's end where they run over tokens."""

    def __init__(self, seed: int, dtype: torch.dtype, seq_lens: Tensor, length: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.seq_lens, self.length = dtype, seq_lens, length

    def tokens(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(len(self.seq_lens), self.length, channels, generator=self.generator)
        past = torch.arange(self.length) >= self.seq_lens[:, None]
        return values.masked_fill(past[..., None], NAN).to(dtype or self.dtype)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def negative(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """A: between -1/16 and -16, evenly in the logarithm."""
        return -(torch.rand(*shape, generator=self.generator) * math.log(256) - math.log(16)).exp().to(dtype)


def lengths(batch: int, length: int, given: list[int] | None, dtype: torch.dtype) -> Tensor:
    """One full row, the others shorter by one more token each, unless given."""
    return torch.tensor([max(length - b, 0) for b in range(batch)] if given is None else given, dtype=dtype)


def conv_args(
    *, B=3, L=7, C=6, K=4, T=F32, bias=True, activation="silu", seq_lens=None, index=torch.int32, seed=0
) -> list[Any]:
    draw = Draw(seed, T, lengths(B, L, seq_lens, index), L)
    return [
        draw.tokens(C),
        draw.normal(C, K),
        draw.normal(C) if bias else None,
        draw.normal(B, C, K - 1),
        draw.seq_lens,
        activation,
    ]


def selective_args(
    *, B=3, L=7, D=6, N=4, T=F32, S=F32, skip=True, gate=True, bias=True, softplus=True, seq_lens=None,
    index=torch.int32, seed=0,
) -> list[Any]:  # fmt: skip
    draw = Draw(seed, T, lengths(B, L, seq_lens, index), L)
    P = F64 if T == F64 else F32
    dt = draw.tokens(D)
    return [
        draw.tokens(D),
        dt if softplus else dt.abs(),
        draw.negative(D, N, dtype=P),
        draw.tokens(N),
        draw.tokens(N),
        draw.normal(D, dtype=P) if skip else None,
        draw.tokens(D) if gate else None,
        draw.normal(D, dtype=P).abs() * (-1 if softplus else 1) if bias else None,
        draw.normal(B, D, N, dtype=S),
        draw.seq_lens,
        softplus,
    ]


def ssd_args(
    *, B=3, L=7, H=4, P=3, G=2, N=5, T=F32, S=F32, skip="H", bias=True, softplus=True, limits=(0.0, math.inf),
    chunk=256, seq_lens=None, index=torch.int32, seed=0,
) -> list[Any]:  # fmt: skip
    draw = Draw(seed, T, lengths(B, L, seq_lens, index), L)
    W = F64 if T == F64 else F32
    dt = draw.tokens(H)
    return [
        draw.tokens(H * P),
        dt if softplus else dt.abs(),
        draw.negative(H, dtype=W),
        draw.tokens(G * N),
        draw.tokens(G * N),
        {"H": draw.normal(H, dtype=W), "HP": draw.normal(H, P, dtype=W), None: None}[skip],
        draw.normal(H, dtype=W).abs() * (-1 if softplus else 1) if bias else None,
        draw.normal(B, H, P, N, dtype=S),
        draw.seq_lens,
        softplus,
        *limits,
        G,
        chunk,
    ]


ARGS = {"causal_conv1d": conv_args, "selective_scan": selective_args, "ssd_scan": ssd_args}


def bits(tensor: Tensor) -> Tensor:
    """The representation, so that -0.0 differs from 0.0 and NaN equals itself."""
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), NAN)  # one of the many: a copy may turn one into another
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def checked(name: str, args: list[Any]) -> tuple[Tensor, Tensor]:
    """Call an op and hold the result against everything that is promised of any call."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    y, state_out = getattr(ops, name)(*args)

    position = SEQ_LENS[name]
    x, seq_lens, state = args[0], args[position], args[position - 1]
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (state_out.shape, state_out.dtype) == (state.shape, state.dtype)
    for old, new in zip(before, args, strict=True):
        assert not isinstance(old, Tensor) or torch.equal(bits(old), bits(new)), "an input was written to"
    storages = [t.untyped_storage().data_ptr() for t in (y, state_out, *args) if isinstance(t, Tensor)]
    assert len(set(storages)) == len(storages), "an output shares the memory of another tensor"
    past = torch.arange(x.shape[1]) >= seq_lens[:, None]
    assert not y[past].any(), "y is not zero past a row's end"
    idle = seq_lens == 0
    assert torch.equal(bits(state_out[idle]), bits(state[idle])), "a row of length 0 changed its state"
    return y, state_out


def assert_close(name: str, args: list[Any], y: Tensor, state_out: Tensor) -> None:
    """Against the recurrence, to the error bound of ``recurrence.error_bound``.

    Roundings on the longest path. Convolution: K products and sums, the bias, and about 8 for silu. Scans: two a token
    for the state or for the running sum of its logarithmic decay, N for the contraction with C, and about 16 for
    softplus, exp, skip and gate.
    """
    op = getattr(recurrence, name)
    want_y, want_state = op(*args)
    size_y, size_state = recurrence.magnitude(op, *args)
    if name == "causal_conv1d":
        roundings = args[1].shape[1] + 9
        assert torch.equal(state_out.double(), torch.from_numpy(want_state)), "the state is no copy of what was read"
    else:
        roundings = 2 * args[0].shape[1] + want_state.shape[-1] + 16
        compare(state_out, want_state, size_state, roundings, args[0].dtype)
    compare(y, want_y, size_y, roundings, args[0].dtype)


def compare(got: Tensor, want: np.ndarray, size: np.ndarray, roundings: int, dtype: torch.dtype) -> None:
    compute = torch.finfo(F64 if dtype == F64 else F32).eps / 2
    stored = torch.finfo(got.dtype)
    bound = recurrence.error_bound(want, size, roundings, compute, stored.eps / 2, stored.tiny * stored.eps)
    error = np.abs(got.double().numpy() - want)
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    assert (error <= bound).all(), f"at {worst}: got {got[worst]}, want {want[worst]} +- {bound[worst]}"


LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 200]
DTYPES = {"fp16": F16, "bf16": BF16, "fp64": F64}
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "causal_conv1d": [
        ("base", {}),
        *((f"B={n}", {"B": n}) for n in (1, 5)),
        *((f"L={n}", {"L": n}) for n in LENGTHS),
        *((f"C={n}", {"C": n}) for n in (1, 7, 33)),
        *((f"K={n}", {"K": n}) for n in (2, 3, 5, 6, 7, 8)),
        ("K=8,L=2", {"K": 8, "L": 2}),
        *((k, {"T": v}) for k, v in DTYPES.items()),
        ("no-bias", {"bias": False}),
        ("no-activation", {"activation": "none"}),
        ("int64-lengths", {"index": torch.int64}),
        ("ragged", {"B": 5, "L": 40, "seq_lens": [0, 40, 1, 2, 17]}),
        ("all-idle", {"B": 2, "L": 3, "seq_lens": [0, 0]}),
    ],
    "selective_scan": [
        ("base", {}),
        *((f"B={n}", {"B": n}) for n in (1, 5)),
        *((f"L={n}", {"L": n}) for n in LENGTHS),
        *((f"D={n}", {"D": n}) for n in (1, 7, 33)),
        *((f"N={n}", {"N": n}) for n in (1, 3, 16, 17, 64)),
        *((k, {"T": v}) for k, v in DTYPES.items() if v != F64),
        ("fp64", {"T": F64, "S": F64}),
        ("fp16-state", {"T": F16, "S": F16}),
        ("bf16-state", {"T": BF16, "S": BF16}),
        ("fp32-with-fp16-state", {"S": F16}),
        ("no-skip", {"skip": False}),
        ("no-gate", {"gate": False}),
        ("no-dt-bias", {"bias": False}),
        ("no-skip-gate-or-bias", {"skip": False, "gate": False, "bias": False}),
        ("no-softplus", {"softplus": False}),
        ("int64-lengths", {"index": torch.int64}),
        ("ragged", {"B": 6, "L": 70, "seq_lens": [0, 70, 1, 32, 33, 64]}),
        ("all-idle", {"B": 2, "L": 3, "seq_lens": [0, 0]}),
    ],
    "ssd_scan": [
        ("base", {}),
        *((f"B={n}", {"B": n}) for n in (1, 5)),
        *((f"L={n}", {"L": n}) for n in LENGTHS),
        *((f"H={n}", {"H": n, "G": 1}) for n in (1, 3, 8)),
        *((f"P={n}", {"P": n}) for n in (1, 8, 17)),
        *((f"G={n}", {"G": n}) for n in (1, 4)),
        *((f"N={n}", {"N": n}) for n in (1, 16, 33, 128)),
        *((f"chunk={n}", {"L": 20, "chunk": n}) for n in (1, 3, 10, 20)),
        *((k, {"T": v}) for k, v in DTYPES.items() if v != F64),
        ("fp64", {"T": F64, "S": F64}),
        ("fp16-state", {"T": F16, "S": F16}),
        ("bf16-state", {"T": BF16, "S": BF16}),
        ("fp32-with-fp16-state", {"S": F16}),
        ("skip-per-channel", {"skip": "HP"}),
        ("no-skip", {"skip": None}),
        ("no-dt-bias", {"bias": False}),
        ("no-softplus", {"softplus": False}),
        ("dt-limits", {"limits": (0.1, 0.5)}),
        ("dt-lower-limit", {"limits": (0.3, math.inf)}),
        ("int64-lengths", {"index": torch.int64}),
        ("ragged", {"B": 6, "L": 130, "seq_lens": [0, 130, 1, 64, 65, 128]}),
        ("all-idle", {"B": 2, "L": 3, "seq_lens": [0, 0]}),
    ],
}
STATEFUL = sorted(CASES)


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(name, c, id=f"{name}-{label}") for name, cases in CASES.items() for label, c in cases],
)
def test_op_is_the_recurrence(name, changes):
    args = ARGS[name](**changes)
    assert_close(name, args, *checked(name, args))


def test_the_bound_notices_arithmetic_in_half_precision():
    """The tolerance above is no empty promise: bfloat16 arithmetic on the same values misses it."""
    args = selective_args(L=40)
    half = [a.to(BF16) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in half]
    rounded = [a.to(BF16).float() if isinstance(a, Tensor) else a for a in ops.selective_scan(*exact)]
    with pytest.raises(AssertionError, match="got"):
        assert_close("selective_scan", exact, *rounded)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", STATEFUL)
def test_any_lengths_in_any_two_pieces(name, data):
    """A prompt cut anywhere, the state carried over, gives the recurrence over the whole."""
    length = data.draw(st.integers(1, 90), label="L")
    seq_lens = data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4), label="seq_lens")
    cut = data.draw(st.integers(1, length), label="cut")
    args = ARGS[name](B=len(seq_lens), L=length, seq_lens=seq_lens, seed=data.draw(st.integers(0, 9), label="seed"))
    at = SEQ_LENS[name]
    pieces = []
    for tokens in (slice(0, cut), slice(cut, length)):
        if tokens.start == length:
            continue
        piece = [a[:, tokens] if i in TOKENS[name] and a is not None else a for i, a in enumerate(args)]
        piece[at] = (args[at] - tokens.start).clamp(0, tokens.stop - tokens.start)
        if pieces:
            piece[at - 1] = pieces[-1][1]
        pieces.append(checked(name, piece))
    assert_close(name, args, torch.cat([y for y, _ in pieces], dim=1), pieces[-1][1])


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("kind", ["token", "state"])
def test_nan_in_one_row_stays_in_that_row(name, kind):
    seq_lens = [5, 0, 7, 4]
    clean = ARGS[name](B=4, seq_lens=seq_lens)
    spoilt = [a.clone() if isinstance(a, Tensor) else a for a in clean]
    if kind == "token":
        spoilt[0][0, 2] = NAN
    else:
        spoilt[SEQ_LENS[name] - 1][0] = NAN
    want, got = checked(name, clean), checked(name, spoilt)  # which includes that y is zero past the spoilt row's end
    assert got[0][0, :5].isnan().any()
    for w, g in zip(want, got, strict=True):
        assert torch.equal(bits(w[1:]), bits(g[1:]))


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("T", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
def test_idle_row_keeps_every_bit_of_its_state(name, T):
    """Numbers that survive no arithmetic: -0.0, subnormal ones, infinity, NaN."""
    args = ARGS[name](T=T, seq_lens=[0, 7, 0], **({} if name == "causal_conv1d" else {"S": T}))
    state = args[SEQ_LENS[name] - 1]
    odd = torch.tensor([-0.0, torch.finfo(T).tiny * torch.finfo(T).eps, math.inf, -math.inf, NAN], dtype=T)
    state.flatten(1)[0, :5] = odd
    state.flatten(1)[2, -5:] = odd
    _, state_out = checked(name, args)
    assert torch.equal(bits(state_out[[0, 2]]), bits(state[[0, 2]]))
    assert not torch.equal(state_out[1], state[1])


@pytest.mark.parametrize("how", ["large-A", "large-dt"])
@pytest.mark.parametrize("name", ["selective_scan", "ssd_scan"])
def test_forgetting_everything_and_nothing(name, how):
    """A * dt of 0 (keep all) and of -1e4 (forget all) beside ordinary steps, in one chunk.

    A difference of cumulative sums would lose the ordinary steps here: 1e4 has float32 neighbours 1e-3 apart.
    """
    args = ARGS[name](L=60, softplus=False, bias=False)
    ordinary, forget = (1e-4, 1.0) if how == "large-A" else (1.0, 1e4)
    dt = args[1]
    dt.mul_(ordinary)  # where it is NaN it stays NaN
    dt[:, 10::10] *= 0.0
    dt[:, 5::10] = forget
    dt[:, 6] = forget  # two in a row
    args[2] = torch.full_like(args[2], -1e4 if how == "large-A" else -1.0)
    past = torch.arange(60) >= args[SEQ_LENS[name]][:, None]
    dt[past] = NAN
    y, state = checked(name, args)
    assert y.isfinite().all()
    assert_close(name, args, y, state)


@pytest.mark.parametrize("name", ["selective_scan", "ssd_scan"])
def test_softplus_of_large_time_steps(name):
    """Where exp overflows and where it underflows."""
    args = ARGS[name](bias=False)
    used = ~args[1].isnan()
    args[1] = torch.where(used, args[1] * 100, NAN)
    y, state = checked(name, args)
    assert_close(name, args, y, state)


@pytest.mark.parametrize("name", STATEFUL)
def test_views_are_read_as_they_are(name):
    """Slices of a wider tensor, as the mixers pass them, give what copies give, to the bit."""
    args = ARGS[name]()
    views = [
        torch.cat([torch.full_like(a, NAN), a], dim=-1)[..., a.shape[-1] :]
        if isinstance(a, Tensor) and a.dim() > 1
        else a
        for a in args
    ]
    assert not views[0].is_contiguous()
    for want, got in zip(checked(name, args), checked(name, views), strict=True):
        assert torch.equal(bits(want), bits(got))


@pytest.mark.parametrize("T", [F32, F16, BF16, F64], ids=["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("seq_lens", [[1, 0, 1], [7, 3, 0]], ids=["L=1", "L=7"])
def test_last_token(T, index, seq_lens):
    draw = Draw(0, T, torch.tensor(seq_lens, dtype=index), max(seq_lens))
    x = draw.tokens(5)
    before = x.clone()
    y = ops.last_token(x, draw.seq_lens)
    assert y.dtype == T
    assert torch.equal(y.double(), torch.from_numpy(recurrence.last_token(x, seq_lens)))
    assert torch.equal(bits(x), bits(before))
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'gelu'"):
        ops.causal_conv1d(*conv_args(activation="gelu"))


TINY = {
    "causal_conv1d": {"B": 2, "L": 3, "C": 2, "K": 3, "T": F64, "seq_lens": [3, 2]},
    "selective_scan": {"B": 2, "L": 3, "D": 2, "N": 2, "T": F64, "S": F64, "seq_lens": [3, 2]},
    "ssd_scan": {"B": 2, "L": 3, "H": 2, "P": 2, "G": 1, "N": 2, "T": F64, "S": F64, "seq_lens": [3, 2]},
}
GRADIENTS = [
    ("causal_conv1d", {}),
    ("causal_conv1d", {"bias": False, "activation": "none"}),
    ("causal_conv1d", {"seq_lens": [0, 1]}),
    ("selective_scan", {}),
    ("selective_scan", {"skip": False, "gate": False, "bias": False, "softplus": False}),
    ("selective_scan", {"seq_lens": [0, 1]}),
    ("ssd_scan", {}),
    ("ssd_scan", {"L": 4, "chunk": 2, "G": 2, "skip": "HP", "seq_lens": [4, 3]}),
    ("ssd_scan", {"skip": None, "bias": False, "softplus": False, "seq_lens": [0, 3]}),
]


def trainable(args: list[Any]) -> list[Any]:
    """Finite past the rows' ends, since the finite differences step there too; every real tensor wants a gradient."""
    return [
        a.nan_to_num(nan=0.3).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]


@pytest.mark.parametrize(("name", "changes"), [pytest.param(n, c, id=f"{n}-{i}") for i, (n, c) in enumerate(GRADIENTS)])
def test_gradients_are_those_of_finite_differences(name, changes):
    args = trainable(ARGS[name](**TINY[name] | changes))
    assert torch.autograd.gradcheck(getattr(ops, name), args)


def test_gradient_of_the_last_token():
    x = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.last_token, (x, torch.tensor([4, 0, 2])))


@pytest.mark.parametrize("name", STATEFUL)
def test_gradients_are_finite_beside_poison_and_zero_there(name):
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in ARGS[name](seq_lens=[7, 3, 0])
    ]
    y, state_out = getattr(ops, name)(*args)
    (y.sum() + state_out.sum()).backward()
    for i, a in enumerate(args):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        assert a.grad.isfinite().all(), f"argument {i}"
        if i in TOKENS[name]:
            assert not a.grad[1, 3:].any()
            assert not a.grad[2].any()
            assert a.grad[1, :3].any()


@pytest.mark.parametrize("name", STATEFUL)
def test_only_what_is_asked_for_gets_a_gradient(name):
    args = ARGS[name]()
    args[0] = args[0].nan_to_num().requires_grad_()
    _, state_out = getattr(ops, name)(*args)
    (found,) = torch.autograd.grad(state_out.sum(), args[0])
    assert found.any()


TWO_TOKENS = {"T": F32, "S": F32, "L": 2, "seq_lens": [2, 1]}  # the scans are traced token by token
OPCHECK = [
    ("causal_conv1d", TINY["causal_conv1d"] | {"T": F32}),
    ("causal_conv1d", {"T": BF16, "L": 1, "bias": False}),
    ("selective_scan", TINY["selective_scan"] | TWO_TOKENS),
    ("selective_scan", {"T": F16, "L": 1, "skip": False, "gate": False}),
    ("ssd_scan", TINY["ssd_scan"] | TWO_TOKENS),
    ("ssd_scan", {"T": BF16, "L": 1, "H": 2, "G": 1, "skip": "HP"}),
]


@pytest.mark.parametrize(("name", "changes"), [pytest.param(n, c, id=f"{n}-{c.get('T')}") for n, c in OPCHECK])
def test_registration_passes_opcheck(name, changes):
    args = ARGS[name](**changes)
    torch.library.opcheck(getattr(ops, name), trainable(args) if changes["T"] == F32 else [
        a.nan_to_num(nan=0.3) if isinstance(a, Tensor) else a for a in args
    ])  # fmt: skip


def test_registration_of_the_last_token_passes_opcheck():
    torch.library.opcheck(ops.last_token, (torch.randn(2, 3, 4, requires_grad=True), torch.tensor([3, 0])))


@pytest.mark.parametrize(
    ("name", "T", "S", "length"),
    [
        pytest.param(name, T, S, length, id=f"{name}-{str(T)[6:]}-state-{str(S)[6:]}-L={length}")
        for name, (T, S), length in itertools.product(STATEFUL, [(F32, F32), (F16, F32), (BF16, BF16)], [1, 5])
    ],
)
def test_fake_tensors_have_the_shape_and_layout_of_real_ones(name, T, S, length):
    args = ARGS[name](T=T, L=length, **({} if name == "causal_conv1d" else {"S": S}))
    real = getattr(ops, name)(*args)
    with FakeTensorMode() as mode:
        fake = getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)
        assert r.is_contiguous()
        assert f.is_contiguous()
