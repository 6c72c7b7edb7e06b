"""activation: functions against the math module, scale and bias, accumulators, the sine outside."""

from __future__ import annotations

import math

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.options import Options
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    PSUM,
    SBUF,
    apply,
    cast,
    columns,
    data,
    event,
    refused,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.tolerance import assert_close

F32 = np.float32
SQRT2, PI = math.sqrt(2), math.pi
#: NumPy's float32 loops are good to 4 ulp, which is 8 roundings of half an ulp.
LIBM = 8


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    return 0.5 * math.erfc(-x / SQRT2)


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * PI)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def gate_dx(x, slope):
    s = sigmoid(slope * x)
    return s + slope * x * s * (1 - s)


def tanh_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / PI) * (x + 0.044715 * x**3)))


#: Name: (formula, absolute terms of the float32 evaluation, roundings of a term, inputs).
#: The terms of exp(a) include |a| exp(a): an argument rounded to 2^-24 |a| moves the result so far.
#: A function of a Gaussian or logistic gate sums the gate's own terms, at most 1 + |argument|.
SMALL, POSITIVE, ANGLE = (-8, 8), (0.01, 50), (-1.5, 1.5)
FUNCTIONS = {
    "copy": (lambda x: x, abs, 0, SMALL),
    "square": (lambda x: x * x, lambda x: x * x, 1, SMALL),
    "abs": (abs, abs, 0, SMALL),
    "relu": (lambda x: max(x, 0.0), abs, 0, SMALL),
    "sign": (lambda x: (x > 0) - (x < 0), lambda x: 1, 0, SMALL),
    "exp": (math.exp, math.exp, LIBM, SMALL),
    "log": (math.log, lambda x: abs(math.log(x)), LIBM, POSITIVE),
    "sqrt": (math.sqrt, math.sqrt, 1, POSITIVE),
    "rsqrt": (lambda x: 1 / math.sqrt(x), lambda x: 1 / math.sqrt(x), 2, POSITIVE),
    "reciprocal": (lambda x: 1 / x, lambda x: 1 / x, 1, POSITIVE),
    "sigmoid": (sigmoid, lambda x: 1.0, LIBM + 3, SMALL),
    "tanh": (math.tanh, lambda x: abs(math.tanh(x)), LIBM, SMALL),
    "erf": (math.erf, lambda x: abs(math.erf(x)), 1, SMALL),
    "erf_dx": (
        lambda x: 2 / math.sqrt(PI) * math.exp(-x * x),
        lambda x: (1 + x * x) * 2 / math.sqrt(PI) * math.exp(-x * x), LIBM + 4, SMALL),
    "gelu": (lambda x: x * phi(x), abs, 6, SMALL),
    "gelu_dx": (
        lambda x: phi(x) + x * density(x),
        lambda x: 1 + (1 + x * x) * abs(x) * density(x), LIBM + 6, SMALL),
    "gelu_apprx_tanh": (
        tanh_gelu, lambda x: abs(x) * (1 + abs(x) + abs(x) ** 3 * 0.1), LIBM + 6, SMALL),
    "gelu_apprx_sigmoid": (
        lambda x: x * sigmoid(1.702 * x), lambda x: abs(x) * (1 + abs(1.702 * x)), LIBM + 6, SMALL),
    "gelu_apprx_sigmoid_dx": (
        lambda x: gate_dx(x, 1.702), lambda x: (1 + abs(1.702 * x)) ** 2, LIBM + 8, SMALL),
    "silu": (lambda x: x * sigmoid(x), abs, LIBM + 4, SMALL),
    "silu_dx": (lambda x: gate_dx(x, 1.0), lambda x: (1 + abs(x)) ** 2, LIBM + 6, SMALL),
    "softplus": (softplus, lambda x: softplus(x) + max(x, 0.0), LIBM + 2, SMALL),
    "mish": (
        lambda x: x * math.tanh(softplus(x)), abs, 3 * LIBM, SMALL),
    "sin": (math.sin, lambda x: 1.0, LIBM, (-PI, PI)),
    "arctan": (math.atan, lambda x: abs(math.atan(x)), LIBM, ANGLE),
}  # fmt: skip


