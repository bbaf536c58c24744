"""The parts of a decode step against their reference in float64, which other tests hold to the model.

Errors are relative to the largest value of a result: values are rounded to T between what is fused too (norm, dt), so
results are off by a few roundings of T whatever the sizes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, NAN, bits, kernels, needs_gpu
from torch import Tensor

from mamba_deploy import step_ops
from mamba_deploy.plugins.rules_step import PARTS

pytestmark = needs_gpu

ALLOWED = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}
TYPES = (F16, BF16, F32)
BATCHES = (1, 2, 3, 8, 13, 20, 67)


class Draw:
    def __init__(self, T: torch.dtype, B: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.T, self.B = T, B

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(dtype or self.T)

    def weight(self, inputs: int, outputs: int) -> Tensor:
        return self.normal(inputs, outputs, scale=inputs**-0.5)

    def norm(self, width: int) -> Tensor:
        return 1 + self.normal(width, dtype=F32, scale=0.3)

    def negative(self, *shape: int) -> Tensor:
        return -8 * torch.rand(*shape, generator=self.generator)

    def lengths(self) -> Tensor:
        """The first row reads; others may not."""
        lengths = torch.randint(0, 2, (self.B,), generator=self.generator, dtype=torch.int32)
        lengths[0] = 1
        return lengths


def in_proj(
    draw: Draw, d: int = 768, M: int = 3352, C: int = 1792, first: int = 1536, K: int = 4, bias: bool = False
) -> tuple[Any, ...]:
    B = draw.B
    return (
        draw.normal(B, 1, d, dtype=F32), draw.norm(d), draw.weight(d, M), draw.normal(M) if bias else None,
        draw.normal(C, K), draw.normal(C) if bias else None, draw.normal(B, C, K - 1), draw.lengths(), 1e-5, first,
    )  # fmt: skip


def x_proj(draw: Draw, D: int = 1536, E: int = 80) -> tuple[Any, ...]:
    return draw.normal(draw.B, 1, 2 * D), draw.weight(D, E)


def selective_update(
    draw: Draw, D: int = 1536, N: int = 16, R: int = 48, S: torch.dtype = F32, eps: float = -1.0, given: bool = True
) -> tuple[Any, ...]:
    B = draw.B
    return (
        draw.normal(B, 1, 2 * D), draw.normal(B, 1, R + 2 * N), draw.weight(R, D), draw.negative(D, N),
        draw.normal(D, dtype=F32) if given else None, draw.normal(D, dtype=F32) if given else None,
        draw.normal(B, D, N, dtype=S), draw.lengths(), eps,
    )  # fmt: skip


def ssd_update(
    draw: Draw, H: int = 24, P: int = 64, N: int = 128, G: int = 1, S: torch.dtype = F32, skip: int = 1
) -> tuple[Any, ...]:
    B = draw.B
    return (
        draw.normal(B, 1, 2 * H * P + 2 * G * N + H), draw.negative(H),
        [None, draw.normal(H, dtype=F32), draw.normal(H, P, dtype=F32)][skip], draw.normal(H, dtype=F32),
        draw.normal(B, H, P, N, dtype=S), draw.lengths(), True, 0.0, math.inf, G,
    )  # fmt: skip


def out_proj(
    draw: Draw, D: int = 1536, d: int = 768, G: int = 1, norm: bool = True, bias: bool = False
) -> tuple[Any, ...]:
    return (
        draw.normal(draw.B, 1, D), draw.norm(D) if norm else None, draw.weight(D, d), draw.normal(d) if bias else None,
        draw.normal(draw.B, 1, d, dtype=F32), 1e-5, G,
    )  # fmt: skip


def head(draw: Draw, d: int = 768, V: int = 50280) -> tuple[Any, ...]:
    return draw.normal(draw.B, 1, d, dtype=F32), draw.norm(d), draw.weight(V, d), 1e-5


ARGUMENTS = {f.__name__: f for f in (in_proj, x_proj, selective_update, ssd_update, out_proj, head)}
PATTERN = 0xFF  # of which every float of 16 and 32 bits is NaN
CASES: list[tuple[str, dict[str, Any]]] = [
    *((op, {}) for op in ARGUMENTS),
    ("in_proj", {"d": 2560, "M": 10240, "C": 5120, "first": 0, "bias": True}),
    ("in_proj", {"d": 24, "M": 8, "C": 3, "first": 5, "K": 2}),
    ("in_proj", {"d": 1001, "M": 104, "C": 104, "first": 0, "K": 8, "bias": True}),
    ("x_proj", {"D": 5120, "E": 192}),
    ("x_proj", {"D": 10, "E": 8}),
    ("selective_update", {"D": 5120, "R": 160}),
    ("selective_update", {"D": 40, "N": 5, "R": 3, "given": False}),
    ("selective_update", {"D": 72, "N": 100, "R": 300}),
    ("selective_update", {"D": 512, "R": 32, "eps": 1e-6}),
    *(("selective_update", {"S": S}) for S in (F16, BF16)),
    ("ssd_update", {"H": 80, "skip": 2}),
    ("ssd_update", {"H": 16, "N": 64, "G": 8, "skip": 0}),
    ("ssd_update", {"H": 8, "P": 128, "G": 2}),
    ("ssd_update", {"H": 96, "P": 80}),
    *(("ssd_update", {"S": S}) for S in (F16, BF16)),
    ("out_proj", {"D": 5120, "d": 2560, "G": 8}),
    ("out_proj", {"D": 10240, "d": 8, "norm": False, "bias": True}),
    ("out_proj", {"D": 72, "d": 24, "G": 3}),
    ("head", {"d": 2560, "V": 1000}),
    ("head", {"d": 8, "V": 1}),
]


def launch(op: str, args: tuple[Any, ...], *, same: bool = False) -> list[Tensor]:
    """y and the state that goes out, on the device, where they were NaN before."""
    wide = step_results(op, args)
    device = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    outputs = {"y": torch.full(wide[0].shape, NAN, dtype=dtype_of_y(op, args), device="cuda")}
    if len(wide) > 1:
        state = device[state_at(args)]
        outputs["state_out"] = state if same else torch.full_like(state, NAN)
    workspace = scratch(op, args)
    getattr(kernels(), op)(*device, **outputs, workspace=workspace, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert workspace[-256:].eq(PATTERN).all(), "written past the workspace"
    for before, after in zip(args, device, strict=True):
        if isinstance(before, Tensor) and after is not outputs.get("state_out"):
            assert torch.equal(bits(before), bits(after.cpu())), "an argument was written to"
    return list(outputs.values())


def scratch(op: str, args: tuple[Any, ...]) -> Tensor:
    """The workspace it asks for, full of NaN, and 256 bytes more."""
    rule = next(rule for rule in PARTS.values() if rule.kernel == op)
    sizes = {"groups": 1} if "groups" in rule.sizes.values() else {}
    for tensor, array in zip(rule.inputs, args, strict=False):
        if array is not None:
            axes = zip(tensor.axes_of(array.dim()), array.shape, strict=True)
            sizes |= {rule.sizes[symbol]: size for symbol, size in axes if symbol in rule.sizes}
    T = next(a for a, tensor in zip(args, rule.inputs, strict=False) if tensor.dtype == "T" and a is not None)
    needed = kernels().workspace_bytes(op, dtype=str(T.dtype).removeprefix("torch."), **sizes)
    return torch.full((needed + 256,), PATTERN, dtype=torch.uint8, device="cuda")


def state_at(args: tuple[Any, ...]) -> int:
    return next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype == torch.int32) - 1


def dtype_of_y(op: str, args: tuple[Any, ...]) -> torch.dtype:
    return F32 if op in ("out_proj", "head") else (args[2] if op == "in_proj" else args[0]).dtype


def step_results(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """By the reference, in float64."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    found = getattr(step_ops, op)(*wide)
    return found if isinstance(found, tuple) else (found,)


