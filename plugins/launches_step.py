"""Launches of ``step.cu``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_int32, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import BYTES, TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = [
    "Linear",
    "head",
    "in_proj",
    "is_together",
    "linear_of",
    "out_proj",
    "selective_update",
    "workspace_floats",
    "x_proj",
]


class Linear(ctypes.Structure):
    """As in ``step_linear.cuh``."""

    _fields_ = [
        *((n, c_int32) for n in "batch inputs outputs x_stride groups conv_first conv_channels conv_width".split()),
        *((n, c_int32) for n in ("rows", "group_size", "by_16")),
        ("eps", ctypes.c_float),
        *((n, c_void_p) for n in "x weight bias norm_weight residual conv_weight conv_bias conv_state".split()),
        *((n, c_void_p) for n in ("seq_lens", "y", "conv_state_out")),
    ]


_STEP = "step_linear.cuh"
_COLUMNS = 8  # rows of the batch that a tensor core takes at once
_NORM_ROWS, _HEAD_NORM_ROWS = 2, 1  # that a block of a product, of the head, norms by itself
_ROW_THREADS, _MOST_LANES = 1024, 32
_HEAD_THREADS, _HEAD_OUTPUTS = 256, 128  # of a block


def in_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``step.cu``: call is its struct, workspace an address. So are the next four."""
    return _linear(linear_of(call), call.dtype, 0, workspace, device)


def linear_of(call: Any) -> Linear:
    """Of in_proj: call is its struct."""
    return Linear(
        call.batch, call.width, call.outputs, call.width, 1, call.conv_first, call.channels, call.conv_width,
        eps=call.eps, x=call.hidden, weight=call.weight, bias=call.bias, norm_weight=call.norm_weight,
        conv_weight=call.conv_weight, conv_bias=call.conv_bias, conv_state=call.conv_state, seq_lens=call.seq_lens,
        y=call.y, conv_state_out=call.conv_state_out,
    )  # fmt: skip


def x_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = Linear(call.batch, call.channels, call.outputs, call.row, 1, x=call.x, weight=call.weight, y=call.y)
    _complete(a, BYTES[call.dtype])
    tiles = _low_tiles(a.batch)
    needed, most = _low_bytes(a, tiles), device.shared_bytes - _LOW_SPARE
    aligned = a.by_16 and not (a.outputs % 8 or a.y % 8)
    if BYTES[call.dtype] != 2 or device.major < 9 or a.batch < 2 or not aligned or needed > most:
        return _linear(a, call.dtype, call.dtype, workspace, device)
    grid = _low_grid(a.outputs, a.batch)
    name, shared = kernel_name("step", "x_proj_kernel", TYPES[call.dtype], tiles), max(needed, min(_LOW_SHARED, most))
    return [Launch("step_x_proj.cuh", name, grid, (32 * _LOW_WARPS,), shared, (a,), _LOW_SPLIT)]


_LOW_WARPS, _LOW_SPLIT, _LOW_OUTPUTS, _LOW_SHARED, _LOW_SPARE = 8, 8, 32, 192 << 10, 1024


def _low_tiles(batch: int) -> int:
    return 1 if batch <= 16 else 2


def _low_grid(outputs: int, batch: int) -> tuple[int, int]:
    return ceil_div(outputs, _LOW_OUTPUTS) * _LOW_SPLIT, ceil_div(batch, 16 * _low_tiles(batch))


def _low_bytes(a: Linear, tiles: int) -> int:
    """Of shared memory of x_proj_kernel, 16 ``tiles`` rows a cluster."""
    rows, inputs = 16 * tiles, 16 * ceil_div(a.inputs, 16 * _LOW_WARPS * _LOW_SPLIT)
    ring, sums = inputs * (2 * _LOW_OUTPUTS + 16) + rows * (2 * inputs + 16), 4 * rows * (_LOW_OUTPUTS + 8)
    return 4 * rows * _LOW_OUTPUTS + _LOW_WARPS * max(ring, sums)


def out_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = Linear(
        call.batch, call.channels, call.width, call.channels, call.groups, eps=call.eps, x=call.x, weight=call.weight,
        bias=call.bias, norm_weight=call.norm_weight, residual=call.residual, y=call.y,
    )  # fmt: skip
    return _linear(a, call.dtype, call.dtype, workspace, device)


