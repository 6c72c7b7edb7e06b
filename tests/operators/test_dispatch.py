"""Dispatch and combine: a stable sort by expert, exact; its inverse within the computed bound."""

from __future__ import annotations

import ml_dtypes
import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.dispatch import DispatchConfig
from reference.moe import combine as combine_reference
from reference.moe import dispatch as dispatch_reference
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

DISPATCH, COMBINE = OPERATORS["dispatch"], OPERATORS["combine"]
TOY = spec_for("toy")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def skewed(seed, tokens, choices, experts, skew):
    """Ids of a kind of load: uniform, Zipf, all to one, or with absent ones on both sides."""
    rng = np.random.default_rng(seed)
    shape = (tokens, choices)
    if skew == "one":
        return np.full(shape, rng.integers(experts), np.int32)
    if skew == "absent":
        return rng.integers(-2, experts + 3, shape).astype(np.int32)
    if skew == "none":
        return np.full(shape, experts, np.int32)
    power = 1.1 if skew == "zipf" else 0.0
    odds = 1.0 / np.arange(1, experts + 1) ** power
    return rng.choice(experts, shape, p=odds / odds.sum()).astype(np.int32)


SKEWS = ["uniform", "zipf", "one", "absent", "none"]


def check_dispatch(got, x, ids, experts):
    """Everything is equal, and of the declared dtype."""
    assert [g.dtype for g in got] == [x.dtype, np.int32, np.int32]
    for operand, result, ref in zip(
        DISPATCH.outputs, got, dispatch_reference(x, ids, experts=experts), strict=True
    ):
        assert result.shape == ref.value.shape
        assert (result.astype(np.float64) == ref.value).all(), operand.name


def check_combine(got, rows, slots, weights, case):
    ref = combine_reference(rows, slots, weights)
    chain = COMBINE.chain({"K": slots.shape[1]}, TOY)
    assert_close(got, ref.value, ref.magnitude, op="combine", case=case, roundings=1, chain=chain)


sizes = {
    "tokens": extents(TOY.partitions, 3 * TOY.partitions + 3),
    "choices": st.integers(1, 5),
    "experts": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "skew": st.sampled_from(SKEWS),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}


@given(hidden=st.integers(1, 20), **sizes)
def test_any_load_is_sorted_exactly(hidden, tokens, choices, experts, skew, dtype, seed):
    x = small_integers(seed, (tokens, hidden), DTYPES[dtype], 100)
    ids = skewed(seed, tokens, choices, experts, skew)
    check_dispatch(ops.dispatch(x, ids, experts=experts, target="toy"), x, ids, experts)


@given(hidden=st.integers(1, 20), ahead=st.integers(0, 3), weighted=st.booleans(), **sizes)
def test_any_sum_matches_the_reference(
    hidden, ahead, weighted, tokens, choices, experts, skew, dtype, seed
):
    rows = normal(seed, (tokens * choices, hidden), DTYPES[dtype])
    ids = skewed(seed, tokens, choices, experts, skew)
    _, slots, _ = dispatch_reference(rows[:tokens], ids, experts=experts)
    slots = slots.value.astype(np.int32)
    weights = normal(seed + 1, slots.shape, np.float32) if weighted else None
    config = DispatchConfig(ahead, False)
    got = ops.combine(rows, slots, weights, config=config, target="toy")
    check_combine(got, rows, slots, weights, skew)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 8, 128), (128, 1, 8), (129, 4, 32), (260, 8, 1024)]
)
def test_the_sizes_of_models_are_exact_and_return(tokens, choices, experts, dtype, target):
    x = small_integers(1, (tokens, 40), DTYPES[dtype], 16)
    ids = skewed(2, tokens, choices, experts, "zipf")
    got = ops.dispatch(x, ids, experts=experts, target=target)
    check_dispatch(got, x, ids, experts)
    back = ops.combine(got[0], got[1], out_dtype="float32", target=target)
    assert (back == choices * x.astype(np.float32)).all()


