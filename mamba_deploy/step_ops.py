"""The reference of the parts of a decode step, and of the model as one operator: one token a row, [B, 1, ...].

They say what :mod:`mamba_deploy.model` does of one token, cut elsewhere: each product with what stands around it. No
exported graph has them, so they are plain functions. Symbols and dtypes as in :mod:`mamba_deploy.ops`; weights of
products [inputs, outputs]; arithmetic is float32, and float64 where weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_deploy import ops
from mamba_deploy.model import rms_normalise

__all__ = ["head", "in_proj", "model", "out_proj", "selective_update", "ssd_update", "x_proj"]


def _norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """Root mean square norm over ``groups`` equal parts of the last axis."""
    normal = rms_normalise(x.unflatten(-1, (groups, -1)), eps, dtype).flatten(-2)
    return normal if weight is None else normal * weight.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the wide dtype, of ``x`` rounded to that of the weight."""
    dtype = ops.compute_dtype(weight)
    y = x.to(weight.dtype).to(dtype) @ weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def in_proj(
    hidden: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    seq_lens: Tensor,
    eps: float,
    conv_first: int,
) -> tuple[Tensor, Tensor]:
    """MambaInProj: norm, product, and the causal convolution with silu of some columns.

    Args:
        hidden: [B, 1, d] float32, the residual stream.
        norm_weight: [d] float32.
        weight: [d, M] T.
        bias: [M] T, or None.
        conv_weight: [C, K] T.
        conv_bias: [C] T, or None.
        conv_state: [B, C, K-1] T, oldest first.
        seq_lens: [B]; with 0 the state stays as it is.
        eps: Of the norm.
        conv_first: The column where the C begin.

    Returns:
        [B, 1, M] T, and the new conv state. A row that reads nothing has zeros in the columns that are convolved.
    """
    projected = _product(_norm(hidden, norm_weight, eps, ops.compute_dtype(weight)), weight, bias).to(weight.dtype)
    own = slice(conv_first, conv_first + len(conv_weight))
    x, state = ops.causal_conv1d(projected[..., own].contiguous(), conv_weight, conv_bias, conv_state, seq_lens, "silu")
    return torch.cat([projected[..., : own.start], x, projected[..., own.stop :]], dim=-1), state


def x_proj(x: Tensor, weight: Tensor) -> Tensor:
    """MambaXProj: [B, 1, X] T, of which the first D count, times [D, E] T -> [B, 1, E] T."""
    return _product(x[..., : len(weight)], weight).to(weight.dtype)


def selective_update(
    xz: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """MambaSelectiveUpdate: ``ops.selective_scan`` with dt's projection in it.

    Args:
        xz: [B, 1, 2 D] T: x, convolved, and the gate.
        low: [B, 1, R + 2 N] T: what dt is projected from, B, C.
        dt_weight: [R, D] T.
        A: [D, N] float32.
        D: [D] float32, or None.
        dt_bias: [D] float32, or None.
        ssm_state: [B, D, N] S.
        seq_lens: [B].
        norm_eps: Of a norm without weights of each part of low (Falcon-Mamba); negative for none.

    Returns:
        y [B, 1, D] T, and the new state.
    """
    N = A.shape[1]
    parts = low.split([len(dt_weight), N, N], dim=-1)
    if norm_eps >= 0:
        parts = tuple(_norm(part, None, norm_eps, ops.compute_dtype(dt_weight)).to(low.dtype) for part in parts)
    x, z = (part.contiguous() for part in xz.chunk(2, dim=-1))
    dt, (B, C) = _product(parts[0], dt_weight).to(xz.dtype), (part.contiguous() for part in parts[1:])
    return ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, True)


