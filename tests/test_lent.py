"""Arrays that are lent."""

from __future__ import annotations

import numpy as np
import pytest

from mamba_deploy.runtime.lent import Lent


def test_an_array_is_back_when_it_and_all_views_of_it_are_gone() -> None:
    own = np.zeros((2, 3), np.float32)
    lent = Lent([own])
    array = lent.lend()
    assert (array.shape, array.dtype, array.flags.writeable) == ((2, 3), np.float32, True)
    assert np.shares_memory(array, own)
    view = array[1:][:, None]
    del array
    assert lent.left == 0
    with pytest.raises(IndexError):
        lent.lend()
    view[...] = 7.0
    assert own.tolist() == [[0.0] * 3, [7.0] * 3]
    del view
    assert lent.left == 1
    assert np.shares_memory(lent.lend(), own)


def test_what_is_lent_outlives_who_lent_it() -> None:
    lent = Lent([np.ones(4, np.float32)])
    array = lent.lend()
    del lent
    assert array.tolist() == [1.0] * 4
