"""What a session asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.contract import Contract
from mamba_deploy.runtime.state import Snapshot

__all__ = ["Backend", "BatchState"]


class BatchState(Protocol):
    """The memory of a running batch, wherever it lies."""

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    def reset(self, rows: Sequence[int]) -> None:
        """Set the state of these rows to zeros: they have read nothing."""
        ...

    def snapshot(self) -> Snapshot:
        """A copy in host memory."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of as many rows.

        Raises:
            InputError: The snapshot is of another model, dtype or batch size; nothing was changed.
        """
        ...


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

    def new_state(self, batch: int) -> BatchState:
        """A state of zeros for ``batch`` rows, where this backend wants it."""
        ...

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: Any) -> NDArray[np.float32]:
        """Read tokens and advance the state.

        Args:
            input_ids: [B, L] int32, C-contiguous.
            seq_lens: [B] int32, 0 to L.
            state: Of :meth:`new_state`, for B rows; holds what came before, and afterwards what comes after. Left as
                it was on an error.

        Returns:
            Logits [B, V] float32 at each row's last used token, or [B, L, V] where the contract says so; the
            caller's own.
        """
        ...

    def close(self) -> None:
        """Give memory back; the backend cannot be used afterwards."""
        ...
