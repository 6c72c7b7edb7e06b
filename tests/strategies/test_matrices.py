from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from tests.strategies.matrices import extents, normal, seeds, small_integers, wide


@pytest.mark.parametrize("wanted", [1, 7, 8, 9, 15, 16, 17, 13])
def test_extents_reach_every_corner_and_the_middle(wanted):
    assert find(extents(8, 20), lambda size: size == wanted) == wanted


@given(tile=st.integers(1, 200), most=st.integers(1, 200), data=st.data())
def test_extents_stay_inside_their_range(tile, most, data):
    assert 1 <= data.draw(extents(tile, most)) <= most


@given(seed=seeds())
def test_a_seed_repeats_its_values(seed):
    for make in (normal, wide):
        first, second = (make(seed, (3, 5), np.float32) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert first.tobytes() != make(seed + 1, (3, 5), np.float32).tobytes()


@given(seed=seeds(), most=st.integers(1, 256))
def test_small_integers_are_exact_in_the_narrowest_dtype(seed, most):
    narrow = small_integers(seed, (40,), ml_dtypes.bfloat16, most).astype(np.float64)
    assert (narrow == small_integers(seed, (40,), np.float64, most)).all()
    assert np.abs(narrow).max() <= most


def test_wide_values_spread_over_many_binades():
    values = np.abs(wide(0, (1000,), np.float32))
    assert values.max() / np.median(values) > 2**5
