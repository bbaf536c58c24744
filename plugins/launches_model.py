"""Launches of ``model.cu``: the choice, and the chain of one token a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mamba_deploy.plugins import launches_parts, launches_prompt, launches_rows, launches_token
from mamba_deploy.plugins.launches_common import BYTES, ceil_div
from mamba_deploy.plugins.launches_step import head, in_proj, out_proj, workspace_floats
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.pending import settle
from mamba_deploy.plugins.structs import MambaHead, MambaInProj, MambaOutProj, layers_of

__all__ = ["model", "workspace_bytes"]

_CHAIN_ROWS = 2


def model(call: Any, workspace: int, device: Device) -> list[Any]:
    """As the launcher in ``model.cu``: call is its struct, workspace an address."""
    if launches_token.is_token(call, device):
        plan: Callable[[Any, int, Device], list[Any]] = launches_token.token_of_row
    else:
        plan = launches_prompt.prompt if _is_wide(call) or launches_rows.is_rows(call, device) else _chain
    return [*settle(call), *plan(call, workspace, device)]


def workspace_bytes(call: Any) -> int:
    """As ``mamba_model_workspace`` in C: enough for fewer tokens too, and for one of one row."""
    of_chain = max(_buffers(call, 0).bytes, launches_token.workspace_bytes(call))
    if not _is_wide(call) and not launches_rows.are_sizes(call):
        return of_chain
    one = type(call).from_buffer_copy(call)
    one.length = 1
    return max(of_chain, launches_prompt.workspace_bytes(call), launches_prompt.workspace_bytes(one))


def _is_wide(c: Any) -> bool:
    """Whether products are cuBLAS's."""
    work = c.batch * c.width**2
    return bool(c.length > 1 or (c.batch > _CHAIN_ROWS and work >= (12 if c.heads else 48) << 20))


class _Buffers(NamedTuple):
    """Addresses in the workspace, and the bytes of it."""

    hidden: tuple[int, int]
    projected: int
    low: int
    y: int
    part: int
    bytes: int


def _rounded(size: int) -> int:
    return ceil_div(size, 256) * 256


def _buffers(c: Any, workspace: int) -> _Buffers:
    item, low = BYTES[c.dtype], 0 if c.heads else c.rank + 2 * c.state_size
    places = [workspace]
    for width, size in ((c.width, 4), (c.width, 4), (c.outputs, item), (low, item), (c.inner, item)):
        places.append(places[-1] + _rounded(c.batch * width * size))
    parts = (
        ("in_proj", MambaInProj(batch=c.batch, width=c.width, dtype=c.dtype)),
        ("out_proj", MambaOutProj(batch=c.batch, channels=c.inner, dtype=c.dtype)),
        ("head", MambaHead(batch=c.batch, width=c.width, dtype=c.dtype)),
    )
    of_parts = max(_rounded(4 * workspace_floats(name, part)) for name, part in parts)
    first, second, projected, low_at, y, part = places
    return _Buffers((first, second), projected, low_at, y, part, part + of_parts - workspace)


def _chain(c: Any, workspace: int, device: Device) -> list[Launch]:
    at = _buffers(c, workspace)
    may_defer = launches_parts.defers(c, device)
    launches = [launches_parts.embed(c, at.hidden[0], may_defer)]

    def run(plan: Callable[[Any, int, Device], list[Launch]], part: Any) -> None:
        launches.extend(plan(part, at.part, device))

    for i, layer in enumerate(layers_of(c)):
        before, after = at.hidden[i % 2], at.hidden[(i + 1) % 2]
        run(in_proj, launches_parts.in_proj_of(c, layer, before, at.projected))
        launches += launches_parts.scan(c, i, at.projected, at.low, at.y, device, may_defer)
        groups = c.groups if layer.gate_norm else 1
        run(
            out_proj,
            MambaOutProj(
                c.batch, 1, c.inner, c.width, groups, c.dtype, c.eps, at.y, layer.gate_norm, layer.out_proj,
                layer.out_proj_bias, before, after,
            ),
        )  # fmt: skip
    run(head, launches_parts.head_of(c, at.hidden[c.layers % 2]))
    return launches
