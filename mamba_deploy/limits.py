"""The least a step and a prompt can cost: bytes to move and operations to do, from the config alone.

Decode reads every weight once a token and every state once, and writes every state; a prompt is bound by its products.
A step can take no less than bytes / bandwidth, but where it writes states once in some tokens, as engines of Mamba-2 do
with many rows (``plugins/pending.cuh``): they are measured against the same bytes, and may come below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, numpy_dtype

__all__ = ["Limits", "parameter_count"]


@dataclass(frozen=True)
class Limits:
    """Bytes and floating-point operations of one call."""

    weight_bytes: int
    state_bytes: int  # read and written
    logits_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        """All of it, each once."""
        return self.weight_bytes + self.state_bytes + self.logits_bytes

    @classmethod
    def of(cls, config: MambaConfig, contract: Contract, *, batch: int = 1, seq: int = 1) -> Limits:
        """Costs of one call over ``batch`` rows of ``seq`` tokens with logits of the last.

        The embedding is read by row, the head whole; a scan does 7 (Mamba) or 5 (Mamba-2) operations an element of
        its state and token.
        """
        c, width = config, numpy_dtype(contract.dtype).itemsize
        products, small = _layer_parameters(c)
        head = c.vocab_size * c.d_model
        weights = c.n_layer * (products * width + small * width) + head * width + batch * seq * c.d_model * width
        ssm = c.d_inner * c.d_state * numpy_dtype(contract.state_dtype).itemsize
        conv = c.conv_channels * (c.d_conv - 1) * width
        scan = c.d_inner * c.d_state * (7 if c.generation == "mamba" else 5)
        return cls(
            weight_bytes=weights,
            state_bytes=2 * batch * c.n_layer * (ssm + conv),
            logits_bytes=4 * batch * c.vocab_size,
            flops=batch * (c.n_layer * seq * (2 * products + scan) + 2 * head),
        )


def parameter_count(config: MambaConfig) -> int:
    """Parameters of the model, padding rows not counted, a tied head counted once."""
    products, small = _layer_parameters(config)
    tables = 1 if config.tie_embeddings else 2
    return config.n_layer * (products + small) + config.d_model * (1 + tables * config.vocab_size)


def _layer_parameters(c: MambaConfig) -> tuple[int, int]:
    """Of one layer: those of the matrix products, and all others."""
    small = c.d_model + c.conv_channels * (c.d_conv + int(c.conv_bias))
    out = (c.d_inner + c.d_mlp) * c.d_model
    if c.generation == "mamba":
        in_width = 2 * c.d_inner
        products = c.d_model * in_width + c.d_inner * (c.dt_rank + 2 * c.d_state) + c.dt_rank * c.d_inner + out
        small += c.d_inner * (2 + c.d_state)
    else:
        in_width = 2 * c.d_mlp + c.d_inner + c.conv_channels + c.n_heads
        products = c.d_model * in_width + out
        small += 2 * c.n_heads + (c.d_inner if c.d_has_hdim else c.n_heads) + (c.d_inner if c.gated_norm else 0)
    return products, small + (in_width + c.d_model if c.proj_bias else 0)
