"""How the kernels are launched where no compiled launcher is there: what the ``.cu`` files decide, once more in Python.

A test records what the compiled launchers do for random calls and compares every kernel, grid, and argument.
"""

from __future__ import annotations

from ctypes import c_int32, c_uint32, c_void_p
from typing import Any

from mamba_deploy.plugins import launches_scan, launches_ssd, launches_step
from mamba_deploy.plugins.launches_common import BYTES, MAX_GRID_Y, TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.launches_scan import selective_scan
from mamba_deploy.plugins.launches_ssd import ssd_scan, ssd_update
from mamba_deploy.plugins.launches_step import head, in_proj, out_proj, selective_update, x_proj
from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = [
    "causal_conv1d",
    "head",
    "in_proj",
    "last_token",
    "out_proj",
    "sample_token",
    "selective_scan",
    "selective_update",
    "ssd_scan",
    "ssd_update",
    "workspace_bytes",
    "x_proj",
]


def causal_conv1d(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``causal_conv1d.cu``: call is its struct, workspace an address."""
    T, item = TYPES[call.dtype], BYTES[call.dtype]
    vector = 16 // item
    tuned = call.width == 4 and call.channels % vector == 0
    tuned = tuned and are_aligned(call, "x weight bias conv_state y conv_state_out", 16)
    if call.length == 1:
        width, vec, threads = (4, vector, 64) if tuned else (0, 1, 64)
        grid = (call.batch, ceil_div(call.channels, threads * vec))
        return [
            Launch("causal_conv1d.cu", kernel_name("conv", "step_kernel", T, width, vec), grid, (threads,), 0, (call,))
        ]
    width, vec = (4, 4) if tuned else (0, 1)
    lanes, runs_of_block, resident = 32, 4, 6 if item == 2 else 5
    channel_blocks, rows = ceil_div(call.channels, lanes * vec), min(call.batch, MAX_GRID_Y)
    runs = max(1, device.multiprocessors * resident // (channel_blocks * rows)) * runs_of_block
    run_length = min(max(ceil_div(call.length, 4 * runs) * 4, 8), 64)
    grid = (channel_blocks * ceil_div(call.length, run_length * runs_of_block), rows)
    arguments = (call, c_uint32(channel_blocks), c_int32(run_length))
    name = kernel_name("conv", "prompt_kernel", T, width, vec)
    return [Launch("causal_conv1d.cu", name, grid, (lanes, runs_of_block), 0, arguments)]


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
    name = kernel_name("sample", "sample_token_kernel", call.temperature == 0)
    return [Launch("sample_token.cu", name, (min(call.batch, MAX_GRID_Y),), (1024,), 0, (call,))]


def workspace_bytes(op: str, call: Any) -> int:
    """As ``mamba_OP_workspace`` in C."""
    if op == "selective_scan":
        floats = launches_scan.workspace_floats(call)
    elif op == "ssd_scan":
        floats = launches_ssd.workspace_floats(call)
    else:
        floats = launches_step.workspace_floats(op, call)
    return ceil_div(4 * floats, 256) * 256
