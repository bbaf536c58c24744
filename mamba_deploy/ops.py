"""The custom operators, as torch.library ops whose body is the reference implementation.

Symbols: B batch, L tokens, D d_inner, N d_state, K d_conv, C conv channels, H heads, P head_dim, G groups.
``T`` is the activation dtype, ``S`` the state dtype; arithmetic is float32 whatever they are, and float64 when
``x`` is float64, which tests use. Token-major throughout. In every op row b uses its first ``seq_lens[b]`` tokens:
past them ``y`` is zero, and what stands there, NaN included, is never looked at; with 0 tokens the state leaves as
it came in.

The ops are differentiable by recomputing the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d", "compute_dtype", "last_token", "selective_scan", "ssd_scan"]

# Tokens handled at once. Both scans are exact for any value; these were the fastest on a two-core CPU.
_SELECTIVE_SCAN_CHUNK = 32
_SSD_CHUNK = 64


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the reference computes in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _valid(seq_lens: Tensor, length: int) -> Tensor:
    """[B, L] bool: the tokens a row uses."""
    return torch.arange(length, device=seq_lens.device) < seq_lens[:, None]


def _masked(x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [B, L, ...] with everything past a row's end set to zero."""
    return torch.where(valid[:, :, None], x.to(dtype), 0)


def _step_size(
    dt: Tensor, bias: Tensor | None, valid: Tensor, softplus: bool, low: float, high: float, dtype: torch.dtype
) -> Tensor:
    """Delta of the papers [B, L, ...]: bias, softplus and limits applied; 0 past a row's end, which keeps the state."""
    dt = _masked(dt, valid, dtype)  # before softplus, or NaN past a row's end would reach the gradient of the bias
    if bias is not None:
        dt = dt + bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    return _masked(dt.clamp(low, high), valid, dtype)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, seq_lens: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}: expected 'silu' or 'none'")
    length, width = x.shape[1], weight.shape[1]
    dtype = compute_dtype(x)
    valid = _valid(seq_lens, length)
    window = torch.cat([conv_state.transpose(1, 2), x], dim=1)  # [B, K-1+L, C]
    known = torch.cat([valid.new_ones(len(x), width - 1), valid], dim=1)
    padded = _masked(window, known, dtype).transpose(1, 2)
    y = F.conv1d(padded, weight.to(dtype)[:, None], None if bias is None else bias.to(dtype), groups=len(weight))
    if activation == "silu":
        y = F.silu(y)
    y = _masked(y.transpose(1, 2), valid, dtype)
    newest = seq_lens.long()[:, None] + torch.arange(width - 1, device=x.device)  # [B, K-1]: the last K-1 used tokens
    state_out = window.gather(1, newest[:, :, None].expand(-1, -1, x.shape[2])).transpose(1, 2)
    return y.to(x.dtype).contiguous(), state_out.contiguous()


