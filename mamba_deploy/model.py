"""Mamba and Mamba-2 in plain PyTorch: the reference that every other backend is compared with.

The scan and the convolution are the ops of :mod:`mamba_deploy.ops`; all else is spelled out here. State goes in and
comes out as tensors, so a prompt, a chunk of a prompt and one decode step are one function.

Projections, convolution and embedding are in the activation dtype T; norms, the residual stream, A, D, the bias of dt
and the logits are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_deploy import ops
from mamba_deploy.config import MambaConfig

__all__ = ["MambaModel", "ModelState"]


class ModelState(NamedTuple):
    """What a model remembers, by layer."""

    conv: list[Tensor]  # each [B, C, K-1] T
    ssm: list[Tensor]  # each [B, D, N] or [B, H, P, N] S


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019) in float32, over ``groups`` equal parts of the last axis."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] any dtype -> [..., width] float32."""
        if self.groups == 1:
            return rms_normalise(x, self.eps) * self.weight
        grouped = x.unflatten(-1, (self.groups, -1))
        return rms_normalise(grouped, self.eps).flatten(-2) * self.weight


def rms_normalise(x: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in this dtype."""
    x = x.to(dtype)
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


class Mamba1Mixer(nn.Module):
    """The block of Gu and Dao 2023, figure 3; official: mamba_ssm/modules/mamba_simple.py, ``Mamba.forward``."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        D, N, R = config.d_inner, config.d_state, config.dt_rank
        self.sizes = [R, N, N]
        self.scan_norm_eps = config.scan_norm_eps
        self.in_proj = nn.Linear(config.d_model, 2 * D, bias=config.proj_bias)
        self.conv_weight = nn.Parameter(torch.empty(D, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(D)) if config.conv_bias else None
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(D))
        self.A = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, config.d_model, bias=config.proj_bias)

    def forward(self, u: Tensor, conv: Tensor, ssm: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, L, d] T -> [B, L, d] T, with the layer's states."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = ops.causal_conv1d(x, self.conv_weight, self.conv_bias, conv, seq_lens, "silu")
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        if self.scan_norm_eps is not None:  # Falcon-Mamba: before dt_proj, without weights
            dt, B, C = (rms_normalise(v, self.scan_norm_eps).to(u.dtype) for v in (dt, B, C))
        dt = self.dt_proj(dt)
        y, ssm = ops.selective_scan(x, dt, self.A, B, C, self.D, z, self.dt_bias, ssm, seq_lens, True)
        return self.out_proj(y), conv, ssm


class Mamba2Mixer(nn.Module):
    """The block of Dao and Gu 2024, figure 6; official: mamba_ssm/modules/mamba2.py, ``Mamba2.forward``."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        D, H, C, M = config.d_inner, config.n_heads, config.conv_channels, config.d_mlp
        self.config = config
        self.in_sizes = [M, M, D, C, H]
        self.conv_sizes = [D, config.n_groups * config.d_state, config.n_groups * config.d_state]
        self.in_proj = nn.Linear(config.d_model, sum(self.in_sizes), bias=config.proj_bias)
        self.conv_weight = nn.Parameter(torch.empty(C, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(C)) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H, config.head_dim) if config.d_has_hdim else torch.empty(H))
        self.norm = RMSNorm(D, config.norm_eps, config.n_groups) if config.gated_norm else None
        self.out_proj = nn.Linear(D + M, config.d_model, bias=config.proj_bias)

    def forward(self, u: Tensor, conv: Tensor, ssm: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, L, d] T -> [B, L, d] T, with the layer's states."""
        c = self.config
        projected = self.in_proj(u)
        if c.d_mlp:
            mlp_gate, mlp, z, xBC, dt = projected.split(self.in_sizes, dim=-1)
        else:
            z, xBC, dt = projected.split(self.in_sizes[2:], dim=-1)
        xBC, conv = ops.causal_conv1d(xBC, self.conv_weight, self.conv_bias, conv, seq_lens, "silu")
        x, B, C = xBC.split(self.conv_sizes, dim=-1)
        y, ssm = ops.ssd_scan(
            x, dt, self.A, B, C, self.D, self.dt_bias, ssm, seq_lens, True, c.dt_min, c.dt_max, c.n_groups, c.chunk_size
        )
        y = self._gate(y, z).to(u.dtype)
        if c.d_mlp:
            y = torch.cat([F.silu(mlp_gate) * mlp, y], dim=-1)
        return self.out_proj(y), conv, ssm

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """official: mamba_ssm/ops/triton/layernorm_gated.py, ``rms_norm_ref``; float32 out."""
        y, gate = y.float(), F.silu(z.float())
        if self.norm is None:
            return y * gate
        return self.norm(y) * gate if self.config.norm_before_gate else self.norm(y * gate)


