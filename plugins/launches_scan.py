"""Launches of ``selective_scan.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint32, c_void_p
from typing import Any, NamedTuple

from mamba_deploy.plugins.launches_common import BYTES, TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.launches_pad import PAD_TOKENS, Copy, pad_launch, padded_size
from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = ["selective_scan", "workspace_floats"]


def selective_scan(call: Any, workspace: int, device: Device, rows: tuple[int, int] | None = None) -> list[Launch]:
    """As the launcher in ``selective_scan.cu``: call is its struct, workspace an address.

    ``rows``: values from one token to the next of B and C, and rows of x to the next of z, where they are not dense.
    """
    if call.length == 1:
        return [_scan_step(call)]
    return _scan_prompt(call, rows or (call.state_size, 1), workspace, device)


_PROMPT = "selective_scan_prompt.cuh"


class _Shape(NamedTuple):
    """The template arguments of Shape in selective_scan_prompt.cuh, in their order."""

    states: int
    lanes: int
    step: int
    tile: int
    items: int
    packs: int
    wide: int
    finished: int
    quads: int
    threads: int
    blocks: int

    def shared_floats(self, quads: int, summary: bool) -> int:
        n, rows = self.states * self.lanes, 4 * quads
        token_pitch = 2 * n + (4 if self.states == 2 else 16 if n < 32 else 0)
        outputs = 0 if summary else 3 * self.tile * (4 * self.quads + 8)
        return 2 * rows * (2 * self.tile + 4) + 2 * self.tile * token_pitch + 2 * rows + outputs


_FEW = _Shape(2, 8, 64, 64, 1, 1, 8, 1, 4, 640, 1)
_MEDIUM = _Shape(2, 8, 32, 64, 2, 1, 8, 2, 10, 640, 1)
_MANY = _Shape(4, 4, 32, 32, 4, 1, 8, 4, 8, 256, 3)
_FEW_32 = _Shape(2, 16, 64, 64, 1, 2, 8, 1, 3, 576, 1)
_STATES_32 = _Shape(4, 8, 16, 32, 2, 1, 8, 2, 8, 384, 2)
_FEW_BLOCKS_32 = _Shape(4, 8, 32, 32, 2, 2, 8, 2, 5, 384, 2)
_STATES = (  # the most states, the shape, quads of channels
    (64, _Shape(4, 16, 16, 16, 1, 2, 8, 1, 4, 384, 2), 4),
    (128, _Shape(4, 32, 16, 16, 1, 4, 8, 1, 2, 352, 2), 2),
    (256, _Shape(8, 32, 8, 8, 1, 4, 8, 1, 2, 352, 1), 2),
)


class _PromptPlan(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("quads", "groups", "scanners", "stagers", "chunks", "chunk_length")),
        ("vectors", ctypes.c_bool),
        ("states", c_int32),
        ("group_row", c_int32),
        ("z_rows", c_int32),
        ("B", c_void_p),
        ("C", c_void_p),
        ("chunk_states", c_void_p),
        ("chunk_steps", c_void_p),
    ]


def _scan_room(call: Any) -> int:
    groups = call.batch * ceil_div(call.channels, 16)
    if call.length == 1 or call.state_size > 32 or groups > 36:
        return 1
    count = min(396 // groups, call.length // 128)
    return 1 if count < 4 else count


def _chunk_floats(call: Any) -> int:
    room = _scan_room(call)
    return 0 if room == 1 else ceil_div(call.batch * room * call.channels * (call.state_size + 1), 64) * 64


def _padded_floats(call: Any) -> int:
    if call.state_size % 8 == 0 or call.channels % 4 != 0 or call.length < PAD_TOKENS:
        return 0
    return ceil_div(call.batch * call.length * padded_size(call.state_size) * BYTES[call.dtype], 256) * 64


def workspace_floats(call: Any) -> int:
    """Of the states between chunks, and of padded arrays."""
    return _chunk_floats(call) + 2 * _padded_floats(call)


def _scan_prompt(call: Any, rows: tuple[int, int], workspace: int, device: Device) -> list[Launch]:
    room, floats = _scan_room(call), _padded_floats(call)
    before, states = [], _States(call.state_size, *rows, call.B, call.C)
    if workspace and floats:
        N, to_N, tokens = call.state_size, padded_size(call.state_size), call.batch * call.length
        start = workspace + 4 * _chunk_floats(call)
        states = _States(to_N, to_N, rows[1], start, start + 4 * floats)
        item = BYTES[call.dtype]
        for source, copy in ((call.B, states.B), (call.C, states.C)):
            before.append(pad_launch(Copy(source, copy, tokens, (1, N), (1, to_N), item)))
    if room > 1:
        length = ceil_div(ceil_div(call.length, room), 32) * 32
        shape = _FEW_BLOCKS_32 if call.state_size > 16 else _MANY
        plan = _scan_plan(call, shape, 4, ceil_div(call.length, length), length, workspace, states)
        elements = call.batch * call.channels * call.state_size
        passing = Launch(_PROMPT, "mamba::scan::pass_kernel", (ceil_div(elements, 128),), (128,), 0, (call, plan))
        chunked = [_scan_launch(call, shape, plan, summary=summary) for summary in (True, False)]
        return [*before, chunked[0], passing, chunked[1]]
    shape, quads = _scan_shape(call, device)
    plan = _scan_plan(call, shape, quads, 1, call.length, 0, states)
    return [*before, _scan_launch(call, shape, plan, summary=False)]


def _scan_shape(call: Any, device: Device) -> tuple[_Shape, int]:
    if call.state_size > 32:
        return next((shape, quads) for most, shape, quads in _STATES if call.state_size <= most)

    def best(*allowed: int) -> int:
        """Whose busiest multiprocessor has the fewest channels; the last of equals."""
        load = {q: ceil_div(call.batch * ceil_div(call.channels, 4 * q), device.multiprocessors) * q for q in allowed}
        return min(reversed(allowed), key=load.__getitem__)

    def fits(shape: _Shape) -> bool:
        return device.shared_bytes >= 4 * shape.shared_floats(shape.quads, False)

    if call.state_size > 16:
        if call.batch * ceil_div(call.channels, 12) <= device.multiprocessors and fits(_FEW_32):
            return _FEW_32, best(2, 3)
        if call.batch * ceil_div(call.channels, 20) <= 2 * device.multiprocessors:
            return _FEW_BLOCKS_32, best(4, 5)
        return _STATES_32, best(4, 6, 8)
    if call.batch * call.channels >= 64 * device.multiprocessors:
        return _MANY, best(4, 6, 8)
    few = call.batch * ceil_div(call.channels, 16) <= device.multiprocessors
    if few or not fits(_MEDIUM):
        return _FEW, best(2, 3, 4)
    return _MEDIUM, best(5, 6, 7, 8, 9, 10)


class _States(NamedTuple):
    """Values of B and of C, from one token's to the next, rows of x from one of z to the next; where B and C are."""

    values: int
    row: int
    z_rows: int
    B: int
    C: int


