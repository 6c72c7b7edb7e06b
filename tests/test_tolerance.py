from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.matmul import matmul
from tests.strategies.matrices import normal, seeds, wide
from tests.tolerance import allowed_error, assert_close, ulp

BF16 = ml_dtypes.bfloat16
FLOATS = [np.float32, np.float16, BF16]
TILE = 32
SIZE = 8 * TILE


def names(dtype):
    return np.dtype(dtype).name


def chain(k):
    return 2 + min(k, TILE) + math.ceil(k / TILE)


def compare(got, a, b):
    ref = matmul(a, b)
    assert_close(
        got,
        ref.value,
        ref.magnitude,
        op="matmul",
        case="here",
        roundings=1,
        chain=chain(a.shape[1]),
    )


def accumulate(a, b, dtype=np.float32, rounded=np.float32):
    """A right kernel: partial products per tile, added up in `rounded`."""
    total = np.zeros((a.shape[0], b.shape[1]), rounded)
    for k in range(0, a.shape[1], TILE):
        part = a[:, k : k + TILE].astype(np.float32) @ b[k : k + TILE].astype(np.float32)
        total = (total.astype(np.float32) + part).astype(rounded)
    return total.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=names)
@given(data=st.data())
def test_ulp_is_the_spacing_numpy_knows(dtype, data):
    top = float(np.finfo(dtype).max) / 2
    value = np.array(data.draw(st.floats(-top, top)), dtype)
    assert ulp(value.astype(np.float64), dtype) == abs(float(np.spacing(np.abs(value))))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1.0, 2.0**-7), (-1.5, 2.0**-7), (255.0, 1.0), (256.0, 2.0), (0.0, 2.0**-133),
        (float("inf"), 2.0**120), (1e300, 2.0**120),
    ],
)  # fmt: skip
def test_ulp_of_bfloat16(value, want):
    assert ulp(value, BF16) == want


def test_the_bound_is_the_documented_formula():
    ref, magnitude = np.array([3.0, -0.5]), np.array([10.0, 7.0])
    allowed = allowed_error(ref, magnitude, dtype=np.float32, roundings=2, chain=40)
    growth = float((1 + Fraction(1, 2**24)) ** 40 - 1)
    want = [2 * 2.0**-22 + 10 * growth, 2 * 2.0**-24 + 7 * growth]
    assert np.abs(allowed - want).max() <= 1e-15 * max(want)


def test_integers_are_exact_or_wrong():
    ref = np.array([[1.0, 2.0]])
    keywords = {"op": "op", "case": "ints", "roundings": 1, "chain": 10}
    assert_close(np.array([[1, 2]], np.int32), ref, ref, **keywords)
    with pytest.raises(AssertionError, match=r"op \[ints\] int32: worst at \(0, 1\): got 3\.0"):
        assert_close(np.array([[1, 3]], np.int32), ref, ref, **keywords)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@given(seed=seeds(), k=st.sampled_from([1, 2, 31, 32, 33, 160, 300]), uneven=st.booleans())
def test_a_right_product_is_accepted(dtype, seed, k, uneven):
    make = wide if uneven else normal
    a, b = make(seed, (9, k), dtype), make(seed + 1, (k, 11), dtype)
    compare(accumulate(a, b, dtype), a, b)


@pytest.mark.parametrize("k", [129, 1000, 4096])
def test_errors_that_all_point_the_same_way_are_accepted(k):
    # Adding one constant over and over rounds one way for a whole binade.
    a, b = np.full((1, k), 0.1, np.float32), np.full((k, 1), 1.1, np.float32)
    total = np.float32(0)
    for start in range(0, k, TILE):
        part = np.float32(0)
        for i in range(start, min(start + TILE, k)):
            part = np.float32(part + a[0, i] * b[i, 0])
        total = np.float32(total + part)
    compare(np.array([[total]]), a, b)


def _last_tile_dropped(a, b, dtype):
    return accumulate(a[:, :-TILE], b[:-TILE], dtype)


def _one_term_dropped(a, b, dtype):
    return accumulate(a[:, :-1], b[:-1], dtype)


def _one_term_twice(a, b, dtype):
    return accumulate(np.hstack([a, a[:, -1:]]), np.vstack([b, b[-1:]]), dtype)


def _operand_transposed(a, b, dtype):
    return accumulate(a, np.ascontiguousarray(b.T), dtype)


def _result_transposed(a, b, dtype):
    return np.ascontiguousarray(accumulate(a, b, dtype).T)


def _stale_tile(a, b, dtype):
    got = accumulate(a, b, dtype)
    got[-3:, -5:] = got[:3, :5]
    return got


def _unwritten_tile(a, b, dtype):
    got = accumulate(a, b, dtype)
    got[0, 0] = np.nan
    return got


def _accumulated_in_bf16(a, b, dtype):
    return accumulate(a, b, dtype, rounded=BF16)


MUTANTS = [
    _last_tile_dropped, _one_term_dropped, _one_term_twice, _operand_transposed,
    _result_transposed, _stale_tile, _unwritten_tile, _accumulated_in_bf16,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wrong_product_is_rejected(dtype, mutant, seed):
    a, b = normal(seed, (SIZE, SIZE), dtype), normal(seed + 9, (SIZE, SIZE), dtype)
    compare(accumulate(a, b, dtype), a, b)
    with pytest.raises(AssertionError, match="worst at"):
        compare(mutant(a, b, dtype), a, b)


def test_the_failure_names_everything():
    ref = np.array([[1.0, 2.0], [4.0, 8.0]])
    got = np.array([[1.0, 2.0], [5.0, 8.5]], np.float32)
    with pytest.raises(AssertionError) as failure:
        assert_close(got, ref, ref, op="matmul", case="2x2x1", roundings=1, chain=0)
    assert str(failure.value) == (
        "matmul [2x2x1] float32: worst at (1, 0): got 5.0, want 4.0, error 1, allowed 4.76837e-07"
    )
    assert failure.value.__notes__ == ["2 of 4 elements are outside the bound"]


@pytest.mark.parametrize(
    ("got", "ref", "right"),
    [
        ("inf", 1e39, True), ("-inf", 1e39, False), ("inf", 1.0, False), ("nan", 1.0, False),
        ("nan", float("nan"), True), ("1.0", float("nan"), False), ("1.0", float("inf"), False),
        ("inf", float("inf"), True), ("3.0e38", 1e39, False), ("inf", 3.4028235e38, True),
    ],
)  # fmt: skip
def test_overflow_and_nan(got, ref, right):
    arguments = (np.array([got]).astype(np.float32), np.array([ref]), np.array([abs(ref)]))
    keywords = {"op": "op", "case": "special", "roundings": 1, "chain": 3}
    if right:
        assert_close(*arguments, **keywords)
    else:
        with pytest.raises(AssertionError, match="worst at"):
            assert_close(*arguments, **keywords)


def test_a_comparison_of_nothing_or_of_other_shapes_fails():
    keywords = {"op": "op", "case": "case", "roundings": 1, "chain": 1}
    with pytest.raises(AssertionError, match="no elements to compare"):
        assert_close(np.zeros((0, 2), np.float32), np.zeros((0, 2)), np.zeros((0, 2)), **keywords)
    with pytest.raises(AssertionError, match=r"shape \(2,\), want \(1, 2\)"):
        assert_close(np.zeros(2, np.float32), np.zeros((1, 2)), np.zeros((1, 2)), **keywords)
