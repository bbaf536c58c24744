"""Launches of ``causal_conv1d.cu``."""

from __future__ import annotations

from ctypes import c_int32, c_uint32
from typing import Any

from mamba_deploy.plugins.launches_common import BYTES, MAX_GRID_Y, TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = ["causal_conv1d"]


def causal_conv1d(call: Any, workspace: int, device: Device, x_row: int | None = None) -> list[Launch]:
    """As the launcher in ``causal_conv1d.cu``: call is its struct, workspace an address; x_row where x is not dense."""
    T, item = TYPES[call.dtype], BYTES[call.dtype]
    x_row, vector = x_row or call.channels, 16 // item
    tuned = call.width == 4 and call.channels % vector == x_row % vector == 0
    tuned = tuned and are_aligned(call, "x weight bias conv_state y conv_state_out", 16)
    if call.length == 1:
        width, vec, threads = (4, vector, 64) if tuned else (0, 1, 64)
        grid = (call.batch, ceil_div(call.channels, threads * vec))
        name = kernel_name("conv", "step_kernel", T, width, vec)
        return [Launch("causal_conv1d.cu", name, grid, (threads,), 0, (call, c_int32(x_row)))]
    width, vec = (4, 4) if tuned else (0, 1)
    lanes, runs_of_block, resident = 32, 4, 6 if item == 2 else 5
    channel_blocks, rows = ceil_div(call.channels, lanes * vec), min(call.batch, MAX_GRID_Y)
    runs = max(1, device.multiprocessors * resident // (channel_blocks * rows)) * runs_of_block
    run_length = min(max(ceil_div(call.length, 4 * runs) * 4, 8), 64)
    grid = (channel_blocks * ceil_div(call.length, run_length * runs_of_block), rows)
    arguments = (call, c_int32(x_row), c_uint32(channel_blocks), c_int32(run_length))
    name = kernel_name("conv", "prompt_kernel", T, width, vec)
    return [Launch("causal_conv1d.cu", name, grid, (lanes, runs_of_block), 0, arguments)]
