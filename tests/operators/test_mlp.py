"""The whole test pattern for gated_mlp."""

from __future__ import annotations

import dataclasses
from collections import Counter

import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.mlp import gated as kernel
from nki_kernels.kernels.mlp.gated import GatedMlpConfig
from nki_kernels.machine.errors import ConfigError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.linear import ACTIVATIONS
from nki_kernels.operators.shapes import cases
from reference.mlp import gated_mlp as reference
from tests.operators.test_matmul import DTYPES
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

OPS = [OPERATORS["gated_mlp"], OPERATORS["gated_mlp_kn"]]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
parametrize_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)

toy_sizes = {
    "t": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "h": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "i": extents(TOY.partitions, 10 * TOY.partitions + 3),
}


def operands(op, t, h, i, dtype, seed=0, make=normal):
    shapes = op.input_shapes({"T": t, "H": h, "I": i})
    return tuple(make(seed + at, shape, DTYPES[dtype]) for at, shape in enumerate(shapes))


def run(op, inputs, **keywords):
    return ops.gated_mlp(*inputs, transpose_weights=op is OPS[0], **keywords)


def compare(got, op, inputs, target, case, **options):
    ref = reference(*inputs, transposed=op is OPS[0], **options)
    chain = op.chain(op.axes(*(x.shape for x in inputs)), spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


@parametrize_op
def test_named_cases_match_the_reference(op):
    for case in cases(op.name):
        config = op.configure(case.axes, "bfloat16", TRN2)
        cut = [min(size, 130 + size % 100) for size in case.axes.values()]
        inputs = operands(op, *cut, "bfloat16")
        compare(run(op, inputs, config=config, target="trn2"), op, inputs, "trn2", case.name)


@parametrize_op
@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    activation=st.sampled_from(ACTIVATIONS),
    **toy_sizes,
)
def test_any_shape_matches_the_reference(op, t, h, i, dtype, seed, activation):
    inputs = operands(op, t, h, i, dtype, seed)
    got = run(op, inputs, activation=activation, target="toy")
    compare(got, op, inputs, "toy", f"{t}x{h}x{i}", activation=activation)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 130, 700), (128, 64, 129), (140, 257, 530), (600, 40, 140)])
def test_every_generation_matches_the_reference(target, dtype, sizes):
    for op in OPS:
        inputs = operands(op, *sizes, dtype)
        compare(run(op, inputs, target=target), op, inputs, target, "ragged")


@parametrize_op
@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_small_integers_are_exact(op, t, h, i, dtype, seed):
    # |x·gate| <= 35, so hidden features stay within 35^2: exact in float32, sparse in the others.
    most = 1
    inputs = operands(op, t, h, i, dtype, seed, lambda *where: small_integers(*where, most=most))
    if dtype != "float32":  # a single feature of x: hidden features are -1, 0 or 1
        inputs[0][:, 1:] = 0
    got = run(op, inputs, activation="relu", out_dtype="float32", target="toy")
    assert (got == reference(*inputs, activation="relu", transposed=op is OPS[0]).value).all()


def test_the_hidden_features_are_rounded_once():
    # One feature whose float32 value, 1 + 2^-8 + 2^-16, is not one of bfloat16.
    x = np.ones((1, 1), DTYPES["bfloat16"])
    gate = np.full((1, 1), 1 + 2**-7, DTYPES["bfloat16"])
    up = np.full((1, 1), 1 + 2**-7, DTYPES["bfloat16"])
    got = ops.gated_mlp(x, gate, up, x, activation="relu", out_dtype="float32", target="toy")
    exact = (1 + 2**-7) ** 2
    assert got.item() == float(np.array(exact, DTYPES["bfloat16"])) != exact


CONFIGS = [
    GatedMlpConfig(tokens, blocks, flip, wave_up, wave_down, prefetch, tail, "pe", True, scalar)
    for tokens, flip in ((3, True), (8, True), (5, False), (16, False))
    for blocks, wave_up, wave_down, prefetch, tail, scalar in (
        (1, 1, 1, 1, 0, True), (2, 2, 1, 3, 1, False), (99, 1, 1, 2, 99, True),
    )
]  # fmt: skip


@parametrize_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_config_changes_a_result(op, dtype):
    inputs = operands(op, 21, 19, 43, dtype, 4, lambda *where: small_integers(*where, most=1))
    want = run(op, inputs, activation="relu", target="toy").tobytes()
    for config in CONFIGS:
        assert op.config_problems(config, dtype, TOY) == ()
        assert run(op, inputs, activation="relu", config=config, target="toy").tobytes() == want
        if dtype != "float32":
            by_dma = dataclasses.replace(config, transpose="dma")
            got = run(op, inputs, activation="relu", config=by_dma, target="toy")
            assert got.tobytes() == want


