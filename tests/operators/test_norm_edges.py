"""Edges and special values of the normalizations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES, NORMS, TOY, call, compare, expected, operands
from tests.strategies.matrices import extents, seeds

LARGEST = float(np.finfo(np.float32).max)


def rows_of(values, n, h, dtype):
    """Return an [n, h] array that repeats `values` row by row."""
    return np.resize(np.asarray(values, np.float64), (h, n)).T.astype(DTYPES[dtype]).copy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (1, 2), (1, 3), (1, 600), (129, 1), (2, 1025)])
@pytest.mark.parametrize("op", NORMS)
def test_edges(op, shape, dtype):
    inputs = operands(op, *shape, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", "edge")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 9, 40])
def test_a_single_column_has_no_spread(n, dtype):
    x, weight, bias = operands("layer_norm", n, 1, dtype)
    assert (ops.layer_norm(x, weight, bias, target="toy") == bias).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_rows_of_zeros_become_the_bias(op, dtype):
    x, *vectors = operands(op, 19, 70, dtype)
    bias = vectors[1] if op == "layer_norm" else np.zeros(70, DTYPES[dtype])
    assert (call(op, (np.zeros_like(x), *vectors), target="toy") == bias).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_rows_of_zeros_without_eps_are_nan(op, dtype):
    x, *vectors = operands(op, 19, 70, dtype)
    x[4] = 0
    got = call(op, (x, *vectors), eps=0.0, target="toy")
    assert np.isnan(got[4]).all()
    others = np.arange(19) != 4
    compare(op, got[others], (x[others], *vectors), "toy", "others", eps=0.0)


#: Values of a row, repeated along it, by dtype: large and small ones whose squares float32 holds.
VALUES = {
    "equal": [3.0], "equal and rounded": [0.1], "one, then zeros": [1.0] + [0.0] * 69,
    "zeros, then one": [0.0] * 69 + [1.0], "half and half": [1.0, -1.0],
    "large": [1e4, -3e4, 2e4], "small": [1e-4, -3e-5, 2e-4], "cancelling": [1e3, -1e3, 1e-2],
    "one large": [6e4] + [1e-3] * 60,
}  # fmt: skip
WIDE_VALUES = {
    "squares almost overflow": [1e18, -2e18], "below eps": [1e-15, -3e-16],
    "squares underflow": [1e-25, 3e-26], "subnormal": [1e-40, -3e-39],
}  # fmt: skip
ROWS = [
    *((values, dtype) for values in VALUES.values() for dtype in DTYPES),
    *((values, dtype) for values in WIDE_VALUES.values() for dtype in ("bfloat16", "float32")),
]
NAMES = [
    *(f"{name} {dtype}" for name in VALUES for dtype in DTYPES),
    *(f"{name} {dtype}" for name in WIDE_VALUES for dtype in ("bfloat16", "float32")),
]


@pytest.mark.parametrize(("values", "dtype"), ROWS, ids=NAMES)
@pytest.mark.parametrize("op", NORMS)
def test_uneven_rows_match_the_reference(op, values, dtype):
    _, *vectors = operands(op, 19, 70, dtype)
    inputs = (rows_of(values, 19, 70, dtype), *vectors)
    compare(op, call(op, inputs, target="toy"), inputs, "toy", str(values[:3]))


@pytest.mark.parametrize("op", NORMS)
@given(dtype=st.sampled_from(["bfloat16", "float32"]), power=st.integers(-60, 59), seed=seeds())
def test_rows_of_any_scale_match_the_reference_without_eps(op, dtype, power, seed):
    """Mean squares from 2^-120 to 2^120: Scalar's root takes 2^-87 to 2^97."""
    x, *vectors = operands(op, 9, 33, dtype, seed)
    inputs = (np.ldexp(x.astype(np.float64), power).astype(x.dtype), *vectors)
    compare(op, call(op, inputs, eps=0.0, target="toy"), inputs, "toy", f"2^{power}", eps=0.0)


@pytest.mark.parametrize("op", NORMS)
@given(
    dtype=st.sampled_from(["bfloat16", "float32"]), seed=seeds(), ratio=st.integers(1, 20),
    n=extents(8, 25), h=extents(16, 70),
)  # fmt: skip
def test_a_mean_far_above_the_spread_matches_the_reference(op, n, h, dtype, seed, ratio):
    x, *vectors = operands(op, n, h, "float32", seed)
    far = (x + 2.0**ratio).astype(DTYPES[dtype])
    inputs = (far, *(v.astype(DTYPES[dtype]) for v in vectors))
    compare(op, call(op, inputs, target="toy"), inputs, "toy", f"mean 2^{ratio}")


@pytest.mark.parametrize("op", NORMS)
@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), n=extents(8, 25), h=extents(16, 70))
def test_one_hot_rows_match_the_reference(op, n, h, dtype, seed):
    rng = np.random.default_rng(seed)
    _, *vectors = operands(op, n, h, dtype, seed)
    x = np.zeros((n, h), DTYPES[dtype])
    x[np.arange(n), rng.integers(0, h, n)] = rng.choice([-8.0, 0.5, 100.0], n)
    compare(op, call(op, (x, *vectors), target="toy"), (x, *vectors), "toy", "one-hot")


