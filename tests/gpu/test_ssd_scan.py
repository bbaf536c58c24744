"""MambaSsdScan's kernels against the float64 recurrence: a base case for each kernel, then one thing changed at a time.

Every call goes through ``call``, so each also proves that every output is written, that y is zero past a row's end,
that what stands there (NaN, always) is not looked at, that a row of length 0 keeps its state to the bit, and that no
input but a state bound to both is written to.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import recurrence
import torch
from gpu import device
from gpu.device import BF16, F16, F32, NAN, bits, needs_gpu
from torch import Tensor

pytestmark = needs_gpu

INF = math.inf
TOKENS = (0, 1, 3, 4)  # arguments over tokens
NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}
FEW_TOKENS = 4  # up to here prompts go through the recurrent kernel, whatever their dtype


@pytest.fixture(scope="module")
def kernels() -> Any:
    return device.kernels()


def draw(
    *, B=2, L=150, H=4, P=64, G=2, N=64, T=BF16, S=F32, skip="H", bias=True, softplus=True, limits=(0.0, INF),
    seq_lens=None, A=None, scale=1.0, contrast=1.0, dt_shift=0.0, seed=0,
) -> list[Any]:  # fmt: skip
    """The op's arguments on the CPU, NaN past each row's end. A is between -1/16 and -16 unless given."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.tensor([max(L - 5 * b, 0) for b in range(B)] if seq_lens is None else seq_lens, dtype=torch.int32)
    past = (torch.arange(L) >= lens[:, None])[..., None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(channels: int, factor: float = 1.0) -> Tensor:
        return (normal(B, L, channels) * factor).masked_fill(past, NAN).to(T)

    x, dt = tokens(H * P, scale), tokens(H) + dt_shift
    log_a = torch.rand(H, generator=generator) * math.log(256) - math.log(16)
    state = normal(B, H, P, N).to(S)
    state[..., 0] = -0.0
    return [
        x,
        dt if softplus else dt.abs(),
        -log_a.exp() if A is None else torch.full((H,), A),
        tokens(G * N),
        tokens(G * N, contrast),
        {"H": normal(H), "HP": normal(H, P), None: None}[skip],
        normal(H).abs() * (-1 if softplus else 1) if bias else None,
        state,
        lens,
        softplus,
        *limits,
        G,
        256,
    ]


class Bound:
    """A call's arguments on the device, outputs and workspace full of NaN, all in memory of their own."""

    def __init__(self, kernels: Any, args: list[Any], same: bool = False) -> None:
        self.kernels = kernels
        self.args = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        x, state = self.args[0], self.args[7]
        self.y = torch.full_like(x, NAN)
        self.state_out = state if same else torch.full_like(state, NAN)
        batch, length = x.shape[:2]
        heads, head_dim, state_size = state.shape[1:]
        needed = kernels.workspace_bytes(
            "ssd_scan", dtype=NAMES[x.dtype], state_dtype=NAMES[state.dtype], batch=batch, length=length, heads=heads,
            head_dim=head_dim, state_size=state_size, groups=args[12],
        )  # fmt: skip
        self.workspace = torch.full((needed // 4 + 64,), NAN, device="cuda")  # 256 bytes more, to see a write past it
        self.needed = needed

    def launch(self) -> None:
        self.kernels.ssd_scan(
            *self.args, y=self.y, state_out=self.state_out, workspace=self.workspace,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def call(kernels: Any, args: list[Any], same: bool = False) -> tuple[Tensor, Tensor]:
    bound = Bound(kernels, args, same)
    bound.launch()
    torch.cuda.synchronize()
    y, state_out = bound.y.cpu(), bound.state_out.cpu()
    for i, (before, after) in enumerate(zip(args, bound.args, strict=True)):
        if isinstance(before, Tensor) and not (same and i == 7):
            assert torch.equal(bits(before), bits(after.cpu())), "an input was written to"
    assert bound.workspace[bound.needed // 4 :].isnan().all(), "written past the workspace"
    lens = args[8]
    past = torch.arange(y.shape[1]) >= lens[:, None]
    assert not bits(y[past]).any(), "y is not zero past a row's end"
    idle = lens == 0
    assert torch.equal(bits(state_out[idle]), bits(args[7][idle])), "a row of length 0 changed its state"
    return y, state_out


def check(args: list[Any], y: Tensor, state_out: Tensor) -> None:
    """To the error bound of ``recurrence.error_bound``.

    Roundings in float32 on the longest path: two a token, N for the contraction with C, about 16 for softplus, exp
    and skip. On the tensor cores each term of y is rounded to the activations' dtype twice more (S or the state it met;
    what that state was made of), each term of the state once. In float16 the weights of a chunk's tokens, delta times
    the decay to its end, share one power of two: 2^-24 of the largest is their spacing, and 64 such errors meet.
    """
    want = recurrence.ssd_scan(*args)
    sizes = recurrence.magnitude(recurrence.ssd_scan, *args)
    x, dt, N = args[0], args[1], args[7].shape[-1]
    roundings = 2 * x.shape[1] + N + 16
    operand, spacing = 0.0, 0.0
    if x.dtype != F32 and x.shape[1] > FEW_TOKENS:
        operand = torch.finfo(x.dtype).eps / 2
    if operand and x.dtype == F16:
        bias = 0.0 if args[6] is None else args[6].abs()
        largest = float((dt.float().nan_to_num().abs() + bias).max()) + 0.7  # log(1 + e^v) < |v| + 0.7
        spacing = 8 * 2.0**-24 * min(largest, args[11]) * float(x.float().nan_to_num().abs().max())
    for name, got, expected, size in zip(("y", "state"), (y, state_out), want, sizes, strict=True):
        stored = torch.finfo(got.dtype)
        bound = recurrence.error_bound(expected, size, roundings, 2.0**-24, stored.eps / 2, stored.tiny * stored.eps)
        bound += 2 * operand * size if name == "y" else operand * size + spacing
        with np.errstate(invalid="ignore"):
            error = np.abs(got.double().numpy() - expected)
            error[(np.abs(expected) > stored.max) & np.isinf(got.double().numpy())] = 0.0
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), INF, error / bound)), error.shape)
        assert (error <= bound).all(), f"{name} at {worst}: got {got[worst]}, want {expected[worst]} +- {bound[worst]}"


FORMS: dict[str, dict[str, Any]] = {
    "step": {"L": 1, "B": 3, "seq_lens": [1, 0, 1]},
    "chunks": {"L": 150, "T": BF16},
    "recurrent": {"L": 40, "T": F32},
    "padded": {"L": 150, "T": BF16, "P": 60, "N": 100},
}
AXES: list[tuple[str, list[Any]]] = [
    ("T", [F32, F16, BF16]),
    ("S", [F16, BF16]),
    ("H", [1, 2, 24]),
    ("P", [1, 4, 17, 24, 33, 80, 96, 128]),
    ("N", [1, 7, 16, 17, 24, 33, 65, 100, 128, 136, 255, 256]),
    ("G", [1, 4]),
    ("skip", ["HP", None]),
    ("bias", [False]),
    ("softplus", [False]),
    ("limits", [(0.1, 0.4)]),
]
LENGTHS = [2, 3, 4, 5, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
PAD_TOKENS = 128  # from here on P and N that are no multiples of 8 are padded


def _cases() -> list[Any]:
    cases = []
    for form, base in FORMS.items():
        cases.append(pytest.param(base, id=form))
        for axis, values in AXES:
            for value in values:
                heads = {"G": 1} if axis == "H" else {}
                shown = NAMES[value] if isinstance(value, torch.dtype) else value
                cases.append(pytest.param({**base, axis: value, **heads}, id=f"{form}-{axis}-{shown}"))
        if form != "step":
            sizes = {"P": 15, "N": 25} if form == "padded" else {"P": 20, "N": 24}
            cases += [pytest.param({**base, "L": n, **sizes}, id=f"{form}-L-{n}") for n in LENGTHS]
        for t, name in NAMES.items():
            cases.append(pytest.param({**base, "T": t, "P": 80, "N": 128}, id=f"{form}-T-{name}-P-80-N-128"))
        batches = {"B": 7, "seq_lens": [0, 1, 0, 1, 1, 1, 0] if form == "step" else None}
        cases.append(pytest.param({**base, **batches}, id=f"{form}-B-7"))
    return cases


@pytest.mark.parametrize("same", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("case", _cases())
def test_equals_the_recurrence(kernels: Any, case: dict[str, Any], same: bool) -> None:
    args = draw(**case, seed=1 if same else 0)
    check(args, *call(kernels, args, same))


@pytest.mark.parametrize("same", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize(("S", "skip"), [(F32, "HP"), (F16, "H"), (BF16, "HP"), (F32, None)], ids=str)
@pytest.mark.parametrize("T", [F16, BF16], ids=str)
@pytest.mark.parametrize(("P", "N"), [(60, 64), (64, 100), (60, 100), (63, 99), (1, 1), (250, 250)])
def test_sizes_that_are_padded(
    kernels: Any, P: int, N: int, T: torch.dtype, S: torch.dtype, skip: str | None, same: bool
) -> None:
    args = draw(B=4, L=PAD_TOKENS + 70, H=4, P=P, G=2, N=N, T=T, S=S, skip=skip, seq_lens=[198, 0, 65, 1])
    check(args, *call(kernels, args, same))


@pytest.mark.parametrize("L", [PAD_TOKENS - 1, PAD_TOKENS, PAD_TOKENS + 1])
@pytest.mark.parametrize("T", [F16, BF16], ids=str)
def test_padded_or_not_is_the_same_but_for_roundings(kernels: Any, T: torch.dtype, L: int) -> None:
    """Zeros written out by the caller: to the bit what padding gives, as the same kernels see the same."""
    B, H, P, G, N = 2, 4, 60, 2, 100
    args = draw(B=B, L=L, H=H, P=P, G=G, N=N, T=T, skip="HP", seq_lens=[L, 40])
    y, state = call(kernels, args)
    check(args, y, state)

    def wider(array: Tensor, shape: tuple[int, ...], cols: int, rows: int = 0) -> Tensor:
        return torch.nn.functional.pad(array.view(shape), (0, cols, 0, rows))

    padded = list(args)
    padded[0] = wider(args[0], (B, L, H, P), 4).reshape(B, L, -1)
    padded[3], padded[4] = (wider(args[i], (B, L, G, N), 4).reshape(B, L, -1) for i in (3, 4))
    padded[5] = wider(args[5], (H, P), 4)
    padded[7] = wider(args[7], (B, H, P, N), 4, 4)
    wide_y, wide_state = call(kernels, padded)
    if L >= PAD_TOKENS:
        assert torch.equal(bits(wide_y.view(B, L, H, -1)[..., :P].reshape(B, L, -1)), bits(y))
        assert torch.equal(bits(wide_state[:, :, :P, :N].contiguous()), bits(state))
    else:
        check(args, wide_y.view(B, L, H, -1)[..., :P].reshape(B, L, -1), wide_state[:, :, :P, :N])


@pytest.mark.parametrize("name", ["x", "B", "ssm_state", "D", "y", "state_out"])
def test_padded_tensors_at_odd_addresses(kernels: Any, name: str) -> None:
    """Copies of smaller words; with an x, y, B or C that is not copied the recurrent kernel runs."""

    def move(given: Tensor) -> Tensor:
        room = torch.full((given.numel() + 1,), NAN, dtype=given.dtype, device="cuda")
        return room[1:].view(given.shape).copy_(given)

    inputs = {"x": 0, "B": 3, "ssm_state": 7, "D": 5}
    for P, N in ((60, 100), (64, 100), (60, 64)):
        args = draw(L=PAD_TOKENS, P=P, N=N, T=BF16, S=BF16, skip="HP")
        bound = Bound(kernels, args)
        if name in inputs:
            bound.args[inputs[name]] = move(bound.args[inputs[name]])
        else:
            setattr(bound, name, move(getattr(bound, name)))
        bound.launch()
        torch.cuda.synchronize()
        check(args, bound.y.cpu(), bound.state_out.cpu())


@pytest.mark.parametrize("same", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
def test_a_long_prompt_is_cut_into_segments(kernels: Any, T: torch.dtype, same: bool) -> None:
    """Few heads: the launcher works on many pieces of time at once."""
    args = draw(B=2, L=3000, H=2, P=16, N=16, G=1, T=T, seq_lens=[2900, 1000])
    assert Bound(kernels, args).needed > 0
    check(args, *call(kernels, args, same))


@pytest.mark.parametrize("T", [F16, BF16], ids=str)
def test_a_long_padded_prompt_is_cut_into_segments(kernels: Any, T: torch.dtype) -> None:
    args = draw(B=3, L=3000, H=2, P=15, N=17, G=1, T=T, S=F16, skip="HP", seq_lens=[2900, 0, 1000])
    check(args, *call(kernels, args, same=T == BF16))


# On a GPU of 132 multiprocessors blocks have helpers: one each for up to 66 blocks of heads, one for two up to 82.
HELPED: dict[str, Any] = {"B": 1, "L": 1000, "H": 60, "P": 64, "G": 1, "N": 128, "T": F16}
PAIRS = {"B": 3, "H": 24, "N": 32}
HELPED_CASES: dict[str, dict[str, Any]] = {
    **{f"L-{n}": {"L": n} for n in (512, 513, 576, 999, 1023, 1025)},  # the first 8 of 16 chunks are the head's own
    **{f"T-{NAMES[t]}": {"T": t} for t in (F16, BF16)},
    **{f"S-{NAMES[s]}": {"S": s, "T": BF16} for s in (F16, BF16)},
    **{f"N-{n}": {"N": n} for n in (8, 64, 72, 100, 120)},
    **{f"P-{p}": {"P": p, "skip": "HP"} for p in (49, 56, 63)},
    **{f"P-{p}": {"P": p, "H": 30, "skip": "HP"} for p in (100, 128)},
    **{f"skip-{skip}": {"skip": skip} for skip in ("HP", None)},
    **{f"A-{a}": {"A": a, "bias": False} for a in (-1e-4, -1e2, -1e4)},
    "no-bias": {"bias": False},
    "no-softplus": {"softplus": False, "limits": (0.1, 0.4)},
    "large": {"A": -1e-4, "scale": 1e4, "contrast": 1e-4, "skip": None},
    "small": {"contrast": 1e-2, "dt_shift": -9.0, "bias": False, "skip": None},
    "rows": {"B": 4, "H": 15, "seq_lens": [0, 1000, 512, 1]},
    "rows-that-end-where-helpers-begin": {"B": 4, "H": 15, "seq_lens": [511, 512, 513, 577]},
    "pairs": {**PAIRS, "seq_lens": [1000, 1000, 1000]},  # the first 11
    "pairs-of-two-rows": {**PAIRS, "H": 23, "seq_lens": [1000, 705, 0]},  # and an odd number
    "pairs-with-one-short": {**PAIRS, "H": 23, "seq_lens": [704, 900, 703]},
    "pairs-with-two-short": {**PAIRS, "H": 25, "seq_lens": [300, 1, 767], "T": BF16},
    "mamba2-2.7b": {"H": 80, "L": 2048},
    "mamba2-2.7b-1999": {"H": 80, "L": 1999, "T": BF16, "S": F16},
    "mamba2-1.3b": {"H": 64, "L": 2048},
    "long": {"H": 80, "L": 5000, "N": 16},
}


def of_heads(args: list[Any], heads: list[int]) -> list[Any]:
    """A call of one group for some of its heads."""
    few, P = list(args), args[7].shape[2]
    columns = torch.cat([torch.arange(h * P, (h + 1) * P) for h in heads])
    few[0], few[1], few[2], few[7] = args[0][..., columns], args[1][..., heads], args[2][heads], args[7][:, heads]
    for i in (5, 6):
        few[i] = None if args[i] is None else args[i][heads]
    return few


@pytest.mark.parametrize("same", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("case", HELPED_CASES.values(), ids=HELPED_CASES)
def test_idle_multiprocessors_help(kernels: Any, case: dict[str, Any], same: bool) -> None:
    args = draw(**{**HELPED, "seq_lens": [case.get("L", 1000)], **case}, seed=1 if same else 0)
    y, state = call(kernels, args, same)
    H, P = args[7].shape[1:3]
    heads = [0, 1, H // 2, H - 2, H - 1]
    y = y.unflatten(-1, (H, P))
    assert y.isfinite().all()
    assert state.isfinite().all()
    check(of_heads(args, heads), y[:, :, heads].flatten(-2), state[:, heads])


@pytest.mark.parametrize("G", [2, 12])
def test_idle_multiprocessors_help_with_groups(kernels: Any, G: int) -> None:
    args = draw(**{**HELPED, "L": 600, "N": 16, "G": G}, seq_lens=[600])
    check(args, *call(kernels, args))


@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_lengths(kernels: Any, T: torch.dtype, seed: int) -> None:
    L = 190
    lens = torch.randint(0, L + 1, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    args = draw(B=8, L=L, H=2, P=24, N=32, T=T, seq_lens=[*lens, 0, L], seed=seed)
    check(args, *call(kernels, args, same=seed == 1))


@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("A", [-1e-4, -1.0, -1e2, -1e4])
@pytest.mark.parametrize("dt_shift", [-6.0, 0.0, 6.0])
def test_any_decay(kernels: Any, T: torch.dtype, A: float, dt_shift: float) -> None:
    args = draw(B=1, L=150, H=2, P=16, N=32, G=1, T=T, A=A, dt_shift=dt_shift, bias=False)
    check(args, *call(kernels, args))


@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_steps_that_forget_everything_between_steps_that_forget_nothing(
    kernels: Any, T: torch.dtype, share: float
) -> None:
    """A difference of two cumulative sums would cancel here."""
    args = draw(B=1, L=200, H=3, P=16, N=32, G=1, T=T, A=-200.0, dt_shift=-14.0, bias=False)
    forget = torch.rand(args[1].shape, generator=torch.Generator().manual_seed(3)) < share
    args[1] = torch.where(forget, torch.tensor(50.0), args[1].float()).to(T)
    check(args, *call(kernels, args))


@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
def test_a_state_that_float16_cannot_hold(kernels: Any, T: torch.dtype) -> None:
    """h reaches 1e6; y is small again, as C is."""
    args = draw(B=1, L=200, H=2, P=16, N=32, G=1, T=T, A=-1e-4, scale=1e4, contrast=1e-4, skip=None)
    want = recurrence.ssd_scan(*args)
    assert np.abs(want[1]).max() > 65504
    check(args, *call(kernels, args))


@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
def test_small_values_stay_exact(kernels: Any, T: torch.dtype) -> None:
    """Delta about 1e-4, B and C about 1e-2: operands of the tensor cores far below 1."""
    args = draw(B=1, L=200, H=2, P=16, N=32, G=1, T=T, contrast=1e-2, dt_shift=-9.0, bias=False, skip=None)
    args[3] = (args[3].float() * 1e-2).to(T)
    args[7] = args[7] * 1e-6
    check(args, *call(kernels, args))


@pytest.mark.parametrize("form", [*FORMS, "helped"])
def test_nan_stays_in_its_row(kernels: Any, form: str) -> None:
    sizes = {**HELPED, "H": 23} if form == "helped" else FORMS[form]
    clean = draw(**{**sizes, "B": 3, "seq_lens": None if form != "step" else [1, 1, 1]})
    dirty = [a.clone() if isinstance(a, Tensor) else a for a in clean]
    for i in TOKENS:
        dirty[i][1] = NAN
    dirty[7][1] = NAN
    y, state = call(kernels, clean)
    y_dirty, state_dirty = call(kernels, dirty)
    for row in (0, 2):
        assert torch.equal(bits(y[row]), bits(y_dirty[row]))
        assert torch.equal(bits(state[row]), bits(state_dirty[row]))
    used = int(clean[8][1])
    assert y_dirty[1, :used].isnan().all()
    assert state_dirty[1].isnan().all()


@pytest.mark.parametrize("form", [*FORMS, "segments", "helped", "helped-pairs"])
def test_a_graph_of_it_replays_to_the_bit(kernels: Any, form: str) -> None:
    more = {
        "segments": {"B": 1, "L": 3000, "H": 2, "P": 16, "N": 16, "G": 1},
        "helped": HELPED,
        "helped-pairs": {**HELPED, "H": 81},
    }
    bound = Bound(kernels, draw(**(FORMS | more)[form]))
    bound.launch()
    torch.cuda.synchronize()
    y, state = bits(bound.y).clone(), bits(bound.state_out).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.launch()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        bound.y.fill_(NAN)
        bound.state_out.fill_(NAN)
        graph.replay()
        differing += (bits(bound.y) != y).sum() + (bits(bound.state_out) != state).sum()
    assert differing.item() == 0


def rows_of(args: list[Any], rows: list[int]) -> list[Any]:
    return [a[rows] if i in (*TOKENS, 7, 8) else a for i, a in enumerate(args)]


@pytest.mark.parametrize(("L", "T"), [(1, BF16), (20, BF16), (3, F32)])
def test_more_rows_than_a_grid_has_in_y(kernels: Any, L: int, T: torch.dtype) -> None:
    args = draw(B=70_000, L=L, H=1, P=5, N=12, G=1, T=T, seq_lens=[L - b % 2 for b in range(70_000)])
    y, state = call(kernels, args)
    some = list(range(0, 70_000, 997))
    check(rows_of(args, some), y[some], state[some])


@pytest.mark.slow
@pytest.mark.parametrize("P", [64, 63])
def test_more_elements_than_32_bits_count(kernels: Any, P: int) -> None:
    """x has 2^32 elements, or its padded copy; the state forgets within 100 tokens: the end needs no beginning."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    L, H, N = 2**20, 64, 16
    tail = draw(B=1, L=300, H=H, P=P, N=N, G=1, A=-1.0, skip=None, bias=False)
    args = [a.cuda() if isinstance(a, Tensor) else a for a in tail]
    for i in TOKENS:
        args[i] = torch.randn(1, L, tail[i].shape[2], device="cuda", dtype=BF16)
        args[i][:, -300:] = tail[i].cuda()
    args[8] = torch.tensor([L], dtype=torch.int32, device="cuda")
    bound = Bound(kernels, args)
    bound.launch()
    y, state = bound.y[:, -300:].cpu(), bound.state_out.cpu()
    heads = [0, 1, 33, 63]
    columns = torch.cat([torch.arange(h * P, (h + 1) * P) for h in heads])
    few = [*tail]
    few[0], few[1], few[2], few[7] = tail[0][..., columns], tail[1][..., heads], tail[2][heads], tail[7][:, heads]
    want = recurrence.ssd_scan(*few)
    error = np.abs(y[:, 200:, columns].double().numpy() - want[0][:, 200:])
    assert (error <= 0.02 * np.abs(want[0]).max()).all()
    assert (np.abs(state[:, heads].double().numpy() - want[1]) <= 0.01 * np.abs(want[1]).max()).all()


@pytest.mark.slow
@pytest.mark.parametrize("T", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("A", [-1e-5, -0.05])
def test_no_drift_in_a_prompt_of_100_000_tokens(kernels: Any, T: torch.dtype, A: float) -> None:
    args = draw(B=1, L=100_000, H=1, P=8, N=16, G=1, T=T, A=A, seq_lens=[100_000])
    check(args, *call(kernels, args))


@pytest.mark.slow
def test_no_drift_in_100_000_single_steps(kernels: Any) -> None:
    """A graph of 1,000 steps, 100 times, the state in place."""
    steps, rounds = 1000, 100
    args = draw(B=1, L=steps, H=1, P=8, N=16, G=1, T=BF16, A=-0.01)
    state, workspace = args[7].cuda(), None
    tokens = {i: args[i][0].cuda() for i in TOKENS}
    y = torch.full_like(tokens[0], NAN)
    rest = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    # Slices of whole tokens stay aligned to 16 bytes; dt, a value a token, is given memory of its own.
    padded_dt = torch.zeros(steps, 8, dtype=BF16, device="cuda")
    padded_dt[:, 0] = tokens[1][:, 0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for t in range(steps):
            kernels.ssd_scan(
                tokens[0][None, t : t + 1], padded_dt[t, :1].view(1, 1, 1), rest[2], tokens[3][None, t : t + 1],
                tokens[4][None, t : t + 1], rest[5], rest[6], state, one, *args[9:], y=y[None, t : t + 1],
                state_out=state, workspace=workspace, stream=torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
    for _ in range(rounds):
        graph.replay()
    torch.cuda.synchronize()
    whole = [a.repeat(1, rounds, 1) if i in TOKENS else a for i, a in enumerate(args)]
    whole[8] = torch.tensor([steps * rounds], dtype=torch.int32)
    want = recurrence.ssd_scan(*whole)
    sizes = recurrence.magnitude(recurrence.ssd_scan, *whole)
    for got, expected, size, dtype in (
        (y[None].cpu(), want[0][:, -steps:], sizes[0][:, -steps:], BF16),
        (state.cpu(), want[1], sizes[1], F32),
    ):
        stored = torch.finfo(dtype)
        bound = recurrence.error_bound(expected, size, 2 * steps * rounds, 2.0**-24, stored.eps / 2, stored.tiny)
        assert (np.abs(got.double().numpy() - expected) <= bound).all()
