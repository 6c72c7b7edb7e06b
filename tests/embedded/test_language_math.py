"""Wrappers of several instructions: rounding, trigonometry, statistics of rows, gathers."""

from __future__ import annotations

import math

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import KernelError, RuleViolation, ShapeError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    INTEGERS,
    PSUM,
    Rule,
    by_name,
    cast,
    columns,
    data,
    ps,
    refused,
    rows,
    same,
    sb,
    tile,
    traced,
    values,
)
from tests.tolerance import assert_close

F32 = np.float32
TARGETS = ("trn1", "trn2", "trn3")
kinds = st.sampled_from([*FLOATS, *INTEGERS])
floats = st.sampled_from(FLOATS)
outs = st.sampled_from([None, nl.float32, nl.bfloat16])
seeds = st.integers(0, 2**20)
singles = st.floats(width=32)


def array(elements):
    return np.array(elements, F32).reshape(1, -1)


# -- rounding --------------------------------------------------------------------------------------

ROUND = {"ceil": np.ceil, "floor": np.floor, "trunc": np.trunc}


@pytest.mark.parametrize("name", ROUND)
@given(elements=st.lists(singles | st.floats(-9, 9, width=32) | st.integers(-9, 9), min_size=1,
                         max_size=16), out=outs)  # fmt: skip
def test_rounding_is_numpys_over_all_of_float32(name, elements, out):
    x = array(elements)
    got = values(lambda y: getattr(nl, name)(tile(y), out), x)
    same(got, cast(ROUND[name](x.astype(np.float64)) + 0.0, out or nl.float32))


@pytest.mark.parametrize("name", ROUND)
@given(p=rows, n=columns, kind=kinds, seed=seeds)
def test_rounding_of_every_type(name, p, n, kind, seed):
    x = data(seed, (p, n), kind)
    got = values(lambda y: getattr(nl, name)(tile(y)), x)
    if x.dtype.kind in "iu":
        same(got, x)
        return
    same(got, cast(ROUND[name](x.astype(np.float64)) + 0.0, kind))


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize("target", TARGETS)
def test_rounding_reads_psum_on_every_generation(name, target):
    x = array([-1.5, 1.5, 2.0**30])
    got = values(lambda y: getattr(nl, name)(tile(y, PSUM)), x, target=target)
    same(got, ROUND[name](x))


def test_integers_keep_every_bit():
    x = np.array([[2**31 - 1, -(2**31) + 1]], np.int32)
    for name in ROUND:
        same(values(lambda y, f=name: getattr(nl, f)(tile(y)), x), x)


# -- trigonometry ----------------------------------------------------------------------------------

#: float32 roundings between the exact reduction and the result, of numbers below 4: two in the
#: reduction, one in the shift by pi/2, one each for the constants 2 pi (third part) and pi/2, and
#: two for the function.
STEPS = 7


def angles(limit):
    return st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=16).map(array)


@pytest.mark.parametrize("name", ["sin", "cos"])
@given(x=angles(4.0) | angles(50_000.0), kind=floats, out=outs)
def test_sine_and_cosine_beyond_the_engines_range(name, x, kind, out):
    x = x.astype(HOSTS[kind])
    got = values(lambda y: getattr(nl, name)(tile(y), out), x)
    assert got.dtype == HOSTS[out or kind]
    want = getattr(np, name)(x.astype(np.float64))
    assert_close(got, want, np.full(x.shape, 4.0), op=name, case="reduced", roundings=1,
                 chain=STEPS)  # fmt: skip


@given(x=angles(4.0) | angles(50_000.0))
def test_tangent(x):
    got = values(lambda y: nl.tan(tile(y)), x)
    s, c = np.sin(x.astype(np.float64)), np.cos(x.astype(np.float64))
    # The errors of sine and cosine reach the quotient as d_s / c and s d_c / c^2, to first order;
    # next to a pole, where the cosine is its own error, nothing is promised.
    error = 4.0 * STEPS * 2.0**-24
    far = np.abs(c) > 64 * error
    scale = 4.0 * (np.abs(1 / c) + np.abs(s) / c**2)
    assert_close(np.where(far, got, 0), np.where(far, s / c, 0), np.where(far, scale, 1), op="tan",
                 case="reduced", roundings=3, chain=STEPS + 1)  # fmt: skip