# -- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("column", [0, 37, 69])
@pytest.mark.parametrize("row", [0, 4, 9, 18])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_a_nan_fills_its_row_and_no_other(op, dtype, row, column):
    x, *vectors = operands(op, 19, 70, dtype)
    x[row, column] = np.nan
    got = call(op, (x, *vectors), target="toy")
    assert np.isnan(got[row]).all()
    others = np.arange(19) != row
    compare(op, got[others], (x[others], *vectors), "toy", "others")


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 4, 9, 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_is_nan_in_its_column_and_zero_in_its_row_of_rms_norm(dtype, row, value):
    x, weight = operands("rms_norm", 19, 70, dtype)
    x[row, 37] = value
    got = ops.rms_norm(x, weight, target="toy")
    column = np.arange(70) == 37
    assert np.isnan(got[row, column]).all()
    assert (got[row, ~column] == 0).all()
    others = np.arange(19) != row
    compare("rms_norm", got[others], (x[others], weight), "toy", "others")


@pytest.mark.parametrize("column", [0, 37, 69])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 4, 9, 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_makes_its_row_nan_in_layer_norm(dtype, row, value, column):
    x, *vectors = operands("layer_norm", 19, 70, dtype)
    x[row, column] = value
    got = ops.layer_norm(x, *vectors, target="toy")
    assert np.isnan(got[row]).all()
    others = np.arange(19) != row
    compare("layer_norm", got[others], (x[others], *vectors), "toy", "others")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("row", [4, 18])
@pytest.mark.parametrize("op", NORMS)
def test_squares_beyond_float32_leave_the_bias(op, row, dtype):
    x, *vectors = operands(op, 19, 70, dtype)
    x[row] = np.where(np.arange(70) % 3, 1e20, -1e20)
    got = call(op, (x, *vectors), target="toy")
    bias = vectors[1] if op == "layer_norm" else 0
    assert (got[row] == bias).all()
    others = np.arange(19) != row
    compare(op, got[others], (x[others], *vectors), "toy", "others")


@pytest.mark.parametrize("op", NORMS)
def test_special_rows_are_those_of_torch(op):
    """The claims above about NaN, infinity and overflow, held against PyTorch."""
    torch = pytest.importorskip("torch")
    x, *vectors = operands(op, 19, 70, "float32")
    x[1, 3], x[2, 3], x[10, 3], x[11, 5] = np.nan, np.inf, -np.inf, np.nan
    x[12] = np.where(np.arange(70) % 3, 1e20, -1e20)
    x[13], x[14], x[15] = 0, 5, np.where(np.arange(70) % 3, 1e18, -2e18)
    tensors = [torch.from_numpy(array.copy()) for array in (x, *vectors)]
    function = getattr(torch.nn.functional, op)
    want = function(tensors[0], (70,), *tensors[1:], eps=1e-5).numpy()
    got = call(op, (x, *vectors), eps=1e-5, target="toy")
    assert (np.isnan(got) == np.isnan(want)).all()
    for row in (2, 10, 12, 13):
        finite = ~np.isnan(want[row])
        assert (got[row][finite] == want[row][finite]).all()


@pytest.mark.parametrize("op", NORMS)
def test_zeros_without_eps_are_those_of_torch(op):
    torch = pytest.importorskip("torch")
    x, *vectors = operands(op, 3, 70, "float32")
    x[1] = 0
    tensors = [torch.from_numpy(array.copy()) for array in (x, *vectors)]
    want = getattr(torch.nn.functional, op)(tensors[0], (70,), *tensors[1:], eps=0.0).numpy()
    got = call(op, (x, *vectors), eps=0.0, target="toy")
    assert np.isnan(want[1]).all()
    assert (np.isnan(got) == np.isnan(want)).all()


@pytest.mark.parametrize("op", NORMS)
def test_a_special_weight_reaches_its_column_and_no_other(op):
    x, weight, *rest = operands(op, 19, 70, "float32")
    weight[5] = np.nan
    got = call(op, (x, weight, *rest), target="toy")
    column = np.arange(70) == 5
    assert np.isnan(got[:, column]).all()
    ref = expected(op, (x, weight, *rest))
    assert np.isnan(ref.value[:, column]).all()
    compare(op, got, (x, weight, *rest), "toy", "weight")


def test_a_result_too_large_for_the_output_dtype_is_infinite():
    x = np.ones((3, 20), np.float32)
    weight = np.full(20, LARGEST, np.float32)
    got = ops.rms_norm(x, weight, out_dtype="float16", target="toy")
    assert (got == np.inf).all()


# -- the call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", NORMS)
def test_the_inputs_stay_as_they_were_and_the_result_is_new(op):
    inputs = operands(op, 19, 70, "float32")
    before = [x.tobytes() for x in inputs]
    first, second = (call(op, inputs, target="toy") for _ in range(2))
    assert [x.tobytes() for x in inputs] == before
    assert first.tobytes() == second.tobytes()
    assert not any(np.shares_memory(first, other) for other in (*inputs, second))


@pytest.mark.parametrize("op", NORMS)
def test_read_only_inputs_are_fine(op):
    inputs = operands(op, 19, 70, "float32")
    for x in inputs:
        x.flags.writeable = False
    compare(op, call(op, inputs, target="toy"), inputs, "toy", "read-only")


@pytest.mark.parametrize("op", NORMS)
def test_the_target_comes_from_the_environment(op, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "toy")
    inputs = operands(op, 19, 70, "float32")
    assert OPERATORS[op].launch(inputs, {}).trace.spec is TOY
    assert call(op, inputs).tobytes() == call(op, inputs, target="toy").tobytes()


@pytest.mark.parametrize("op", NORMS)
def test_an_unknown_target_lists_the_known_ones(op):
    with pytest.raises(ValueError, match=r"'trn9': unknown; allowed are trn1, .*toy"):
        call(op, operands(op, 2, 2, "float32"), target="trn9")