def each(function, x):
    flat = [float(function(float(v))) for v in np.asarray(x).flat]
    return np.array(flat, np.float64).reshape(np.shape(x))


@pytest.mark.parametrize("name", FUNCTIONS)
@given(p=rows, n=columns, kinds=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
       seed=st.integers(0, 2**20))  # fmt: skip
def test_a_function_matches_its_formula(name, p, n, kinds, seed):
    formula, magnitude, chain, (low, high) = FUNCTIONS[name]
    x = np.random.default_rng(seed).uniform(low, high, (p, n)).astype(HOSTS[kinds[0]])
    x = np.clip(x, *np.asarray([low, high], x.dtype)) if name != "sin" else x

    def call(dst, y):
        nisa.activation(dst, getattr(nl, name), y)

    got = apply(call, x, shape=(p, n), dtype=kinds[1])
    assert_close(
        got, each(formula, x), each(magnitude, x), op=name, case=f"{kinds}", roundings=1,
        chain=chain,
    )  # fmt: skip


def test_every_activation_function_has_a_formula_here():
    from nki_kernels.machine.operators import OPS

    assert {name for name, op in OPS.items() if op.activation is not None} == set(FUNCTIONS)


def test_the_values_at_infinity():
    x = np.array([[np.inf, -np.inf]], F32)
    for op, want in {
        nl.exp: [np.inf, 0], nl.tanh: [1, -1], nl.sigmoid: [1, 0], nl.relu: [np.inf, 0],
        nl.erf: [1, -1], nl.softplus: [np.inf, 0], nl.sign: [1, -1],
    }.items():  # fmt: skip

        def call(dst, y, op=op):
            nisa.activation(dst, op, y)

        same(apply(call, x, shape=(1, 2)), np.array([want], F32))


@pytest.mark.parametrize("x", [9.0, -9.0, 4.0, 100.0])
def test_the_sine_outside_its_range_is_the_cubic_about_the_nearer_end(x):
    def call(dst, y):
        nisa.activation(dst, nl.sin, y)

    d = math.copysign(abs(x) - PI, x)
    want = np.array([[-d + d**3 / 6]])
    terms = np.array([[abs(x) * (1 + d * d) + abs(d) ** 3]])
    got = apply(call, np.array([[x]], F32), shape=(1, 1), options=Options(domain="off"))
    assert_close(got, want, terms, op="sin", case=str(x), roundings=1, chain=8)
    if x == 9.0:
        assert round(float(got[0, 0]), 2) == 27.65


# -- scale and bias --------------------------------------------------------------------------------

NUMBERS = (0.5, -2.0, 3.0)


@pytest.mark.parametrize("scale", [*NUMBERS, "vector"])
@pytest.mark.parametrize("bias", [None, *NUMBERS, "vector", "bfloat16"])
@given(p=rows, n=columns, seed=st.integers(0, 99),
       places=st.tuples(*[st.sampled_from([SBUF, PSUM])] * 4))  # fmt: skip
def test_scale_then_bias_then_function(scale, bias, p, n, seed, places):
    kind = nl.bfloat16 if bias == "bfloat16" else nl.float32
    x = data(seed, (p, n), nl.float32)
    factors, offsets = data(seed + 1, (p, 1), nl.float32), data(seed + 2, (p, 1), kind)

    def call(dst, y, factor, offset):
        nisa.activation(
            dst, nl.relu, y, scale=factor if scale == "vector" else scale,
            bias=offset if isinstance(bias, str) else bias,
        )  # fmt: skip

    got = apply(
        call, x, factors, offsets, shape=(p, n), buffers=places[:3], buffer=places[3]
    )  # fmt: skip
    factor = factors.astype(float) if scale == "vector" else scale
    offset = offsets.astype(float) if isinstance(bias, str) else bias or 0.0
    product = cast(x.astype(float) * factor, nl.float32).astype(float)
    same(got, cast(np.maximum(product + offset, 0), nl.float32))


