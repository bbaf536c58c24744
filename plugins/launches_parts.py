"""What the ways in which MambaModel is run share: structs of products, and launches beside them."""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import BYTES, TYPES, kernel_name
from mamba_deploy.plugins.launches_ssd import ssd_update
from mamba_deploy.plugins.launches_step import selective_update, x_proj
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.structs import MambaHead, MambaInProj, MambaSelectiveUpdate, MambaSsdUpdate, MambaXProj

__all__ = ["ROWS", "ROW_THREADS", "embed", "head_of", "in_proj_of", "scan"]

ROWS, ROW_THREADS = "prompt_rows.cuh", 128


def in_proj_of(c: Any, layer: Any, hidden: int, y: int) -> MambaInProj:
    """Of a layer of a call of MambaModel, between two addresses."""
    return MambaInProj(
        c.batch, 1, c.width, c.outputs, c.channels, c.conv_width, c.dtype, c.inner if c.heads else 0, c.eps, hidden,
        layer.norm_weight, layer.in_proj, layer.in_proj_bias, layer.conv_weight, layer.conv_bias, layer.conv_state,
        c.seq_lens, y, layer.conv_state_out,
    )  # fmt: skip


def head_of(c: Any, hidden: int) -> MambaHead:
    """Of a call of MambaModel, from an address."""
    return MambaHead(c.batch, 1, c.width, c.vocab, c.dtype, c.eps, hidden, c.norm_weight, c.head, c.logits)


def embed(c: Any, hidden: int) -> Launch:
    """The rows of the embedding that the tokens of a call of MambaModel name, to an address."""
    vec = 16 // BYTES[c.dtype]
    vec = vec if c.width % vec == 0 and c.embedding % 16 == 0 else 1
    pointers = (c_void_p(c.input_ids), c_void_p(c.embedding), c_void_p(hidden))
    name = kernel_name("model", "embed_rows_kernel", TYPES[c.dtype], vec)
    return Launch(ROWS, name, (c.batch * c.length,), (ROW_THREADS,), 0, (*pointers, c_int32(c.vocab), c_int32(c.width)))


def scan(c: Any, layer: Any, projected: int, low: int, y: int, device: Device) -> list[Launch]:
    """From a convolved row of in_proj to y, gated.

    Args:
        c: The call of MambaModel.
        layer: The MambaLayer.
        projected: Address of in_proj's outputs.
        low: Address of x_proj's, in Mamba.
        y: Address of y.
        device: That of the current context.
    """
    T, S = c.dtype, c.state_dtype
    last = (layer.A, layer.D, layer.dt_bias, layer.ssm_state, c.seq_lens, y, layer.ssm_state_out)
    if c.heads:
        of_step = (c.batch, 1, c.outputs, c.heads, c.head_dim, c.state_size, c.groups, T, S, 1, c.skip_per_channel)
        return ssd_update(MambaSsdUpdate(*of_step, c.dt_min, c.dt_max, projected, *last), 0, device)
    row = c.rank + 2 * c.state_size
    sizes = (c.batch, 1, c.outputs, row, c.rank, c.inner, c.state_size, T, S)
    update = MambaSelectiveUpdate(*sizes, c.norm_eps, projected, low, layer.dt_proj, *last)
    return [
        *x_proj(MambaXProj(c.batch, 1, c.outputs, c.inner, row, T, projected, layer.x_proj, low), 0, device),
        *selective_update(update, 0, device, early=True),
    ]
