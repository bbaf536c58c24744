"""Launches of ``pad.cuh``: arrays padded with zeros, or cut to what they were."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import NamedTuple

from mamba_deploy.plugins.launches_common import ceil_div, kernel_name
from mamba_deploy.plugins.nvrtc import Launch

__all__ = ["PAD_TOKENS", "Copy", "pad_launch", "padded_size"]

PAD_TOKENS = 128  # from here on B and C, or P and N, are padded


def padded_size(size: int) -> int:
    """The next multiple of 8."""
    return ceil_div(size, 8) * 8


class Copy(NamedTuple):
    """To [matrices, *to_shape] from [matrices, *from_shape] of elements of so many bytes."""

    source: int
    target: int
    matrices: int
    from_shape: tuple[int, int]
    to_shape: tuple[int, int]
    item: int


class _Resize(ctypes.Structure):
    _fields_ = [
        ("from_", c_void_p), ("to", c_void_p), ("rows", c_int64),
        *((name, c_int32) for name in ("from_rows", "from_cols", "to_rows", "to_cols")),
    ]  # fmt: skip


_WORDS = {16: "uint4", 8: "uint2", 4: "uint32_t", 2: "uint16_t"}


def pad_launch(copy: Copy) -> Launch:
    """In the widest words that rows on both sides are made of."""
    (from_rows, from_cols), (to_rows, to_cols) = copy.from_shape, copy.to_shape
    multiples = (from_cols * copy.item, to_cols * copy.item, copy.source, copy.target)
    word = next(word for word in _WORDS if word == copy.item or not any(number % word for number in multiples))
    elements = word // copy.item
    from_cols, to_cols = from_cols // elements, to_cols // elements
    rows = copy.matrices * to_rows
    resize = _Resize(copy.source, copy.target, rows, from_rows, from_cols, to_rows, to_cols)
    grid = (min(ceil_div(rows, max(1024 // to_cols, 1)), 2**31 - 1),)
    return Launch("pad.cuh", kernel_name("pad", "pad_kernel", _WORDS[word]), grid, (256,), 0, (resize,))