def _shared_stride(inputs: int) -> int:
    return ceil_div(inputs, 64) * 64 + 16


def _layout_bytes(a: Linear, item: int, x_item: int, ring: int, warp_outputs: int) -> int:
    """Of shared memory, up to 8 rows."""
    normed = a.norm_weight is not None
    scales = 4 * ceil_div(a.inputs, 4) * 4 + 64 * a.rows * a.groups if normed else 0
    raw = ceil_div(a.rows * a.inputs * x_item, 16) * 16 if x_item != item else 0
    x = ceil_div(a.rows * _shared_stride(a.inputs) * item, 16) * 16
    return scales + raw + x + max(ring, 4 * a.rows * warp_outputs)


def _most_rows(a: Linear, device: Device, *sizes: int) -> int:
    """Sets the most rows of a block whose x has room in shared memory, at least one; gives the bytes."""
    a.rows = min(a.batch, _COLUMNS)
    while a.rows > 1 and _layout_bytes(a, *sizes) > device.shared_bytes:
        a.rows -= 1
    return _layout_bytes(a, *sizes)


def _complete(a: Linear, x_item: int) -> None:
    """Sets what follows from the sizes and addresses."""
    a.group_size = a.inputs // a.groups
    a.by_16 = not (a.x_stride * x_item % 16 or a.inputs * x_item % 16 or a.x % 16)


def _norm_apart(a: Linear, dtype: int, x_dtype: int, workspace: int) -> Launch:
    """The norm in a kernel of its own; changes ``a`` to read what that writes."""
    stride = ceil_div(a.inputs, 32) * 32
    a.rows = 1
    shared = _layout_bytes(a, BYTES[dtype], BYTES[x_dtype], 0, 0)
    name = kernel_name("step", "norm_kernel", TYPES[dtype], TYPES[x_dtype])
    arguments = (Linear.from_buffer_copy(a), c_void_p(workspace), c_int32(stride))
    a.x, a.x_stride, a.norm_weight, a.groups = workspace, stride, None, 1
    _complete(a, BYTES[dtype])
    return Launch(_STEP, name, (a.batch,), (256,), shared, arguments)


