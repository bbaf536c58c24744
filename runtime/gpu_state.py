"""The state of a batch in the memory of the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.contract import Contract, TensorSpec, numpy_dtype
from mamba_deploy.errors import EngineError
from mamba_deploy.runtime.device import Device, aligned
from mamba_deploy.runtime.state import Snapshot, check_fits

__all__ = ["GpuState", "row_bytes", "state_bytes"]


def row_bytes(states: Sequence[TensorSpec]) -> dict[str, int]:
    """Of one row of each tensor of a state, by name; rows lie one after another."""
    return {spec.name: math.prod(spec.shape(1)) * numpy_dtype(spec.dtype).itemsize for spec in states}


def state_bytes(row_bytes: Mapping[str, int], batch: int) -> int:
    """Room that a batch's state takes, each tensor of it aligned."""
    return sum(aligned(size * batch) for size in row_bytes.values())


class GpuState:
    """The tensors of one batch, one after another in memory that the backend owns.

    A call reads and writes each in place. So that one that fails can be taken back, :meth:`checkpoint` keeps a copy
    beside it, and the backend the single tokens that were read since. Beside the contract's there may be tensors of the
    engine's own, zeros at first: tokens that the others do not hold yet.
    """

    def __init__(
        self, device: Device, contract: Contract, row_bytes: Mapping[str, int], batch: int, address: int, spare: int
    ) -> None:
        """Zeros.

        Args:
            device: Whose memory it is.
            contract: Names, dtypes and shapes of what snapshots hold.
            row_bytes: Of all tensors, see :func:`row_bytes`.
            batch: Rows.
            address: Of :func:`state_bytes` bytes.
            spare: Of as many, for the copy.
        """
        self._device, self._contract, self.batch = device, contract, batch
        self._address, self._spare, self.row_bytes = address, spare, row_bytes
        self.addresses: dict[str, int] = {}
        for name, size in row_bytes.items():
            self.addresses[name] = address
            address += aligned(size * batch)
        self._nbytes = address - self._address
        self.since: list[tuple[NDArray[np.int32], NDArray[np.int32]]] | None = None  # the copy; None: there is none
        self.is_lost = False
        self.behind: Callable[[], None] | None = None  # takes back what runs ahead of the host
        self.complete: Callable[[], None] | None = None  # has the contract's tensors hold all tokens
        with device:
            device.clear(self._address, self._nbytes)

    def check(self) -> None:
        """Make the state what the caller takes it for.

        Raises:
            EngineError: The memory is another batch's by now, or what is in it is not known.
        """
        if self.is_lost:
            raise EngineError("the state is lost", hint="call reset(), or restore() a snapshot")
        if self.behind is not None:
            self.behind()

    def checkpoint(self) -> None:
        """Keep a copy of what is there now."""
        self._device.copy(self._spare, self._address, self._nbytes)
        self.since = []

    def go_back(self) -> None:
        """To the copy."""
        self._device.copy(self._address, self._spare, self._nbytes)

    def reset(self, rows: Sequence[int]) -> None:
        """Set the state of these rows to zeros: they have read nothing."""
        self.check()
        with self._device as device:
            for name, address in self.addresses.items():
                size = self.row_bytes[name]
                for row in rows:
                    device.clear(address + row * size, size)
        self.since = None

    def snapshot(self) -> Snapshot:
        """A copy in host memory."""
        self.check()
        if self.complete is not None:
            self.complete()
        arrays = {s.name: np.empty(s.shape(self.batch), numpy_dtype(s.dtype)) for s in self._contract.states}
        with self._device as device:
            for name, array in arrays.items():
                device.download(array, self.addresses[name])
            device.synchronize()
        return Snapshot(arrays, {s.name: s.dtype for s in self._contract.states})

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of as many rows.

        Raises:
            InputError: The snapshot is of another model, dtype or batch size; nothing was changed.
        """
        check_fits(snapshot, self._contract, self.batch)
        if self.behind is not None:
            self.behind()
        with self._device as device:
            device.clear(self._address, self._nbytes)
            for name, array in snapshot.arrays.items():
                device.upload(self.addresses[name], np.ascontiguousarray(array))
            device.synchronize()
        self.since, self.is_lost = None, False
