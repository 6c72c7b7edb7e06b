"""The test pattern of rms_norm_backward and layer_norm_backward.

Mutants and counts are in test_norm_backward_mutants.py; finite differences in
tests/reference/test_norm_gradients.py.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.norm import LayerNormBackwardConfig, RmsNormBackwardConfig
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.operators.shapes import cases, parse
from tests.operators.norm_gradients import BACKWARD, EVERY, call, compare, expected, operands
from tests.operators.norms import DTYPES, TOY, TRN2
from tests.operators.test_contract import Symbol
from tests.strategies.matrices import extents, seeds, small_integers, wide
from tests.tolerance import allowed_error

# -- named cases -----------------------------------------------------------------------------------

NAMED = [(op, case.name) for op in BACKWARD for case in cases(op)]


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_a_named_case_matches_the_reference(op, name):
    """Two row tiles with the real row length and the real remainder, under the real config."""
    axes = parse(OPERATORS[op], name).axes
    config = OPERATORS[op].configure(axes, "bfloat16", TRN2)
    cut = OPERATORS[op].reduced(axes, config, TRN2)
    inputs = operands(op, cut["N"], cut["H"], "bfloat16")
    compare(op, call(op, inputs, config=config, target="trn2"), inputs, "trn2", name)


# -- properties ------------------------------------------------------------------------------------

toy_sizes = {
    "n": extents(TOY.partitions, 3 * TOY.partitions + 5),
    "h": extents(TOY.stationary_fmax, 60),
}
dtypes = st.sampled_from(list(DTYPES))


@pytest.mark.parametrize(("op", "weighted"), EVERY)
@given(dtype=dtypes, out_dtype=dtypes, seed=seeds(), uneven=st.booleans(), **toy_sizes)
def test_any_shape_matches_the_reference(op, weighted, n, h, dtype, out_dtype, seed, uneven):
    inputs = operands(op, n, h, dtype, seed, weighted, *([wide] if uneven else []))
    got = call(op, inputs, out_dtype=out_dtype, target="toy")
    assert all(array.dtype == DTYPES[out_dtype] for array in got)
    compare(op, got, inputs, "toy", f"{n}x{h}")


@pytest.mark.parametrize("op", BACKWARD)
@given(eps=st.floats(2**-40, 2**40), seed=seeds(), **toy_sizes)
def test_any_eps_matches_the_reference(op, n, h, eps, seed):
    inputs = operands(op, n, h, "float32", seed)
    compare(op, call(op, inputs, eps=eps, target="toy"), inputs, "toy", f"eps {eps}", eps=eps)


@pytest.mark.parametrize("op", BACKWARD)
@given(
    dtype=st.sampled_from(["bfloat16", "float32"]), seed=seeds(), ratio=st.integers(1, 20),
    **toy_sizes,
)  # fmt: skip
def test_a_mean_far_above_the_spread_matches_the_reference(op, n, h, dtype, seed, ratio):
    dy, x, weight = operands(op, n, h, "float32", seed)
    far = (x + 2.0**ratio).astype(DTYPES[dtype])
    # Rows that rounding makes equal have a test of their own.
    assume((far.astype(np.float64).var(axis=1) > 0).all())
    inputs = (dy.astype(far.dtype), far, weight.astype(far.dtype))
    compare(op, call(op, inputs, target="toy"), inputs, "toy", f"mean 2^{ratio}")


@given(seed=seeds(), ratio=st.integers(0, 12), **toy_sizes)
def test_equal_rows_far_from_zero_lose_at_most_the_rounding_of_their_mean(n, h, seed, ratio):
    """The variance of such a row is 0; the kernel's is the square of the error of its mean."""
    op, eps = "layer_norm_backward", 1e-5
    dy, _, weight = operands(op, n, h, "float32", seed)
    x = np.full((n, h), 2.0**ratio, np.float32)
    dx = np.abs(call(op, (dy, x, weight), eps=eps, target="toy")[0].astype(np.float64))
    ref = expected(op, (dy, x, weight), eps=eps)[0]
    contract = OPERATORS[op]
    chain = contract.chain({"N": n, "H": h}, spec_for("toy"))
    bound = {"dtype": np.dtype(np.float32), "roundings": contract.roundings, "chain": chain}
    allowed = allowed_error(ref.value, ref.magnitude, **bound)
    least = 1 / np.sqrt(1 + (chain * 2.0**-24 * 2.0**ratio) ** 2 / eps)
    assert (dx >= np.abs(ref.value) * least - allowed).all()
    assert (dx <= np.abs(ref.value) + allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("n", [1, 127, 129])
@pytest.mark.parametrize("h", [1, 127, 129, 1025, 2049])
def test_sizes_around_the_real_tiles_match_the_reference(op, n, h, dtype):
    inputs = operands(op, n, h, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", f"{n}x{h}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", BACKWARD)
def test_every_generation_matches_the_reference(op, dtype, target):
    spec = spec_for(target)
    inputs = operands(op, 2 * spec.partitions + 3, 2 * spec.stationary_fmax + 5, dtype)
    compare(op, call(op, inputs, target=target), inputs, target, "ragged")


config_fields = {
    "chunk": extents(8, 40),
    "pool": st.integers(0, 50),
    "ahead": st.integers(0, 2),
    "overlap": st.booleans(),
    "hwdge": st.booleans(),
}
#: Two row tiles of x and g in float32, and what is in flight, must fit the toy core.
short_rows = extents(TOY.stationary_fmax, 30)


@given(dtype=dtypes, seed=seeds(), n=toy_sizes["n"], h=short_rows, **config_fields)
def test_no_config_changes_the_mathematics_of_rms_norm(n, h, dtype, seed, **fields):
    inputs = operands("rms_norm_backward", n, h, dtype, seed)
    config = RmsNormBackwardConfig(**fields)
    got = ops.rms_norm_backward(*inputs, config=config, target="toy")
    compare("rms_norm_backward", got, inputs, "toy", repr(config))


@given(
    dtype=dtypes, seed=seeds(), n=toy_sizes["n"], h=short_rows, vector_stats=st.integers(0, 50),
    **config_fields,
)  # fmt: skip
def test_no_config_changes_the_mathematics_of_layer_norm(n, h, dtype, seed, **fields):
    inputs = operands("layer_norm_backward", n, h, dtype, seed)
    config = LayerNormBackwardConfig(**fields)
    got = ops.layer_norm_backward(*inputs, config=config, target="toy")
    compare("layer_norm_backward", got, inputs, "toy", repr(config))


# -- exactness -------------------------------------------------------------------------------------


@given(dtype=dtypes, power=st.integers(-6, 6), seed=seeds(), **toy_sizes)
def test_parameters_gradients_of_integers_are_exact(dtype, power, seed, n, h):
    """Rows of one power of two and signs have r = 2^-power and n = +-1, without a rounding."""
    # ... where h times the float32 nearest to 1 / h rounds to 1; it does not for h = 41 or 47.
    assume(np.float32(h) * np.float32(1 / h) == 1)
    rng = np.random.default_rng(seed)
    signs = np.where(rng.random((n, h)) < 0.5, -1.0, 1.0)
    dy = small_integers(seed + 1, (n, h), DTYPES[dtype], most=3)
    x = np.ldexp(signs, power).astype(DTYPES[dtype])
    _, dweight = ops.rms_norm_backward(dy, x, eps=0.0, target="toy")
    assert (dweight.astype(np.float64) == (dy.astype(np.float64) * signs).sum(0)).all()
    _, _, dbias = ops.layer_norm_backward(dy, x, eps=0.5, target="toy")
    assert (dbias.astype(np.float64) == dy.astype(np.float64).sum(0)).all()


@pytest.mark.parametrize("op", BACKWARD)
@given(dtype=dtypes, seed=seeds(), **toy_sizes)
def test_permuting_rows_permutes_dx(op, n, h, dtype, seed):
    dy, x, weight = operands(op, n, h, dtype, seed)
    order = np.random.default_rng(seed).permutation(n)
    whole, *_ = call(op, (dy, x, weight), target="toy")
    permuted, *_ = call(op, (dy[order], x[order], weight), target="toy")
    assert permuted.tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("op", BACKWARD)
@given(dtype=dtypes, power=st.integers(-9, 9), seed=seeds(), **toy_sizes)
def test_a_power_of_two_in_dy_is_in_every_gradient(op, n, h, dtype, power, seed):
    dy, x, weight = operands(op, n, h, "float32", seed)
    dy = small_integers(seed, dy.shape, np.float32, most=20)
    once = call(op, (dy, x, weight), target="toy")
    scaled = call(op, (np.ldexp(dy, power), x, weight), target="toy")
    for a, b in zip(once, scaled, strict=True):
        assert np.ldexp(a, power).tobytes() == b.tobytes()


@pytest.mark.parametrize("op", BACKWARD)
@given(dtype=dtypes, seed=seeds(), more=st.integers(1, 20), **toy_sizes)
def test_rows_below_without_gradient_are_inert(op, n, h, dtype, seed, more):
    dy, x, weight = operands(op, n, h, dtype, seed)
    below = wide(seed + 9, (more, h), DTYPES[dtype])
    padded = call(
        op, (np.concatenate([dy, np.zeros_like(below)]), np.concatenate([x, below]), weight),
        target="toy",
    )  # fmt: skip
    alone = call(op, (dy, x, weight), target="toy")
    assert padded[0][:n].tobytes() == alone[0].tobytes()
    assert (padded[0][n:] == 0).all()
    # The sums end with zeros: by value, since PE adds them in an order of its own.
    refs = expected(op, (dy, x, weight))
    for got, ref in zip(padded[1:], refs[1:], strict=True):
        assert got.shape == ref.value.shape
    compare(op, (alone[0], *padded[1:]), (dy, x, weight), "toy", "padded")


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", BACKWARD)
def test_the_results_are_rounded_once_to_the_output_dtype(op, out_dtype):
    inputs = operands(op, 19, 41, "float32")
    full = call(op, inputs, target="toy")
    got = call(op, inputs, out_dtype=out_dtype, target="toy")
    for a, b in zip(got, full, strict=True):
        assert a.tobytes() == b.astype(DTYPES[out_dtype]).tobytes()


# -- edges and special values ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("values", [[0.0], [3.0], [1e4, -3e4], [1e-4, -3e-5], [6e4] + [1e-3] * 60])
def test_uneven_rows_match_the_reference(op, values, dtype):
    dy, _, weight = operands(op, 19, 41, dtype)
    x = np.resize(np.asarray(values), (41, 19)).T.astype(DTYPES[dtype]).copy()
    inputs = (dy, x, weight)
    compare(op, call(op, inputs, target="toy"), inputs, "toy", str(values[:2]))


@pytest.mark.parametrize("where", ["dy", "x"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 9, 18])
@pytest.mark.parametrize("op", BACKWARD)
def test_special_values_go_where_those_of_torch_go(op, row, value, where):
    torch = pytest.importorskip("torch")
    dy, x, weight = operands(op, 19, 41, "float32")
    (dy if where == "dy" else x)[row, 17] = value
    got = call(op, (dy, x, weight), eps=1e-5, target="toy")
    leaves = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, weight)]
    leaves += [torch.zeros(41, requires_grad=True)] if "layer" in op else []
    y = getattr(torch.nn.functional, op.removesuffix("_backward"))(
        leaves[0], (41,), *leaves[1:], eps=1e-5
    )
    want = torch.autograd.grad(y, leaves, torch.from_numpy(dy))
    for a, b in zip(got, want, strict=True):
        assert (np.isnan(a) == np.isnan(b.numpy())).all()
    others = np.arange(19) != row
    compare(op, got, (dy, x, weight), "toy", "others", rows=others, eps=1e-5)


