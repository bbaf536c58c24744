"""The memory of a running batch: one array a layer for the convolution, one for the scan.

bfloat16 arrays are uint16 here, as NumPy has no such dtype; files hold them as bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from mamba_deploy.contract import Contract, numpy_dtype
from mamba_deploy.errors import InputError

__all__ = ["Snapshot", "State"]

_FORMAT = "mamba-deploy state 1"
# Names of dtypes in safetensors files: as written, and as read.
_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of all rows of a batch, to go back to or to go on from elsewhere."""

    arrays: Mapping[str, NDArray]  # by the names of the contract's state inputs, each [B, ...]
    dtypes: Mapping[str, str]

    @property
    def batch(self) -> int:
        """Rows."""
        shape = next(iter(self.arrays.values())).shape
        return shape[0] if shape else 0

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(_safetensors_bytes(self.arrays, self.dtypes))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what :meth:`save` wrote, on this machine or another.

        Raises:
            InputError: The file is missing, damaged, or holds something else.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
            content = safetensors.deserialize(raw)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} cannot be read as a saved state: {error}") from error
        if (found := _metadata(raw).get("format")) != _FORMAT:
            raise InputError(
                f"{path} is not a saved state: its format is {found!r}, not {_FORMAT!r}",
                hint="give a file that Snapshot.save wrote",
            )
        names = {file_name: name for name, file_name in _FILE_DTYPES.items()}
        arrays, dtypes = {}, {}
        for name, entry in content:
            if entry["dtype"] not in names:
                raise InputError(f"{path} holds '{name}' of dtype {entry['dtype']}: not a saved state")
            dtypes[name] = names[entry["dtype"]]
            flat = np.frombuffer(entry["data"], dtype=numpy_dtype(dtypes[name]))
            arrays[name] = flat.reshape(entry["shape"]).copy()
        if not arrays:
            raise InputError(f"{path} holds no tensors: not a saved state")
        return cls(arrays, dtypes)


def _safetensors_bytes(arrays: Mapping[str, NDArray], dtypes: Mapping[str, str]) -> bytes:
    """A safetensors file: the length of a JSON header, the header, and the data at the offsets it names.

    Written here because the library's NumPy side has no bfloat16, and its ``serialize`` changes between versions.
    """
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT}}
    data = [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    offset = 0
    for (name, array), block in zip(arrays.items(), data, strict=True):
        end = offset + len(block)
        header[name] = {"dtype": _FILE_DTYPES[dtypes[name]], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file that the library has read, so that its header is sound."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


class State:
    """State arrays in host memory, twice: a call reads ``current`` and writes ``spare``, then :meth:`swap`.

    So a call that fails leaves the state as it was, and a runtime that may not write where it reads is served.
    """

    def __init__(self, contract: Contract, batch: int) -> None:
        self.contract = contract
        self.batch = batch
        self.current, self.spare = (
            {spec.name: np.zeros(spec.shape(batch), numpy_dtype(spec.dtype)) for spec in contract.states}
            for _ in range(2)
        )

    def swap(self) -> None:
        """Make what the last call wrote the current state."""
        self.current, self.spare = self.spare, self.current

    def reset(self, rows: Sequence[int]) -> None:
        """Set the state of these rows to zeros: they have read nothing."""
        for array in self.current.values():
            array[list(rows)] = 0

    def snapshot(self) -> Snapshot:
        """A copy of the current state."""
        return Snapshot(
            {name: array.copy() for name, array in self.current.items()},
            {spec.name: spec.dtype for spec in self.contract.states},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of as many rows.

        Raises:
            InputError: The snapshot is of another model, dtype or batch size; nothing was changed.
        """
        check_fits(snapshot, self.contract, self.batch)
        for name, array in self.current.items():
            array[...] = snapshot.arrays[name]


def check_fits(snapshot: Snapshot, contract: Contract, batch: int | None = None) -> None:
    """Raise unless a snapshot holds exactly the states of a contract, of so many rows if a number is given.

    Raises:
        InputError: A tensor is missing or unknown, or has another shape or dtype; or the rows are others.
    """
    expected = {spec.name: spec for spec in contract.states}
    if odd := sorted(set(expected) ^ set(snapshot.arrays)):
        raise InputError(
            f"the saved state and the model do not have the same tensors: {', '.join(odd[:4])}",
            hint="a state can only go on in the model it came from",
        )
    if snapshot.batch == 0:
        raise InputError("the saved state has no rows")
    for name, spec in expected.items():
        shape, dtype = snapshot.arrays[name].shape, snapshot.dtypes[name]
        if shape != spec.shape(snapshot.batch) or dtype != spec.dtype:
            raise InputError(
                f"saved state '{name}' is {dtype} {list(shape)}, the model wants {spec.dtype} {list(spec.axes)}",
                hint="a state can only go on in the model it came from, exported with the same dtypes",
            )
    if batch is not None and snapshot.batch != batch:
        raise InputError(f"the saved state has {snapshot.batch} rows, this one {batch}")