def _scan_plan(
    call: Any, shape: _Shape, quads: int, chunks: int, chunk_length: int, workspace: int, states: _States
) -> _PromptPlan:
    stagers = max(
        ceil_div(shape.step * quads, 32 * shape.items),
        ceil_div(shape.step * shape.states * shape.lanes // shape.wide, 32 * shape.packs),
    )
    count, row, z_rows, B, C = states
    vectors = call.channels % 4 == 0 and count % shape.wide == 0 and B % 16 == C % 16 == 0
    vectors = vectors and row * BYTES[call.dtype] % 16 == 0
    vectors = vectors and are_aligned(call, "x dt z y", 4 * BYTES[call.dtype])
    steps = workspace + 4 * call.batch * chunks * call.channels * call.state_size if chunks > 1 else None
    return _PromptPlan(
        quads, ceil_div(call.channels, 4 * quads), 4 * quads * shape.lanes // 32, stagers, chunks, chunk_length,
        vectors, count, row, z_rows, B, C, workspace or None, steps,
    )  # fmt: skip


def _scan_launch(call: Any, shape: _Shape, plan: _PromptPlan, *, summary: bool) -> Launch:
    written = f"mamba::scan::Shape<{', '.join(map(str, shape))}>"
    name = kernel_name("scan", "prompt_kernel", TYPES[call.dtype], written, bool(plan.vectors), summary)
    finishers = 0 if summary else ceil_div(shape.step * plan.quads, 32 * shape.finished)
    threads = 32 * (plan.scanners + plan.stagers + finishers)
    grid = (call.batch * plan.groups, plan.chunks - 1 if summary else plan.chunks)
    return Launch(_PROMPT, name, grid, (threads,), 4 * shape.shared_floats(plan.quads, summary), (call, plan))


def _scan_step(call: Any) -> Launch:
    N, vec = call.state_size, 16 // BYTES[call.state_dtype]
    rows = 1
    warps = 4
    if N % vec == 0 and are_aligned(call, "ssm_state ssm_state_out B C A", 16):
        lanes = next(n for n in (16, 32, 64, 128, 32 * vec) if n >= N or n == 32 * vec) // vec
        iterations = ceil_div(256, 32 * vec) if N > 128 else 1
        passes = lanes
        if N <= 16:
            channels = call.batch * call.channels
            rows = 4 if channels >= 800_000 else 2 if channels >= 100_000 else 1
            warps = 2 if rows == 4 else 4
            passes = lanes if channels >= 10_000 else 1
    else:
        vec = 1
        most = ((8, 8, 1), (16, 8, 2), (24, 8, 3), (32, 16, 2), (64, 32, 2), (128, 32, 4), (256, 32, 8))
        _, lanes, iterations = next(shape for shape in most if shape[0] >= N)
        passes = lanes
    channel_blocks = ceil_div(call.channels, warps * passes * 32 // lanes)
    types = (TYPES[call.dtype], TYPES[call.state_dtype])
    name = kernel_name("scan", "step_kernel", *types, vec, lanes, iterations, passes, rows)
    grid = (channel_blocks * ceil_div(call.batch, rows),)
    return Launch("selective_scan_step.cuh", name, grid, (32 * warps,), 0, (call, c_uint32(channel_blocks)))
