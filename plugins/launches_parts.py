"""What the ways in which MambaModel is run share: structs of products, and launches beside them."""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from typing import Any

from mamba_deploy.plugins.launches_common import BYTES, TYPES, kernel_name
from mamba_deploy.plugins.launches_ssd import ssd_update, update_defers
from mamba_deploy.plugins.launches_step import selective_update, x_proj
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.pending import Pending, is_in_place, pending_of, pending_row
from mamba_deploy.plugins.structs import (
    MambaHead,
    MambaInProj,
    MambaSelectiveUpdate,
    MambaSsdUpdate,
    MambaXProj,
    layers_of,
)

__all__ = ["ROWS", "ROW_THREADS", "defers", "embed", "head_of", "in_proj_of", "scan"]

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


def defers(c: Any, device: Device) -> bool:
    """Whether a step may leave its tokens pending."""
    if not c.heads or not c.pending or c.length > 1 or c.pending_row < pending_row(c) or not is_in_place(c):
        return False
    return update_defers(c, device) and not any(layer.ssm_state % 16 for layer in layers_of(c))


def embed(c: Any, hidden: int, may_defer: bool) -> Launch:
    """The rows of the embedding that the tokens of a call name, to an address; and marks, where it may defer."""
    vec = 16 // BYTES[c.dtype]
    vec = vec if c.width % vec == 0 and c.embedding % 16 == 0 else 1
    pointers = (c_void_p(c.input_ids), c_void_p(c.embedding), c_void_p(hidden))
    name = kernel_name("model", "embed_rows_kernel", TYPES[c.dtype], vec)
    marks = (c_void_p(c.pending_out if may_defer else None), c_void_p(c.seq_lens), c_int32(c.pending_row))
    arguments = (*pointers, c_int32(c.vocab), c_int32(c.width), *marks)
    return Launch(ROWS, name, (c.batch * c.length,), (ROW_THREADS,), 0, arguments)


def scan(c: Any, i: int, projected: int, low: int, y: int, device: Device, may_defer: bool) -> list[Launch]:
    """From a convolved row of in_proj to y, gated.

    Args:
        c: The call of MambaModel.
        i: The layer.
        projected: Address of in_proj's outputs.
        low: Address of x_proj's, in Mamba.
        y: Address of y.
        device: That of the current context.
        may_defer: See :func:`defers`, which looks at all layers.
    """
    T, S, layer = c.dtype, c.state_dtype, layers_of(c)[i]
    last = (layer.A, layer.D, layer.dt_bias, layer.ssm_state, c.seq_lens, y, layer.ssm_state_out)
    if c.heads:
        before = pending_of(c, i) if may_defer else Pending()
        of_step = (c.batch, 1, c.outputs, c.heads, c.head_dim, c.state_size, c.groups, T, S, 1, c.skip_per_channel)
        return ssd_update(MambaSsdUpdate(*of_step, c.dt_min, c.dt_max, projected, *last), 0, device, before)
    row = c.rank + 2 * c.state_size
    sizes = (c.batch, 1, c.outputs, row, c.rank, c.inner, c.state_size, T, S)
    update = MambaSelectiveUpdate(*sizes, c.norm_eps, projected, low, layer.dt_proj, *last)
    return [
        *x_proj(MambaXProj(c.batch, 1, c.outputs, c.inner, row, T, projected, layer.x_proj, low), 0, device),
        *selective_update(update, 0, device, early=True),
    ]