@pytest.mark.parametrize("op", BACKWARD)
def test_inputs_stay_as_they_were_and_results_are_new(op):
    inputs = operands(op, 19, 41, "float32")
    before = [x.tobytes() for x in inputs]
    first, second = (call(op, inputs, target="toy") for _ in range(2))
    assert [x.tobytes() for x in inputs] == before
    assert [x.tobytes() for x in first] == [x.tobytes() for x in second]
    assert not any(np.shares_memory(a, b) for a in first for b in (*inputs, *second))


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", BACKWARD)
def test_output_shapes_never_look_at_a_size(op):
    n, h = Symbol("N"), Symbol("H")
    dx, *vectors = OPERATORS[op].output_shapes((n, h), (n, h), None)
    assert dx[0] is n
    assert dx[1] is h
    assert all(len(shape) == 1 and shape[0] is h for shape in vectors)
    assert len(vectors) == (1 if "rms" in op else 2)


@pytest.mark.parametrize("op", BACKWARD)
def test_defaults_are_those_of_the_forward_pass(op):
    inputs = operands(op, 5, 20, "float32")
    want = call(op, inputs, eps=DEFAULT_EPS[op.removesuffix("_backward")], target="toy")
    got = call(op, inputs, target="toy")
    assert [a.tobytes() for a in got] == [a.tobytes() for a in want]
    eps = DEFAULT_EPS[op.removesuffix("_backward")]
    for a, b in zip(expected(op, inputs), expected(op, inputs, eps=eps), strict=True):
        assert (a.value == b.value).all()