@given(kinds=st.tuples(st.sampled_from([nl.int8, nl.uint16, nl.int32]),
                       st.sampled_from([nl.int8, nl.uint8, nl.int32, nl.bfloat16])),
       seed=st.integers(0, 99))  # fmt: skip
def test_integers_pass_through_float32(kinds, seed):
    x = data(seed, (2, 3), kinds[0])

    def call(dst, y):
        nisa.activation(dst, nl.copy, y, scale=0.5)

    same(apply(call, x, shape=(2, 3), dtype=kinds[1]), cast(x.astype(float) / 2, kinds[1]))


# -- accumulators ----------------------------------------------------------------------------------

CMD = nisa.reduce_cmd


def test_example_11():
    def kernel(x):
        y, out, total = tile(x), sb(1, 3), [sb(1, 1), sb(1, 1)]
        for res, command in zip(total, (CMD.reset_reduce, CMD.reduce), strict=True):
            nisa.activation(
                out, nl.copy, y, scale=2.0, bias=1.0, reduce_op=nl.add, reduce_res=res,
                reduce_cmd=command,
            )  # fmt: skip
        return out, *total

    out, first, second = values(kernel, np.array([[1, 2, 3]], F32))
    same(out, np.array([[3, 5, 7]], F32))
    same(first, np.array([[15]], F32))
    same(second, np.array([[30]], F32))


@given(st.lists(st.sampled_from(["idle", "reset", "reduce", "reset_reduce"]), max_size=6))
def test_any_sequence_of_commands(commands):
    x = np.array([[1, 2], [10, 20]], F32)
    register = np.zeros((2, 1), F32)
    want = []
    for command in ["reset", *commands]:
        if command in ("reset", "reset_reduce"):
            register = np.zeros((2, 1), F32)
        if command in ("reduce", "reset_reduce"):
            register = register + x.sum(axis=1, keepdims=True)
        want.append(register)

    def kernel(source):
        y, results = tile(source), []
        for command in ["reset", *commands]:
            res = sb(2, 1)
            nisa.activation(
                sb(2, 2), nl.copy, y, reduce_op=nl.add, reduce_res=res, reduce_cmd=CMD[command]
            )
            results.append(res)
        return tuple(results)

    got = values(kernel, x)
    for one, expected in zip(got if commands else [got], want, strict=True):
        same(one, expected)


def test_the_sum_takes_values_before_the_rounding_of_the_write():
    # 1 + 2^-9 rounds to 1 in bfloat16; eight of them sum to 8 + 2^-6 in float32.
    def kernel(x):
        out, res = sb(1, 8, dtype=nl.bfloat16), sb(1, 1)
        nisa.activation(
            out, nl.copy, tile(x), reduce_op=nl.add, reduce_res=res, reduce_cmd=CMD.reset_reduce
        )
        return out, res

    out, res = values(kernel, np.full((1, 8), 1 + 2.0**-9, F32))
    same(out, np.ones((1, 8), ml_dtypes.bfloat16))
    same(res, np.array([[8 + 2.0**-6]], F32))


@given(p=rows, n=columns, seed=st.integers(0, 2**20))
def test_the_sum_adds_left_to_right_in_float32(p, n, seed):
    x = data(seed, (p, n), nl.float32)
    want = np.zeros((p, 1), F32)
    for column in range(n):
        want = want + x[:, column : column + 1]

    def kernel(source):
        res = sb(p, 1)
        nisa.activation(
            sb(p, n), nl.copy, tile(source), reduce_op=nl.add, reduce_res=res,
            reduce_cmd=CMD.reset_reduce,
        )  # fmt: skip
        return res

    same(values(kernel, x), want)


def test_sums_run_over_all_free_dimensions_and_lanes_keep_their_own():
    def kernel(x):
        y, res = tile(x), sb(8, 1, dtype=nl.bfloat16)
        nisa.activation(sb(8, 6), nl.copy, y, reduce_op=nl.add, reduce_cmd=CMD.reset_reduce)
        # Only lanes 4 to 7 add once more.
        t = sb(8, 2, 3)
        nisa.activation(t[4:8], nl.copy, y[4:8], reduce_op=nl.add, reduce_cmd=CMD.reduce)
        nisa.activation(sb(8, 6), nl.copy, y, reduce_res=res)
        return res

    x = np.arange(48, dtype=F32).reshape(8, 2, 3)
    sums = x.reshape(8, 6).sum(axis=1, keepdims=True)
    sums[4:] *= 2
    same(values(kernel, x), sums.astype(ml_dtypes.bfloat16))


