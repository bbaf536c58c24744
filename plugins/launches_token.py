"""Launches of ``token.cu``."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_uint8, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.launches_maps import MAP_ALIGN, TensorMap, encoded, has_bulk_copies
from mamba_deploy.plugins.launches_parts import head_of
from mamba_deploy.plugins.launches_step import head
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.structs import MambaLayer, layers_of

__all__ = ["is_token", "token_of_row", "workspace_bytes"]

_WARPS, _IN_ROWS, _COLUMNS, _BOX_COLUMNS = 16, 256, 256, 64
_MOST_SLOTS, _MOST_BLOCKS, _MOST_WIDTH, _SLOT_ALIGN = 32, 128, 4096, 1024
_UNITS, _SUM_UNITS = (4, 5, 8), 4  # of 8 channels of a block, for which there are kernels
_PARTS_FROM = 2048  # width from which on blocks pass each other parts of sums; below they add to sums
_TABLE_LAYERS, _TABLE_BLOCKS, _TABLE_THREADS = 40, 128, 256
_MOST_LAYERS = 2 * _TABLE_LAYERS


class _TokenLayer(ctypes.Structure):
    _fields_ = [
        ("at", MambaLayer),
        ("padding", c_uint8 * (-ctypes.sizeof(MambaLayer) % MAP_ALIGN)),
        *((name, TensorMap) for name in ("in_", "low", "dt", "out")),
    ]


class _Token(ctypes.Structure):
    _fields_ = [
        *((n, c_int32) for n in "layers width inner low rank heads head_dim vocab state_dtype".split()),
        *((n, c_int32) for n in "skip_per_channel own_width width_factor own_low low_factor part layer_sums".split()),
        *((n, c_int32) for n in ("slot_bytes", "slots")),
        *((n, c_float) for n in ("eps", "norm_eps", "dt_min", "dt_max")),
        *((n, c_void_p) for n in "input_ids seq_lens embedding others sums low_parts lows parts stream hidden".split()),
    ]


def is_token(c: Any, device: Device) -> bool:
    """Whether a call of MambaModel is one row's token that one kernel can do, and does faster than the chain."""
    if not _are_sizes(c) or not _are_aligned(c):
        return False
    return has_bulk_copies(device) and _units(c, device.multiprocessors) > 0