@given(hidden=st.integers(1, 5), **sizes)
def test_relabelling_experts_moves_whole_groups(
    hidden, tokens, choices, experts, skew, dtype, seed
):
    x = small_integers(seed, (tokens, hidden), DTYPES[dtype], 100)
    ids = skewed(seed, tokens, choices, experts, skew)
    label = np.random.default_rng(seed).permutation(experts).astype(np.int32)
    there = (ids >= 0) & (ids < experts)
    renamed = np.where(there, label[np.clip(ids, 0, experts - 1)], ids)
    one = ops.dispatch(x, ids, experts=experts, target="toy")
    two = ops.dispatch(x, renamed, experts=experts, target="toy")
    starts = [np.concatenate([[0], found[2]]) for found in (one, two)]
    for expert in range(experts):
        new = label[expert]
        before = one[0][starts[0][expert] : starts[0][expert + 1]]
        after = two[0][starts[1][new] : starts[1][new + 1]]
        assert before.tobytes() == after.tobytes()


def test_an_absent_row_may_be_anything():
    rows = np.full((2, 3), np.nan, np.float32)
    rows[0] = 5
    slots = np.array([[0, 2], [-1, 0], [2, 9]], np.int32)
    got = ops.combine(rows, slots, np.ones((3, 2), np.float32), target="toy")
    assert got.tolist() == [[5] * 3, [5] * 3, [0] * 3]


def test_a_zero_weight_is_an_absent_choice_for_finite_rows():
    rows = normal(1, (6, 7), np.float32)
    slots = np.arange(6, dtype=np.int32).reshape(3, 2)
    weights = np.array([[1, 0]] * 3, np.float32)
    without = np.where(weights == 0, 6, slots).astype(np.int32)
    one = ops.combine(rows, slots, weights, target="toy")
    two = ops.combine(rows, without, weights, target="toy")
    assert (one == two).all()


def test_an_id_that_no_expert_has_never_leaves_a_tensor():
    """No check is off: a DMA outside its tensor would raise."""
    ids = np.array([[2**24 - 1, -(2**24 - 1)], [1, 5]], np.int32)
    x = np.ones((2, 3), np.float32)
    check_dispatch(ops.dispatch(x, ids, experts=4, target="toy"), x, ids, 4)


# -- refusals --------------------------------------------------------------------------------------

X = np.zeros((3, 4), np.float32)
IDS = np.zeros((3, 2), np.int32)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "text"),
    [
        ((X, IDS), {}, OptionError, "experts is None; a positive int is needed"),
        ((X, IDS), {"experts": 0}, OptionError, "experts is 0; a positive int"),
        ((X, IDS), {"experts": True}, OptionError, "experts is True"),
        ((X, IDS.astype(np.int64)), {"experts": 2}, DtypeError, "indices has dtype int64; it must"),
        ((X, IDS[:2]), {"experts": 2}, ShapeError, "T is 3 in x [T, H] = [3, 4] but 2 in indices"),
        ((X, IDS + 2**24), {"experts": 2}, OptionError, "indices has 16777216; float32 compares"),
        ((X, IDS), {"experts": 3584}, ShapeError, "experts is 3584; PSUM counts at most 3583"),
    ],
)
def test_an_illegal_dispatch_says_why(inputs, options, error, text):
    with pytest.raises(error) as caught:
        DISPATCH.launch(inputs, options, target="trn2")
    assert text in str(caught.value)


