"""Arrays that are lent out, and are back when nobody holds them any more."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lent"]


class Lent:
    """Dense arrays of one shape and dtype."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        self._here = list(arrays)

    @property
    def left(self) -> int:
        """How many are here."""
        return len(self._here)

    def lend(self) -> NDArray[Any]:
        """One that is here, whatever is in it. It is back when it and all views of it are gone.

        Raises:
            IndexError: None is here.
        """
        array = self._here.pop()
        # What a view of an array holds is not that array but what is behind it: this.
        behind = (ctypes.c_byte * array.nbytes).from_buffer(array.data)
        weakref.finalize(behind, self._here.append, array).atexit = False
        return np.ndarray(array.shape, array.dtype, memoryview(behind))
