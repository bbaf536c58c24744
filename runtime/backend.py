"""What a session asks of a backend."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.contract import Contract
from mamba_deploy.runtime.state import State

__all__ = ["Backend"]


class Backend(Protocol):
    """A model that can be run: ONNX Runtime, PyTorch or TensorRT behind one interface."""

    @property
    def name(self) -> str:
        """What runs, for people: ``onnxruntime 1.31.1 (cpu)``."""
        ...

    @property
    def contract(self) -> Contract:
        """Names, dtypes and axes of what the model takes and gives."""
        ...

    def new_state(self, batch: int) -> State:
        """A state of zeros for ``batch`` rows, where this backend wants it."""
        ...

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: State) -> NDArray[np.float32]:
        """Read tokens and advance the state.

        Args:
            input_ids: [B, L] int32, C-contiguous.
            seq_lens: [B] int32, 0 to L.
            state: For B rows; holds what came before, and afterwards what comes after. Left as it was on an error.

        Returns:
            Logits [B, V] float32 at each row's last used token, or [B, L, V] where the contract says so; the
            caller's own.
        """
        ...

    def close(self) -> None:
        """Give memory back; the backend cannot be used afterwards."""
        ...