def test_what_does_not_fit_says_so():
    many = [Abstract((2**20, 4), "bfloat16"), Abstract((2**20, 16), "int32")]
    with pytest.raises(ShapeError, match=r"T \* K is 16777216; at most 16777215 are counted"):
        DISPATCH.launch(many, {"experts": 8}, target="trn2")
    tall = [Abstract((2**20, 4), "bfloat16"), Abstract((2**20, 8), "int32")]
    with pytest.raises(
        ShapeError, match=r"bytes per partition of SBUF; trn2 has .*split the token"
    ):
        DISPATCH.launch(tall, {"experts": 8}, target="trn2")
    wide = [Abstract((4, 2**15), "float32"), Abstract((4, 1), "int32"), None]
    with pytest.raises(ShapeError, match="H is 32768; a row and its sums need"):
        COMBINE.launch(wide, {}, target="trn2")


@pytest.mark.parametrize(
    ("config", "target", "text"),
    [
        (3, "trn2", "a DispatchConfig is needed"),
        (DispatchConfig(-1, False), "trn2", "config.ahead is -1; it must be an int of at least 0"),
        (DispatchConfig(1, True), "trn1", "config.hwdge needs gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(config, target, text):
    with pytest.raises(ConfigError) as caught:
        ops.dispatch(X, IDS, experts=2, config=config, target=target)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "hidden", "choices", "experts"), [(8192, 7168, 8, 256), (32768, 4096, 2, 8)]
)
def test_what_passes_the_limits_fits(tokens, hidden, choices, experts):
    x = Abstract((tokens, hidden), "bfloat16")
    table = skewed(0, tokens, choices, experts, "uniform")
    DISPATCH.launch([x, table], {"experts": experts}, target="trn2").time()


def test_the_outputs_are_sized_by_products_and_options():
    shapes = DISPATCH.output_shapes((5, 3), (5, 2), options={"experts": 7})
    assert shapes == ((10, 3), (5, 2), (7,))
    axes = {"T": 5, "H": 3, "K": 2, "E": 7}
    assert DISPATCH.min_bytes(axes, "bfloat16") == 2 * 15 + 4 * 10 + 2 * 30 + 4 * 10 + 4 * 7


# -- mutants ---------------------------------------------------------------------------------------


def forget_earlier_tiles(real):
    def fresh(dst, stationary, moving, accumulate, **keywords):
        return real(dst=dst, stationary=stationary, moving=moving, accumulate=False)

    return "nc_matmul", fresh


def forget_first_places(real):
    def zero(dst, data, indices, **keywords):
        real(dst=dst, data=data, indices=indices)
        if dst.shape[1] > 2:
            nisa.memset(dst=dst, value=0.0)

    return "nc_n_gather", zero


@pytest.mark.parametrize("mutant", [forget_earlier_tiles, forget_first_places])
def test_a_mutated_dispatch_is_rejected(mutant, monkeypatch):
    x = small_integers(1, (20, 6), np.float32, 100)
    ids = skewed(1, 20, 2, 5, "uniform")
    check_dispatch(ops.dispatch(x, ids, experts=5, target="toy"), x, ids, 5)
    name, _ = mutant(None)
    monkeypatch.setattr(nisa, name, mutant(getattr(nisa, name))[1])
    with pytest.raises(Exception, match=r"rows|slots|offsets|wrote|written"):
        check_dispatch(ops.dispatch(x, ids, experts=5, target="toy"), x, ids, 5)


def test_a_combine_without_weights_is_rejected(monkeypatch):
    rows, slots = normal(1, (20, 6), np.float32), np.arange(20, dtype=np.int32).reshape(10, 2)
    weights = normal(2, (10, 2), np.float32)
    check_combine(ops.combine(rows, slots, weights, target="toy"), rows, slots, weights, "right")
    real = nisa.scalar_tensor_tensor

    def unweighted(dst, data, op0, operand0, op1, operand1):
        return real(dst=dst, data=data, op0=op0, operand0=1.0, op1=op1, operand1=operand1)

    monkeypatch.setattr(nisa, "scalar_tensor_tensor", unweighted)
    with pytest.raises(AssertionError, match="worst at"):
        check_combine(ops.combine(rows, slots, weights, target="toy"), rows, slots, weights, "not")