def check(found: list[Tensor], op: str, args: tuple[Any, ...], T: torch.dtype) -> Tensor:
    """Fails where the rows that read are not the reference's; gives which do, [B]."""
    B = len(args[0])
    reads = next((a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32), torch.ones(B)) > 0
    for got, want in zip(found, step_results(op, args), strict=True):
        error = (got.cpu().double() - want)[reads].abs().max() / want[reads].abs().max()
        allowed = max(ALLOWED[T], ALLOWED[got.dtype])
        assert error <= allowed, f"{error:.1e} of {allowed:.1e} at batch {B}"
    return reads


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("T", TYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=str)
def test_equals_the_reference(op: str, case: dict[str, Any], T: torch.dtype, same: bool) -> None:
    for B in BATCHES if not case else (1, 5, 21):
        args = ARGUMENTS[op](Draw(T, B, seed=B), **case)
        found = launch(op, args, same=same)
        reads = check(found, op, args, T)
        assert found[0].isfinite().all()
        if len(found) > 1:
            kept = args[state_at(args)]
            assert torch.equal(bits(found[1].cpu()[~reads]), bits(kept[~reads])), "a row of length 0 changed its state"


FEW = [  # products of many inputs with a row or two: the last ones of odd sizes, or in more blocks than run at once
    ("in_proj", {"d": 2560, "M": 10240, "C": 5120, "first": 0}),
    ("in_proj", {"d": 2048, "M": 8512, "C": 4352, "first": 4096, "bias": True}),
    ("x_proj", {"D": 4096, "E": 160}),
    ("out_proj", {"D": 5120, "d": 2560}),
    ("out_proj", {"D": 8192, "d": 4096, "G": 8, "bias": True}),
    ("in_proj", {"d": 2051, "M": 33856, "C": 65, "first": 20000, "K": 8, "bias": True}),
    ("x_proj", {"D": 3082, "E": 8}),
    ("out_proj", {"D": 3077, "d": 24, "G": 17}),
    ("head", {"d": 2560, "V": 1000}),
    ("head", {"d": 5128, "V": 77}),
]


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("T", TYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), FEW, ids=str)
def test_a_row_or_two_of_many_inputs(op: str, case: dict[str, Any], T: torch.dtype, B: int) -> None:
    args = ARGUMENTS[op](Draw(T, B, seed=B), **case)
    found = launch(op, args, same=B == 2)
    check(found, op, args, T)
    assert found[0].isfinite().all()


