"""What the launches of all operators share."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = [
    "BYTES",
    "MAX_GRID_Y",
    "TYPES",
    "are_aligned",
    "ceil_div",
    "kernel_name",
]

TYPES = ("float", "__half", "__nv_bfloat16")  # by their numbers in mamba_kernels.h
BYTES = (4, 2, 2)
MAX_GRID_Y = 65535


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def are_aligned(call: ctypes.Structure, names: str, multiple: int) -> bool:
    """Whether these fields of a call, addresses or sizes, are all multiples of it."""
    return all((getattr(call, name) or 0) % multiple == 0 for name in names.split())


def kernel_name(space: str, name: str, *parameters: Any) -> str:
    """``mamba::SPACE::NAME<PARAMETERS>`` as C++ writes it."""
    shown = (str(p).lower() if isinstance(p, bool) else str(p) for p in parameters)
    return f"mamba::{space}::{name}<{', '.join(shown)}>"
