"""The four ops as plain float64 recurrences, a row and a token at a time: what ops and kernels are compared with.

Written from the equations of the papers (Gu and Dao 2023, equation 2 with section 3.2; Dao and Gu 2024, section 2)
in NumPy alone; nothing is shared with ``mamba_deploy.ops``, not even the chunking. Arguments come in the order of
those ops, as anything NumPy reads or as torch tensors, and are never written to. A row's tokens past ``seq_lens`` are
never read; there y is zero.

Symbols: B batch, L tokens, C conv channels, K d_conv, D d_inner, N d_state, H heads, P head_dim, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["causal_conv1d", "error_bound", "last_token", "magnitude", "selective_scan", "ssd_scan"]

Array = NDArray[np.float64]
Argument = Any  # an array, a torch tensor on any device, or None


def causal_conv1d(
    x: Argument, weight: Argument, bias: Argument, conv_state: Argument, seq_lens: Argument, activation: str
) -> tuple[Array, Array]:
    """x [B,L,C], weight [C,K], bias? [C], conv_state [B,C,K-1] -> y [B,L,C], conv_state."""
    x, weight, bias, state = _float64(x), _float64(weight), _float64(bias), _float64(conv_state).copy()
    y = np.zeros_like(x)
    for b, used in enumerate(_lengths(seq_lens)):
        for t in range(used):
            window = np.concatenate([state[b], x[b, t][:, None]], axis=1)
            value = (window * weight).sum(axis=1)
            if bias is not None:
                value = value + bias
            y[b, t] = _silu(value) if activation == "silu" else value
            state[b] = window[:, 1:]
    return y, state


def selective_scan(
    x: Argument,
    dt: Argument,
    A: Argument,
    B: Argument,
    C: Argument,
    D: Argument,
    z: Argument,
    dt_bias: Argument,
    ssm_state: Argument,
    seq_lens: Argument,
    dt_softplus: bool,
) -> tuple[Array, Array]:
    """x, dt, z? [B,L,D], A [D,N], B, C [B,L,N], D?, dt_bias? [D], ssm_state [B,D,N] -> y [B,L,D], ssm_state."""
    x, dt, A, B, C, D, z, dt_bias = map(_float64, (x, dt, A, B, C, D, z, dt_bias))
    state = _float64(ssm_state).copy()
    y = np.zeros_like(x)
    for b, used in enumerate(_lengths(seq_lens)):
        for t in range(used):
            delta = _delta(dt[b, t], dt_bias, dt_softplus)
            state[b] = np.exp(delta[:, None] * A) * state[b] + np.outer(delta * x[b, t], B[b, t])
            value = state[b] @ C[b, t]
            if D is not None:
                value = value + D * x[b, t]
            if z is not None:
                value = value * _silu(z[b, t])
            y[b, t] = value
    return y, state


def ssd_scan(
    x: Argument,
    dt: Argument,
    A: Argument,
    B: Argument,
    C: Argument,
    D: Argument,
    dt_bias: Argument,
    ssm_state: Argument,
    seq_lens: Argument,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    n_groups: int,
    chunk_size: int = 0,
) -> tuple[Array, Array]:
    """x [B,L,H*P], dt [B,L,H], A [H], B, C [B,L,G*N], D? [H] or [H,P], dt_bias? [H], ssm_state [B,H,P,N]
    -> y [B,L,H*P], ssm_state. The recurrence knows no chunks, so ``chunk_size`` is not looked at.
    """
    x, dt, A, B, C, D, dt_bias = map(_float64, (x, dt, A, B, C, D, dt_bias))
    state = _float64(ssm_state).copy()
    heads, head_dim, d_state = state.shape[1:]
    y = np.zeros_like(x)
    for b, used in enumerate(_lengths(seq_lens)):
        for t in range(used):
            delta = np.clip(_delta(dt[b, t], dt_bias, dt_softplus), dt_min, dt_max)
            for h in range(heads):
                channels = slice(h * head_dim, (h + 1) * head_dim)
                group = h // (heads // n_groups)
                states = slice(group * d_state, (group + 1) * d_state)
                u = x[b, t, channels]
                state[b, h] = np.exp(delta[h] * A[h]) * state[b, h] + np.outer(delta[h] * u, B[b, t, states])
                y[b, t, channels] = state[b, h] @ C[b, t, states]
                if D is not None:
                    y[b, t, channels] += D[h] * u
    return y, state


def last_token(x: Argument, seq_lens: Argument) -> Array:
    """x [B,L,d] -> [B,d]."""
    x = _float64(x)
    y = np.zeros((x.shape[0], x.shape[2]))
    for b, used in enumerate(_lengths(seq_lens)):
        if used:
            y[b] = x[b, used - 1]
    return y


def magnitude(op: Callable[..., tuple[Array, Array]], *args: Argument) -> tuple[Array, Array]:
    """The sums of one of the ops above over absolute values: what its rounding errors are relative to.

    For a result computed as a sum of products, the error bound of numerical analysis is a number of roundings times
    this (Higham 2002, section 3.1), not times the result, in which the terms may have cancelled. Time steps keep
    their sign, so they must be positive after softplus and limits.
    """
    signed = {causal_conv1d: (0, 1, 2, 3), selective_scan: (0, 3, 4, 5, 8), ssd_scan: (0, 3, 4, 5, 7)}[op]
    taken = [np.abs(_float64(a)) if i in signed and a is not None else a for i, a in enumerate(args)]
    if op is causal_conv1d:
        taken[-1] = "none"  # |silu(v)| <= |v|, and its slope is below 1.1
    y, state = op(*taken)
    return np.abs(y), state


def error_bound(reference: Array, size: Array, roundings: int, compute: float, storage: float, tiny: float) -> Array:
    """How far a computed value may be from ``reference``.

    Args:
        reference: The float64 result.
        size: Its :func:`magnitude`.
        roundings: How many roundings lie one after the other on the longest path to a value.
        compute: Unit roundoff of the arithmetic.
        storage: Unit roundoff of the dtype the result is stored in.
        tiny: The smallest subnormal number of that dtype.

    Returns:
        storage * |reference| + 5 * sqrt(roundings) * compute * size + tiny: one rounding on storing, and the
        probabilistic bound of Higham and Mary 2019, which is sqrt(n) times a small constant where the
        worst case is n.
    """
    return storage * np.abs(reference) + 5 * np.sqrt(roundings) * compute * size + tiny


def _float64(value: Argument) -> Any:
    if value is None:
        return None
    if hasattr(value, "detach"):  # a torch tensor; NumPy has no bfloat16
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _lengths(seq_lens: Argument) -> list[int]:
    return [int(n) for n in seq_lens]


def _delta(dt: Array, bias: Array | None, softplus: bool) -> Array:
    if bias is not None:
        dt = dt + bias
    return np.logaddexp(0.0, dt) if softplus else dt


def _silu(v: Array) -> Array:
    return v * np.exp(-np.logaddexp(0.0, -v))
