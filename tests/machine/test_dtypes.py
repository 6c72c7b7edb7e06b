"""Types, and the one rounding of a write, against a search over every number a type has."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import ml_dtypes
import nki.language as nl
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nki_kernels.machine import dtypes
from nki_kernels.machine.dtypes import DType, as_dtype, round_tf32, store
from nki_kernels.machine.errors import DtypeError

FLOATS = [nl.bfloat16, nl.float16, nl.float8_e4m3, nl.float8_e5m2, nl.float8_e4m3fn]
INTEGERS = [nl.int8, nl.int16, nl.int32, nl.uint8, nl.uint16, nl.uint32]
singles = st.floats(width=32)


def table(dtype: DType) -> list[float]:
    """Every finite non-negative number of a type, in the order of its bit patterns."""
    bits = np.arange(2 ** (8 * dtype.itemsize - 1), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # the patterns that are NaN
        numbers = bits.view(dtype.host).astype(np.float64)
    return [float(x) for x in numbers[np.isfinite(numbers)]]


TABLES = {dtype: table(dtype) for dtype in FLOATS}


def nearest(value: float, dtype: DType) -> float:
    """Round to nearest, ties to the even bit pattern; past the midpoint to the next binade: inf."""
    if math.isnan(value):
        return math.nan
    numbers = TABLES[dtype]
    size = abs(value)
    beyond = 2 * numbers[-1] - numbers[-2]  # the number after the largest, if there were one
    ladder = [*numbers, beyond]
    if math.isinf(value):
        return value if dtype is not nl.float8_e4m3fn else math.nan
    low, high = 0, len(ladder) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ladder[middle] <= size else (low, middle)
    if size >= beyond:
        at = high
    else:
        below, above = (
            Fraction(size) - Fraction(ladder[low]),
            Fraction(ladder[high]) - Fraction(size),
        )
        at = low if below < above or (below == above and low % 2 == 0) else high
    if at == len(numbers):
        # float8_e4m3fn has no infinity; what overflows is NaN here (undocumented).
        return math.nan if dtype is nl.float8_e4m3fn else math.copysign(math.inf, value)
    return math.copysign(ladder[at], value)


def written(values: list[float], dtype: DType) -> list[float]:
    target = np.zeros(len(values), dtype.host)
    with np.errstate(all="ignore"):
        store(target, np.array(values, np.float32))
        return [float(x) for x in target.astype(np.float64)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(values=st.lists(singles, min_size=1, max_size=20))
@example(values=[0.0, -0.0, math.inf, -math.inf, math.nan])
def test_floats_round_once_to_nearest_even(dtype, values):
    got, want = written(values, dtype), [nearest(x, dtype) for x in values]
    assert np.array_equal(got, want, equal_nan=True)
    assert [math.copysign(1, x) for x in got if x == 0] == [
        math.copysign(1, x) for x in want if x == 0
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_round_halves_to_even(dtype):
    """Every midpoint of neighbours that float32 can hold, and the overflow threshold."""
    numbers = TABLES[dtype]
    step = max(1, len(numbers) // 500)
    middles = [(a + b) / 2 for a, b in zip(numbers[::step], numbers[1::step], strict=False)]
    middles.append(numbers[-1] + (numbers[-1] - numbers[-2]) / 2)
    exact = [x for x in middles if float(np.float32(x)) == x]
    assert len(exact) > len(middles) // 2
    want = [nearest(x, dtype) for x in exact]
    assert np.array_equal(written(exact, dtype), want, equal_nan=True)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(values=st.lists(singles, min_size=1, max_size=20))
@example(values=[math.inf, -math.inf, math.nan, 2.0**31, -(2.0**31), 2.0**32, 0.5, 1.5, 2.5, -0.5])
def test_integers_round_to_even_and_saturate(dtype, values):
    info = np.iinfo(dtype.host)

    def one(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return info.max if x > 0 else info.min
        return min(max(round(x), info.min), info.max)

    assert written(values, dtype) == [one(float(np.float32(x))) for x in values]


def test_documented_integer_rounding():
    values = [-1.5, 0.5, 1.5, 2.5, 200, -200]
    assert written(values, nl.int8) == [-2, 0, 2, 2, 127, -128]
    assert written(values, nl.uint8) == [0, 0, 2, 2, 200, 0]


@pytest.mark.parametrize("source", INTEGERS, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(data=st.data())
def test_integers_into_integers_saturate_exactly(source, dtype, data):
    limits, info = np.iinfo(source.host), np.iinfo(dtype.host)
    values = data.draw(st.lists(st.integers(limits.min, limits.max), min_size=1, max_size=9))
    target = np.zeros(len(values), dtype.host)
    store(target, np.array(values, source.host))
    assert target.tolist() == [min(max(v, info.min), info.max) for v in values]


def test_bool_is_not_zero():
    target = np.zeros(4, np.bool_)
    store(target, np.array([0.0, -0.0, 0.25, -3.0], np.float32))
    assert target.tolist() == [False, False, True, True]


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
@example(value=1 + 2.0**-11)
@example(value=1 + 3 * 2.0**-11)
def test_tf32_keeps_ten_bits(value):
    mantissa, exponent = math.frexp(value)
    want = math.ldexp(round(mantissa * 2**11), exponent - 11)
    got = float(round_tf32(np.array(value, np.float32)).item())
    assert got == want or (abs(want) > float(np.finfo(np.float32).max) and math.isinf(got))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_tf32_leaves_infinities_and_nan(value):
    assert np.array_equal(round_tf32(np.array([value], np.float32)), [value], equal_nan=True)


# -- names -----------------------------------------------------------------------------------------

NAMES = {
    "bf16": nl.bfloat16, "bfloat16": nl.bfloat16, "nl.bfloat16": nl.bfloat16, "f16": nl.float16,
    "fp16": nl.float16, "fp32": nl.float32, "f32": nl.float32, "tf32": nl.tfloat32,
    "bool": nl.bool_, "float8e4": nl.float8_e4m3, "float8e5": nl.float8_e5m2,
    "torch.float8_e4m3fn": nl.float8_e4m3fn, "float4_e2m1fn_x4": nl.float4_e2m1fn_x4,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_type(name):
    assert as_dtype(name) is NAMES[name]


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_a_type_is_its_own_name(dtype):
    assert as_dtype(dtype) is dtype
    assert as_dtype(str(dtype)) is dtype
    assert dtype == str(dtype)
    assert repr(dtype) == f"nl.{dtype}"
    assert dtype.itemsize == dtype.host.itemsize
    assert dtype.is_float + dtype.is_integer + (dtype.kind == "packed") == 1


HOSTS = {
    nl.float32: (np.float32, np.dtype("f4")), nl.float16: (np.float16,), nl.int32: (np.int32,),
    nl.bool_: (bool, np.bool_), nl.uint8: (np.uint8,), nl.bfloat16: (ml_dtypes.bfloat16,),
    nl.float8_e4m3: (ml_dtypes.float8_e4m3,), nl.float8_e8m0fnu: (ml_dtypes.float8_e8m0fnu,),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HOSTS, ids=str)
def test_a_numpy_type_is_a_type(dtype):
    for host in HOSTS[dtype]:
        assert as_dtype(host) is dtype
        assert as_dtype(np.dtype(host)) is dtype


def test_a_torch_type_is_a_type():
    torch = pytest.importorskip("torch")
    for name in ("float32", "bfloat16", "float16", "int8", "uint8", "int32", "float8_e5m2"):
        assert as_dtype(getattr(torch, name)) is as_dtype(name)
    assert as_dtype(torch.bool) is nl.bool_
    with pytest.raises(DtypeError, match=r"dtype torch\.float64: not a NeuronCore data type"):
        as_dtype(torch.float64)


@pytest.mark.parametrize(
    "value",
    [
        float,
        "float64",
        np.float64,
        np.int64,
        int,
        "",
        "int4",
        None,
        3,
        [1],
        {"a": 1},
        np.dtype(">f4"),
        "M8",
    ],
    ids=repr,
)
def test_no_type_says_which_exist(value):
    for _ in range(2):  # the second answer may come from the memo
        with pytest.raises(DtypeError) as caught:
            as_dtype(value)
        message = str(caught.value)
        assert message.startswith(
            f"dtype {value!r}: not a NeuronCore data type; allowed are float32, "
        )
        assert "cast the array first" in message


@pytest.mark.parametrize("dtype", dtypes.ALL)
def test_a_copy_of_a_type_is_the_type(dtype):
    assert copy.deepcopy([dtype])[0] is dtype
    assert pickle.loads(pickle.dumps(dtype)) is dtype


def test_a_record_of_one_field_carries_a_packed_type():
    for packed in (nl.float8_e4m3fn_x4, nl.float8_e5m2_x4, nl.float4_e2m1fn_x4):
        assert as_dtype(np.dtype([(str(packed), packed.host)])) is packed
    for other in ([("float8_e5m2_x4", np.uint16)], [("x", np.uint32)],
                  [("float8_e5m2_x4", np.uint32), ("b", np.uint32)]):  # fmt: skip
        with pytest.raises(DtypeError):
            as_dtype(np.dtype(other))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e5m2])
def test_widening_is_the_cast_for_every_bit_pattern(dtype):
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"u{np.dtype(dtype).itemsize}")
    values = bits.view(dtype).reshape(2, -1)[:, ::3]
    wide = dtypes.widen(values)
    assert wide.dtype == np.float32
    assert np.array_equal(wide, values.astype(np.float32), equal_nan=True)
    assert not np.shares_memory(wide, values)
