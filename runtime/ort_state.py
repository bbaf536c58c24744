"""The state of a batch in memory that ONNX Runtime allocates: a GPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_deploy.contract import Contract, numpy_dtype
from mamba_deploy.runtime.state import Snapshot, State, check_fits

__all__ = ["OrtState"]


class OrtState(State):
    """State tensors as ``OrtValue``, twice, as in :class:`State`; they leave the device for a snapshot only.

    bfloat16 is uint16 here too: what ONNX Runtime is told of a tensor's memory is its address and the true type.
    """

    current: dict[str, Any]
    spare: dict[str, Any]

    def __init__(self, ort: Any, contract: Contract, batch: int, device: str) -> None:
        """Zeros.

        Args:
            ort: The module ``onnxruntime``.
            contract: Names, dtypes and shapes.
            batch: Rows.
            device: As ONNX Runtime names it: ``cuda``, or ``cpu`` for tests.
        """
        self.contract = contract
        self.batch = batch
        self.device = device
        self.current, self.spare = (
            {
                spec.name: ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(spec.shape(batch), numpy_dtype(spec.dtype)), device, 0
                )
                for spec in contract.states
            }
            for _ in range(2)
        )

    def reset(self, rows: Sequence[int]) -> None:
        """Set the state of these rows to zeros, by way of host memory."""
        after = self.snapshot()
        for array in after.arrays.values():
            array[list(rows)] = 0
        self.restore(after)

    def snapshot(self) -> Snapshot:
        """A copy in host memory."""
        return Snapshot(
            {name: np.array(value.numpy()) for name, value in self.current.items()},  # numpy() may be a view
            {spec.name: spec.dtype for spec in self.contract.states},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of as many rows.

        Raises:
            InputError: The snapshot is of another model, dtype or batch size; nothing was changed.
        """
        check_fits(snapshot, self.contract, self.batch)
        for spec in self.contract.states:
            array = np.ascontiguousarray(snapshot.arrays[spec.name], numpy_dtype(spec.dtype))
            self.spare[spec.name].update_inplace(array)
        self.swap()
