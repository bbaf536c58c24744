"""cuBLAS for prompts of a whole model: found among NVIDIA's wheels or on the system, opened when it is first asked for.

Our library opens it by itself (``cublas.h``), where the system's loader finds it or this process has it open: so
:func:`find` comes before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_float, c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from mamba_deploy.errors import PluginError

__all__ = ["LEAST_WORKSPACE_BYTES", "WORKSPACE_BYTES", "find", "run"]

WORKSPACE_BYTES, LEAST_WORKSPACE_BYTES = 32 << 20, 16 << 10  # as in cublas.h
MISSING_HINT = "pip install nvidia-cublas-cu12, or install the libraries of CUDA"
_NAMES = ("libcublas.so.13", "libcublas.so.12", "libcublas.so.11")
_FOLDERS = ("cu13/lib", "cublas/lib")  # of the package nvidia
_TYPES = (0, 2, 14)  # CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
_COMPUTE_FLOAT32, _DEFAULT = 68, -1
_FULL_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
_ARGUMENTS = {
    "cublasCreate_v2": (c_void_p,),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasSetMathMode": (c_void_p, c_int),
    "cublasGemmStridedBatchedEx": (
        c_void_p, *5 * (c_int,), c_void_p, *2 * (c_void_p, c_int, c_int, c_longlong), c_void_p,
        c_void_p, c_int, c_int, c_longlong, *3 * (c_int,)
    ),
}  # fmt: skip


@cache
def find() -> ctypes.CDLL:
    """The library that the process has open, one of NVIDIA's wheels, or the system's, in this order.

    Raises:
        PluginError: There is none.
    """
    wheels = importlib.util.find_spec("nvidia")
    roots = list(wheels.submodule_search_locations or ()) if wheels is not None else []
    files = [str(path) for r in roots for f in _FOLDERS for n in _NAMES if (path := Path(r, f, n)).is_file()]
    candidates = [*((name, os.RTLD_NOLOAD) for name in _NAMES), *((name, 0) for name in (*files, *_NAMES))]
    for name, mode in candidates:
        try:
            library = ctypes.CDLL(name, mode=mode | os.RTLD_NOW)
            for function, arguments in _ARGUMENTS.items():
                getattr(library, function).argtypes = arguments
        except (OSError, AttributeError):
            continue
        return library
    raise PluginError("libcublas was not found", hint=MISSING_HINT)


@cache
def _handle(context: int) -> c_void_p:
    """Of a CUDA context, which is current; lives as long as the process."""
    handle = c_void_p()
    _check(find().cublasCreate_v2(ctypes.byref(handle)))
    _check(find().cublasSetMathMode(handle, _FULL_SUMS))
    return handle


def run(gemm: Any, context: int, stream: int) -> None:
    """Enqueue a :class:`~mamba_deploy.plugins.nvrtc.Gemm` in the current context.

    Raises:
        PluginError: There is no cuBLAS, or it refuses.
    """
    library, handle, kind = find(), _handle(context), _TYPES[gemm.dtype]
    _check(library.cublasSetStream_v2(handle, stream))  # which forgets the workspace
    _check(library.cublasSetWorkspace_v2(handle, gemm.workspace, gemm.workspace_bytes))
    one, other = c_float(1.0), c_float(1.0 if gemm.add else 0.0)
    inputs = gemm.inputs // gemm.parts
    w_row, w_part = (gemm.inputs, inputs) if gemm.by_outputs else (gemm.outputs, inputs * gemm.outputs)
    status = library.cublasGemmStridedBatchedEx(  # as cuBLAS sees it, columns first, y^T = W^T x^T
        handle, int(gemm.by_outputs), 0, gemm.outputs, gemm.rows, inputs, ctypes.addressof(one), gemm.w, kind, w_row,
        w_part, gemm.x, kind, gemm.x_row, inputs, ctypes.addressof(other), gemm.y, 0 if gemm.wide else kind,
        gemm.outputs, gemm.rows * gemm.outputs, gemm.parts, _COMPUTE_FLOAT32, _DEFAULT,
    )  # fmt: skip
    _check(status)


def _check(status: int) -> None:
    if status != 0:
        raise PluginError(f"cuBLAS refused a product: status {status}")
