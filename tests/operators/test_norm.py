"""The test pattern of rms_norm and layer_norm: cases, properties, exactness, illegal calls.

Edges and special values are in test_norm_edges.py, mutants in test_norm_mutants.py, counts in
test_norm_counts.py, configs and limits in test_norm_limits.py.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.norm import LayerNormConfig, RmsNormConfig
from nki_kernels.machine.errors import DtypeError, NkiKernelsError, OptionError, ShapeError
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.operators.shapes import cases, parse
from tests.operators.norms import (
    ALL,
    DTYPES,
    EVERY,
    NORMS,
    TOY,
    TRN2,
    call,
    compare,
    expected,
    operands,
)
from tests.operators.test_contract import Symbol
from tests.strategies.matrices import extents, normal, seeds, small_integers, wide

# -- named cases -----------------------------------------------------------------------------------

NAMED = [(op, case.name) for op in NORMS for case in cases(op)]


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_a_named_case_matches_the_reference(op, name):
    """Two row tiles with the real row length and the real remainder, under the real config."""
    axes = parse(OPERATORS[op], name).axes
    config = OPERATORS[op].configure(axes, "bfloat16", TRN2)
    cut = OPERATORS[op].reduced(axes, config, TRN2)
    inputs = operands(op, cut["N"], cut["H"], "bfloat16")
    compare(op, call(op, inputs, config=config, target="trn2"), inputs, "trn2", name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("rms_norm", "gpt-oss-20b:decode:hidden"),
        ("rms_norm", "qwen3-30b-a3b:decode:q-norm"),
        ("layer_norm", "minilm-l6:prefill:hidden"),
    ],
)
def test_a_named_case_matches_at_full_size(op, name, dtype):
    axes = parse(OPERATORS[op], name).axes
    inputs = operands(op, axes["N"], axes["H"], dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", name)


# -- properties ------------------------------------------------------------------------------------

#: Up to four row tiles; layer_norm's statistics take turns from the second on. 78 columns of
#: float32 are the most that fit the toy core, almost five bn_stats chunks.
toy_sizes = {
    "n": extents(TOY.partitions, 3 * TOY.partitions + 5),
    "h": extents(TOY.bn_stats_fmax, 78),
}
dtypes = st.sampled_from(list(DTYPES))
columns = st.integers(0, 80)
config_fields = {
    "chunk": extents(8, 40),
    "piece": extents(8, 40),
    "ahead": st.integers(0, 1),
    "hwdge": st.booleans(),
}


@pytest.mark.parametrize(("op", "present"), EVERY)
@given(dtype=dtypes, out_dtype=dtypes, seed=seeds(), uneven=st.booleans(), **toy_sizes)
def test_any_shape_matches_the_reference(op, present, n, h, dtype, out_dtype, seed, uneven):
    inputs = operands(op, n, h, dtype, seed, present, wide if uneven else normal)
    got = call(op, inputs, out_dtype=out_dtype, target="toy")
    assert got.dtype == DTYPES[out_dtype]
    compare(op, got, inputs, "toy", f"{n}x{h}")


@pytest.mark.parametrize("op", NORMS)
@given(eps=st.floats(2**-40, 2**120), seed=seeds(), **toy_sizes)
def test_any_eps_matches_the_reference(op, n, h, eps, seed):
    inputs = operands(op, n, h, "float32", seed)
    compare(op, call(op, inputs, eps=eps, target="toy"), inputs, "toy", f"eps {eps}", eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("n", [127, 128, 129, 257])
@pytest.mark.parametrize("h", [511, 512, 513, 1024, 1025])
def test_sizes_around_the_real_tiles_match_the_reference(op, n, h, dtype):
    inputs = operands(op, n, h, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", f"{n}x{h}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_every_generation_matches_the_reference(op, dtype, target):
    spec = spec_for(target)
    inputs = operands(op, 2 * spec.partitions + 3, 2 * spec.bn_stats_fmax + 5, dtype)
    compare(op, call(op, inputs, target=target), inputs, target, "ragged")


@given(dtype=dtypes, seed=seeds(), **config_fields, **toy_sizes)
def test_no_config_changes_the_mathematics_of_rms_norm(
    n, h, dtype, seed, chunk, piece, ahead, hwdge
):
    inputs = operands("rms_norm", n, h, dtype, seed)
    config = RmsNormConfig(chunk, piece, ahead, 0, 0, 0, hwdge)
    got = ops.rms_norm(*inputs, config=config, target="toy")
    compare("rms_norm", got, inputs, "toy", repr(config))


@pytest.mark.parametrize("present", [given for op, given in EVERY if op == "layer_norm"])
@given(
    dtype=dtypes, seed=seeds(), vector_stats=columns, pool_shift=columns, pool_scale=columns,
    overlap=st.booleans(), n=toy_sizes["n"], h=extents(TOY.bn_stats_fmax, 50), **config_fields,
)  # fmt: skip
def test_no_config_changes_the_mathematics_of_layer_norm(present, n, h, dtype, seed, **fields):
    inputs = operands("layer_norm", n, h, dtype, seed, present)
    fields["ahead"] = 0  # three rows of 50 float32 columns and their chunks are all that fits
    config = LayerNormConfig(**fields)
    got = ops.layer_norm(*inputs, config=config, target="toy")
    compare("layer_norm", got, inputs, "toy", repr(config))


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", NORMS)
@given(dtype=dtypes, seed=seeds(), **toy_sizes)
def test_permuting_rows_permutes_the_result(op, n, h, dtype, seed):
    x, *vectors = operands(op, n, h, dtype, seed)
    rng = np.random.default_rng(seed)
    # layer_norm adds the first row tile in another order than the rest: permute within each.
    first = TOY.partitions if op == "layer_norm" else n
    order = np.concatenate([rng.permutation(min(first, n)), first + rng.permutation(n - first)])
    order = order[:n].astype(int)
    whole = call(op, (x, *vectors), target="toy")
    permuted = call(op, (x[order], *vectors), target="toy")
    assert permuted.tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("op", NORMS)
@given(dtype=dtypes, seed=seeds(), more=st.integers(1, 20), **toy_sizes)
def test_rows_below_are_inert(op, n, h, dtype, seed, more):
    x, *vectors = operands(op, n, h, dtype, seed)
    below = wide(seed + 9, (more, h), DTYPES[dtype])
    padded = call(op, (np.concatenate([x, below]), *vectors), target="toy")
    assert padded[:n].tobytes() == call(op, (x, *vectors), target="toy").tobytes()


@pytest.mark.parametrize("op", NORMS)
@given(
    dtype=st.sampled_from(["bfloat16", "float32"]), power=st.integers(-30, 30), seed=seeds(),
    **toy_sizes,
)  # fmt: skip
def test_a_power_of_two_leaves_every_bit(op, n, h, dtype, power, seed):
    x, *vectors = operands(op, n, h, dtype, seed)
    eps = DEFAULT_EPS[op]
    scaled = np.ldexp(x.astype(np.float64), power).astype(x.dtype)
    want = call(op, (x, *vectors), eps=eps, target="toy")
    got = call(op, (scaled, *vectors), eps=eps * 4.0**power, target="toy")
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("op", NORMS)
@given(dtype=dtypes, seed=seeds(), **toy_sizes)
def test_negating_rows_negates_the_result(op, n, h, dtype, seed):
    x, weight, *_ = operands(op, n, h, dtype, seed, ("weight",))
    got, negated = (call(op, (rows, weight), target="toy") for rows in (x, -x))
    assert (negated == -got).all()


@pytest.mark.parametrize("op", NORMS)
@given(dtype=dtypes, seed=seeds(), **toy_sizes)
def test_ones_and_zeros_are_as_good_as_nothing(op, n, h, dtype, seed):
    x, *_ = operands(op, n, h, dtype, seed)
    one, zero = np.ones(h, DTYPES[dtype]), np.zeros(h, DTYPES[dtype])
    plain = call(op, (x,), target="toy")
    assert call(op, (x, one), target="toy").tobytes() == plain.tobytes()
    if op == "layer_norm":
        # By value: the sum of -0 and 0 is 0.
        assert (call(op, (x, None, zero), target="toy") == plain).all()
        assert (call(op, (x, one, zero), target="toy") == plain).all()


@given(
    dtype=dtypes, power=st.integers(-6, 6), log_h=st.integers(0, 6), n=toy_sizes["n"], seed=seeds()
)
def test_signs_of_one_power_of_two_return_the_weight(dtype, power, log_h, n, seed):
    h = 2**log_h
    signs = np.where(np.random.default_rng(seed).random((n, h)) < 0.5, -1.0, 1.0)
    weight = normal(seed, (h,), DTYPES[dtype])
    x = np.ldexp(signs, power).astype(DTYPES[dtype])
    got = ops.rms_norm(x, weight, eps=0.0, target="toy")
    assert (got.astype(np.float64) == signs * weight.astype(np.float64)).all()


@given(dtype=dtypes, n=toy_sizes["n"], h=extents(16, 2 * TOY.bn_stats_fmax), seed=seeds())
def test_a_row_of_one_integer_returns_the_bias(dtype, n, h, seed):
    # Integers, and rows so short that bn_stats takes all of them: every sum and mean is exact.
    x = np.repeat(small_integers(seed, (n, 1), DTYPES[dtype], most=100), h, axis=1)
    _, weight, bias = operands("layer_norm", n, h, dtype, seed)
    got = ops.layer_norm(x, weight, bias, target="toy")
    assert (got == bias).all()


@given(dtype=dtypes, shift=st.integers(-200, 200), seed=seeds(), **toy_sizes)
def test_layer_norm_does_not_see_a_shift(n, h, dtype, shift, seed):
    most = 50 if dtype != "bfloat16" else 20
    shift = shift if dtype != "bfloat16" else shift // 2
    x, *vectors = operands(
        "layer_norm", n, h, dtype, seed, ALL, lambda *where: small_integers(*where, most=most)
    )
    moved = (x.astype(np.float64) + shift).astype(x.dtype)
    assert (moved.astype(np.float64) - shift == x.astype(np.float64)).all()
    got = ops.layer_norm(moved, *vectors, target="toy")
    still = expected("layer_norm", (x, *vectors)).value
    compare("layer_norm", got, (moved, *vectors), "toy", f"shift {shift}", value=still)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", NORMS)
def test_the_result_is_rounded_once_to_the_output_dtype(op, out_dtype):
    inputs = operands(op, 19, 61, "float32")
    full = call(op, inputs, target="toy")
    got = call(op, inputs, out_dtype=out_dtype, target="toy")
    assert got.tobytes() == full.astype(DTYPES[out_dtype]).tobytes()


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", NORMS)
def test_output_shapes_never_look_at_a_size(op):
    n, h = Symbol("N"), Symbol("H")
    vectors = [(h,)] * (len(OPERATORS[op].inputs) - 1)
    for given_vectors in (vectors, [None] * len(vectors)):
        ((rows, length),) = OPERATORS[op].output_shapes((n, h), *given_vectors)
        assert rows is n
        assert length is h


@pytest.mark.parametrize("op", NORMS)
def test_defaults_are_the_references_own(op):
    inputs = operands(op, 5, 20, "float32")
    want = call(op, inputs, eps=DEFAULT_EPS[op], target="toy")
    assert call(op, inputs, target="toy").tobytes() == want.tobytes()
    same = expected(op, inputs, eps=DEFAULT_EPS[op]).value
    assert (expected(op, inputs).value == same).all()


def zeros(*shapes, dtype=np.float32):
    return tuple(None if shape is None else np.zeros(shape, dtype) for shape in shapes)


ILLEGAL = {
    "one dimension": (
        zeros((4,)), {}, ShapeError,
        "x has 1 dimensions, shape [4]; 2 are needed: x [N, H]; reshape it",
    ),
    "weight of another length": (
        zeros((3, 4), (5,)), {}, ShapeError,
        ("H is 4 in x [N, H] = [3, 4] but 5 in weight [H] = [5]; the two must be equal; "
         "transpose or slice one of them"),
    ),
    "weight as a row": (
        zeros((3, 4), (1, 4)), {}, ShapeError,
        "weight has 2 dimensions, shape [1, 4]; 1 are needed: weight [H]; reshape it",
    ),
    "no rows": (zeros((0, 4), (4,)), {}, ShapeError, "x [N, H] = [0, 4] has a zero-size axis"),
    "no columns": (zeros((3, 0), (0,)), {}, ShapeError, "weight [H] = [0] has a zero-size axis"),
    "float64": (
        zeros((3, 4), dtype=np.float64), {}, DtypeError,
        ("x has dtype float64; allowed are bfloat16, float16, float32; "
         "cast it, for example x.astype('float32')"),
    ),
    "two dtypes": (
        (np.zeros((3, 4), ml_dtypes.bfloat16), np.zeros(4, np.float32)), {}, DtypeError,
        "dtypes differ: x bfloat16, weight float32; all inputs must have one dtype; cast one",
    ),
    "strided": (
        (np.zeros((3, 8), np.float32)[:, ::2],), {}, ShapeError,
        "x is strided, [32, 8] bytes for shape [3, 4]",
    ),
    "no array": ((None,), {}, DtypeError, "x is a NoneType; a NumPy array is needed; pass np.as"),
    "a list": (([[1.0]],), {}, DtypeError, "x is a list; a NumPy array is needed"),
    "a list for the weight": (
        (*zeros((1, 1)), [1.0]), {}, DtypeError, "weight is a list; a NumPy array is needed",
    ),
    "float64 output": (
        zeros((3, 4)), {"out_dtype": np.float64}, DtypeError,
        "allowed are bfloat16, float16, float32; choose one of them",
    ),
}  # fmt: skip
BAD_EPS = [
    -1e-6,
    float("nan"),
    float("inf"),
    1e39,
    "1e-6",
    True,
    1j,
    10**400,
    np.float64(-1),
]


def refused(op, inputs, options, error, text, monkeypatch):
    monkeypatch.setattr(
        "nki_kernels.operators.contract.launch", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(error) as caught:
        call(op, inputs, **options, target="trn2")
    assert isinstance(caught.value, NkiKernelsError)
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{op}(")


@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("op", NORMS)
def test_an_illegal_call_raises_before_anything_runs(op, name, monkeypatch):
    refused(op, *ILLEGAL[name], monkeypatch)


def test_the_bias_is_held_to_the_same_rules(monkeypatch):
    inputs = zeros((3, 4), None, (5,))
    refused("layer_norm", inputs, {}, ShapeError, "5 in bias [H] = [5]; the two", monkeypatch)


@pytest.mark.parametrize("eps", BAD_EPS, ids=repr)
@pytest.mark.parametrize("op", NORMS)
def test_an_eps_that_is_none_says_what_one_is(op, eps, monkeypatch):
    text = f"eps is {eps!r}; a number of at least 0 that float32 can hold is needed; pass for"
    refused(op, zeros((3, 4)), {"eps": eps}, OptionError, text, monkeypatch)
    assert issubclass(OptionError, ValueError)


@pytest.mark.parametrize("op", NORMS)
def test_every_reason_is_listed_and_the_gravest_names_the_error(op, monkeypatch):
    half = np.zeros((3, 4), np.float16)
    refused(op, (half, np.zeros(5, np.int8)), {"eps": -1}, ShapeError, "3 problems", monkeypatch)
    refused(op, (half, np.zeros(4, np.int8)), {"eps": -1}, DtypeError, "2 problems", monkeypatch)
    contract = OPERATORS[op]
    rest = (None,) * (len(contract.inputs) - 2)
    found = contract.problems((half, np.zeros(5, np.int8), *rest), {"eps": -1}, "trn2")
    assert [reason.split()[0] for reason in found] == ["weight", "H", "eps"]


@pytest.mark.parametrize(
    "eps", [0, 1e-6, np.float32(1e-6), np.float16(0.5), 1e29, 10**9, 2.0**120, 3.4e38], ids=repr
)
@pytest.mark.parametrize("op", NORMS)
def test_any_number_is_an_eps(op, eps):
    inputs = operands(op, 3, 20, "float32")
    assert np.isfinite(call(op, inputs, eps=eps, target="toy")).all()