def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    valid = _valid(seq_lens, x.shape[1])
    delta = _step_size(dt, dt_bias, valid, dt_softplus, -math.inf, math.inf, dtype)
    u, B, C = _masked(x, valid, dtype), _masked(B, valid, dtype), _masked(C, valid, dtype)
    A = A.to(dtype)
    h = ssm_state.to(dtype)  # [B, D, N]
    outputs = []
    for tokens in _chunks(x.shape[1], _SELECTIVE_SCAN_CHUNK):
        decay = torch.exp(delta[:, tokens, :, None] * A)  # [B, t, D, N]
        drive = (delta[:, tokens] * u[:, tokens])[..., None] * B[:, tokens, None, :]
        states = []
        for decay_t, drive_t in zip(decay.unbind(1), drive.unbind(1), strict=True):
            h = torch.addcmul(drive_t, decay_t, h)
            states.append(h)
        outputs.append((torch.stack(states, 1) @ C[:, tokens, :, None])[..., 0])
    y = torch.cat(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(_masked(z, valid, dtype))
    return _masked(y, valid, dtype).to(x.dtype), _as_state(h, ssm_state, seq_lens)


def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    n_groups: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    batch, length, _ = x.shape
    heads, head_dim, d_state = ssm_state.shape[1:]
    dtype = compute_dtype(x)
    valid = _valid(seq_lens, length)
    delta = _step_size(dt, dt_bias, valid, dt_softplus, dt_min, dt_max, dtype).transpose(1, 2)  # [B, H, L]
    u = _masked(x, valid, dtype).unflatten(2, (heads, head_dim)).transpose(1, 2)  # [B, H, L, P]

    def per_head(states: Tensor) -> Tensor:  # [B, L, G * N] -> [B, H, L, N]
        grouped = _masked(states, valid, dtype).unflatten(2, (n_groups, d_state)).transpose(1, 2)
        return grouped.repeat_interleave(heads // n_groups, dim=1)

    B, C = per_head(B), per_head(C)
    h = ssm_state.to(dtype)  # [B, H, P, N]
    outputs = []
    for tokens in _chunks(length, min(chunk_size, _SSD_CHUNK)):
        log_decay = delta[:, :, tokens] * A.to(dtype)[:, None]  # [B, H, t]
        within = torch.exp(_segment_sums(log_decay))  # [B, H, t, t]: decay from token s to token t >= s, else 0
        from_start = torch.exp(log_decay.cumsum(-1))[..., None]
        drive = delta[:, :, tokens, None] * u[:, :, tokens]
        b, c = B[:, :, tokens], C[:, :, tokens]
        outputs.append((c @ b.mT * within) @ drive + from_start * (c @ h.mT))
        h = from_start[:, :, -1:] * h + (drive * within[:, :, -1, :, None]).mT @ b
    y = torch.cat(outputs, dim=2)
    if D is not None:
        y = y + D.to(dtype).reshape(heads, 1, -1) * u
    y = _masked(y.transpose(1, 2).reshape(batch, length, heads * head_dim), valid, dtype)
    return y.to(x.dtype), _as_state(h, ssm_state, seq_lens)


def _last_token(x: Tensor, seq_lens: Tensor) -> Tensor:
    last = (seq_lens.long() - 1).clamp(min=0)
    picked = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
    return torch.where(seq_lens[:, None] > 0, picked, 0)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _segment_sums(a: Tensor) -> Tensor:
    """[..., t, t]: the sum of a[s+1 .. t], -inf where s > t.

    Summed term by term, not as a difference of two cumulative sums, which would cancel when one step forgets
    everything (a = -1e4) and its neighbours do not.
    """
    length = a.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=a.device).tril(-1)
    sums = torch.where(lower, a[..., :, None], 0).cumsum(-2)
    return sums.masked_fill(~(lower | torch.eye(length, dtype=torch.bool, device=a.device)), -math.inf)


def _as_state(h: Tensor, ssm_state: Tensor, seq_lens: Tensor) -> Tensor:
    """In the dtype the state came in; never the very tensor that came in.

    A row of length 0 gets back what it gave: 1 * state + 0 would turn its -0.0 into 0.0.
    """
    used = (seq_lens > 0).view(-1, *(1,) * (h.dim() - 1))
    return torch.where(used, h.to(ssm_state.dtype), ssm_state)


def _differentiable(op: torch.library.CustomOpDef, body: Callable[..., object]) -> None:
    """Give an op the gradient of its body, by running the body again under autograd."""

    def remember(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.constants = [None if isinstance(v, Tensor) else (v,) for v in inputs]

    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            inputs = [
                next(saved).detach().requires_grad_(needed[i]) if c is None else c[0]
                for i, c in enumerate(ctx.constants)
            ]
            outputs = body(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [v for v, n in zip(inputs, needed, strict=True) if n]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if n else None for n in needed)

    op.register_autograd(backward, setup_context=remember)


@torch.library.custom_op("mamba_deploy::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, seq_lens: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time that carries its last K-1 inputs (ONNX ``MambaCausalConv1d``).

    y[t, c] = activation(bias[c] + sum over k of weight[c, k] * x[t - K + 1 + k, c]), where x before this call is
    ``conv_state``. The maths of ``causal_conv1d_fn`` of Dao-AILab/causal-conv1d.

    Args:
        x: [B, L, C] T.
        weight: [C, K] T.
        bias: [C] T, or None.
        conv_state: [B, C, K-1] T, oldest first.
        seq_lens: [B] integer, 0 to L.
        activation: ``silu`` or ``none``.

    Returns:
        y [B, L, C] T and the new conv_state [B, C, K-1] T.

    Raises:
        ValueError: The activation is another one.
    """
    return _causal_conv1d(x, weight, bias, conv_state, seq_lens, activation)


@causal_conv1d.register_fake
def _(x, weight, bias, conv_state, seq_lens, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(conv_state)


@torch.library.custom_op("mamba_deploy::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu and Dao 2023, equation 2 with the discretisation of section 3.2; ONNX
    ``MambaSelectiveScan``).

    delta = softplus(dt + dt_bias);
    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] x[t];
    y[t] = (C[t] . h[t] + D x[t]) * silu(z[t]).
    The maths of ``selective_scan_ref`` of state-spaces/mamba.

    Args:
        x: [B, L, D] T.
        dt: [B, L, D] T, before bias and softplus.
        A: [D, N] float32, negative: -exp(A_log).
        B: [B, L, N] T.
        C: [B, L, N] T.
        D: [D] float32, or None for no skip.
        z: [B, L, D] T, or None for no gate.
        dt_bias: [D] float32, or None.
        ssm_state: [B, D, N] S.
        seq_lens: [B] integer, 0 to L.
        dt_softplus: Apply softplus to dt.

    Returns:
        y [B, L, D] T and the new ssm_state [B, D, N] S.
    """
    return _selective_scan(x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, dt_softplus)


@selective_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, dt_softplus):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(ssm_state)


@torch.library.custom_op("mamba_deploy::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    seq_lens: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    n_groups: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan through the chunked state-space dual form (Dao and Gu 2024, section 6; ONNX ``MambaSsdScan``).

    delta = clamp(softplus(dt + dt_bias), dt_min, dt_max), a scalar per head and token;
    h[t] = exp(delta[t] A) h[t-1] + delta[t] x[t] B[t]^T;  y[t] = h[t] C[t] + D x[t].
    The maths of ``ssd_minimal_discrete`` and ``selective_state_update`` of state-spaces/mamba.

    Args:
        x: [B, L, H * P] T.
        dt: [B, L, H] T, before bias, softplus and limits.
        A: [H] float32, negative.
        B: [B, L, G * N] T.
        C: [B, L, G * N] T.
        D: [H] or [H, P] float32, or None.
        dt_bias: [H] float32, or None.
        ssm_state: [B, H, P, N] S.
        seq_lens: [B] integer, 0 to L.
        dt_softplus: Apply softplus to dt.
        dt_min: Lower bound of delta.
        dt_max: Upper bound of delta; may be infinite.
        n_groups: G; heads h share the B and C of group h // (H / G).
        chunk_size: A hint, the longest chunk; the answer does not depend on it.

    Returns:
        y [B, L, H * P] T and the new ssm_state [B, H, P, N] S.
    """
    return _ssd_scan(x, dt, A, B, C, D, dt_bias, ssm_state, seq_lens, dt_softplus, dt_min, dt_max, n_groups, chunk_size)


@ssd_scan.register_fake
def _(x, dt, A, B, C, D, dt_bias, ssm_state, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(ssm_state)


@torch.library.custom_op("mamba_deploy::last_token", mutates_args=())
def last_token(x: Tensor, seq_lens: Tensor) -> Tensor:
    """Row b's token seq_lens[b] - 1, zeros where seq_lens[b] is 0 (ONNX ``MambaLastToken``).

    Args:
        x: [B, L, d] T.
        seq_lens: [B] integer, 0 to L.

    Returns:
        [B, d] T.
    """
    return _last_token(x, seq_lens)


@last_token.register_fake
def _(x, seq_lens):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[2])


for _op, _body in (
    (causal_conv1d, _causal_conv1d),
    (selective_scan, _selective_scan),
    (ssd_scan, _ssd_scan),
    (last_token, _last_token),
):
    _differentiable(_op, _body)