def test_the_wrapper_reduces_and_the_instruction_does_not():
    seen = []

    def kernel(source):
        raw = sb(1, 1)
        nisa.activation(dst=raw, op=nl.sin, data=tile(source))
        seen.extend(t.numpy() for t in (raw, nl.sin(tile(source))))

    launch(kernel, (array([9.0]),), target="trn2", options=Options(domain="off"))
    assert [round(float(v[0, 0]), 2) for v in seen] == [27.65, 0.41]


@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
@pytest.mark.parametrize("target", TARGETS)
def test_trigonometry_reads_psum_on_every_generation(name, target):
    x = array([0.0, 1.0, -20.0])
    got = values(lambda y: getattr(nl, name)(tile(y, PSUM)), x, target=target)
    want = getattr(np, name)(x.astype(np.float64))
    slope = 4 * (1 + np.tan(x.astype(np.float64)) ** 2)
    assert_close(got, want, slope, op=name, case=target, roundings=3, chain=2 * STEPS)


# -- statistics ------------------------------------------------------------------------------------

shapes = st.tuples(rows, st.integers(1, 3), st.integers(1, 5))


def axes_of(trailing):
    return [(2,), (1, 2)][trailing - 1]


@given(shape=shapes, trailing=st.integers(1, 2), kind=floats, out=outs, keep=st.booleans(),
       seed=seeds)  # fmt: skip
def test_var_keeps_its_axes(shape, trailing, kind, out, keep, seed):
    x = data(seed, shape, kind)
    axes = axes_of(trailing)
    got = values(lambda y: nl.var(tile(y), axes, out, keepdims=keep), x)
    wide = x.astype(np.float64)
    want = wide.var(axes, keepdims=True)
    n = math.prod(shape[1:][-trailing:])
    # (x - m)^2 with m off by up to (n + 2) roundings of mean |x|: that error enters linearly,
    # times 2 |x - m|, and once more squared.
    spread = np.abs(wide).mean(axes, keepdims=True) + np.abs(wide)
    magnitude = (spread**2 * 4).mean(axes, keepdims=True)
    assert got.dtype == HOSTS[out or kind]
    assert_close(got, want, magnitude, op="var", case=str(shape), roundings=1, chain=2 * n + 6)


@given(shape=shapes, trailing=st.integers(1, 2), kind=floats, out=outs, seed=seeds)
def test_softmax(shape, trailing, kind, out, seed):
    x = data(seed, shape, kind)
    axes = axes_of(trailing)
    got = values(lambda y: nl.softmax(tile(y), axes, out), x)
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(axes, keepdims=True))
    want = powers / powers.sum(axes, keepdims=True)
    n = math.prod(shape[1:][-trailing:])
    # Relative errors: exp of an argument up to 16 rounded once, 2 for exp, n - 1 additions of
    # positive numbers, reciprocal and product.
    assert got.dtype == HOSTS[out or kind]
    assert_close(got, want, want, op="softmax", case=str(shape), roundings=1,
                 chain=2 * (16 + 2) + n + 2)  # fmt: skip


def test_softmax_of_the_last_axis_by_default():
    x = array([3.0, 3.0, 3.0, 3.0])
    same(values(lambda y: nl.softmax(tile(y)), x), array([0.25] * 4))


@given(shape=shapes, trailing=st.integers(1, 2), kind=floats, out=outs,
       epsilon=st.sampled_from([1e-6, 0.5]), seed=seeds)  # fmt: skip
