from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.matmul import matmul
from tests.strategies.matrices import seeds, wide


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@given(seed=seeds(), m=st.integers(1, 3), n=st.integers(1, 3), k=st.integers(1, 5))
def test_matmul_is_the_sum_of_products(dtype, seed, m, n, k):
    a, b = wide(seed, (m, k), dtype), wide(seed + 1, (k, n), dtype)
    ref = matmul(a, b)
    for i in range(m):
        for j in range(n):
            terms = [Fraction(float(a[i, x])) * Fraction(float(b[x, j])) for x in range(k)]
            size = sum(map(abs, terms))
            # k products and additions in float64, each within 2^-53.
            slack = 2 * k * size * Fraction(1, 2**53)
            assert abs(Fraction(float(ref.value[i, j])) - sum(terms)) <= slack
            assert abs(Fraction(float(ref.magnitude[i, j])) - size) <= slack


def test_matmul_leaves_its_inputs_alone():
    a, b = np.ones((2, 3), np.float32), np.full((3, 2), -2, np.float32)
    ref = matmul(a, b)
    assert ref.value.dtype == ref.magnitude.dtype == np.float64
    assert (ref.value == -6).all()
    assert (ref.magnitude == 6).all()
    assert (a == 1).all()
    assert (b == -2).all()


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_stored_the_other_way_and_in_batches_it_is_the_same(transpose_a, transpose_b):
    a, b = wide(1, (2, 3, 4), np.float32), wide(2, (2, 4, 5), np.float32)
    ref = matmul(
        np.swapaxes(a, 1, 2) if transpose_a else a,
        np.swapaxes(b, 1, 2) if transpose_b else b,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
    )
    for batch in range(2):
        one = matmul(a[batch], b[batch])
        assert (ref.value[batch] == one.value).all()
        assert (ref.magnitude[batch] == one.magnitude).all()
