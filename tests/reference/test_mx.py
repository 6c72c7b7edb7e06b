"""The reference of the MX product: its quantization, by hand and by its bounds."""

from __future__ import annotations

import numpy as np
import pytest

from reference.mx import KINDS, matmul_mx, quantized


def test_a_block_is_scaled_by_its_largest_value_and_rounded():
    x = np.zeros((1, 32))
    x[0, :4] = [1.0, 1.0625, 300.0, 0.0]
    # 2^8 <= 300 < 2^9 and Emax 8: X = 2, so that 300 / 2 = 150 lies between 144 and 160.
    got = quantized(x, "e4m3")
    assert got[0, :4].tolist() == [1.0, 1.0, 288.0, 0.0]
    assert quantized(x[:, ::-1], "e4m3")[0, ::-1].tolist() == got[0].tolist()


def test_blocks_take_eight_neighbours_of_each_quarter():
    x = np.ones((1, 64))
    x[0, 17] = 2.0**20  # quarter 1 (16 .. 31) of 64, its first half
    lost = np.flatnonzero(quantized(x, "e4m3")[0] == 0)
    block = [16 * quarter + at for quarter in range(4) for at in range(8)]
    assert lost.tolist() == [k for k in block if k != 17]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_half_a_unit_of_the_elements(kind):
    x = np.random.default_rng(1).standard_normal((40, 1056))
    bits = {"e4m3": 3, "e5m2": 2}[kind]
    error = np.abs(quantized(x, kind) - x)
    # Normal elements lose half a unit in the last place, others half the smallest subnormal.
    floor = np.abs(x).max() * 2.0 ** -{"e4m3": 17, "e5m2": 30}[kind]
    assert (error <= np.maximum(np.abs(x) * 2.0 ** -(bits + 1), floor)).all()
    assert (quantized(quantized(x, kind), kind) == quantized(x, kind)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_with_a_special_value_is_nan_and_no_other(value):
    x = np.ones((2, 64))
    x[1, 0] = value
    got = quantized(x, "e4m3")
    assert np.isnan(got).sum() == 32
    assert np.isnan(got[1, [0, 7, 16, 32, 48]]).all()


def test_a_product_of_exact_values_is_exact():
    rng = np.random.default_rng(2)
    a, b = rng.integers(-8, 9, (3, 64)), rng.integers(-8, 9, (64, 5))
    ref = matmul_mx(a, b)
    assert (ref.value == a @ b).all()
    assert (ref.magnitude == np.abs(a) @ np.abs(b)).all()
    assert (matmul_mx(a, b.T, transpose_b=True).value == ref.value).all()