MANY = [  # products in tiles, of which clusters of blocks split the inputs; the last two of odd sizes
    ("in_proj", {"d": 2048, "M": 8192, "C": 4096, "first": 0}),
    ("out_proj", {"D": 5120, "d": 2560}),
    ("x_proj", {"D": 5120, "E": 192}),
    ("in_proj", {"d": 4096, "M": 18560, "C": 10240, "first": 8192, "bias": True}),
    ("out_proj", {"D": 16384, "d": 4096, "G": 8}),
    ("head", {"d": 2560, "V": 50280}),
    ("in_proj", {"d": 2056, "M": 1032, "C": 513, "first": 7, "K": 3}),
    ("head", {"d": 2056, "V": 1003}),
]


@pytest.mark.parametrize("T", [F16, BF16], ids=str)
@pytest.mark.parametrize(("op", "case"), MANY, ids=str)
def test_more_rows_of_published_sizes(op: str, case: dict[str, Any], T: torch.dtype) -> None:
    for B in (3, 9, 32, 67):
        args = ARGUMENTS[op](Draw(T, B, seed=B), **case)
        check(launch(op, args), op, args, T)


BLOCKS = [  # updates in blocks of 8 rows, the last of 8, 3, 8 and 3; of 64 channels, in the last case the last of 8
    (64, {"D": 5120, "R": 160}),
    (67, {"D": 5120, "R": 160}),
    (96, {"D": 5120, "R": 160}),
    (67, {"D": 8200, "R": 250, "eps": 1e-6}),
]


@pytest.mark.parametrize("S", TYPES, ids=str)
@pytest.mark.parametrize("T", [F16, BF16], ids=str)
@pytest.mark.parametrize(("B", "case"), BLOCKS, ids=str)
def test_updates_in_many_blocks(B: int, case: dict[str, Any], T: torch.dtype, S: torch.dtype) -> None:
    args = selective_update(Draw(T, B, seed=B), S=S, **case)
    found = launch("selective_update", args, same=B == 67)
    reads = check(found, "selective_update", args, T)
    assert found[0].isfinite().all()
    kept = args[state_at(args)]
    assert torch.equal(bits(found[1].cpu()[~reads]), bits(kept[~reads])), "a row of length 0 changed its state"


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_row_is_the_row_alone(op: str, B: int) -> None:
    """To rounding, whatever the number of rows that share the weights."""
    args = ARGUMENTS[op](Draw(F16, B, seed=7))
    together = launch(op, args)[0].cpu()
    for b in range(B):
        alone = [a[b : b + 1] if isinstance(a, Tensor) and a.shape[:1] == (B,) and a.dim() > 1 else a for a in args]
        if any(isinstance(a, Tensor) and a.dtype == torch.int32 for a in args):
            at = state_at(args) + 1
            alone[at] = args[at][b : b + 1]
            if args[at][b] == 0:
                continue
        error = (launch(op, tuple(alone))[0].cpu().double() - together[b : b + 1]).abs().max()
        assert error <= 1e-3 * together.abs().max()


@pytest.mark.parametrize("B", [1, 3, 64])
@pytest.mark.parametrize("op", ["in_proj", "selective_update", "ssd_update"])
def test_a_step_reads_what_the_one_before_it_wrote(op: str, B: int) -> None:
    """To the bit what it reads where the host waits in between: it may have started before that had ended."""
    args = ARGUMENTS[op](Draw(F16, B, seed=5))
    shape, workspace = step_results(op, args)[0].shape, scratch(op, args)

    def steps(*, wait: bool) -> list[Tensor]:
        device = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        state = device[state_at(args)]
        found = [torch.full(shape, NAN, dtype=dtype_of_y(op, args), device="cuda") for _ in range(20)]
        torch.cuda.synchronize()
        for y in found:
            stream = torch.cuda.current_stream().cuda_stream
            getattr(kernels(), op)(*device, y=y, state_out=state, workspace=workspace, stream=stream)
            if wait:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return [*found, state]

    for got, want in zip(steps(wait=False), steps(wait=True), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_graph_replays_bit_identical(op: str) -> None:
    args = ARGUMENTS[op](Draw(BF16, 3, seed=3))
    eager = launch(op, args)
    device = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    outputs = dict(zip(("y", "state_out"), (torch.full_like(out, NAN) for out in eager), strict=False))
    graph, workspace = torch.cuda.CUDAGraph(), scratch(op, args)
    with torch.cuda.graph(graph):
        for _ in range(2):  # one starts while the other ends
            getattr(kernels(), op)(
                *device, **outputs, workspace=workspace, stream=torch.cuda.current_stream().cuda_stream
            )
    for _ in range(1000):
        for out in outputs.values():
            out.fill_(NAN)
        graph.replay()
        for out, want in zip(outputs.values(), eager, strict=True):
            assert torch.equal(bits(out), bits(want))
