from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import DtypeError, NkiKernelsError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.contract import supports

MATMUL = OPERATORS["matmul"]
TOY = "toy"


class Symbol:
    """A size that refuses to be compared or read, as a symbolic size of an export would."""

    def __init__(self, name):
        self.name = name

    def _refuse(self, *_):
        raise TypeError(f"{self.name} has no value")

    __eq__ = __bool__ = __int__ = __index__ = __lt__ = __gt__ = _refuse
    __hash__ = None


def test_output_shapes_never_look_at_a_size():
    m, k, n = Symbol("M"), Symbol("K"), Symbol("N")
    ((rows, columns),) = MATMUL.output_shapes((m, k), (k, n))
    assert rows is m
    assert columns is n


def test_output_shapes_need_the_right_ranks():
    with pytest.raises(ShapeError, match=r"matmul\(\[2, 3\], \[3\]\): b has 1 dimensions, shape"):
        MATMUL.output_shapes((2, 3), (3,))
    with pytest.raises(ShapeError, match=r"1 inputs; 2 are needed: a \[M, K\], b \[K, N\]"):
        MATMUL.output_shapes((2, 3))


def test_input_and_output_shapes_agree():
    axes = {"M": 2, "N": 5, "K": 3}
    shapes = MATMUL.input_shapes(axes)
    assert shapes == ((2, 3), (3, 5))
    assert MATMUL.axes(*shapes) == axes
    assert MATMUL.output_shapes(*shapes) == ((2, 5),)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "nbytes"),
    [
        ("bfloat16", None, 2 * (6 + 15 + 10)),
        ("float32", None, 4 * (6 + 15 + 10)),
        ("float16", "float32", 2 * (6 + 15) + 4 * 10),
    ],
)
def test_work_and_compulsory_bytes(dtype, out_dtype, nbytes):
    axes = {"M": 2, "N": 5, "K": 3}
    assert MATMUL.flops(axes) == 2 * 2 * 5 * 3
    assert MATMUL.min_bytes(axes, dtype, out_dtype) == nbytes


def test_the_roofline_is_the_larger_bound():
    spec = spec_for("trn2")
    large = {"M": 4096, "N": 4096, "K": 4096}
    compute = Fraction(2 * 4096**3) / Fraction(spec.peak_tflops("bfloat16")) / 1000
    assert is_near(MATMUL.roofline_ns(large, "bfloat16", spec), compute)
    assert MATMUL.roofline_ns(large, "float32", spec) > MATMUL.roofline_ns(large, "bfloat16", spec)
    thin = {"M": 1, "N": 4096, "K": 4096}
    want = 2 * (4096 + 4096 * 4096 + 4096) / Fraction(spec.hbm_bytes_per_ns)
    assert is_near(MATMUL.roofline_ns(thin, "bfloat16", spec), want)


def is_near(got, want):
    """Equal but for the rounding of a multiplication and a division in float64."""
    return abs(Fraction(got) - want) <= 2 * Fraction(math.ulp(got))


def arrays(a, b, dtype=np.float32):
    return np.zeros(a, dtype), np.zeros(b, dtype)