def test_rms_norm(shape, trailing, kind, out, epsilon, seed):
    x, w = data(seed, shape, kind), data(seed + 1, shape, kind)
    axes = axes_of(trailing)
    n = math.prod(shape[1:][-trailing:])
    got = values(lambda a, b: nl.rms_norm(tile(a), tile(b), axes, n, epsilon, dtype=out), x, w)
    wide, weights = x.astype(np.float64), w.astype(np.float64)
    scale = 1 / np.sqrt((wide**2).mean(axes, keepdims=True) + epsilon)
    want = wide * scale * weights
    # Relative errors: square, n - 1 additions, product and addition, rsqrt of 2, two products;
    # the square root halves what comes before it.
    assert got.dtype == HOSTS[out or kind]
    assert_close(got, want, np.abs(want), op="rms_norm", case=str(shape), roundings=1, chain=n + 8)


def test_rms_norm_counts_what_it_is_told():
    x, w = array([3.0, 4.0]), array([1.0, 2.0])
    got = values(lambda a, b: nl.rms_norm(tile(a), tile(b), 1, 1, epsilon=0.0), x, w)
    same(got, array([F32(3) * F32(0.2), F32(4) * F32(0.2) * 2]))


def test_rms_norm_rounds_inside_to_the_compute_type():
    x, w = array([1 + 2.0**-9, 1.0]), array([1.0, 1.0])

    def kernel(a, b):
        return nl.rms_norm(tile(a), tile(b), 1, 2, epsilon=0.0, compute_dtype=nl.bfloat16)

    same(values(kernel, x, w), array([1.0, 1.0]))


# -- gathers ---------------------------------------------------------------------------------------


@given(p=rows, n=columns, m=columns, kind=floats, out=outs, seed=seeds)
def test_gather_flattened(p, n, m, kind, out, seed):
    x = data(seed, (p, n), kind)
    at = np.random.default_rng(seed).integers(0, n, (p, m)).astype(np.uint32)
    got = values(lambda y, i: nl.gather_flattened(tile(y), tile(i), dtype=out), x, at)
    same(got, cast(np.take_along_axis(x, at.astype(np.int64), 1), out or kind))


# -- logical_not, abs_max --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nl.uint8, nl.int32])
def test_logical_not_flips_the_lowest_bit(kind):
    x = np.array([[0, 1, 6]], HOSTS[kind])
    same(values(lambda y: nl.logical_not(tile(y)), x), np.array([[1, 0, 7]], HOSTS[kind]))


@pytest.mark.parametrize(("name", "want"), [("abs_max", [-5, -3, 3]), ("abs_min", [3, 1, 3])])
def test_magnitudes_against_a_column(name, want):
    x, y = array([-5.0, 1.0, -3.0]), array([3.0])
    if name == "abs_max":
        want = [-5, 3, 3]
    got = values(lambda a, b: getattr(nl, name)(tile(a), tile(b)), x, y, target="trn3")
    same(got, array(want))


# -- illegal calls ---------------------------------------------------------------------------------

S = sb


def zeros(*shape):
    return nl.zeros(shape, nl.uint32)


