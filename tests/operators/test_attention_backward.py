"""The whole test pattern of an operator, for the gradients of attention."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.attention import MASKED_ATTENTION
from nki_kernels.operators.attention_backward import (
    ATTENTION_BACKWARD,
    CAUSAL_ATTENTION_BACKWARD,
)
from reference.attention import attention as forward
from reference.attention_backward import attention_backward as reference
from tests.operators.attention_gradients import check, compare, operands, run
from tests.operators.attentions import DTYPES
from tests.strategies.matrices import extents, seeds

TOY = spec_for("toy")

sizes = {
    "b": st.integers(1, 2),
    "g": st.integers(1, 2),
    "group": st.integers(1, 3),
    "m": extents(TOY.partitions, 3 * TOY.partitions + 3),
    "n": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "d": st.sampled_from([1, 5, 8]),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}

patterns = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "align": st.sampled_from(["top-left", "bottom-right"]),
        "window": st.integers(1, 40),
        "scale": st.sampled_from([0.1, 1.0, -0.5]),
        "softcap": st.sampled_from([1.5, 30.0]),
        "out_dtype": st.just("float32"),
    },
)


# -- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "bias"])
def test_the_reference_is_the_slope_of_the_forward_reference(name, shared, softcap):
    rng = np.random.default_rng(0)
    b, h, g, m, n, d, e = 2, 4, 2, 5, 6, 3, 4
    arrays = {
        "q": rng.standard_normal((b, h, m, d)), "k": rng.standard_normal((b, g, n, d)),
        "v": rng.standard_normal((b, g, n, e)), "sinks": rng.standard_normal(h),
        "bias": rng.standard_normal((1, 1, m, n) if shared else (b, h, m, n)),
    }  # fmt: skip
    mask = rng.random((1, h, m, n)) < 0.8
    options = {"causal": True, "align": "bottom-right", "softcap": softcap, "scale": 0.7}
    do = rng.standard_normal((b, h, m, e))

    def results(changed):
        q, k, v, sinks, bias = changed.values()
        return forward(q, k, v, sinks, mask, bias, **options)

    out, lse = (found.value for found in results(arrays))
    q, k, v, sinks, bias = arrays.values()
    found = reference(do, q, k, v, out, lse, sinks, mask, bias, **options)
    slopes = dict(zip(("q", "k", "v", "sinks", "bias"), found, strict=True))[name].value
    step = 2.0**-17
    for index in list(np.ndindex(arrays[name].shape))[::5]:
        ends = []
        for sign in (1, -1):
            moved = {key: value.copy() for key, value in arrays.items()}
            moved[name][index] += sign * step
            ends.append(np.sum(do * results(moved)[0].value))
        slope = (ends[0] - ends[1]) / (2 * step)
        # The third derivative times step^2, and rounding over the step: both below 2^-28 here.
        assert abs(slope - slopes[index]) <= 2.0**-28


# -- properties ------------------------------------------------------------------------------------


@given(options=patterns, above=st.sampled_from([0, 99]), **sizes)
def test_any_shape_and_pattern_matches_the_reference(
    b, g, group, m, n, d, dtype, seed, options, above
):
    inputs = operands(b, g * group, g, m, n, d, dtype, seed, options)
    axes = ATTENTION_BACKWARD.axes(*(x.shape for x in inputs))
    config = ATTENTION_BACKWARD.configure(axes, dtype, TOY)
    check(inputs, options, config=dataclasses.replace(config, dma_above=above))


@given(options=patterns, sink=st.sampled_from([-3.0, 0.0, 5.0, 200.0]), **sizes)
def test_sinks_match_the_reference(b, g, group, m, n, d, dtype, seed, options, sink):
    extras = ((np.arange(g * group) + sink).astype(np.float32),)
    check(operands(b, g * group, g, m, n, d, dtype, seed, options, extras), options, extras)


@given(
    options=patterns, which=st.sampled_from(["mask", "bias", "both"]),
    wide=st.tuples(st.booleans(), st.booleans()), **sizes,
)  # fmt: skip
def test_masks_and_biases_match_the_reference(
    b, g, group, m, n, d, dtype, seed, options, which, wide
):
    h = g * group
    rng = np.random.default_rng(seed)
    mask = bias = None
    if which != "bias":
        mask = (rng.random((b, 1, m, n)) < 0.6).astype(np.uint8)
    if which != "mask":
        shape = (b if wide[0] else 1, h if wide[1] else 1, m, n)
        bias = rng.standard_normal(shape).astype(DTYPES[dtype])
    extras = (None, mask, bias)
    check(operands(b, h, g, m, n, d, dtype, seed, options, extras), options, extras)


@given(
    options=patterns, slope=st.sampled_from([1e-3, 0.4, -0.2]),
    extra=st.sampled_from([None, "sinks", "mask", "bias"]), **sizes,
)  # fmt: skip
def test_slopes_match_the_reference(b, g, group, m, n, d, dtype, seed, options, slope, extra):
    h = g * group
    options = {**options, "slopes": [slope / (1 + head) for head in range(h)]}
    extras = [None, None, None]
    if extra == "sinks":
        extras[0] = np.arange(h).astype(np.float32)
    elif extra == "mask":
        extras[1] = (np.random.default_rng(seed).random((1, 1, m, n)) < 0.6).astype(np.uint8)
    elif extra == "bias":
        extras[2] = np.random.default_rng(seed).standard_normal((1, h, m, n)).astype(DTYPES[dtype])
    check(operands(b, h, g, m, n, d, dtype, seed, options, extras), options, extras)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_slopes_without_a_scale_match_the_reference(softcap):
    options = {"scale": 0.0, "slopes": [0.5, 0.1], "softcap": softcap}
    check(operands(1, 2, 1, 9, 19, 8, "float32", 0, options), options)


@given(d=st.integers(1, 16), e=st.integers(1, 24), dtype=sizes["dtype"], seed=seeds())
def test_head_sizes_may_differ(d, e, dtype, seed):
    if -(-d // 8) + -(-e // 8) > 3:
        return
    options = {"causal": True}
    check(operands(1, 2, 1, 19, 21, d, dtype, seed, options, e=e), options)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_generation_matches_the_reference(target, dtype):
    spec = spec_for(target)
    options = {"causal": True}
    m, n = 2 * spec.partitions + 3, spec.moving_fmax + 5
    check(operands(1, 2, 1, m, n, 8, dtype, 0, options), options, target=target)


@pytest.mark.parametrize(
    ("m", "n", "d", "e", "dtype"),
    [
        (127, 129, 64, 64, "bfloat16"), (640, 513, 64, 64, "float32"),
        (512, 512, 128, 128, "bfloat16"), (129, 640, 128, 128, "float16"),
        (640, 513, 256, 256, "bfloat16"), (127, 130, 192, 128, "float32"),
    ],
)  # fmt: skip
def test_sizes_around_the_real_tiles_match_the_reference(m, n, d, e, dtype):
    options = {"causal": True}
    check(operands(1, 1, 1, m, n, d, dtype, 0, options, e=e), options, target="trn2")


@pytest.mark.parametrize("kind", ["huge key", "equal keys", "alternating", "last", "low"])
@pytest.mark.parametrize("power", [4, 12])
def test_scores_of_any_size_match_the_reference(power, kind):
    amount, options = 2.0**power, {"causal": True}
    do, q, k, v, *_ = operands(1, 2, 1, 19, 21, 8, "bfloat16")
    q[...] = np.abs(q) + 1
    k[...] = np.sign(k) * 0.5
    if kind == "huge key":
        k[:, :, 10] = amount / 64
    elif kind == "equal keys":
        k[...] = amount
    elif kind == "alternating":
        k[...] = (np.where(np.arange(21) % 2, 1.0, -1.0) * amount)[:, None]
    elif kind == "last":
        k[:, :, -1] = amount
    else:
        k[...] = -amount
    out, lse = (found.value for found in forward(q, k, v, **options))
    check((do, q, k, v, out.astype(q.dtype), lse.astype(np.float32)), options, case=kind)


def test_small_integers_are_exact():
    """Equal scores over 16 keys make p 1 / 16; every product and sum is then exact in bfloat16."""
    rng = np.random.default_rng(0)
    m, n, d = 16, 16, 8
    q = np.zeros((1, 1, m, d), DTYPES["bfloat16"])
    k, v, do = (rng.integers(-2, 3, (1, 1, n, d)).astype(q.dtype) for _ in range(3))
    v[...] = v[:, :, :1]
    lse = np.full((1, 1, m), np.log(np.float32(16)), np.float32)
    dq, dk, dv = run((do, q, k, v, v[:, :, :m].copy(), lse), {"scale": 1.0}).result
    # p is exp of a rounded logarithm, and so is what it multiplies: rounded to bfloat16 it is 1/16.
    assert (dv.astype(np.float64) == do.astype(np.float64).sum(axis=2, keepdims=True) / 16).all()
    assert (dk == 0).all()
    assert (dq == 0).all()


@given(options=patterns, **sizes)
def test_heads_and_batches_are_independent(b, g, group, m, n, d, dtype, seed, options):
    inputs = operands(b, g * group, g, m, n, d, dtype, seed, options)
    whole = run(inputs, options).result
    at = slice((g - 1) * group, None)
    heads = [at, at, slice(-1, None), slice(-1, None), at, at]
    one = run(
        tuple(np.ascontiguousarray(x[-1:, h]) for x, h in zip(inputs, heads, strict=True)), options
    ).result
    for some, all_, h in zip(one, whole, (at, heads[2], heads[2]), strict=True):
        assert some[0].tobytes() == all_[-1, h].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_repeats_to_the_bit(dtype):
    options = {"causal": True}
    inputs = operands(2, 4, 2, 27, 35, 8, dtype, 0, options)
    one, two = run(inputs, options).result, run(inputs, options).result
    assert [x.tobytes() for x in one] == [x.tobytes() for x in two]


@pytest.mark.parametrize("sink", [None, 1.0])
def test_rows_and_keys_that_nothing_joins_have_no_gradient(sink):
    options = {"causal": True, "align": "bottom-right", "window": 3}
    extras = (None if sink is None else np.full(2, sink, np.float32),)
    inputs = operands(1, 2, 1, 40, 9, 8, "float32", 0, options, extras)
    dq, *_ = check(inputs, options, extras).result
    assert (dq[:, :, :31] == 0).all()
    options = {"causal": True}
    inputs = operands(1, 2, 1, 9, 70, 8, "float32", 0, options)
    _, dk, dv = check(inputs, options).result
    assert (dk[:, :, 9:] == 0).all()
    assert (dv[:, :, 9:] == 0).all()


def test_masked_rows_have_no_gradient():
    mask = np.ones((1, 1, 9, 17), np.uint8)
    mask[:, :, 3] = 0
    extras = (None, mask, None)
    inputs = operands(1, 1, 1, 9, 17, 8, "bfloat16", 0, {}, extras)
    assert inputs[5][0, 0, 3] == -np.inf
    dq, dk, dv = check(inputs, {}, extras).result
    assert (dq[:, :, 3] == 0).all()
    assert np.isfinite(dk.astype(np.float32)).all()
    assert np.isfinite(dv.astype(np.float32)).all()


def test_it_takes_what_the_forward_kernel_returns():
    options = {"causal": True, "window": 20}
    do, q, k, v, *_ = operands(1, 4, 2, 40, 40, 8, "bfloat16")
    out, lse = MASKED_ATTENTION.launch((q, k, v, None, None, None), options, target="toy").result
    check((do, q, k, v, out, lse), options)


# -- what runs -------------------------------------------------------------------------------------


def macs(launched):
    return sum(event.work.macs for event in launched.trace if event.opcode == "nc_matmul")


def test_pe_turns_ds_where_few_keys_are_attended():
    n = 4 * TOY.moving_fmax
    inputs = operands(1, 1, 1, n, n, 8, "bfloat16")

    def turns(options):
        return sum(event.opcode == "nc_transpose" for event in run(inputs, options).trace)

    # One turns lse; then a square per tile of queries and of keys, and those of dk and dv.
    assert turns({}) == 1
    assert turns({"causal": True, "window": TOY.partitions}) > n // TOY.partitions


def test_tiles_that_are_masked_cost_nothing():
    n = 8 * TOY.moving_fmax
    inputs = operands(1, 1, 1, n, n, 8, "bfloat16")
    full, causal = macs(run(inputs, {})), macs(run(inputs, {"causal": True}))
    window = macs(run(inputs, {"causal": True, "window": TOY.partitions}))
    assert causal < 0.6 * full
    assert window < 0.25 * full


def test_five_products_and_one_exponential_per_score():
    m, n, d = 4 * TOY.partitions, 2 * TOY.moving_fmax, 8
    inputs = operands(1, 1, 1, m, n, d, "bfloat16")
    launched = run(inputs, {})
    assert macs(launched) == 5 * m * n * d
    flops = ATTENTION_BACKWARD.flops({"B": 1, "H": 1, "M": m, "N": n, "D": d, "E": d})
    assert flops == 2 * macs(launched)
    assert CAUSAL_ATTENTION_BACKWARD.flops(
        {"B": 1, "H": 1, "M": m, "N": n, "D": d, "E": d}
    ) == macs(launched)
    works = [event.work for event in launched.trace if event.opcode == "activation"]
    assert sum(work.n for work in works if work.function == "exp") == m * n // TOY.partitions


def configs():
    base = ATTENTION_BACKWARD.configure(
        {"B": 1, "H": 1, "G": 1, "M": 40, "N": 40, "D": 5, "E": 5}, "bfloat16", TOY
    )
    for changes in (
        {}, {"keys": 8}, {"segment": 1}, {"segment": 3}, {"segment": 2, "keys": 8}, {"chunk": 1},
        {"ahead": 0, "near": 0, "ready": 0}, {"ahead": 7, "near": 2, "ready": 1},
        {"ds_lag": 0, "dv_lag": 0, "dk_lag": 0, "dq_lag": 0}, {"ds_lag": 2, "dk_lag": 2},
        {"dv_lag": 3, "dk_lag": 1, "dq_lag": 2},
        {"dma_above": 99, "ds_lag": 0, "dk_lag": 0, "dq_lag": 0}, {"dma_above": 0},
        {"dma_above": 99, "dq_lag": 4}, {"dma_above": 99, "keys": 8},
        {"fill": False}, {"hwdge": False}, {"batch": 1}, {"batch": 7, "near": 0, "ready": 0},
    ):  # fmt: skip
        yield dataclasses.replace(base, **changes)


@pytest.mark.parametrize("config", list(configs()), ids=repr)
@pytest.mark.parametrize("options", [{"causal": True, "softcap": 2.0}, {"window": 5}], ids=repr)
def test_no_config_changes_the_mathematics(config, options):
    inputs = operands(2, 4, 2, 37, 41, 5, "bfloat16", 0, options)
    check(inputs, options, config=config)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("d", "e"), [(64, 64), (256, 256), (512, 384), (384, 512), (64, 768)])
def test_what_the_limits_allow_fits(target, dtype, d, e):
    axes = {"B": 1, "H": 2, "G": 1, "M": 1100, "N": 1100, "D": d, "E": e}
    inputs = [
        Abstract(shape, operand.dtype or dtype)
        for operand, shape in zip(
            ATTENTION_BACKWARD.inputs, ATTENTION_BACKWARD.input_shapes(axes), strict=True
        )
    ]
    for options in ({"causal": True}, {"causal": True, "window": 100}):
        ATTENTION_BACKWARD.launch(inputs, options, target=target)


# -- illegal calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": np.nan}, "scale is nan; a finite number or None"),
        ({"softcap": 0.0}, "softcap is 0.0; a finite number above 0"),
        ({"window": 0}, "window is 0; an int of at least 1"),
        ({"align": "left"}, "align is 'left'; allowed are top-left, bottom-right"),
        ({"slopes": [1.0, 2.0]}, "slopes has 2 entries; one per query head, 1; give them all"),
        ({"max_seqlen": 3}, "max_seqlen is 3; packed sequences have no gradients yet; leave"),
    ],
)
def test_an_illegal_option_says_why(options, text):
    with pytest.raises(OptionError) as caught:
        run(operands(1, 1, 1, 4, 4, 4, "float32"), options)
    assert text in str(caught.value)


def shapes(h, g, d, e, m=4, n=4):
    axes = {"B": 1, "H": h, "G": g, "M": m, "N": n, "D": d, "E": e}
    return tuple(np.zeros(s, np.float32) for s in ATTENTION_BACKWARD.input_shapes(axes))


@pytest.mark.parametrize(
    ("h", "g", "d", "e", "text"),
    [
        (3, 2, 4, 4, "3 query heads share 2 key heads"),
        (1, 1, 9, 9, "the head sizes of q and v are 9 and 9; the sums of dk and dv take a PSUM "),
        (1, 1, 9, 9, "bank for every 8 of each, 4 in all, at most 3 on toy; use smaller heads"),
        (1, 1, 17, 4, "the head size of q and k is 17; a row of dq must fit a PSUM bank, at most "),
    ],
)  # fmt: skip
def test_an_illegal_shape_says_why(h, g, d, e, text):
    with pytest.raises(ShapeError) as caught:
        run(shapes(h, g, d, e), {})
    assert text in str(caught.value)


def test_a_result_of_another_shape_says_why():
    inputs = shapes(1, 1, 4, 4)
    with pytest.raises(ShapeError, match=r"M is 4 in do .* but 5 in lse"):
        run((*inputs[:5], np.zeros((1, 1, 5), np.float32)), {})
    with pytest.raises(DtypeError, match="lse has dtype float16; it must be float32"):
        run((*inputs[:5], inputs[5].astype(np.float16)), {})


def test_a_mask_of_other_sizes_says_why():
    inputs = operands(3, 4, 1, 5, 6, 4, "float32")
    with pytest.raises(ShapeError, match=r"mask has 2 along B; allowed are 1 and 3; broadcast it"):
        run(inputs, {}, (None, np.ones((2, 1, 5, 6), np.uint8), None))


@pytest.mark.parametrize(
    ("changes", "target", "text"),
    [
        ({"keys": 0}, "trn2", "config.keys is 0; it must be an int of at least 1"),
        ({"segment": 1.0}, "trn2", "config.segment is 1.0; it must be an int of at least 1"),
        ({"dq_lag": -1}, "trn2", "config.dq_lag is -1; it must be an int of at least 0"),
        ({"keys": 640}, "trn2", "config.keys is 640; trn2 takes multiples of 128 up to 512"),
        (
            {"ready": 3, "near": 2, "ahead": 2},
            "toy",
            "config.ready is 3, config.near 2, config.ahead",
        ),
        ({"near": 9, "ahead": 8}, "trn2", "near 9, config.ahead 8; statistics are made of what is"),
        (
            {"ds_lag": 4},
            "trn2",
            "config.ds_lag is 4, config.dk_lag 3 and config.dq_lag 3; dK and dQ",
        ),
        ({"dk_lag": 9, "dq_lag": 8, "dma_above": 99}, "trn2", "config.dk_lag is 9 and"),
        ({"hwdge": True}, "trn1", "config.hwdge needs gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(changes, target, text):
    inputs = operands(1, 1, 1, 4, 4, 4, "float32")
    axes = ATTENTION_BACKWARD.axes(*(x.shape for x in inputs))
    config = ATTENTION_BACKWARD.configure(axes, "float32", spec_for(target))
    config = dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError) as caught:
        run(inputs, {}, target=target, config=config)
    assert text in str(caught.value)


def test_a_config_is_an_attention_backward_config():
    with pytest.raises(ConfigError, match=r"config is 3; an AttentionBackwardConfig is needed"):
        run(operands(1, 1, 1, 4, 4, 4, "float32"), {}, config=3)


@given(
    m=st.integers(1, 70000), n=st.integers(1, 70000), d=st.integers(1, 512), e=st.integers(1, 512)
)
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, m, n, d, e):
    axes = {"B": 1, "H": 1, "G": 1, "M": m, "N": n, "D": d, "E": e}
    config = ATTENTION_BACKWARD.configure(axes, dtype, spec_for(target))
    assert ATTENTION_BACKWARD.config_problems(config, dtype, spec_for(target)) == ()


def test_causal_is_the_default_of_one_operator():
    inputs = operands(1, 1, 1, 20, 20, 8, "float32", 0, {"causal": True})
    causal = CAUSAL_ATTENTION_BACKWARD.launch(inputs, {}, target="toy").result
    compare(causal, inputs, {"causal": True})


def test_the_public_call_chooses_the_operator():
    options = {"causal": True, "align": "bottom-right", "window": 9, "softcap": 3.0, "scale": 0.5}
    options["slopes"] = [0.1, 0.2]
    inputs = operands(1, 2, 1, 20, 24, 8, "float32", 0, options)
    compare(ops.attention_backward(*inputs, **options, target="toy"), inputs, options)
    inputs = operands(1, 2, 1, 20, 24, 8, "float32")
    compare(ops.attention_backward(*inputs, target="toy"), inputs, {})
    mask = np.random.default_rng(0).random((1, 1, 20, 24)) < 0.5
    extras = (np.ones(2, np.float32), mask, np.ones((1, 1, 20, 24), np.float32))
    inputs = operands(1, 2, 1, 20, 24, 8, "float32", 0, {}, extras)
    found = ops.attention_backward(
        *inputs, sinks=extras[0], mask=mask, bias=extras[2], target="toy"
    )
    compare(found, inputs, {}, extras)


def test_an_option_of_another_name_is_refused():
    with pytest.raises(TypeError, match="the option 'caus' is none; allowed are causal, align, "):
        ops.attention_backward(*shapes(1, 1, 4, 4), caus=True)
