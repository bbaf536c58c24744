"""Random models of MambaModel, what they compute in float64, and the structs of calls."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_deploy import ops
from mamba_deploy.plugins.structs import MambaLayer, MambaModel

F32 = torch.float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # by their numbers in mamba_kernels.h


class Sizes(NamedTuple):
    """Of a model: Mamba where heads is 0, else Mamba-2."""

    width: int = 64  # d
    inner: int = 128  # D
    states: int = 16  # N
    rank: int = 8  # R
    heads: int = 0  # H
    groups: int = 1  # G
    layers: int = 2
    vocab: int = 104
    taps: int = 4  # K
    norm_eps: float = -1.0
    gate_norm: bool = True
    bias: bool = False
    skip: int = 1  # D: none, [H], or [H, P]
    given: bool = True  # biases of the convolution and of dt

    @property
    def head_dim(self) -> int:
        return self.inner // self.heads if self.heads else 0

    @property
    def channels(self) -> int:
        return self.inner + (2 * self.groups * self.states if self.heads else 0)

    @property
    def outputs(self) -> int:
        return self.inner + self.channels + self.heads

    @property
    def eps(self) -> float:
        return 1e-5


class Model:
    """Weights, states and tokens on the CPU: ``fixed`` and ``layers`` by the names of the structs' fields."""

    def __init__(
        self,
        sizes: Sizes,
        B: int,
        L: int,
        T: torch.dtype,
        S: torch.dtype = F32,
        seed: int = 0,
        all_logits: bool = False,
        dt_limits: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        self.sizes, self.B, self.L, self.T, self.S, self.all_logits = sizes, B, L, T, S, all_logits
        self.dt_limits = dt_limits
        self.generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, L + 1, (B,), generator=self.generator, dtype=torch.int32)
        lengths[0] = L
        if B > 2:
            lengths[2] = 0
        s = sizes
        self.fixed = {
            "input_ids": torch.randint(0, s.vocab, (B, L), generator=self.generator, dtype=torch.int32),
            "seq_lens": lengths,
            "embedding": self._normal(s.vocab, s.width),
            "norm_weight": self._norm(s.width),
            "head": self._normal(s.vocab, s.width, scale=s.width**-0.5),
        }
        self.layers = [self._layer() for _ in range(s.layers)]

    def _normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(dtype or self.T)

    def _norm(self, width: int) -> Tensor:
        return 1 + self._normal(width, dtype=F32, scale=0.3)

    def _weight(self, inputs: int, outputs: int) -> Tensor:
        return self._normal(inputs, outputs, scale=inputs**-0.5)

    def _layer(self) -> dict[str, Tensor | None]:
        s, B = self.sizes, self.B
        per_head = (s.heads,) if s.heads else (s.inner,)
        skip = [None, per_head, (s.heads, s.head_dim)][s.skip]
        state = (B, s.heads, s.head_dim, s.states) if s.heads else (B, s.inner, s.states)
        return {
            "norm_weight": self._norm(s.width),
            "in_proj": self._weight(s.width, s.outputs),
            "in_proj_bias": self._normal(s.outputs) if s.bias else None,
            "conv_weight": self._normal(s.channels, s.taps, scale=0.5),
            "conv_bias": self._normal(s.channels) if s.given else None,
            "conv_state": self._normal(B, s.channels, s.taps - 1),
            "x_proj": None if s.heads else self._weight(s.inner, s.rank + 2 * s.states),
            "dt_proj": None if s.heads else self._weight(s.rank, s.inner),
            "A": -4 * torch.rand(*(per_head if s.heads else (s.inner, s.states)), generator=self.generator),
            "D": None if skip is None else self._normal(*skip, dtype=F32),
            "dt_bias": self._normal(*per_head, dtype=F32) if s.given else None,
            "ssm_state": self._normal(*state, dtype=self.S),
            "gate_norm": self._norm(s.inner) if s.heads and s.gate_norm else None,
            "out_proj": self._weight(s.inner, s.width),
            "out_proj_bias": self._normal(s.width) if s.bias else None,
        }

    def results(self, wide: torch.dtype | None = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits and states by the reference: in float64, or as the plain graph computes in T where wide is None."""
        s, lengths = self.sizes, self.fixed["seq_lens"]

        def given(value: Tensor | None) -> Any:
            return value.to(wide) if wide and value is not None and value.is_floating_point() else value

        def rounded(value: Tensor) -> Tensor:
            return value.to(wide or self.T)

        def norm(x: Tensor, weight: Tensor | None, eps: float, groups: int = 1) -> Tensor:
            parts = x.to(wide or F32).unflatten(-1, (groups, -1))
            normal = (parts * torch.rsqrt((parts * parts).mean(-1, keepdim=True) + eps)).flatten(-2)
            return rounded(normal if weight is None else normal * given(weight))

        def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            y = x.to(wide or F32) @ w.to(wide or F32)
            return rounded(y if bias is None else y + bias.to(wide or F32))

        h = self.fixed["embedding"][self.fixed["input_ids"].long()].to(wide or F32)
        convs, ssms = [], []
        for layer in self.layers:
            v = {name: given(value) for name, value in layer.items()}
            projected = product(norm(h, v["norm_weight"], s.eps), v["in_proj"], v["in_proj_bias"])
            first = s.inner if s.heads else 0
            x, conv = ops.causal_conv1d(
                projected[..., first : first + s.channels].contiguous(), v["conv_weight"], v["conv_bias"],
                v["conv_state"], lengths, "silu",
            )  # fmt: skip
            if s.heads:
                x, B, C = (p.contiguous() for p in x.split([s.inner, *2 * [s.groups * s.states]], dim=-1))
                dt = projected[..., s.inner + s.channels :].contiguous()
                y, ssm = ops.ssd_scan(
                    x, dt, v["A"], B, C, v["D"], v["dt_bias"], v["ssm_state"], lengths, True, *self.dt_limits,
                    s.groups, 256,
                )  # fmt: skip
                y = y.to(wide or F32) * torch.nn.functional.silu(projected[..., : s.inner].to(wide or F32))
                y = rounded(y) if v["gate_norm"] is None else norm(y, v["gate_norm"], s.eps, s.groups)
            else:
                parts = product(x, v["x_proj"]).split([s.rank, s.states, s.states], dim=-1)
                if s.norm_eps >= 0:
                    parts = tuple(norm(part, None, s.norm_eps) for part in parts)
                low, B, C = (part.contiguous() for part in parts)
                y, ssm = ops.selective_scan(
                    x, product(low, v["dt_proj"]), v["A"], B, C, v["D"], projected[..., s.inner :].contiguous(),
                    v["dt_bias"], v["ssm_state"], lengths, True,
                )  # fmt: skip
            h = h + product(y, v["out_proj"], v["out_proj_bias"]).to(wide or F32)
            convs.append(conv)
            ssms.append(ssm)
        if not self.all_logits:
            h = ops.last_token(h, lengths)
        last = norm(h, self.fixed["norm_weight"], s.eps)
        return last.to(wide or F32) @ self.fixed["head"].to(wide or F32).t(), convs, ssms


class Call:
    """The struct of a call on a device, with outputs full of NaN; ``same``: states go out where they came in."""

    def __init__(self, model: Model, device: str = "cuda", same: bool = False) -> None:
        s, B = model.sizes, model.B
        self.fixed = {name: value.to(device, copy=True) for name, value in model.fixed.items()}
        self.layers = [
            {name: None if value is None else value.to(device, copy=True) for name, value in layer.items()}
            for layer in model.layers
        ]
        shape = (B, model.L, s.vocab) if model.all_logits else (B, s.vocab)
        self.logits = torch.full(shape, math.nan, device=device)
        for layer in self.layers:
            for name in ("conv_state", "ssm_state"):
                state = layer[name]
                assert state is not None
                layer[f"{name}_out"] = state if same else torch.full_like(state, math.nan)
        self.each = (MambaLayer * s.layers)(*(MambaLayer(**_addresses(layer)) for layer in self.layers))
        self.struct = MambaModel(
            batch=B, length=model.L, layers=s.layers, width=s.width, outputs=s.outputs, channels=s.channels,
            conv_width=s.taps, inner=s.inner, state_size=s.states, rank=0 if s.heads else s.rank, heads=s.heads,
            head_dim=s.head_dim, groups=s.groups if s.heads else 0, vocab=s.vocab, dtype=DTYPES.index(model.T),
            state_dtype=DTYPES.index(model.S), skip_per_channel=s.skip == 2, all_logits=model.all_logits, eps=s.eps,
            norm_eps=s.norm_eps, dt_min=model.dt_limits[0], dt_max=model.dt_limits[1], logits=self.logits.data_ptr(),
            each=ctypes.addressof(self.each), **_addresses(self.fixed),
        )  # fmt: skip

    @property
    def states(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the convolutions and of the scans, as they go out."""
        return tuple([layer[f"{name}_state_out"] for layer in self.layers] for name in ("conv", "ssm"))  # type: ignore[return-value]


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in tensors.items() if value is not None}
