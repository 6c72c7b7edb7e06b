"""The test pattern of group_norm."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference.norm
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.norm import GroupNormConfig
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.operators.shapes import cases, parse
from tests.operators.norms import DTYPES, TOY, TRN2
from tests.operators.test_contract import Symbol
from tests.strategies.matrices import normal, seeds, wide
from tests.tolerance import assert_close

OP = OPERATORS["group_norm"]
PARAMETERS = [(), ("weight",), ("bias",), ("weight", "bias")]
#: Batches and groups around the partitions of the toy core, two per batch and three.
sizes = {
    "n": st.integers(1, 2 * TOY.partitions + 1), "groups": st.integers(1, 5),
    "each": st.integers(1, 4), "s": st.integers(1, 20),
}  # fmt: skip


def operands(n, c, s, dtype, seed=0, given=("weight", "bias"), make=normal):
    """Return (x, weight or None, bias or None)."""
    host = DTYPES[dtype]
    vectors = (
        normal(seed + 1 + i, (c,), host) if name in given else None
        for i, name in enumerate(("weight", "bias"))
    )
    return (make(seed, (n, c, s), host), *vectors)


def call(inputs, groups, **keywords):
    x, weight, bias = inputs
    return ops.group_norm(x, groups, weight, bias, **keywords)


def compare(got, inputs, groups, target, case, **eps):
    ref = reference.norm.group_norm(*inputs, num_groups=groups, **eps)
    n, c, s = inputs[0].shape
    axes = {"N": n, "C": c, "S": s, "G": groups}
    assert_close(
        got, ref.value, ref.magnitude, op="group_norm", case=case,
        roundings=OP.roundings, chain=OP.chain(axes, spec_for(target)),
    )  # fmt: skip


@pytest.mark.parametrize("name", [case.name for case in cases("group_norm")])
def test_a_named_case_matches_the_reference(name):
    axes = parse(OP, name).axes
    config = OP.configure(axes, "bfloat16", TRN2)
    cut = OP.reduced(axes, config, TRN2)
    inputs = operands(min(cut["N"], 2), cut["C"], cut["S"], "bfloat16")
    got = call(inputs, cut["G"], config=config, target="trn2")
    compare(got, inputs, cut["G"], "trn2", name)


@pytest.mark.parametrize("present", PARAMETERS)
@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), uneven=st.booleans(), **sizes)
def test_any_shape_matches_the_reference(present, n, groups, each, s, dtype, seed, uneven):
    inputs = operands(n, groups * each, s, dtype, seed, present, wide if uneven else normal)
    compare(call(inputs, groups, target="toy"), inputs, groups, "toy", f"{n}x{groups}x{each}x{s}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "c", "s", "groups"), [(5, 96, 1025, 32), (129, 3, 7, 1), (2, 64, 513, 2)]
)
def test_sizes_around_the_real_tiles_match_the_reference(n, c, s, groups, dtype):
    inputs = operands(n, c, s, dtype)
    compare(call(inputs, groups, target="trn2"), inputs, groups, "trn2", f"{n}x{c}x{s}x{groups}")


@given(
    chunk=st.integers(1, 40), vector_stats=st.integers(0, 40), ahead=st.integers(0, 1),
    overlap=st.booleans(), hwdge=st.booleans(), seed=seeds(), **sizes,
)  # fmt: skip
def test_no_config_changes_the_mathematics(n, groups, each, s, seed, **fields):
    config = GroupNormConfig(**fields)
    inputs = operands(n, groups * each, s, "bfloat16", seed)
    compare(call(inputs, groups, config=config, target="toy"), inputs, groups, "toy", repr(config))


@given(eps=st.floats(2**-40, 2**120), seed=seeds(), **sizes)
def test_any_eps_matches_the_reference(n, groups, each, s, eps, seed):
    inputs = operands(n, groups * each, s, "float32", seed)
    got = call(inputs, groups, eps=eps, target="toy")
    compare(got, inputs, groups, "toy", f"eps {eps}", eps=eps)


# -- exactness -------------------------------------------------------------------------------------


@given(seed=seeds(), dtype=st.sampled_from(list(DTYPES)), **sizes)
def test_permuting_groups_permutes_the_result(n, groups, each, s, seed, dtype):
    x, weight, bias = operands(n, groups * each, s, dtype, seed)
    order = np.random.default_rng(seed).permutation(groups)
    channels = (order[:, None] * each + np.arange(each)).ravel()
    whole = call((x, weight, bias), groups, target="toy")
    moved = (np.ascontiguousarray(x[:, channels]), weight[channels], bias[channels])
    assert call(moved, groups, target="toy").tobytes() == whole[:, channels].tobytes()


def test_axes_behind_the_channels_are_positions():
    x, weight, bias = operands(2, 6, 20, "float32")
    flat = call((x, weight, bias), 3, target="toy")
    for shape in ((2, 6, 4, 5), (2, 6, 2, 2, 5)):
        got = call((x.reshape(shape), weight, bias), 3, target="toy")
        assert got.shape == shape
        assert got.tobytes() == flat.tobytes()
    assert call((np.ascontiguousarray(x[:, :, 0]), None, None), 2, target="toy").shape == (2, 6)


def test_one_group_per_channel_is_torchs_instance_norm():
    torch = pytest.importorskip("torch")
    inputs = operands(3, 6, 20, "float32")
    tensors = [torch.from_numpy(a) for a in inputs]
    for groups in (1, 2, 6):
        want = torch.nn.functional.group_norm(tensors[0], groups, *tensors[1:]).numpy()
        ref = reference.norm.group_norm(*inputs, num_groups=groups)
        axes = {"N": 3, "C": 6, "S": 20, "G": groups}
        assert_close(
            want, ref.value, ref.magnitude, op="torch", case=str(groups), roundings=1,
            chain=OP.chain(axes, TOY),
        )  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (2, 3), (4, 5)])
def test_a_special_value_fills_its_group_and_no_other(where, value):
    batch, channel = where
    inputs = operands(5, 6, 20, "float32")
    clean = call(inputs, 3, target="toy")
    inputs[0][batch, channel, 7] = value
    got = call(inputs, 3, target="toy")
    inside = np.zeros(got.shape, bool)
    inside[batch, channel // 2 * 2 : channel // 2 * 2 + 2] = True
    assert np.isnan(got[inside]).all()
    assert (got[~inside] == clean[~inside]).all()


@pytest.mark.parametrize("power", [-60, 50])
def test_groups_of_any_scale_without_eps(power):
    x, weight, bias = operands(5, 6, 20, "float32")
    inputs = (np.ldexp(x, power), weight, bias)
    compare(call(inputs, 3, eps=0.0, target="toy"), inputs, 3, "toy", f"2^{power}", eps=0.0)


# -- the contract ----------------------------------------------------------------------------------


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


ILLEGAL = [
    ((zeros(3), None, None), 1, {}, ShapeError, "x has 1 dimensions, shape [3]; 3 are needed: x ["),
    ((zeros(2, 6, 4), zeros(5), None), 2, {}, ShapeError, "C is 6 in x [N, C, S] = [2, 6, 4] but"),
    ((zeros(2, 6, 0), None, None), 2, {}, ShapeError, "x [N, C, S] = [2, 6, 0] has a zero-size"),
    ((zeros(2, 6, 8)[:, :, ::2], None, None), 2, {}, ShapeError, "x is strided"),
    (
        (zeros(2, 6, 4), None, None), 4, {}, ShapeError,
        "C is 6 and num_groups 4; channels must form equal groups; choose a divisor of C",
    ),
    ((zeros(2, 6, 4), None, None), 12, {}, ShapeError, "C is 6 and num_groups 12; channels must"),
    (
        (zeros(2, 6, 4), None, None), 0, {}, OptionError,
        "num_groups is 0; an int of at least 1 is needed; pass for example 32",
    ),
    ((zeros(2, 6, 4), None, None), 2.0, {}, OptionError, "num_groups is 2.0; an int of at least 1"),
    ((zeros(2, 6, 4), None, None), 2, {"eps": -1}, OptionError, "eps is -1; a number of at least"),
    ((zeros(2, 6, 4, dtype=np.float64), None, None), 2, {}, DtypeError, "x has dtype float64"),
    ((None, None, None), 2, {}, DtypeError, "x is a NoneType; a NumPy array is needed"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "groups", "options", "error", "text"), ILLEGAL)
def test_an_illegal_call_raises_before_anything_runs(
    inputs, groups, options, error, text, monkeypatch
):
    monkeypatch.setattr(
        "nki_kernels.operators.contract.launch", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(error) as caught:
        call(inputs, groups, **options, target="toy")
    assert text in str(caught.value)


BAD = [
    ({"chunk": 0}, "toy", "config.chunk is 0; it must be an int of at least 1"),
    ({"vector_stats": -1}, "toy", "config.vector_stats is -1; it must be an int of at least 0"),
    ({"ahead": True}, "toy", "config.ahead is True; it must be an int of at least 0"),
    ({"hwdge": True}, "trn1", "config.hwdge needs gen3; trn1 is gen2; set it to False"),
]


@pytest.mark.parametrize(("changes", "target", "text"), BAD)
def test_a_config_that_cannot_run_says_why(changes, target, text):
    good = GroupNormConfig(chunk=4, vector_stats=2, ahead=1, overlap=True, hwdge=False)
    inputs = operands(2, 6, 4, "float32")
    call(inputs, 2, config=good, target=target)
    with pytest.raises(ConfigError) as caught:
        call(inputs, 2, config=dataclasses.replace(good, **changes), target=target)
    assert text in str(caught.value)
    with pytest.raises(ConfigError, match="config is 3; a GroupNormConfig is needed; pass one"):
        call(inputs, 2, config=3, target=target)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("each", [1, 10])
def test_the_largest_group_runs_and_one_more_says_so(each, dtype, target):
    axes = {"N": 3, "C": 2 * each, "S": 10**6, "G": 2}
    (reason,) = OP.limits(axes, dtype, spec_for(target))
    most = int(re.search(r"at most S = (\d+) on", reason).group(1))
    assert f"S is 1000000; a group of {dtype}, {each} channels of S positions, must fit" in reason
    for s in {most, max(1, most // 2), max(1, most // 5)}:
        inputs = [Abstract(shape, dtype) for shape in OP.input_shapes({**axes, "S": s})]
        options = {"num_groups": 2, "out_dtype": "float32"}
        OP.launch(inputs, options, target=target)
    assert OP.limits({**axes, "S": most + 1}, dtype, spec_for(target)) != ()


def test_output_shapes_never_look_at_a_size():
    n, c, s = Symbol("N"), Symbol("C"), Symbol("S")
    ((rows, channels, positions),) = OP.output_shapes((n, c, s), (c,), None)
    assert rows is n
    assert channels is c
    assert positions is s


def test_defaults_and_inputs():
    inputs = operands(2, 6, 20, "float32")
    before = [x.tobytes() for x in inputs]
    got = call(inputs, 3, target="toy")
    want = call(inputs, 3, eps=DEFAULT_EPS["layer_norm"], target="toy")
    assert got.tobytes() == want.tobytes()
    assert [x.tobytes() for x in inputs] == before


# -- counts and mutants ----------------------------------------------------------------------------


@pytest.mark.parametrize("present", PARAMETERS)
@pytest.mark.parametrize(("n", "groups", "each", "s"), [(1, 1, 1, 1), (5, 3, 2, 20), (9, 2, 3, 7)])
def test_instructions_and_bytes_are_exactly_the_formula(n, groups, each, s, present):
    config = GroupNormConfig(chunk=16, vector_stats=8, ahead=1, overlap=True, hwdge=True)
    inputs = operands(n, groups * each, s, "bfloat16", given=present)
    run = OP.launch(inputs, {"num_groups": groups}, config=config, target="toy")
    size, rows = each * s, n * groups
    cuts = [(at, min(at + 16, size)) for at in range(0, size, 16)]
    scalar = sum(right - left > 8 for left, right in cuts)
    tiles = [(at, min(at + TOY.partitions, rows)) for at in range(0, rows, TOY.partitions)]
    want = Counter(memset=1 + min(2, len(tiles)) * scalar)
    segments = sum(
        (stop - 1) // groups - start // groups + 1
        for start, stop in {(a % groups, a % groups + b - a): (a, b) for a, b in tiles}.values()
    )
    want["dma_copy"] = 2 * len(tiles) * len(cuts) + len(present) * segments
    width = s if present else size
    spans = sum(-(-right // width) - left // width for left, right in cuts)
    want.update(
        bn_stats=len(tiles) * len(cuts), activation=2 * len(tiles) * scalar, bn_aggr=len(tiles),
        # The root, slope, offset, and a chunk channel by channel.
        tensor_scalar=len(tiles) * (1 + ("weight" in present) + ("bias" not in present) + spans),
        scalar_tensor_tensor=len(tiles) * (1 + ("bias" in present)),
    )  # fmt: skip
    assert Counter(event.opcode for event in run.trace) == +want
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    assert sum(work.hbm_write_bytes for work in moved) == 2 * rows * size
    assert OP.flops({"N": n, "C": groups * each, "S": s, "G": groups}) == 8 * rows * size


@pytest.mark.parametrize("what", ["weight of the next channel", "offset"])
def test_a_mutated_kernel_is_rejected(what, monkeypatch):
    inputs = operands(5, 6, 20, "bfloat16")
    compare(call(inputs, 3, target="toy"), inputs, 3, "toy", "right")
    if what == "offset":
        real = nisa.scalar_tensor_tensor

        def mutated(**k):
            return real(**{**k, "reverse1": False})

        monkeypatch.setattr(nisa, "scalar_tensor_tensor", mutated)
        got = call(inputs, 3, target="toy")
    else:
        got = call((inputs[0], np.roll(inputs[1], 1), inputs[2]), 3, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, inputs, 3, "toy", what)
