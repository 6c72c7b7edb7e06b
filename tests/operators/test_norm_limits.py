"""Configs and limits of the normalizations: what fits SBUF, what a config may say."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import spec_for
from nki_kernels.kernels.norm import LayerNormConfig, RmsNormConfig
from nki_kernels.machine.errors import ConfigError, DoesNotFit, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES, NORMS, TOY, TRN2, call, compare, operands

TARGETS = ["trn1", "trn2", "trn3", "toy"]
SIZES = st.integers(1, 200_000)


def abstract(op, n, h, dtype):
    return [Abstract(shape, dtype) for shape in OPERATORS[op].input_shapes({"N": n, "H": h})]


def longest(op, dtype, target):
    """Return the longest row, as the message of one that is too long says it."""
    (reason,) = OPERATORS[op].limits({"N": 1, "H": 10**6}, dtype, spec_for(target))
    return int(re.search(r"at most H = (\d+) on", reason).group(1))


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_the_longest_row_runs_and_one_more_says_so(op, dtype, target):
    most = longest(op, dtype, target)
    rows = 2 * spec_for(target).partitions + 1
    options = {"out_dtype": "float32"}
    OPERATORS[op].launch(abstract(op, rows, most, dtype), options, target=target)
    text = (
        rf"H is {most + 1}; a row of {dtype} and its parameters must fit one partition of SBUF, at "
        rf"most H = {most} on {target}; split the row, or use a narrower dtype"
    )
    with pytest.raises(ShapeError, match=text):
        OPERATORS[op].launch(abstract(op, 1, most + 1, dtype), {}, target=target)


@given(op=st.sampled_from(NORMS), dtype=st.sampled_from(list(DTYPES)), h=SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_limit_in_the_message_is_the_limit(target, op, dtype, h):
    allowed = not OPERATORS[op].limits({"N": 1, "H": h}, dtype, spec_for(target))
    assert allowed == (h <= longest(op, dtype, target))


#: Rows this long once did not fit beside their chunks: free memory lay in pieces between the rows.
FRAGMENTING = [
    ("trn1", "bfloat16", "float32", 16384), ("trn2", "bfloat16", "bfloat16", 18394),
    ("trn2", "bfloat16", "float32", 15018), ("trn2", "bfloat16", "bfloat16", 23266),
    ("trn2", "float32", "float32", 9743), ("trn2", "float32", "float32", 12275),
    ("trn2", "bfloat16", "float32", 24181), ("trn3", "float32", "float32", 13440),
]  # fmt: skip


@pytest.mark.parametrize(("target", "dtype", "out_dtype", "h"), FRAGMENTING)
@pytest.mark.parametrize("tiles", [5, 11])
def test_rows_fit_beside_their_chunks(tiles, target, dtype, out_dtype, h):
    rows = tiles * spec_for(target).partitions - 1
    inputs = abstract("layer_norm", rows, h, dtype)
    OPERATORS["layer_norm"].launch(inputs, {"out_dtype": out_dtype}, target=target)


@given(
    target=st.sampled_from(TARGETS),
    op=st.sampled_from(NORMS),
    dtype=st.sampled_from(list(DTYPES)),
    out_dtype=st.sampled_from(list(DTYPES)),
    tiles=st.integers(1, 6),
    share=st.floats(0, 1),
)
def test_any_row_within_the_limit_fits(target, op, dtype, out_dtype, tiles, share):
    h = max(1, int(share * longest(op, dtype, target)))
    rows = tiles * spec_for(target).partitions - 1
    inputs = abstract(op, rows, h, dtype)
    OPERATORS[op].launch(inputs, {"out_dtype": out_dtype}, target=target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_rows_of_16384_match_the_reference(op, dtype):
    inputs = operands(op, 4, 16384, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", "4x16384")
    assert longest(op, dtype, "trn2") >= 16384


def test_a_config_too_large_for_the_core_does_not_fit():
    config = OPERATORS["rms_norm"].configure({"N": 1, "H": 16384}, "float32", TRN2)
    config = dataclasses.replace(config, ahead=3)
    inputs = abstract("rms_norm", 900, 16384, "float32")
    with pytest.raises(DoesNotFit, match="Use smaller tiles"):
        OPERATORS["rms_norm"].launch(inputs, {}, config=config, target="trn2")


# -- the config ------------------------------------------------------------------------------------

RMS = RmsNormConfig(chunk=4, piece=2, ahead=1, together=2, scalar=1, pool=1, hwdge=False)
LAYER = LayerNormConfig(
    vector_stats=4, pool_shift=1, pool_scale=2, chunk=4, piece=2, ahead=1, overlap=True, hwdge=False
)
BAD = [
    ({"chunk": 0}, "toy", "config.chunk is 0; it must be an int of at least 1"),
    ({"piece": 2.0}, "toy", "config.piece is 2.0; it must be an int of at least 1"),
    ({"ahead": -1}, "toy", "config.ahead is -1; it must be an int of at least 0"),
    ({"hwdge": True}, "trn1", "config.hwdge needs gen3; trn1 is gen2; set it to False"),
]
BAD_RMS = [
    ({"together": -1}, "toy", "config.together is -1; it must be an int of at least 0"),
    (
        {"pool": 3}, "toy",
        "config.scalar is 1 and config.pool 3; they count among the config.together = 2 rows of",
    ),
]  # fmt: skip
BAD_LAYER = [
    ({"vector_stats": -1}, "toy", "config.vector_stats is -1; it must be an int of at least 0"),
    ({"pool_shift": True}, "toy", "config.pool_shift is True; it must be an int of at least 0"),
    ({"pool_scale": None}, "toy", "config.pool_scale is None; it must be an int of at least 0"),
]


@pytest.mark.parametrize(
    ("op", "good", "changes", "target", "text"),
    [
        *(("rms_norm", RMS, *bad) for bad in BAD + BAD_RMS),
        *(("layer_norm", LAYER, *bad) for bad in BAD + BAD_LAYER),
    ],
)
def test_a_config_that_cannot_run_says_why(op, good, changes, target, text):
    inputs = operands(op, 2, 6, "bfloat16")
    call(op, inputs, config=good, target=target)
    with pytest.raises(ConfigError) as caught:
        call(op, inputs, config=dataclasses.replace(good, **changes), target=target)
    assert text in str(caught.value)


def test_every_reason_of_a_config_is_listed():
    config = dataclasses.replace(LAYER, chunk=0, pool_scale=-1, hwdge=True)
    with pytest.raises(
        ConfigError, match=r"(?s)3 problems.*config.chunk.*config.pool_scale.*hwdge"
    ):
        call("layer_norm", operands("layer_norm", 2, 6, "bfloat16"), config=config, target="trn1")


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("rms_norm", r"config is \(1, 2\); an RmsNormConfig is needed; pass one, or None"),
        ("layer_norm", r"config is \(1, 2\); a LayerNormConfig is needed; pass one, or None"),
    ],
)
def test_a_config_of_another_kind_is_refused(op, text):
    with pytest.raises(ConfigError, match=text):
        call(op, operands(op, 2, 6, "bfloat16"), config=(1, 2), target="toy")


@given(op=st.sampled_from(NORMS), dtype=st.sampled_from(list(DTYPES)), n=SIZES, h=SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_chosen_config_is_plain_and_has_no_problems(target, op, dtype, n, h):
    spec, contract = spec_for(target), OPERATORS[op]
    config = contract.configure({"N": n, "H": h}, dtype, spec)
    assert contract.config_problems(config, dtype, spec) == ()
    assert all(type(value) in (int, bool) for value in dataclasses.asdict(config).values())
    assert config.piece <= config.chunk <= h
    # A row's result must not depend on how many rows there are.
    assert config == contract.configure({"N": 1, "H": h}, dtype, spec)
    if op == "layer_norm":
        assert config.vector_stats <= h
        assert config.pool_shift + config.pool_scale <= h


@given(op=st.sampled_from(NORMS), n=SIZES, h=SIZES)
@pytest.mark.parametrize("spec", [TOY, TRN2], ids=lambda spec: spec.name)
def test_the_reduced_problem_keeps_rows_whole_and_the_last_tile_ragged(spec, op, n, h):
    small = OPERATORS[op].reduced({"N": n, "H": h}, None, spec)
    assert small["H"] == h
    assert 1 <= small["N"] <= min(n, 2 * spec.partitions)
    assert (small["N"] > spec.partitions) == (n > spec.partitions)
    assert small["N"] % spec.partitions == n % spec.partitions