def ssd_update(
    projected: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    n_groups: int,
) -> tuple[Tensor, Tensor]:
    """MambaSsdUpdate: ``ops.ssd_scan`` of a row of the projection, gated.

    Args:
        projected: [B, 1, 2 H P + 2 G N + H] T: z, x, B, C and dt side by side; x, B and C convolved.
        A: [H] float32.
        D: [H] or [H, P] float32, or None.
        dt_bias: [H] float32, or None.
        ssm_state: [B, H, P, N] S.
        seq_lens: [B].
        dt_softplus: As in ``ops.ssd_scan``, like the next three.
        dt_min: Lower limit of the step.
        dt_max: Upper limit.
        n_groups: G.

    Returns:
        y silu(z) [B, 1, H P] T, and the new state.
    """
    heads, head_dim, states = ssm_state.shape[1:]
    width = n_groups * states
    sizes = [heads * head_dim, heads * head_dim, width, width, heads]
    z, x, B, C, dt = (part.contiguous() for part in projected.split(sizes, dim=-1))
    dtype = ops.compute_dtype(projected)
    y, state = ops.ssd_scan(
        x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), D, dt_bias, ssm_state, seq_lens,
        dt_softplus, dt_min, dt_max, n_groups, 256,
    )  # fmt: skip
    return (y * F.silu(z.to(dtype))).to(projected.dtype), state


def out_proj(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    eps: float,
    n_groups: int,
) -> Tensor:
    """MambaOutProj: norm in groups, product, sum.

    Args:
        x: [B, 1, D] T.
        norm_weight: [D] float32, or None for no norm.
        weight: [D, d] T.
        bias: [d] T, or None.
        residual: [B, 1, d] float32.
        eps: Of the norm.
        n_groups: Of the norm.

    Returns:
        residual + norm(x) weight + bias [B, 1, d] float32, the product rounded to T.
    """
    normal = x if norm_weight is None else _norm(x, norm_weight, eps, ops.compute_dtype(weight), n_groups)
    return residual + _product(normal, weight, bias).to(weight.dtype).to(residual.dtype)


def head(hidden: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """MambaHead: [B, 1, d] float32, [d] float32, [V, d] T -> logits [B, V] float32."""
    return _product(_norm(hidden, norm_weight, eps, ops.compute_dtype(weight)), weight.t())[:, 0].to(hidden.dtype)


# Of a layer, what may be absent.
_OPTIONAL = ("in_proj_bias", "conv_bias", "x_proj", "dt_proj", "D", "dt_bias", "gate_norm", "out_proj_bias")


def model(
    input_ids: Tensor,
    seq_lens: Tensor,
    embedding: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor | None,
    layers: Sequence[Mapping[str, Tensor | None]],
    eps: float = 1e-5,
    norm_eps: float = -1.0,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    n_groups: int = 1,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """MambaModel and Mamba2Model of one token a row.

    Args:
        input_ids: [B, 1].
        seq_lens: [B]; with 0 the states stay as they are.
        embedding: [V, d] T.
        norm_weight: [d] float32, of the last norm.
        head_weight: [V, d] T, or None where it is the embedding.
        layers: Of each layer the arrays of ``MambaLayer`` in ``plugins/mamba_kernels.h`` that come in, by name.
        eps: Of the norms.
        norm_eps: As in :func:`selective_update`.
        dt_min: As in :func:`ssd_update`, like the next two.
        dt_max: Upper limit.
        n_groups: G.

    Returns:
        logits [B, V] float32, and of each layer the new states.
    """
    ids = input_ids.long().clamp(0, len(embedding) - 1)
    hidden, states = embedding[ids].to(ops.compute_dtype(embedding)), []
    for layer in layers:
        w: dict[str, Any] = {**dict.fromkeys(_OPTIONAL), **layer}
        first = 0 if w["x_proj"] is not None else len(w["out_proj"])
        conv = (w["conv_weight"], w["conv_bias"], w["conv_state"], seq_lens)
        projected, conv_state = in_proj(hidden, w["norm_weight"], w["in_proj"], w["in_proj_bias"], *conv, eps, first)
        scan = (w["A"], w["D"], w["dt_bias"], w["ssm_state"], seq_lens)
        if w["x_proj"] is not None:
            low = x_proj(projected, w["x_proj"])
            y, ssm_state = selective_update(projected, low, w["dt_proj"], *scan, norm_eps)
        else:
            y, ssm_state = ssd_update(projected, *scan, True, dt_min, dt_max, n_groups)
        groups = 1 if w["gate_norm"] is None else n_groups
        hidden = out_proj(y, w["gate_norm"], w["out_proj"], w["out_proj_bias"], hidden, eps, groups)
        states.append((conv_state, ssm_state))
    return head(hidden, norm_weight, embedding if head_weight is None else head_weight, eps), states
