from __future__ import annotations

from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.norm import layer_norm, rms_norm
from tests.strategies.matrices import normal, seeds, wide

DTYPES = ["float32", "float16", ml_dtypes.bfloat16]
SIZES = {"n": st.integers(1, 3), "h": st.integers(1, 6)}
#: One rounding of float64.
UNIT = Decimal(2) ** -53


def decimals(array):
    return [Decimal(float(value)) for value in array]


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds(), eps=st.sampled_from([1e-6, 1e-5, 0.25, 3.0]), weighted=st.booleans(), **SIZES)
def test_rms_norm_is_the_formula(dtype, seed, eps, weighted, n, h):
    x = wide(seed, (n, h), dtype)
    weight = normal(seed + 1, (h,), dtype) if weighted else None
    ref = rms_norm(x, weight, eps)
    assert (ref.magnitude == np.abs(ref.value)).all()
    scale = decimals(np.ones(h) if weight is None else weight)
    with localcontext(prec=60):
        for row, got in zip(map(decimals, x), ref.value, strict=True):
            root = (sum(v * v for v in row) / h + Decimal(eps)).sqrt()
            for value, factor, result in zip(row, scale, got, strict=True):
                want = value / root * factor
                assert abs(Decimal(float(result)) - want) <= (2 * h + 8) * UNIT * abs(want)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=seeds(), eps=st.sampled_from([1e-6, 1e-5, 0.25, 3.0]), shift=st.integers(-9, 9),
    weighted=st.booleans(), biased=st.booleans(), **SIZES,
)  # fmt: skip
def test_layer_norm_is_the_formula(dtype, seed, eps, shift, weighted, biased, n, h):
    x = (wide(seed, (n, h), np.float64) + shift).astype(dtype)
    weight = normal(seed + 1, (h,), dtype) if weighted else None
    bias = normal(seed + 2, (h,), dtype) if biased else None
    ref = layer_norm(x, weight, bias, eps)
    scale = decimals(np.ones(h) if weight is None else weight)
    offset = decimals(np.zeros(h) if bias is None else bias)
    with localcontext(prec=60):
        for i, row in enumerate(map(decimals, x)):
            mean = sum(row) / h
            root = (sum((v - mean) ** 2 for v in row) / h + Decimal(eps)).sqrt()
            for j in range(h):
                want = (row[j] - mean) / root * scale[j] + offset[j]
                # The magnitude itself bounds what float64 may lose: 2^-53 per rounding.
                slack = (4 * h + 16) * UNIT * Decimal(float(ref.magnitude[i, j]))
                assert abs(Decimal(float(ref.value[i, j])) - want) <= slack


@given(
    seed=seeds(), eps=st.sampled_from([1e-6, 0.25]), shift=st.integers(-30, 30),
    signs=st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0])] * 3), h=st.integers(1, 40),
)  # fmt: skip
def test_the_magnitude_covers_statistics_that_are_slightly_off(seed, eps, shift, signs, h):
    """Disturb mean and variance as far as float32 may; the result moves by less than it allows."""
    x = normal(seed, (4, h), np.float64) + shift
    weight, bias = normal(seed + 1, (h,), np.float64), normal(seed + 2, (h,), np.float64)
    ref = layer_norm(x, weight, bias, eps)
    off = 2.0**-24
    mean, spread = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
    typical = np.abs(x).mean(axis=1, keepdims=True)
    for_mean, for_relative, for_merged = (off * sign for sign in signs)
    disturbed = spread**2 * (1 + for_relative) + for_merged * 2 * typical * spread
    # Merging pieces about a mean that is off cannot make a variance negative.
    factor = 1 / np.sqrt(np.maximum(disturbed, 0) + eps)
    moved = (x - (mean + for_mean * typical)) * factor * weight + bias
    # A hundredth covers what is quadratic in `off`, and float64.
    assert (np.abs(moved - ref.value) <= 1.01 * off * ref.magnitude).all()


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_a_norm_leaves_its_inputs_alone_and_answers_in_float64(function):
    x, weight = np.full((2, 4), 3, np.float32), np.full(4, -2, np.float32)
    ref = function(x, weight)
    assert ref.value.dtype == ref.magnitude.dtype == np.float64
    assert ref.value.shape == ref.magnitude.shape == (2, 4)
    assert (x == 3).all()
    assert (weight == -2).all()


def test_known_values():
    x = np.array([[3.0, 4.0]])
    assert rms_norm(np.array([[2.0, -2.0]]), eps=0.0).value.tolist() == [[1.0, -1.0]]
    assert rms_norm(np.array([[1.0, -1.0]]), np.array([3.0, 5.0]), 3.0).value.tolist() == [
        [1.5, -2.5],
    ]
    assert layer_norm(x, eps=0.0).value.tolist() == [[-1.0, 1.0]]
    assert layer_norm(x, np.array([2.0, 3.0]), np.array([1.0, 1.0]), 0.0).value.tolist() == [
        [-1.0, 4.0],
    ]
    assert (rms_norm(np.zeros((1, 3))).value == 0).all()
    assert layer_norm(np.full((1, 2), 7.0), None, np.array([5.0, -5.0])).value.tolist() == [[5, -5]]