class Block(nn.Module):
    """Norm, mixer, residual."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba1Mixer(config) if config.generation == "mamba" else Mamba2Mixer(config)

    def forward(self, h: Tensor, conv: Tensor, ssm: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, L, d] float32, the residual stream."""
        y, conv, ssm = self.mixer(self.norm(h).to(self.mixer.in_proj.weight.dtype), conv, ssm, seq_lens)
        return h + y.float(), conv, ssm


class MambaModel(nn.Module):
    """A language model: embedding, blocks, norm, head.

    Build it with :meth:`from_weights`; a bare constructor leaves the weights uninitialised.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def from_weights(
        cls, config: MambaConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> MambaModel:
        """A model over the tensors that ``load_checkpoint`` returns.

        Args:
            config: The architecture.
            weights: By the names of :meth:`state_dict`. Tensors already in the wanted dtype are not copied.
            dtype: Activation dtype T; None keeps the dtype of the embedding.

        Returns:
            The model in evaluation mode, without gradients.
        """
        dtype = dtype or weights["embedding.weight"].dtype
        with torch.device("meta"):
            model = cls(config)
        kept = {name: cast_weight(name, tensor, dtype) for name, tensor in weights.items()}
        model.load_state_dict(kept, assign=True)
        return model.eval().requires_grad_(False)

    def new_state(self, batch: int, state_dtype: torch.dtype = torch.float32) -> ModelState:
        """A state of zeros: nothing was read yet."""
        c, weight = self.config, self.embedding.weight
        conv = [torch.zeros(batch, *c.conv_state_shape, dtype=weight.dtype, device=weight.device) for _ in self.layers]
        ssm = [torch.zeros(batch, *c.ssm_state_shape, dtype=state_dtype, device=weight.device) for _ in self.layers]
        return ModelState(conv, ssm)

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        seq_lens: Tensor | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """Read L tokens a row.

        Args:
            input_ids: [B, L] integer.
            state: What came before; None for nothing.
            seq_lens: [B] integer, 0 to L: row b reads its first seq_lens[b] tokens; None for all.
            all_logits: Logits after every token rather than after each row's last.

        Returns:
            Logits [B, V] (or [B, L, V]) float32, and the new state. The logits of a row that read nothing, and of
            positions past a row's end, carry no meaning.
        """
        if state is None:
            state = self.new_state(len(input_ids))
        if seq_lens is None:
            seq_lens = torch.full((input_ids.shape[0],), input_ids.shape[1], device=input_ids.device)
        h = self.embedding(input_ids).float()
        new = ModelState([], [])
        for layer, conv, ssm in zip(self.layers, state.conv, state.ssm, strict=True):
            h, conv, ssm = layer(h, conv, ssm, seq_lens)
            new.conv.append(conv)
            new.ssm.append(ssm)
        if not all_logits:
            h = ops.last_token(h, seq_lens)
        head = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.norm_f(h).to(head.dtype), head).float(), new

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Read one token a row: [B] integer -> logits [B, V] float32 and the new state."""
        return self.forward(tokens[:, None], state)


def cast_weight(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype it has in a model of activation dtype ``dtype``: norms, A, D and dt_bias stay float32."""
    leaf = name.rsplit(".", 1)[-1]
    small = leaf in ("A", "D", "dt_bias") or ".norm." in f".{name}" or name.startswith("norm_f")
    return tensor.to(torch.float32 if small else dtype)