ILLEGAL = [
    Rule("softmax axis", lambda: nl.softmax(S(2, 3)), lambda: nl.softmax(S(2, 3), 0),
         ("nl.softmax: axis=0 of a tile [2, 3]", "without the partition dimension 0")),
    Rule("var axis", lambda: nl.var(S(2, 3), 1), lambda: nl.var(S(2, 3, 4), 1),
         ("nl.var: axis=1", "up to and with 2")),
    Rule("rms weights", lambda: nl.rms_norm(S(2, 3), S(2, 3), 1, 3),
         lambda: nl.rms_norm(S(2, 3), S(1, 3), 1, 3),
         ("w [1, 3] and x [2, 3]", "nl.broadcast_to")),
    Rule("rms count", lambda: nl.rms_norm(S(2, 3), S(2, 3), 1, 3),
         lambda: nl.rms_norm(S(2, 3), S(2, 3), 1, 0), ("n=0", "a positive int")),
    Rule("gather axis", lambda: nl.gather_flattened(S(2, 3), zeros(2, 3)),
         lambda: nl.gather_flattened(S(2, 3), zeros(2, 3), axis=1),
         ("axis=1", "only 0 is defined")),
    Rule("gather indices", lambda: nl.gather_flattened(S(2, 3), zeros(2, 3)),
         lambda: nl.gather_flattened(S(2, 3), S(2, 3, dtype=nl.float32)), ("indices", "uint32")),
    Rule("logical_not of floats", lambda: nl.logical_not(S(2, 3, dtype=nl.uint8)),
         lambda: nl.logical_not(S(2, 3)), ("bitvec operator nl.bitwise_xor", "integers")),
    Rule("tiles do not broadcast", lambda: nl.abs_max(S(2, 3), S(2, 1)),
         lambda: nl.abs_max(S(2, 3), S(2, 2)), ("data1", "data2"), "trn3"),
]  # fmt: skip


@pytest.mark.parametrize("rule", ILLEGAL, ids=by_name)
def test_illegal_calls(rule):
    refused(rule.illegal, *rule.says, target=rule.target)
    traced(rule.legal, target=rule.target)


@pytest.mark.parametrize("name", ["divide", "mod", "fmod"])
def test_functions_no_engine_has(name):
    refused(
        lambda: getattr(nl, name)(sb(2, 3), 2.0), f"nl.{name}: no engine has this operation",
        "nl.reciprocal", error=RuleViolation,
    )  # fmt: skip
    assert repr(getattr(nl, name)) == f"nl.{name}"


UNARY = [
    "exp", "sin", "cos", "tan", "ceil", "floor", "trunc", "negative", "logical_not", "rsqrt",
    "copy", "invert", "softmax",
]  # fmt: skip


@pytest.mark.parametrize("value", [3, np.ones((2, 2)), None])
@pytest.mark.parametrize("name", UNARY)
def test_what_is_no_tile(name, value):
    refused(lambda: getattr(nl, name)(value), f"nl.{name}: x is {type(value).__name__}",
            "must be a tile", "nl.load")  # fmt: skip


@pytest.mark.parametrize(("call", "says"), [
    (lambda: nl.sum(1, 1), "nl.sum: x is int"), (lambda: nl.max(1, 1), "nl.max: x is int"),
    (lambda: nl.mean(1, 1), "nl.mean: x is int"), (lambda: nl.var(1, 1), "nl.var: x is int"),
    (lambda: nl.where(sb(1, 1), 1, sb(1, 1)), "nl.where: x is int"),
    (lambda: nl.where(True, sb(1, 1), sb(1, 1)), "nl.where: condition is bool"),
    (lambda: nl.rms_norm(sb(1, 2), None, 1, 2), "nl.rms_norm: w is NoneType"),
    (lambda: nl.gather_flattened(sb(1, 2), [0]), "nl.gather_flattened: indices is list"),
    (lambda: nl.expand_dims(1, 1), "nl.expand_dims: x is int"),
    (lambda: nl.broadcast_to(1, (1, 1)), "nl.broadcast_to: x is int"),
    (lambda: nl.load(np.ones(2)), "nl.load: src is ndarray"),
    (lambda: nl.load_transpose2d(1), "nl.load_transpose2d: src is int"),
])  # fmt: skip
def test_operands_that_are_no_tiles(call, says):
    refused(call, says, "it must be a tile")


@pytest.mark.parametrize("name", [*ROUND, "sin", "cos", "tan", "softmax", "logical_not"])
def test_wrappers_outside_a_kernel_say_so(name):
    with pytest.raises(KernelError, match=rf"nl.{name} outside a kernel"):
        getattr(nl, name)(None)


def test_shapes_that_do_not_fit_are_shape_errors():
    refused(lambda: nl.softmax(ps(2, 3), (0, 1)), "axis=(0, 1)", error=ShapeError)
