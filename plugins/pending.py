"""Tokens that states of Mamba-2 do not hold yet (``pending.cuh``): how they lie, and the launches of ``model.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import ceil_div
from mamba_deploy.plugins.nvrtc import Launch
from mamba_deploy.plugins.rules import MAX_LAYERS
from mamba_deploy.plugins.structs import layers_of

__all__ = ["HEAD_WORDS", "MOST", "Pending", "is_in_place", "pending_of", "pending_row", "settle"]

MOST = 3  # tokens
HEAD_WORDS = 4
_MARK_WORDS = 4
_SOURCE, _THREADS, _BLOCKS, _ROWS = "settle.cuh", 256, 4, 1024


class Pending(ctypes.Structure):
    """As in ``pending.cuh``."""

    _fields_ = [("marks", c_void_p), ("records", c_void_p), ("row", c_int32), ("record", c_int32)]


class _Settle(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("marks", "records")),
        *((n, c_int32) for n in "row record batch heads head_dim state_size groups state_dtype".split()),
        ("states", c_void_p * MAX_LAYERS),
    ]


def _record_words(c: Any) -> int:
    return 4 * ceil_div(c.heads * (HEAD_WORDS + c.head_dim) + c.groups * c.state_size, 4)


def pending_row(c: Any) -> int:
    """Of a ``MambaModel``, as ``mamba_pending_row`` in C: float32 values of a row; 0 of Mamba."""
    return 64 * ceil_div(_MARK_WORDS + c.layers * MOST * _record_words(c), 64) if c.heads else 0


def pending_of(c: Any, layer: int) -> Pending:
    """Where they lie of a layer."""
    record = _record_words(c)
    first = c.pending_out + 4 * (_MARK_WORDS + layer * MOST * record)
    return Pending(c.pending_out, first, c.pending_row, record)


def settle(c: Any) -> list[Launch]:
    """What comes before a call that does not look at what is pending."""
    if not c.heads or not c.pending or (c.length == 1 and is_in_place(c)):
        return []
    sizes = (c.pending_row, _record_words(c), c.batch, c.heads, c.head_dim, c.state_size, c.groups, c.state_dtype)
    a = _Settle(c.pending, c.pending + 4 * _MARK_WORDS, *sizes)
    for i, layer in enumerate(layers_of(c)):
        a.states[i] = layer.ssm_state
    name = "mamba::pending::settle_kernel"
    found = [Launch(_SOURCE, name, (_BLOCKS, c.layers, min(c.batch, _ROWS)), (_THREADS,), 0, (a,))]
    for marks in dict.fromkeys((c.pending, c.pending_out)):
        arguments = (c_void_p(marks), c_int32(c.pending_row), c_int32(c.batch))
        clear = "mamba::pending::clear_marks_kernel"
        found.append(Launch(_SOURCE, clear, (ceil_div(c.batch, _THREADS),), (_THREADS,), 0, arguments))
    return found


def is_in_place(c: Any) -> bool:
    """Whether all that may be pending goes out where it came in."""
    return c.pending == c.pending_out and all(layer.ssm_state == layer.ssm_state_out for layer in layers_of(c))
