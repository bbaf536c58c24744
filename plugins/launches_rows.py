"""Launches of ``rows.cu``."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_uint8, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import TYPES, ceil_div, kernel_name
from mamba_deploy.plugins.launches_maps import HOPPER_SHARED, MAP_ALIGN, TensorMap, encoded, has_bulk_copies
from mamba_deploy.plugins.launches_parts import in_proj_of
from mamba_deploy.plugins.launches_step import Linear, is_together, linear_of
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.structs import layers_of

__all__ = ["MOST_ROWS", "SUMS", "are_sizes", "in_proj", "is_rows", "out_proj"]

SUMS = 4  # in which out_proj comes, each of as many inputs
MOST_ROWS = 128

_ROWS, _INPUTS, _THREADS, _SPLIT, _MOST_SLOTS = 64, 64, 384, 2, 16
_SHARED, _RING = HOPPER_SHARED - 2048, 1024  # bytes at most; where the ring begins
_ONE_ROW_WIDTH, _WIDTH_STEP, _BOX_COLUMNS = 4096, _SPLIT * _INPUTS, 64
_COLUMNS = (192, 160, 144, 128, 96, 64)  # of a cluster, for which there are kernels
_ASKED = 4 << 20  # bytes of the next weights that a product asks for


class _Next(ctypes.Structure):
    _fields_ = [("weights", c_void_p), ("part", c_int64), ("parts", c_int32), ("asked", c_int32)]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, TensorMap) for name in ("x", "weight", "rest")),
        ("a", Linear),
        ("stages", c_int32),
        ("slots", c_int32),
        ("next", _Next),
        ("sums", c_void_p),
        ("padding", c_uint8 * (-(sum(map(ctypes.sizeof, (Linear, _Next))) + 2 * ctypes.sizeof(c_void_p)) % MAP_ALIGN)),
    ]


def are_sizes(c: Any) -> bool:
    """As ``are_rows_sizes`` in C++: whatever the device."""
    least = 2 if c.width < _ONE_ROW_WIDTH else 1
    if not least <= c.batch * c.length <= MOST_ROWS or c.dtype == 0:
        return False
    return not (c.width % _WIDTH_STEP or c.inner % (SUMS * _WIDTH_STEP) or c.outputs % 8)


def is_rows(c: Any, device: Device) -> bool:
    """Whether in_proj and out_proj of a call of MambaModel can be products of ``rows.cu``, and are faster so."""
    if not are_sizes(c) or not has_bulk_copies(device) or device.architecture // 10 != 9:  # PTX has no wgmma
        return False
    return all(is_together(_in_proj(c, layer, 0, 0)) for layer in layers_of(c))


def in_proj(c: Any, layer: Any, x: int, y: int, device: Device) -> Launch:
    """As ``rows_in_proj`` in C++."""
    after = _next(layer.out_proj, c.inner, c.width, SUMS * _SPLIT)
    return _launch(_in_proj(c, layer, x, y), None, after, _asked_by_in_proj(c), 1, c.dtype, device)


def out_proj(c: Any, i: int, x: int, sums: int, device: Device) -> Launch:
    """As ``rows_out_proj`` in C++, of the layer ``i``."""
    layers = layers_of(c)
    a = Linear(c.batch * c.length, c.inner, c.width, c.inner, x=x, weight=layers[i].out_proj)
    last = i + 1 == c.layers
    after = _next(None if last else layers[i + 1].in_proj, c.width, c.outputs, _SPLIT)
    return _launch(a, sums, after, 0 if last else _asked_by_out_proj(c), SUMS, c.dtype, device)


def _asked_by_out_proj(c: Any) -> int:
    return _ASKED if c.length > 1 or c.batch <= _ROWS else 0


def _asked_by_in_proj(c: Any) -> int:
    soon = not c.heads and c.length == 1 and c.batch <= _ROWS // 2
    return _asked_by_out_proj(c) * (1 if soon else 2)


def _next(weights: int | None, inputs: int, outputs: int, parts: int) -> _Next:
    """Weights [inputs, outputs], which a product will read in so many parts of its inputs."""
    return _Next(weights, 2 * inputs // parts * outputs, parts)


def _in_proj(c: Any, layer: Any, x: int, y: int) -> Linear:
    """Of x, which is normed. Without the convolution of a prompt, which is along it."""
    a = linear_of(in_proj_of(c, layer, 0, y))
    a.x, a.norm_weight = x, None
    if c.length > 1:
        a.batch, a.conv_channels = c.batch * c.length, 0
        a.conv_weight = a.conv_bias = a.conv_state = a.conv_state_out = None
    return a


def _columns(outputs: int, parts: int, multiprocessors: int) -> int:
    """With which the fullest multiprocessor reads the fewest weights; of several, the most."""
    room = max(multiprocessors // _SPLIT, 1)
    return min(_COLUMNS, key=lambda columns: ceil_div(ceil_div(outputs, columns) * parts, room) * columns)


def _launch(a: Linear, sums: int | None, after: _Next, asked: int, parts: int, dtype: int, device: Device) -> Launch:
    """asked: bytes of the next weights."""
    columns, tiles = _columns(a.outputs, parts, device.multiprocessors), 1 if a.batch <= _ROWS else 2
    rest = columns % _BOX_COLUMNS
    encode: Any = device.encode_map  # which is_rows asks for

    def weights(box_columns: int) -> Any:
        return encoded(encode, dtype, a.weight, (a.outputs, a.inputs), (box_columns, _INPUTS))

    box_rows = ceil_div(a.batch, 8) * 8 if tiles == 1 else _ROWS
    stage = 2 * _INPUTS * (columns + tiles * box_rows)
    slots = min((_SHARED - _RING) // stage, _MOST_SLOTS)
    x = encoded(encode, dtype, a.x, (a.inputs, a.batch), (_INPUTS, box_rows))
    maps = x, weights(_BOX_COLUMNS), weights(rest) if rest else TensorMap()
    grid = (ceil_div(a.outputs, columns) * _SPLIT, parts)
    warps = math.prod(grid) * 4 * tiles // after.parts  # that share a part's
    after.asked = min(asked // after.parts, after.part) // warps // 16 * 16
    p = _Product(*maps, a, a.inputs // (_SPLIT * parts * _INPUTS), slots, after, sums)
    name = kernel_name("rows", "rows_kernel", TYPES[dtype], columns, tiles)
    return Launch("rows_product.cuh", name, grid, (_THREADS,), _RING + slots * stage, (p,), _SPLIT)
