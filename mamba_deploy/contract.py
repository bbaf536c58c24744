"""THE table of graph inputs and outputs: what the ONNX file and the engine take and give.

One row a tensor. Exporter, sessions, verifier and engine builder read this table and nothing else;
later kinds of state (an attention cache in a hybrid, say) are further rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.config import MambaConfig

__all__ = ["Contract", "TensorSpec", "from_float32", "numpy_dtype", "pending_specs", "to_float32"]

DType = Literal["float32", "float16", "bfloat16", "int32"]
Role = Literal["tokens", "lengths", "state", "logits", "next_token"]
Axis = str | int  # "batch" and "seq" vary from call to call


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph."""

    name: str
    direction: Literal["in", "out"]
    dtype: DType
    axes: tuple[Axis, ...]
    role: Role
    layer: int | None = None  # of a state
    partner: str | None = None  # of a state: the name it has on the other side of the graph

    def shape(self, batch: int, seq: int = 1) -> tuple[int, ...]:
        """With the two varying axes filled in."""
        sizes = {"batch": batch, "seq": seq}
        return tuple(sizes[a] if isinstance(a, str) else a for a in self.axes)


@dataclass(frozen=True)
class Contract:
    """All tensors of one model's graph, in the graph's order.

    ============================  ================  ============================================
    tensor                        dtype             axes
    ============================  ================  ============================================
    in  ``input_ids``             int32             [batch, seq]
    in  ``seq_lens``              int32             [batch]; row b uses its first seq_lens[b] tokens
    in  ``conv_state.{i}``        activation dtype  [batch, C, K-1]
    in  ``ssm_state.{i}``         state dtype       [batch, D, N] or [batch, H, P, N]
    out ``logits``                float32           [batch, V], or [batch, seq, V] if asked for
    out ``next_token``            int32             [batch], argmax of the last used token's logits
    out ``conv_state_out.{i}``    activation dtype  as its partner
    out ``ssm_state_out.{i}``     state dtype       as its partner
    ============================  ================  ============================================
    """

    dtype: DType
    state_dtype: DType
    all_logits: bool
    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(
        cls, config: MambaConfig, *, dtype: DType = "float32", state_dtype: DType = "float32", all_logits: bool = False
    ) -> Contract:
        """The table of a model exported with these choices."""
        rows = [
            TensorSpec("input_ids", "in", "int32", ("batch", "seq"), "tokens"),
            TensorSpec("seq_lens", "in", "int32", ("batch",), "lengths"),
        ]
        states: list[tuple[str, DType, tuple[int, ...]]] = [
            ("conv_state", dtype, config.conv_state_shape),
            ("ssm_state", state_dtype, config.ssm_state_shape),
        ]
        outputs: list[TensorSpec] = [
            TensorSpec(
                "logits", "out", "float32", ("batch", *(("seq",) if all_logits else ()), config.vocab_size), "logits"
            ),
            TensorSpec("next_token", "out", "int32", ("batch",), "next_token"),
        ]
        for i in range(config.n_layer):
            for kind, kind_dtype, shape in states:
                name, out = f"{kind}.{i}", f"{kind}_out.{i}"
                rows.append(TensorSpec(name, "in", kind_dtype, ("batch", *shape), "state", i, out))
                outputs.append(TensorSpec(out, "out", kind_dtype, ("batch", *shape), "state", i, name))
        return cls(dtype, state_dtype, all_logits, tuple(rows + outputs))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.direction == "in")

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.direction == "out")

    @property
    def states(self) -> tuple[TensorSpec, ...]:
        """The state inputs, by layer; their partners are the outputs."""
        return tuple(t for t in self.inputs if t.role == "state")

    def to_list(self) -> list[dict[str, object]]:
        """As the manifest writes it."""
        return [
            {"name": t.name, "direction": t.direction, "dtype": t.dtype, "axes": list(t.axes), "role": t.role}
            for t in self.tensors
        ]


def pending_specs(words: int) -> tuple[TensorSpec, ...]:
    """What an engine of one operator takes and gives besides: the tokens of each row that its ssm_state lacks.

    It goes out where it came in, as states do, is part of the state, and zeros at first; nothing is pending after a
    prompt, or a step in which the row reads nothing.

    Args:
        words: Of a row; 0: there are no such tensors.
    """
    if not words:
        return ()
    axes = ("batch", words)
    return (
        TensorSpec("pending", "in", "float32", axes, "state", partner="pending_out"),
        TensorSpec("pending_out", "out", "float32", axes, "state", partner="pending"),
    )


_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32}


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy has no bfloat16: its bits travel as uint16."""
    return np.dtype(_NUMPY[dtype])


def to_float32(array: NDArray, dtype: str) -> NDArray[np.float32]:
    """The values of an array whose dtype by contract is ``dtype``."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(array: NDArray[np.float32], dtype: str) -> NDArray:
    """Round to nearest even into the representation :func:`numpy_dtype` names."""
    if dtype != "bfloat16":
        return array.astype(numpy_dtype(dtype))
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