def _row_product(a: Linear, dtype: int, x_dtype: int, device: Device) -> list[Launch]:
    """Of a row or two and many inputs; else none."""
    if a.batch > _NORM_ROWS or a.inputs < (1536 if a.outputs > a.inputs else 3072):
        return []
    item = BYTES[dtype]
    pieces = ceil_div(a.outputs, 16 // item)
    waves = ceil_div(pieces, _MOST_LANES * device.multiprocessors)
    lanes = max(ceil_div(pieces, waves * device.multiprocessors), 4 if 2 * pieces > device.multiprocessors else 1)
    of_row = 4 * (max(ceil_div(a.inputs, 4) * 4, _ROW_THREADS) + _ROW_THREADS * 16 // item)
    shared = a.batch * (of_row + lanes * (16 // item) * (56 if item == 4 else 44))
    if shared + 128 * a.batch > device.shared_bytes:
        return []
    name = kernel_name("step", "row_kernel", TYPES[dtype], TYPES[x_dtype], a.batch)
    return [Launch("step_row.cuh", name, (ceil_div(pieces, lanes),), (_ROW_THREADS,), shared, (a, c_int32(lanes)))]


def _linear(a: Linear, dtype: int, x_dtype: int, workspace: int, device: Device) -> list[Launch]:
    _complete(a, BYTES[x_dtype])
    of_few = _row_product(a, dtype, x_dtype, device)
    if of_few:
        return of_few
    before = []
    if a.batch > _NORM_ROWS and a.norm_weight is not None:
        before, x_dtype = [_norm_apart(a, dtype, x_dtype, workspace)], dtype
    if BYTES[x_dtype] == 2 and _is_tile(a, dtype, False, device):
        return [*before, _tile(a, dtype, False, device)]
    item = BYTES[dtype]
    tiles = ceil_div(a.outputs, 64 // item)
    some, roomy = 3 * tiles >= device.multiprocessors, device.major >= 8 and device.shared_bytes >= 160 << 10
    ring = some and roomy and a.inputs >= 2048
    nbytes, warps = (4, 16) if not some else (8, 16) if a.inputs >= 2048 else (8, 8)
    if 2 * tiles >= 3 * device.multiprocessors:
        nbytes, warps, ring = 16, 8, False
    in_ring = 8 * 4 * nbytes * 32 * warps if ring else 0
    outputs = 8 * nbytes // item
    shared = _most_rows(a, device, item, BYTES[x_dtype], in_ring, warps * outputs)
    name = kernel_name("step", "linear_kernel", TYPES[dtype], TYPES[x_dtype], nbytes, warps, ring)
    grid = (ceil_div(a.outputs, outputs), ceil_div(a.batch, a.rows))
    return [*before, Launch(_STEP, name, grid, (32 * warps,), shared, (a,))]


_TILE_THREADS, _TILE_INPUTS, _MOST_TILES = 512, 64, 5


def _is_tile(a: Linear, dtype: int, of_head: bool, device: Device) -> bool:
    if BYTES[dtype] != 2 or device.major < 8 or a.norm_weight is not None or not a.by_16 or a.batch <= _NORM_ROWS:
        return False
    if of_head or device.major >= 9:
        return bool(a.batch > _COLUMNS or a.inputs >= 2048)
    tiles = ceil_div(a.outputs, 32) * ceil_div(a.batch, 16)
    return bool(a.batch > _COLUMNS and 4 * tiles >= device.multiprocessors)


def is_together(a: Linear) -> bool:
    """Whether 4 neighbouring outputs are read and written together, as all published models allow."""
    if a.conv_channels > 0 and not (a.conv_width == 4 and are_aligned(a, "conv_first conv_channels", 4)):
        return False
    return are_aligned(a, "bias residual y conv_weight conv_bias conv_state conv_state_out", 16)


def _cuts(a: Linear, tiles: int, of_head: bool, device: Device) -> Iterator[tuple[int, int, int, int, int]]:
    """Of tiles with so many rows: cost, ROW_TILES, NT, the blocks that split the inputs, and shared memory."""
    stages, most = ceil_div(a.inputs, _TILE_INPUTS), 1 if of_head or device.major < 9 else 8
    pitch, rows, turns = 2 * _TILE_INPUTS + 16, 16 * tiles, 2 if tiles == 4 else 4
    for nt in range(1, _MOST_TILES + 1):
        outputs = 32 * nt
        stage = (outputs * pitch if of_head else _TILE_INPUTS * (2 * outputs + 16)) + rows * pitch
        shared = max(stage * min(max((96 << 10) // stage, 4), 8), 4 * turns * rows * (outputs + 8))
        if shared > device.shared_bytes or (nt == _MOST_TILES and not is_together(a)):
            return
        for split in (1, 2, 4, 8):
            if split > min(most, stages):
                break
            room = device.multiprocessors * (1000 if split <= 2 else 1000 - 35 * split) // 1000
            blocks = ceil_div(a.outputs, outputs) * split * ceil_div(a.batch, rows)
            sums = 0 if split == 1 else 2 * 4 * turns * rows * outputs
            moved = ceil_div(stages, split) * (2 * _TILE_INPUTS * (outputs + rows) + (5 << 10)) + sums
            yield ceil_div(blocks, room) * moved, tiles, nt, split, shared


def _tile(a: Linear, dtype: int, of_head: bool, device: Device) -> Launch:
    """The cut that leaves the fullest multiprocessor the fewest bytes to move, as in ``step.cu``."""
    row_tiles = (1, 2, 4)[: 1 + (a.batch > 16) + (a.batch > 32)]
    _, tiles, nt, split, shared = min(cut for tiles in row_tiles for cut in _cuts(a, tiles, of_head, device))
    name = kernel_name("step", "tile_kernel", TYPES[dtype], tiles, nt, of_head)
    grid = (ceil_div(a.outputs, 32 * nt) * split, ceil_div(a.batch, 16 * tiles))
    return Launch("step_tile.cuh", name, grid, (_TILE_THREADS,), shared, (a, c_int32(split)), split)


def head(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = Linear(
        call.batch, call.width, call.vocab, call.width, 1, eps=call.eps, x=call.hidden, weight=call.weight,
        norm_weight=call.norm_weight, y=call.y,
    )  # fmt: skip
    _complete(a, 4)
    if a.batch <= _HEAD_NORM_ROWS:
        threads = 32 * min(ceil_div(a.inputs, 512 // BYTES[call.dtype]), 16)
        name = kernel_name("step", "row_head_kernel", TYPES[call.dtype])
        return [Launch("step_row.cuh", name, (ceil_div(a.outputs, 8),), (threads,), 0, (a,))]
    norm = _norm_apart(a, call.dtype, 0, workspace)
    if _is_tile(a, call.dtype, True, device):
        return [norm, _tile(a, call.dtype, True, device)]
    shared = _most_rows(a, device, BYTES[call.dtype], BYTES[call.dtype], 0, 0)
    name = kernel_name("step", "head_kernel", TYPES[call.dtype])
    grid = (ceil_div(a.outputs, _HEAD_OUTPUTS), ceil_div(a.batch, a.rows))
    return [norm, Launch(_STEP, name, grid, (_HEAD_THREADS,), shared, (a,))]


def selective_update(call: Any, workspace: int, device: Device, early: bool = False) -> list[Launch]:
    """See :func:`in_proj`; early as in ``step.cu``."""
    item = BYTES[call.dtype]
    warps, channels = 16 // item, 128 // item
    groups, rows, most = ceil_div(call.channels, channels), 1, min(call.batch, _COLUMNS)
    of_states = call.state_size == 16 and not call.ssm_state % 16
    by_rows = item == 2 and device.major >= 8 and of_states and call.batch > (1 if device.major >= 9 else 2)
    if by_rows:
        rows, of_row = most, 4 * 256 + 1024 * BYTES[call.state_dtype]
        name = kernel_name("scan", "update_rows_kernel", TYPES[call.dtype], TYPES[call.state_dtype])
    else:
        while rows < most and groups * ceil_div(call.batch, rows) > 2 * device.multiprocessors:
            rows += 1
        of_row = 4 * warps * channels
        name = kernel_name("scan", "update_kernel", TYPES[call.dtype], rows if rows <= 2 else _COLUMNS)
    while rows > 1 and _update_bytes(call, rows, of_row) > device.shared_bytes:
        rows -= 1
    shared, grid = _update_bytes(call, rows, of_row), (groups, ceil_div(call.batch, rows))
    at_once = _blocks_at_once(call, grid, shared, device) if early and device.major >= 9 else math.prod(grid)
    arguments = (call, c_int32(rows), *([c_int32(at_once)] if by_rows else []))
    return [Launch("selective_update.cuh", name, grid, (32 * warps,), shared, arguments)]


_UPDATE_RESIDENT = 4


def _blocks_at_once(call: Any, grid: tuple[int, int], shared: int, device: Device) -> int:
    """As in ``step.cu``."""
    of_one, blocks = min(_UPDATE_RESIDENT, (device.shared_bytes + 1024) // (shared + 1024)), math.prod(grid)
    if blocks > of_one * device.multiprocessors:
        return blocks
    return of_one * max(device.multiprocessors - math.prod(_low_grid(call.low_row, call.batch)), 0)


def _update_bytes(call: Any, rows: int, of_row: int) -> int:
    """Of shared memory, ``of_row`` those of a row's sums and of its old states where they are there."""
    low = ceil_div(rows * _shared_stride(call.rank) * BYTES[call.dtype], 16) * 16
    return low + 4 * ceil_div(2 * rows * call.state_size, 4) * 4 + rows * of_row


def workspace_floats(op: str, call: Any) -> int:
    """Of a norm that has a kernel of its own."""
    if op not in ("in_proj", "out_proj", "head") or call.batch <= (_HEAD_NORM_ROWS if op == "head" else _NORM_ROWS):
        return 0
    inputs = call.channels if op == "out_proj" else call.width
    return ceil_div(call.batch * ceil_div(inputs, 32) * 32 * BYTES[call.dtype], 4)
