"""How the kernels are launched where no compiled launcher is there: what the ``.cu`` files decide, once more in Python.

A test records what the compiled launchers do for random calls and compares every kernel, grid, and argument.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from typing import Any

from mamba_deploy.plugins import launches_model, launches_scan, launches_ssd, launches_step
from mamba_deploy.plugins.launches_common import BYTES, MAX_GRID_Y, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.launches_conv import causal_conv1d
from mamba_deploy.plugins.launches_model import model
from mamba_deploy.plugins.launches_scan import selective_scan
from mamba_deploy.plugins.launches_ssd import ssd_scan, ssd_update
from mamba_deploy.plugins.launches_step import head, in_proj, out_proj, selective_update, x_proj
from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = [
    "causal_conv1d",
    "head",
    "in_proj",
    "last_token",
    "model",
    "out_proj",
    "sample_token",
    "selective_scan",
    "selective_update",
    "ssd_scan",
    "ssd_update",
    "workspace_bytes",
    "x_proj",
]


def last_token(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``last_token.cu``: call is its struct, workspace an address."""
    size = call.width * BYTES[call.dtype]
    if size % 16 == 0 and are_aligned(call, "x y", 16):
        word, words = "uint4", size // 16
    else:
        word, words = ("uint32_t" if call.dtype == 0 else "uint16_t"), call.width
    grid = (ceil_div(words, 128), min(call.batch, MAX_GRID_Y))
    pointers = tuple(c_void_p(p) for p in (call.x, call.seq_lens, call.y))
    arguments = (*pointers, c_int32(call.batch), c_int32(call.length), c_int32(words))
    return [Launch("last_token.cu", kernel_name("last", "last_token_kernel", word), grid, (128,), 0, arguments)]


def sample_token(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``sample_token.cu``: call is its struct; workspace is not used."""
    room = device.multiprocessors // call.batch if device.major >= 9 else 1
    blocks = next((count for count in (8, 4, 2) if room >= count), 1)  # of a row
    name = kernel_name("sample", "sample_token_kernel", blocks, call.temperature == 0)
    threads = 1024 if blocks == 1 else 512
    return [Launch("sample_token.cu", name, (call.batch * blocks,), (threads,), 0, (call,), blocks)]


def workspace_bytes(op: str, call: Any) -> int:
    """As ``mamba_OP_workspace`` in C."""
    if op == "model":
        return launches_model.workspace_bytes(call)
    if op == "selective_scan":
        floats = launches_scan.workspace_floats(call)
    elif op == "ssd_scan":
        floats = launches_ssd.workspace_floats(call)
    else:
        floats = launches_step.workspace_floats(op, call)
    return ceil_div(4 * floats, 256) * 256