@given(t=st.integers(1, 5000), h=st.integers(1, 9000), i=st.integers(1, 16000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, t, h, i):
    axes, spec, op = {"T": t, "H": h, "I": i}, spec_for(target), OPS[0]
    if op.limits(axes, dtype, spec):
        return
    config = op.configure(axes, dtype, spec)
    assert op.config_problems(config, dtype, spec) == ()
    small = op.reduced(axes, config, spec)
    assert all(1 <= small[letter] <= axes[letter] for letter in axes)


@pytest.mark.parametrize(
    ("tokens", "h", "i", "dtype"),
    [
        (1, 8192, 28672, "bfloat16"),
        (200, 4096, 14336, "bfloat16"),
        (512, 4096, 14336, "bfloat16"),
        (128, 256, 30000, "float32"),
        (129, 256, 30000, "float32"),
    ],
)
def test_the_largest_layers_fit(tokens, h, i, dtype):
    op = OPS[1]
    axes = {"T": tokens, "H": h, "I": i}
    config = op.configure(axes, dtype, TRN2)
    inputs = [Abstract(shape, dtype) for shape in op.input_shapes(axes)]
    assert op.launch(inputs, {}, config=config, target="trn2").time().total_ns > 0


GOOD = GatedMlpConfig(8, 9, True, 1, 1, 1, 1, "dma", False, False)


@pytest.mark.parametrize(
    ("changes", "dtype", "target", "text"),
    [
        ({"tokens": 0}, "bfloat16", "trn2", "config.tokens is 0; it must be an int of at least 1"),
        ({"blocks": 0}, "bfloat16", "trn2", "config.blocks is 0; it must be an int of at least 1"),
        ({"tail": -1}, "bfloat16", "trn2", "config.tail is -1; it must be an int of at least 0"),
        ({"tokens": 200}, "bfloat16", "trn2", "a stationary operand has at most 128 columns"),
        ({"tokens": 600, "flip": False}, "bfloat16", "trn2", "a moving operand has at most 512"),
        (
            {"wave_up": 9},
            "bfloat16",
            "trn2",
            "config.wave_up needs 9 accumulators; trn2 has 8 PSUM",
        ),
        ({"wave_down": 7, "transpose": "pe"}, "bfloat16", "trn2", "trn2 has 6 PSUM banks for them"),
        ({}, "float32", "trn2", "config.transpose is 'dma' for 4-byte elements"),
        ({"transpose": "act"}, "bfloat16", "trn2", "allowed are 'dma' and 'pe'"),
        ({"hwdge": True}, "bfloat16", "trn1", "need gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(changes, dtype, target, text):
    inputs = operands(OPS[0], 2, 3, 4, dtype)
    config = dataclasses.replace(GOOD, **changes)
    with pytest.raises(ConfigError) as caught:
        ops.gated_mlp(*inputs, config=config, target=target)
    assert text in str(caught.value)


def test_wrong_calls_say_why():
    x, gate, up, down = operands(OPS[0], 2, 3, 4, "float32")
    with pytest.raises(ConfigError, match="config is 3; a GatedMlpConfig is needed"):
        ops.gated_mlp(x, gate, up, down, config=3, target="toy")
    with pytest.raises(OptionError, match="activation is None; allowed are relu, gelu, gelu_tanh"):
        ops.gated_mlp(x, gate, up, down, activation=None, target="toy")
    with pytest.raises(ShapeError, match=r"I is 4 in gate \[I, H\] = \[4, 3\] but 3 in up"):
        ops.gated_mlp(x, gate, up[:3], down, target="toy")
    with pytest.raises(ShapeError, match=r"H is 3 in x \[T, H\] .* but 4 in gate \[H, I\]"):
        ops.gated_mlp(x, gate, up, down, transpose_weights=False, target="toy")
    wide = [
        Abstract(shape, "float32") for shape in OPS[0].input_shapes({"T": 1, "H": 8, "I": 10**5})
    ]
    with pytest.raises(ShapeError, match="H and I are 8 and 100000; one token's x and hidden feat"):
        OPS[0].check(wide, {}, "trn2")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_reaches_its_token_and_no_other(value):
    inputs = operands(OPS[0], 5, 17, 20, "float32")
    inputs[0][2, 3] = value
    got = ops.gated_mlp(*inputs, target="toy")
    assert np.isnan(got[2]).all()
    assert np.isfinite(np.delete(got, 2, axis=0)).all()


# -- counts ----------------------------------------------------------------------------------------


def tiles(size, tile):
    return -(-size // tile)


@parametrize_op
@pytest.mark.parametrize("config", CONFIGS[::2], ids=repr)
@pytest.mark.parametrize("transpose", ["dma", "pe"])
def test_work_instructions_and_bytes_are_exactly_the_formula(op, config, transpose):
    config = dataclasses.replace(config, transpose=transpose)
    t, h, i = 21, 37, 43
    trace = op.launch(operands(op, t, h, i, "bfloat16"), {}, config=config, target="toy").trace
    p, columns = TOY.partitions, TOY.moving_fmax
    blocks = [min(config.tokens, t - at) for at in range(0, t, config.tokens)]
    want = Counter()
    for block in blocks:
        rows = tiles(block, p)
        up_tiles = tiles(i, columns if config.flip else p)
        down_tiles = rows * tiles(h, columns)
        want["nc_matmul"] += 2 * tiles(h, p) * up_tiles + tiles(i, p) * down_tiles
        want["activation"] += up_tiles
        want["tensor_tensor"] += up_tiles
        want["tensor_copy"] += down_tiles
        want["dma_copy"] += rows * tiles(tiles(h, columns), config.wave_down)
        if config.flip:
            whole = i // p
            want["nc_transpose"] += tiles(i, p)
            want["tensor_copy"] += tiles(whole, columns // block) + (i % p != 0)
        waves_up = 2 * tiles(up_tiles, config.wave_up) * tiles(h, p)
        waves_down = tiles(tiles(h, columns), config.wave_down) * tiles(i, p)
        loads = waves_up + waves_down
        flipped = op is OPS[0]
        if transpose == "dma":
            want["dma_transpose"] += tiles(h, p) + flipped * loads
            want["dma_copy"] += (not flipped) * loads
        else:
            turned = rows * tiles(h, p)
            if flipped:
                turned += 2 * tiles(i, p) * tiles(h, p) + tiles(h, p) * tiles(i, p)
            else:
                want["dma_copy"] += loads
            want["dma_copy"] += turned
            want["nc_transpose"] += turned
    if t > 2 * config.blocks * config.tokens:
        want["loop_iteration"] = t // (config.blocks * config.tokens)
    got = Counter(e.opcode for e in trace)
    if transpose == "pe":  # evictions of transposes go bank by bank
        assert got["tensor_copy"] >= want.pop("tensor_copy")
        got.pop("tensor_copy")
    assert got == want
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    assert 2 * sum(work.macs for work in passes) == op.flops({"T": t, "H": h, "I": i})
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    read = 2 * (t * h + len(blocks) * 3 * h * i)
    assert sum(work.hbm_read_bytes for work in moved) == read
    assert sum(work.hbm_write_bytes for work in moved) == 2 * t * h


@parametrize_op
@pytest.mark.parametrize("tokens", [16, 17, 20, 23])
def test_a_device_loop_of_passes_and_its_rest_match_the_reference(op, tokens):
    config = GatedMlpConfig(4, 2, True, 1, 1, 2, 1, "pe", True, True)
    inputs = operands(op, tokens, 19, 43, "bfloat16")
    launch = op.launch(inputs, {}, config=config, target="toy")
    compare(launch.result, op, inputs, "toy", tokens)
    # Two passes are written out, what is longer is a loop; the rest stands behind it.
    looped = [event for event in launch.trace if len(event.loop) > 0]
    assert bool(looped) == (tokens > 16)
    assert len(looped) < len(launch.trace) if tokens % 8 else True


@pytest.mark.parametrize("sizes", [(3, 37, 43), (21, 37, 43)])
def test_values_change_no_event(sizes):
    inputs = operands(OPS[0], *sizes, "bfloat16")
    values = OPS[0].launch(inputs, {}, target="toy")
    shapes = OPS[0].launch([Abstract(x.shape, "bfloat16") for x in inputs], {}, target="toy")
    assert [(e.opcode, e.work) for e in shapes.trace] == [(e.opcode, e.work) for e in values.trace]


# -- mutants ---------------------------------------------------------------------------------------


def activate_with_relu(monkeypatch):
    monkeypatch.setattr(kernel, "activation_of", lambda name: nl.relu)


def forget_the_gate(monkeypatch):
    real = kernel._combine

    def wrong(accumulators, pending, started, active, dtype):
        return real(accumulators, pending, started, [active[0]] * len(active), dtype)

    monkeypatch.setattr(kernel, "_combine", wrong)


def swap_hidden_tiles(monkeypatch):
    real = kernel._flipped

    def wrong(parts):
        first, second, *rest = real(parts)
        return [second, first, *rest]

    monkeypatch.setattr(kernel, "_flipped", wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mutant", [activate_with_relu, forget_the_gate, swap_hidden_tiles], ids=lambda f: f.__name__
)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    op = OPS[1]
    inputs = operands(op, 4, 24, 8 * TOY.moving_fmax, dtype)
    compare(run(op, inputs, target="toy"), op, inputs, "toy", "right")
    mutant(monkeypatch)
    got = run(op, inputs, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, op, inputs, "toy", mutant.__name__)