def f32(*shapes):
    return tuple(np.zeros(shape, np.float32) for shape in shapes)


ILLEGAL = {
    "another shape of x": (f32((3, 4), (2, 4), (4,)), {}, ShapeError, "N is 3 in dy [N, H] = [3, "),
    "a longer weight": (f32((3, 4), (3, 4), (5,)), {}, ShapeError, "5 in weight [H] = [5]; the"),
    "one dimension": (f32((4,), (4,), (4,)), {}, ShapeError, "dy has 1 dimensions, shape [4]; 2 "),
    "no rows": (f32((0, 4), (0, 4), (4,)), {}, ShapeError, "dy [N, H] = [0, 4] has a zero-size"),
    "two dtypes": (
        (np.zeros((3, 4), np.float16), *f32((3, 4), (4,))), {}, DtypeError,
        "dtypes differ: dy float16, x float32, weight float32; all inputs must have one dtype",
    ),
    "no x": ((np.zeros((3, 4)), None, None), {}, DtypeError, "x is a NoneType; a NumPy array is"),
    "eps below 0": (f32((3, 4), (3, 4), (4,)), {"eps": -1.0}, OptionError, "eps is -1.0; a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("op", BACKWARD)
def test_an_illegal_call_raises_before_anything_runs(op, name, monkeypatch):
    inputs, options, error, text = ILLEGAL[name]
    monkeypatch.setattr(
        "nki_kernels.operators.contract.launch", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(error) as caught:
        call(op, inputs, **options, target="trn2")
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{op}(")


def longest(op, dtype, target):
    """Return the longest row, as the message of one that is too long says it."""
    (reason,) = OPERATORS[op].limits({"N": 1, "H": 10**6}, dtype, spec_for(target))
    return int(re.search(r"at most H = (\d+) on", reason).group(1))


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", BACKWARD)
def test_the_longest_row_runs_and_one_more_says_so(op, dtype, target):
    most, rows = longest(op, dtype, target), 2 * spec_for(target).partitions + 1
    if target == "trn2":
        assert most >= (16384 if "rms" in op or dtype == "bfloat16" else 16000)
    shapes = OPERATORS[op].input_shapes({"N": rows, "H": most})
    inputs = [Abstract(shape, dtype) for shape in shapes]
    OPERATORS[op].launch(inputs, {"out_dtype": "float32"}, target=target)
    text = (
        rf"H is {most + 1}; a row of {dtype} of x and dy and the weight must fit one partition of "
        rf"SBUF, at most H = {most} on {target}; split the row, or use a narrower dtype"
    )
    shapes = OPERATORS[op].input_shapes({"N": 1, "H": most + 1})
    with pytest.raises(ShapeError, match=text):
        OPERATORS[op].launch([Abstract(s, dtype) for s in shapes], {}, target=target)


@given(
    op=st.sampled_from(BACKWARD), dtype=st.sampled_from(["bfloat16", "float32"]),
    out_dtype=dtypes, tiles=st.integers(1, 5), share=st.floats(0, 1),
    target=st.sampled_from(["trn2", "toy"]),
)  # fmt: skip
def test_any_row_within_the_limit_fits(op, dtype, out_dtype, tiles, share, target):
    h = max(1, int(share * longest(op, dtype, target)))
    rows = tiles * spec_for(target).partitions - 1
    inputs = [Abstract(s, dtype) for s in OPERATORS[op].input_shapes({"N": rows, "H": h})]
    OPERATORS[op].launch(inputs, {"out_dtype": out_dtype}, target=target)


RMS = RmsNormBackwardConfig(chunk=8, pool=4, ahead=1, overlap=True, hwdge=False)
LAYER = LayerNormBackwardConfig(chunk=8, pool=4, vector_stats=4, ahead=1, overlap=True, hwdge=False)
BAD = [
    ({"chunk": 0}, "toy", "config.chunk is 0; it must be an int of at least 1"),
    ({"pool": -1}, "toy", "config.pool is -1; it must be an int of at least 0"),
    ({"ahead": 1.0}, "toy", "config.ahead is 1.0; it must be an int of at least 0"),
    ({"hwdge": True}, "trn1", "config.hwdge needs gen3; trn1 is gen2; set it to False"),
]


@pytest.mark.parametrize(
    ("op", "good", "changes", "target", "text"),
    [
        *(("rms_norm_backward", RMS, *bad) for bad in BAD),
        *(("layer_norm_backward", LAYER, *bad) for bad in BAD),
        ("layer_norm_backward", LAYER, {"vector_stats": -1}, "toy", "config.vector_stats is -1"),
    ],
)
def test_a_config_that_cannot_run_says_why(op, good, changes, target, text):
    inputs = operands(op, 2, 6, "bfloat16")
    call(op, inputs, config=good, target=target)
    with pytest.raises(ConfigError) as caught:
        call(op, inputs, config=dataclasses.replace(good, **changes), target=target)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("rms_norm_backward", r"config is \(1, 2\); an RmsNormBackwardConfig is needed; pass one"),
        ("layer_norm_backward", r"config is \(1, 2\); a LayerNormBackwardConfig is needed; pass"),
    ],
)
def test_a_config_of_another_kind_is_refused(op, text):
    with pytest.raises(ConfigError, match=text):
        call(op, operands(op, 2, 6, "bfloat16"), config=(1, 2), target="toy")


@given(
    op=st.sampled_from(BACKWARD), dtype=dtypes, n=st.integers(1, 10**6), h=st.integers(1, 10**5)
)  # fmt: skip
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
def test_a_chosen_config_is_plain_and_has_no_problems(target, op, dtype, n, h):
    spec, contract = spec_for(target), OPERATORS[op]
    config = contract.configure({"N": n, "H": h}, dtype, spec)
    assert contract.config_problems(config, dtype, spec) == ()
    assert all(type(value) in (int, bool) for value in dataclasses.asdict(config).values())
    # A row's dx must not depend on how many rows there are.
    assert config == contract.configure({"N": 1, "H": h}, dtype, spec)
