"""The router: selection exact, weights within the computed bound, its options, its refusals."""

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
from nki_kernels.operators.router import RouterConfig
from reference.moe import router as reference
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

ROUTER = OPERATORS["router"]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def compare(got, inputs, options, target, case):
    """Indices and counts are equal, weights within their bound."""
    x, weight = inputs[:2]
    axes = ROUTER.axes(x.shape, weight.shape, None, None, options=options)
    for operand, result, ref in zip(
        ROUTER.outputs, got, reference(*inputs, **options), strict=True
    ):
        assert_close(
            result, ref.value, ref.magnitude, op="router", case=f"{case} {operand.name}",
            roundings=ROUTER.roundings, chain=ROUTER.chain(axes, spec_for(target)),
        )  # fmt: skip


def tied(seed, tokens, hidden, experts, dtype):
    """Inputs whose logits are exact, small multiples of 1/16, and often equal."""
    host = DTYPES[dtype]
    x = (small_integers(seed, (tokens, hidden), np.float32, 2) / 16).astype(host)
    return x, small_integers(seed + 1, (hidden, experts), host, 2)


def route(inputs, options, target="toy", **keywords):
    return ops.router(*inputs, **options, target=target, **keywords)


# -- named cases -----------------------------------------------------------------------------------

MODELS = {
    "mixtral-8x7b": ((4096, 8), {"top_k": 2, "renormalize": True}),
    "qwen3-30b-a3b": ((2048, 128), {"top_k": 8, "renormalize": True}),
    "gpt-oss-20b": ((2880, 32), {"top_k": 4, "score_first": False}),
    "deepseek-v3": (
        (7168, 256),
        {"top_k": 8, "score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": 8,
         "top_groups": 4, "group_score": "top2"},
    ),
    "llama4": ((512, 16), {"top_k": 1, "score": "sigmoid", "score_first": False}),
    "most": ((256, 1024), {"top_k": 32, "scale": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("name", MODELS)
def test_the_routing_of_a_model_matches_the_reference(name, tokens):
    (hidden, experts), options = MODELS[name]
    host = DTYPES["bfloat16"]
    # Half a mixture of exact logits, and few of them equal: hidden values are mostly zero.
    x = np.zeros((tokens, hidden), host)
    x[:, :: hidden // 128] = small_integers(1, (tokens, hidden), host, 8)[:, :: hidden // 128] / 64
    weight = small_integers(2, (hidden, experts), host, 8)
    bias = normal(3, (experts,), np.float32) if name == "deepseek-v3" else None
    inputs = (x, weight, None, bias)
    compare(route(inputs, options, "trn2"), inputs, options, "trn2", name)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_generation_matches_the_reference(target, dtype):
    tokens, hidden = spec_for(target).partitions + 3, 2 * spec_for(target).partitions - 1
    inputs = (*tied(5, tokens, hidden, 12, dtype), None, None)
    options = {"top_k": 9}
    compare(route(inputs, options, target), inputs, options, target, "ragged")


# -- properties ------------------------------------------------------------------------------------

sizes = {
    "tokens": extents(TOY.partitions, 5 * TOY.partitions + 3),
    "hidden": extents(TOY.partitions, 3 * TOY.partitions),
    "experts": st.integers(1, 16),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}


@given(
    data=st.data(), score=st.sampled_from(["softmax", "sigmoid"]), renormalize=st.booleans(),
    score_first=st.booleans(), with_bias=st.booleans(), **sizes,
)  # fmt: skip
def test_any_routing_without_scores_in_the_selection_is_exact(
    data, score, renormalize, score_first, with_bias, tokens, hidden, experts, dtype, seed
):
    options = {
        "top_k": data.draw(st.integers(1, experts)), "score": score, "renormalize": renormalize,
        "score_first": score_first, "scale": 2.5,
    }  # fmt: skip
    bias = small_integers(seed + 2, (experts,), DTYPES[dtype], 2) if with_bias else None
    inputs = (*tied(seed, tokens, hidden, experts, dtype), bias, None)
    compare(route(inputs, options), inputs, options, "toy", "drawn")


@given(data=st.data(), group_score=st.sampled_from(["max", "top2"]), **sizes)
def test_groups_and_a_selection_bias_are_exact_on_logits(
    data, group_score, tokens, hidden, experts, dtype, seed
):
    size = data.draw(st.integers(2, 8))
    groups = data.draw(st.integers(1, 16 // size))
    top_groups = data.draw(st.integers(1, groups))
    options = {
        "top_k": data.draw(st.integers(1, top_groups * size)), "score_first": False,
        "groups": groups, "top_groups": top_groups, "group_score": group_score,
    }  # fmt: skip
    experts = groups * size
    selection = small_integers(seed + 2, (experts,), np.float32, 4) / 8
    inputs = (*tied(seed, tokens, hidden, experts, dtype), None, selection)
    compare(route(inputs, options), inputs, options, "toy", "grouped")


@given(score=st.sampled_from(["softmax", "sigmoid"]), **sizes)
def test_scores_choose_the_best_within_their_error(score, tokens, hidden, experts, dtype, seed):
    """With scores in the selection float64 may order near ties otherwise: nothing else differs."""
    x, weight = normal(seed, (tokens, hidden), DTYPES[dtype]), None
    weight = normal(seed + 1, (hidden, experts), DTYPES[dtype])
    selection = normal(seed + 2, (experts,), np.float32) / 4
    top_k = max(1, experts // 2)
    indices, _, counts = ops.router(
        x, weight, None, selection, top_k=top_k, score=score, target="toy"
    )
    everyone = reference(x, weight, top_k=experts, score=score)
    scores = np.zeros((tokens, experts))
    np.put_along_axis(scores, everyone[0].value.astype(int), everyone[1].value, axis=1)
    axes = {"T": tokens, "H": hidden, "E": experts, "K": top_k}
    slack = 2 * ROUTER.chain(axes, TOY) * 2.0**-24 * (everyone[1].magnitude.max() + 2)
    ranked = scores + selection
    order = np.take_along_axis(ranked, indices.astype(int), axis=1)
    assert (np.diff(order, axis=1) <= slack).all()
    rest = ranked.copy()
    np.put_along_axis(rest, indices.astype(int), -np.inf, axis=1)
    assert (rest.max(axis=1) <= order.min(axis=1) + slack).all()
    assert all(len(set(row)) == top_k for row in indices.tolist())
    assert (counts == np.bincount(indices.ravel(), minlength=experts)).all()


@given(**sizes)
def test_permuting_tokens_permutes_the_choice(tokens, hidden, experts, dtype, seed):
    x, weight = tied(seed, tokens, hidden, experts, dtype)
    order = np.random.default_rng(seed).permutation(tokens)
    options = {"top_k": max(1, experts // 2)}
    one, two = route((x, weight), options), route((x[order], weight), options)
    assert two[0].tobytes() == one[0][order].tobytes()
    assert two[1].tobytes() == one[1][order].tobytes()
    assert two[2].tobytes() == one[2].tobytes()


@given(**sizes)
def test_relabelling_experts_relabels_the_choice(tokens, hidden, experts, dtype, seed):
    # Distinct logits: a tie would go to the lower label.
    x = np.eye(1, hidden, dtype=DTYPES[dtype]).repeat(tokens, axis=0)
    rng = np.random.default_rng(seed)
    weight = np.zeros((hidden, experts), DTYPES[dtype])
    weight[0] = rng.permutation(experts)
    order = rng.permutation(experts)
    top_k = max(1, experts // 2)
    one = ops.router(x, weight, top_k=top_k, target="toy")
    two = ops.router(x, np.ascontiguousarray(weight[:, order]), top_k=top_k, target="toy")
    assert (order[two[0]] == one[0]).all()
    assert (two[2] == one[2][order]).all()


@given(**sizes)
def test_all_experts_are_the_dense_mixture(tokens, hidden, experts, dtype, seed):
    x, weight = tied(seed, tokens, hidden, experts, dtype)
    indices, weights, counts = ops.router(x, weight, top_k=experts, target="toy")
    assert (np.sort(indices, axis=1) == np.arange(experts)).all()
    assert (counts == tokens).all()
    compare((indices, weights, counts), (x, weight), {"top_k": experts}, "toy", "dense")


def test_of_equal_experts_the_lower_come_first():
    x, weight = np.ones((3, 4), np.float32), np.ones((4, 40), np.float32)
    indices, weights, counts = ops.router(x, weight, top_k=20, target="trn2")
    assert (indices == np.arange(20)).all()
    assert (counts == np.repeat([3, 0], 20)).all()
    assert (weights == weights[0, 0]).all()


@pytest.mark.parametrize("block", [1, 2, 3])
def test_no_config_changes_a_result(block):
    inputs = tied(4, 43, 20, 9, "bfloat16")
    want = route(inputs, {"top_k": 3})
    for transpose in ("dma", "pe"):
        got = route(inputs, {"top_k": 3}, config=RouterConfig(block, transpose, False))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_logit_that_is_no_number_ranks_last_and_weighs_nothing(value):
    x = np.ones((2, 1), np.float32)
    weight = np.array([[1, value, 3, 2]], np.float32)
    indices, weights, counts = ops.router(x, weight, top_k=4, target="toy")
    assert indices.tolist() == [[2, 3, 0, 1]] * 2
    assert (weights[:, 3] == 0).all()
    compare((indices, weights, counts), (x, weight), {"top_k": 4}, "toy", "nan")


def test_a_token_without_a_single_number_still_gets_its_experts():
    x = np.array([[np.nan], [1]], np.float32)
    weight = np.array([[1, 2, 3]], np.float32)
    got = ops.router(x, weight, top_k=2, target="toy")
    assert got[0].tolist() == [[0, 1], [2, 1]]
    compare(got, (x, weight), {"top_k": 2}, "toy", "nan token")


def test_a_selection_bias_moves_the_choice_and_no_weight():
    x, weight = np.ones((1, 1), np.float32), np.array([[1, 2, 3, 4]], np.float32)
    bias = np.array([9, 0, -np.inf, 0], np.float32)
    plain = ops.router(x, weight, top_k=4, target="toy")
    moved = ops.router(x, weight, None, bias, top_k=4, target="toy")
    assert moved[0].tolist() == [[0, 3, 1, 2]]
    by_expert = {int(e): w for e, w in zip(plain[0][0], plain[1][0], strict=True)}
    for expert, got in zip(moved[0][0], moved[1][0], strict=True):
        assert got == by_expert[int(expert)]


# -- refusals --------------------------------------------------------------------------------------

GOOD = (np.zeros((3, 4), np.float32), np.zeros((4, 8), np.float32))
REFUSED = {
    "no top_k": ({}, OptionError, "top_k is None; allowed are 1 to 32"),
    "top_k 0": ({"top_k": 0}, OptionError, "top_k is 0; allowed are 1 to 32"),
    "top_k 33": ({"top_k": 33}, OptionError, "top_k is 33; allowed"),
    "true": ({"top_k": True}, OptionError, "top_k is True"),
    "more than E": ({"top_k": 9}, ShapeError, "top_k is 9 of E = 8 experts; choose at most E"),
    "score": ({"top_k": 1, "score": "relu"}, OptionError, "score is 'relu'; allowed are softmax"),
    "group score": (
        {"top_k": 1, "group_score": "mean"}, OptionError, "group_score is 'mean'; allowed are max",
    ),
    "first": ({"top_k": 1, "score_first": 1}, OptionError, "score_first is 1; allowed are True"),
    "renorm": ({"top_k": 1, "renormalize": None}, OptionError, "renormalize is None; allowed"),
    "scale": ({"top_k": 1, "scale": np.inf}, OptionError, "scale is inf; a finite number"),
    "groups": ({"top_k": 1, "groups": 0}, OptionError, "groups is 0; a positive int"),
    "top groups": (
        {"top_k": 1, "groups": 2, "top_groups": 3}, OptionError,
        "top_groups is 3; allowed are 1 to groups = 2",
    ),
    "uneven": (
        {"top_k": 1, "groups": 3}, OptionError, "groups is 3 for E = 8 experts; it must divide E",
    ),
    "too few": (
        {"top_k": 5, "groups": 2, "top_groups": 1}, OptionError,
        "top_k is 5; top_groups = 1 groups of 4 hold 4 experts; choose fewer",
    ),
    "top2 of one": (
        {"top_k": 1, "groups": 8, "top_groups": 2, "group_score": "top2"}, OptionError,
        "group_score is top2 for groups of 1 expert; use max",
    ),
    "nan bias": (
        {"top_k": 1, "selection_bias": np.array([0, np.nan] * 4, np.float32)}, OptionError,
        "selection_bias[1] is NaN, which has no rank",
    ),
    "wide bias": (
        {"top_k": 1, "selection_bias": np.zeros(8)}, DtypeError,
        "selection_bias has dtype float64; it must be float32; cast it with selection_bias.astype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_illegal_call_raises_before_anything_runs(name, monkeypatch):
    options, error, text = REFUSED[name]
    monkeypatch.setattr(
        "nki_kernels.operators.contract.launch", lambda *_, **__: pytest.fail("ran")
    )
    inputs = (*GOOD, None, options.get("selection_bias"))
    with pytest.raises(error) as caught:
        ROUTER.launch(inputs, options, target="trn2")
    assert text in str(caught.value)


def test_what_does_not_fit_says_so():
    many = [Abstract((1, 8), "bfloat16"), Abstract((8, 1025), "bfloat16"), None, None]
    with pytest.raises(ShapeError, match="E is 1025; PSUM holds the logits of at most 1024"):
        ROUTER.launch(many, {"top_k": 1}, target="trn2")
    long = [Abstract((1, 65536), "bfloat16"), Abstract((65536, 512), "bfloat16"), None, None]
    with pytest.raises(ShapeError, match="H is 65536 with E = 512; the weight and two tiles"):
        ROUTER.launch(long, {"top_k": 1}, target="trn2")


@pytest.mark.parametrize(
    ("config", "dtype", "target", "text"),
    [
        ((1, "dma", False), "bfloat16", "trn2", "a RouterConfig is needed"),
        (RouterConfig(0, "dma", False), "bfloat16", "trn2", "config.block is 0; it must be an int"),
        (RouterConfig(1, "act", False), "bfloat16", "trn2", "allowed are 'dma' and 'pe'"),
        (RouterConfig(1, "dma", False), "float32", "trn2", "config.transpose is 'dma' for float32"),
        (RouterConfig(1, "dma", True), "bfloat16", "trn1", "config.hwdge needs gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(config, dtype, target, text):
    with pytest.raises(ConfigError) as caught:
        route(tied(0, 3, 4, 8, dtype), {"top_k": 1}, target, config=config)
    assert text in str(caught.value)


@given(
    tokens=st.integers(1, 9000), hidden=st.integers(1, 8192), experts=st.integers(1, 1024),
    top_k=st.integers(1, 32),
)  # fmt: skip
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, tokens, hidden, experts, top_k):
    axes, spec = {"T": tokens, "H": hidden, "E": experts, "K": top_k}, spec_for(target)
    if not ROUTER.limits(axes, dtype, spec):
        assert ROUTER.config_problems(ROUTER.configure(axes, dtype, spec), dtype, spec) == ()


@pytest.mark.parametrize(
    ("hidden", "experts", "dtype", "tokens"),
    [(7168, 256, "bfloat16", 600), (6144, 1024, "bfloat16", 200), (2880, 128, "float32", 200)],
)
def test_what_passes_the_limits_fits(hidden, experts, dtype, tokens):
    inputs = [Abstract((tokens, hidden), dtype), Abstract((hidden, experts), dtype), None, None]
    ROUTER.launch(inputs, {"top_k": 8}, target="trn2").time()


def test_the_outputs_are_sized_by_the_options():
    shapes = ROUTER.output_shapes((5, 3), (3, 7), None, None, options={"top_k": 2})
    assert shapes == ((5, 2), (5, 2), (7,))
    axes = {"T": 5, "H": 3, "E": 7, "K": 2}
    assert ROUTER.options_of(axes) == {"top_k": 2}
    read = 2 * (15 + 21 + 7) + 4 * 7
    assert ROUTER.min_bytes(axes, "bfloat16") == read + 4 * (10 + 10 + 7)


# -- mutants ---------------------------------------------------------------------------------------


def forget_to_remove(monkeypatch):
    real = nisa.nc_match_replace8

    def forgetful(dst, data, vals, imm, **keywords):
        keep = vals[:, 0:8]
        nisa.memset(dst=keep[:, 1:8], value=imm)
        return real(dst=dst, data=data, vals=keep, imm=imm, **keywords)

    monkeypatch.setattr(nisa, "nc_match_replace8", forgetful)


def drop_the_last_slice(monkeypatch):
    real, calls = nisa.nc_matmul, []

    def faulty(dst, stationary, moving, **keywords):
        calls.append(stationary)
        if stationary.shape[0] == 4 and moving.shape[1] > 1:
            return None
        return real(dst=dst, stationary=stationary, moving=moving, **keywords)

    monkeypatch.setattr(nisa, "nc_matmul", faulty)


def count_the_last_tile_only(monkeypatch):
    real = nisa.nc_matmul

    def fresh(dst, stationary, moving, accumulate, **keywords):
        one = dst.shape[0] == 1 and stationary.shape[1] == 1
        return real(
            dst=dst, stationary=stationary, moving=moving, accumulate=accumulate and not one
        )

    monkeypatch.setattr(nisa, "nc_matmul", fresh)


def forget_the_factor(monkeypatch):
    real = nisa.reciprocal

    def one(dst, data, **keywords):
        real(dst=dst, data=data, **keywords)
        nisa.memset(dst=dst, value=1.0)

    monkeypatch.setattr(nisa, "reciprocal", one)


@pytest.mark.parametrize(
    "mutant",
    [forget_to_remove, drop_the_last_slice, count_the_last_tile_only, forget_the_factor],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, monkeypatch):
    inputs = tied(7, 2 * TOY.partitions + 2, TOY.partitions + 4, 12, "bfloat16")
    options = {"top_k": 5}
    compare(route(inputs, options), inputs, options, "toy", "right")
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="worst at"):
        compare(route(inputs, options), inputs, options, "toy", mutant.__name__)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_change_no_event(dtype):
    inputs = (*tied(7, 21, 12, 12, dtype), None, None)
    with_values = ROUTER.launch(inputs, {"top_k": 3}, target="toy")
    shapes = [None if x is None else Abstract(x.shape, dtype) for x in inputs]
    shapes_only = ROUTER.launch(shapes, {"top_k": 3}, target="toy")
    assert [e.opcode for e in shapes_only.trace] == [e.opcode for e in with_values.trace]
    assert shapes_only.time().total_ns == with_values.time().total_ns