def workspace_bytes(call: Any) -> int:
    """As ``token_workspace`` in C++: whatever the batch and length, and the device."""
    c = type(call).from_buffer_copy(call)
    c.batch = c.length = 1
    units = [units for units in _UNITS if _are_sizes(c) and _is_cut(c, units)]
    return max((_place(_cut(c, u), c.inner // (8 * u), 0) for u in units), default=0)


def token_of_row(c: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``token.cu``: c is the struct of MambaModel, workspace an address."""
    units = _units(c, device.multiprocessors)
    a, blocks = _cut(c, units), c.inner // (8 * units)
    _place(a, blocks, workspace)
    ring = _ring_begin(a) + _SLOT_ALIGN
    a.slots = min((device.shared_bytes - _own_bytes(8 * units) - ring) // a.slot_bytes, _MOST_SLOTS)
    name = kernel_name("token", "token_kernel", TYPES[c.dtype], bool(c.heads), units, a.layer_sums > 0)
    shared = ring + a.slots * a.slot_bytes
    table, others = _tables(c, a, 8 * units, device.encode_map)
    zeros = (a.hidden - a.sums) // 16  # that a kernel sets 16 bytes at a time
    put = (others, c_int32(_others(c.layers)), c_void_p(a.others), c_void_p(a.sums), c_int64(zeros))
    return [
        Launch("token.cuh", "mamba::token::token_table_kernel", (_TABLE_BLOCKS,), (_TABLE_THREADS,), 0, put),
        Launch("token.cuh", name, (blocks,), (32 * (_WARPS + 1),), shared, (a, table), _cluster(units), True),
        *head(head_of(c, a.hidden), 0, device),
    ]


# --- whether, and how it is cut


def _are_sizes(c: Any) -> bool:
    if c.batch != 1 or c.length != 1 or c.dtype == 0 or c.conv_width != 4 or c.layers > _MOST_LAYERS:
        return False
    if c.width % _COLUMNS or c.width > _MOST_WIDTH or c.outputs % 8:
        return False
    if c.heads:
        return bool(c.state_size == 128 and c.groups == 1 and c.head_dim >= 16 and c.heads % 4 == 0)
    return bool(c.state_size == 16 and c.rank % 16 == 0 and c.rank <= _COLUMNS)


def _are_aligned(c: Any) -> bool:
    copied = "norm_weight in_proj_bias conv_weight conv_bias conv_state A D dt_bias ssm_state gate_norm ssm_state_out"
    return all(are_aligned(layer, copied, 16) for layer in layers_of(c))


def _adds_to_sums(c: Any) -> bool:
    return bool(c.width < _PARTS_FROM)


def _units(c: Any, multiprocessors: int) -> int:
    """The fewest with which all blocks fit on the device at once, unless they leave a third of it empty; or 0.

    Blocks that add to sums are fast where they are few.
    """
    for units in _UNITS:
        blocks = c.inner // (8 * units)
        if blocks <= multiprocessors and _is_cut(c, units):
            return units if _adds_to_sums(c) or 3 * blocks >= 2 * multiprocessors else 0
    return 0


def _is_cut(c: Any, units: int) -> bool:
    own = 8 * units
    blocks = c.inner // own
    if c.inner % own or blocks == 0 or blocks > _MOST_BLOCKS:
        return False
    a, shares_width = _cut(c, units), c.width % (2 * blocks) == 0
    if _adds_to_sums(c):
        shares_x = not c.heads or (shares_width and a.own_width <= own)
        return bool(units == _SUM_UNITS and a.low <= 32 * _WARPS and shares_x)
    return bool(shares_width and blocks % _WARPS == 0 and a.part <= 32 and a.own_low <= 2 * _WARPS)


def _cut(c: Any, units: int) -> _Token:
    """What follows from the sizes and the channels of a block."""
    own = 8 * units
    blocks = c.inner // own
    low = c.outputs - 2 * c.inner if c.heads else c.rank + 2 * c.state_size
    own_width, own_low = c.width // blocks, ceil_div(ceil_div(low, blocks), 2) * 2
    layer_sums = low + c.width + (c.width // 32 if c.heads else 0)
    return _Token(
        c.layers, c.width, c.inner, low, c.rank, c.heads, c.head_dim, c.vocab, c.state_dtype, c.skip_per_channel,
        own_width, ceil_div(1 << 32, own_width), own_low, ceil_div(1 << 32, own_low),
        part=own_width + (2 if c.heads else 0), layer_sums=layer_sums if _adds_to_sums(c) else 0,
        slot_bytes=512 * max(own, ceil_div(own_width, 8) * 8 if c.heads else 0),
        eps=c.eps, norm_eps=c.norm_eps, dt_min=c.dt_min, dt_max=c.dt_max,
        input_ids=c.input_ids, seq_lens=c.seq_lens, embedding=c.embedding,
    )  # fmt: skip


def _cluster(units: int) -> int:
    """Blocks of a cluster: as cluster_of."""
    return 2 if units == 5 else 1


# --- places


def _place(a: _Token, blocks: int, workspace: int) -> int:
    """Sets the addresses in the workspace; gives the bytes of it. What begins as zeros lies from sums to hidden."""
    at, parts = workspace, a.layer_sums == 0
    for name, size in (
        ("others", _others(a.layers) * ctypes.sizeof(_TokenLayer)),
        ("sums", 8 * a.layers * a.layer_sums),
        ("low_parts", 8 * ceil_div(a.low, a.own_low) * blocks * a.own_low * parts),
        ("lows", 8 * a.low * parts),
        ("parts", 8 * blocks * blocks * a.part * parts),
        ("stream", 8 * a.width * parts),
        ("hidden", 4 * a.width),
    ):
        setattr(a, name, at)
        at += ceil_div(size, 256) * 256
    return at - workspace


def _ring_begin(a: _Token) -> int:
    """In dynamic shared memory: as in Places."""
    low = ceil_div(2 * a.width, 16) * 16 + 4 * a.low
    if a.layer_sums:
        low += 4 * a.width + (6 * (a.low - a.heads) if a.heads else 0)
    return ceil_div(low, 8) * 8 + int(a.layers) * ctypes.sizeof(MambaLayer)


def _own_bytes(own: int) -> int:
    """Of static shared memory: as Own."""
    floats = _WARPS * (2 * own + 1) + 6 * own
    return 8 * (2 * _MOST_SLOTS + 2) + 4 * floats + 2 * (own + _COLUMNS)


# --- layers, with their tensor maps


def _others(layers: int) -> int:
    """Layers that are no argument of the kernel."""
    return max(layers - _TABLE_LAYERS, 0)


def _tables(c: Any, a: _Token, own: int, encode: Any) -> list[Any]:
    """Of the layers that are an argument of the kernel, and of the others."""
    tables = [(_TokenLayer * _TABLE_LAYERS)() for _ in range(_MOST_LAYERS // _TABLE_LAYERS)]
    for to, layer in zip(itertools.chain(*tables), layers_of(c), strict=False):
        _fill(to, layer, c, a, own, encode)
    return tables


def _fill(to: _TokenLayer, layer: Any, c: Any, a: _Token, own: int, encode: Callable[..., int]) -> None:
    def map_of(weights: int, rows: int, columns: int, box_rows: int, box_columns: int) -> Any:
        return encoded(encode, c.dtype, weights, (columns, rows), (box_columns, box_rows))

    to.at = layer
    cluster = _cluster(own // 8)
    to.in_ = map_of(layer.in_proj, c.width, c.outputs, _IN_ROWS // cluster, cluster * own)
    to.out = map_of(layer.out_proj, c.inner, c.width, own, _BOX_COLUMNS)
    if c.heads:
        to.low = map_of(layer.in_proj, c.width, c.outputs, ceil_div(a.own_width, 8) * 8, _BOX_COLUMNS)
    else:
        to.low = map_of(layer.x_proj, c.inner, a.low, own, _BOX_COLUMNS)
        to.dt = map_of(layer.dt_proj, c.rank, c.inner, c.rank, own)