ILLEGAL = {
    "contraction": (
        arrays((3, 4), (5, 6)), {}, ShapeError,
        ("K is 4 in a [M, K] = [3, 4] but 5 in b [K, N] = [5, 6]; the two must be equal; "
         "transpose or slice one of them"),
    ),
    "one dimension": (
        arrays((4,), (4, 6)), {}, ShapeError,
        "a has 1 dimensions, shape [4]; 2 are needed: a [M, K]; reshape it",
    ),
    "three dimensions": (
        arrays((3, 4), (1, 4, 6)), {}, ShapeError,
        "b has 3 dimensions, shape [1, 4, 6]; 2 are needed: b [K, N]; reshape it",
    ),
    "scalar": (arrays((), (4, 6)), {}, ShapeError, "a has 0 dimensions, shape []"),
    "no rows": (
        arrays((0, 4), (4, 6)), {}, ShapeError,
        ("a [M, K] = [0, 4] has a zero-size axis; every axis must be at least 1; "
         "handle the empty case before the call"),
    ),
    "no contraction": (arrays((3, 0), (0, 6)), {}, ShapeError, "b [K, N] = [0, 6] has a zero-size"),
    "no columns": (arrays((3, 4), (4, 0)), {}, ShapeError, "b [K, N] = [4, 0] has a zero-size"),
    "float64": (
        arrays((3, 4), (4, 6), np.float64), {}, DtypeError,
        ("a has dtype float64; allowed are bfloat16, float16, float32; "
         "cast it, for example a.astype('float32')"),
    ),
    "integers": (arrays((3, 4), (4, 6), np.int32), {}, DtypeError, "b has dtype int32; allowed"),
    "other byte order": (arrays((3, 4), (4, 6), ">f4"), {}, DtypeError, "a has dtype >f4; allowed"),
    "two dtypes": (
        (np.zeros((3, 4), np.float32), np.zeros((4, 6), ml_dtypes.bfloat16)), {}, DtypeError,
        "dtypes differ: a float32, b bfloat16; all inputs must have one dtype; cast one",
    ),
    "transposed view": (
        (np.zeros((3, 4), np.float32), np.zeros((6, 4), np.float32).T), {}, ShapeError,
        ("b is strided, [4, 16] bytes for shape [4, 6]; a kernel takes dense row-major arrays; "
         "pass np.ascontiguousarray(b)"),
    ),
    "column slice": (
        (np.zeros((3, 8), np.float32)[:, ::2], np.zeros((4, 6), np.float32)), {}, ShapeError,
        "a is strided, [32, 8] bytes for shape [3, 4]",
    ),
    "list": (
        ([[1.0]], np.zeros((1, 6), np.float32)), {}, DtypeError,
        "a is a list; a NumPy array is needed; pass np.asarray(a, dtype=...)",
    ),
    "float64 output": (
        arrays((3, 4), (4, 6)), {"out_dtype": np.float64}, DtypeError,
        "allowed are bfloat16, float16, float32; choose one of them",
    ),
    "unknown output": (
        arrays((3, 4), (4, 6)), {"out_dtype": "fp33"}, DtypeError, "out_dtype is fp33; allowed are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_is_one_clear_error(name):
    inputs, options, error, text = ILLEGAL[name]
    assert any(text in reason for reason in MATMUL.problems(inputs, options, TOY))
    with pytest.raises(error) as caught:
        MATMUL.check(inputs, options, TOY)
    assert isinstance(caught.value, NkiKernelsError)
    assert text in str(caught.value)
    assert str(caught.value).startswith("matmul(")


def test_every_reason_is_listed():
    inputs = np.zeros((0, 4), np.float64), np.zeros((6, 5), np.int64).T
    with pytest.raises(ShapeError) as caught:
        MATMUL.check(inputs, {"out_dtype": "int8"}, TOY)
    lines = str(caught.value).splitlines()
    assert lines[0] == "matmul(float64[0, 4], int64[5, 6]): 6 problems"
    starts = ["a has", "b has", "out_dtype is", "a [M, K] =", "K is 4", "b is"]
    assert len(lines) == 1 + len(starts)
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.startswith(f"  - {start} ")
    assert len(MATMUL.problems(inputs, {"out_dtype": "int8"}, TOY)) == 6


@pytest.mark.parametrize("dtype", MATMUL.dtypes)
def test_a_legal_call_has_no_problems(dtype):
    host = np.dtype(getattr(ml_dtypes, dtype, dtype))
    inputs = np.zeros((3, 4), host), np.zeros((4, 6), host)
    assert MATMUL.problems(inputs, {}, TOY) == []
    assert MATMUL.problems([Abstract((3, 4), dtype), Abstract((4, 6), dtype)], {}, TOY) == []
    # A single row or column is dense whatever its strides say.
    column = np.zeros((4, 6), host)[:, :1]
    assert MATMUL.problems((np.zeros((3, 1), host).T.reshape(1, 3), column[:3]), {}, TOY) != []
    assert MATMUL.problems((np.zeros((3, 1), host).T, np.zeros((3, 6), host)), {}, TOY) == []


def test_limits_are_asked_only_about_sizes_that_make_sense():
    asked = []

    def limits(axes, dtype, spec):
        asked.append((dict(axes), str(dtype), spec.name))
        return ("M is 3; at most 2 fit; use fewer rows",)

    limited = type(MATMUL)(
        **{name: getattr(MATMUL, name) for name in MATMUL.__slots__ if name != "limits"},
        limits=limits,
    )
    with pytest.raises(ShapeError, match=r"float32\[4, 6\]\): M is 3; at most 2 fit; use fewer"):
        limited.check(arrays((3, 4), (4, 6)), {}, TOY)
    assert asked == [({"M": 3, "K": 4, "N": 6}, "float32", spec_for(TOY).name)]
    with pytest.raises(ShapeError):
        limited.check(arrays((3, 4), (5, 6)), {}, TOY)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("dtype", "known"), [("bf16", True), (np.float16, True), ("float64", False), (object(), False)]
)
def test_supports_takes_any_spelling(dtype, known):
    assert supports(MATMUL, dtype) is known
