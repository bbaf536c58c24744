"""Tensor maps: as ``tensor_map.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_uint8, c_uint32, c_uint64
from typing import Any

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins.nvrtc import Device

__all__ = ["HOPPER_SHARED", "MAP_ALIGN", "TensorMap", "encoded", "has_bulk_copies"]

# As cuda.h has them.
_MAP_TYPES = (7, 6, 9)  # by the numbers of dtypes
_INTERLEAVE_NONE, _L2_PROMOTION_128, _FILL_NONE = 0, 2, 0
_SWIZZLES = {16: 1, 32: 2, 64: 3}  # by columns of a box; else none
MAP_ALIGN = 64
HOPPER_SHARED = 227 << 10  # that a block may have where there are copies by maps

TensorMap = c_uint64 * 16


def has_bulk_copies(device: Device) -> bool:
    """Whether kernels with copies by maps run."""
    return device.major == 9 and device.shared_bytes >= HOPPER_SHARED and device.encode_map is not None


def encoded(encode: Callable[..., int], dtype: int, values: int, size: tuple[int, int], box: tuple[int, int]) -> Any:
    """A map of values in so many columns and rows in boxes, as make_map."""
    room = (c_uint8 * (ctypes.sizeof(TensorMap) + MAP_ALIGN))()  # for ctypes aligns less than the driver wants
    offset = -ctypes.addressof(room) % MAP_ALIGN
    code = encode(
        ctypes.addressof(room) + offset, _MAP_TYPES[dtype], 2, values, (c_uint64 * 2)(*size),
        (c_uint64 * 1)(2 * size[0]), (c_uint32 * 2)(*box), (c_uint32 * 2)(1, 1), _INTERLEAVE_NONE,
        _SWIZZLES.get(box[0], 0), _L2_PROMOTION_128, _FILL_NONE,
    )  # fmt: skip
    if code != 0:
        raise PluginError(f"CUDA refused a tensor map: {code}")
    return TensorMap.from_buffer_copy(room, offset)