def test_reduce_res_may_be_the_destination_and_dst_a_stride_0_scratch():
    def kernel(x):
        y, one, scratch, res = tile(x), sb(2, 1), sb(2, 1), sb(2, 1)
        column = y[:, 0:1]
        nisa.activation(
            one, nl.copy, column, scale=3.0, reduce_op=nl.add, reduce_res=one,
            reduce_cmd=CMD.reset_reduce,
        )  # fmt: skip
        nisa.activation(
            scratch.ap([[1, 2], [0, 3]]), nl.square, y, reduce_op=nl.add, reduce_res=res,
            reduce_cmd=CMD.reset_reduce,
        )  # fmt: skip
        return one, scratch, res

    one, scratch, res = values(kernel, np.array([[1, 2, 3], [4, 5, 6]], F32))
    same(one, np.array([[3], [12]], F32))
    same(scratch, np.array([[9], [36]], F32))
    same(res, np.array([[14], [77]], F32))


def test_in_place_with_bias_from_the_data():
    def kernel(x):
        t = tile(x)
        nisa.activation(t, nl.copy, t, bias=t[:, 0:1], scale=t[:, 1:2])
        return t

    same(values(kernel, np.array([[1, 2, 3]], F32)), np.array([[3, 5, 7]], F32))


@pytest.mark.parametrize(("command", "res", "reads", "writes"), [
    (CMD.idle, False, ("act_table",), ()),
    (CMD.idle, True, ("act_table", "act_accumulator"), ()),
    (CMD.reset, False, ("act_table",), ("act_accumulator",)),
    (CMD.reduce, False, ("act_table", "act_accumulator"), ("act_accumulator",)),
    (CMD.reset_reduce, True, ("act_table",), ("act_accumulator",)),
])  # fmt: skip
def test_the_accumulator_is_hidden_state_in_the_event(command, res, reads, writes):
    found = event(
        lambda: nisa.activation(
            sb(2, 3),
            nl.exp,
            sb(2, 3),
            reduce_op=nl.add,
            reduce_cmd=command,
            reduce_res=sb(2, 1) if res else None,
        )
    )
    assert (found.hidden_reads, found.hidden_writes) == (reads, writes)
    assert found.work.reduces is (command in (CMD.reduce, CMD.reset_reduce))
    assert found.work.reads_accumulator is res
    assert len(found.writes) == 1 + res


def test_gpsimd_activates_from_gen4():
    def call(y):
        x, dst = tile(y), sb(2, 3)
        nisa.activation(dst, nl.square, x, bias=1.0, scale=2.0, engine=nisa.engine.gpsimd)
        return dst

    x = np.arange(6, dtype=F32).reshape(2, 3)
    same(values(call, x, target="trn3"), (2 * x + 1) ** 2)
    found = event(lambda: nisa.activation(sb(2, 3), nl.exp, sb(2, 3), engine=nisa.engine.gpsimd),
                  target="trn3")  # fmt: skip
    assert (found.engine, found.hidden_reads, found.hidden_writes) == (nisa.engine.gpsimd, (), ())


@pytest.mark.parametrize(("target", "options", "says"), [
    ("toy", {}, "engine=gpsimd on toy; it needs gen4"),
    ("trn3", {"reduce_op": nl.add, "reduce_cmd": nisa.reduce_cmd.reset_reduce}, "accumulators"),
    ("trn3", {"engine": nisa.engine.vector}, "engine=vector; activation runs on scalar, gpsimd"),
])  # fmt: skip
def test_engines_that_cannot(target, options, says):
    asked = {"engine": nisa.engine.gpsimd, **options}
    refused(lambda: nisa.activation(sb(2, 3), nl.exp, sb(2, 3), **asked), says, target=target)
