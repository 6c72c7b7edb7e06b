"""The whole test pattern for gated_mlp_backward."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.linear import ACTIVATIONS
from nki_kernels.operators.shapes import cases
from reference.mlp import gated_mlp_backward as reference
from tests.operators.test_matmul import DTYPES
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

OP, KEPT = OPERATORS["gated_mlp_backward"], OPERATORS["gated_mlp_backward_kept"]
KERNEL = importlib.import_module("nki_kernels.kernels.mlp.gated_backward")
TOY, TRN2 = spec_for("toy"), spec_for("trn2")

toy_sizes = {
    "t": extents(TOY.stationary_fmax, 3 * TOY.stationary_fmax),
    "h": extents(TOY.moving_fmax, TOY.moving_fmax + 9),
    "i": extents(TOY.moving_fmax, TOY.moving_fmax + 9),
}


def operands(t, h, i, dtype, seed=0, make=normal, kept=False):
    """Return dy, x, gate, up and down; with `kept` also a and b."""
    shapes = (KEPT if kept else OP).input_shapes({"T": t, "H": h, "I": i})
    return tuple(make(seed + at, shape, DTYPES[dtype]) for at, shape in enumerate(shapes))


def compare(got, inputs, target, case, **options):
    axes = OP.axes(*(x.shape for x in inputs[:5]))
    keywords = {"op": OP.name, "roundings": 1, "chain": OP.chain(axes, spec_for(target))}
    names = ("dx", "dgate", "dup", "ddown")
    for name, array, ref in zip(names, got, reference(*inputs, **options), strict=True):
        assert_close(array, ref.value, ref.magnitude, case=f"{case} {name}", **keywords)


def test_named_cases_match_the_reference():
    for case in cases(OP.name):
        config = OP.configure(case.axes, "bfloat16", TRN2)
        inputs = operands(*[130 + size % 100 for size in case.axes.values()], "bfloat16")
        got = ops.gated_mlp_backward(*inputs, config=config, target="trn2")
        compare(got, inputs, "trn2", case.name)


@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    activation=st.sampled_from(ACTIVATIONS),
    kept=st.booleans(),
    **toy_sizes,
)
def test_any_shape_matches_the_reference(t, h, i, dtype, seed, activation, kept):
    inputs = operands(t, h, i, dtype, seed, kept=kept)
    got = ops.gated_mlp_backward(*inputs, activation=activation, target="toy")
    compare(got, inputs, "toy", f"{t}x{h}x{i} {activation}", activation=activation)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
def test_every_generation_matches_the_reference(target, dtype, kept):
    inputs = operands(131, 140, 517, dtype, kept=kept)
    compare(ops.gated_mlp_backward(*inputs, target=target), inputs, target, "ragged")


@given(seed=seeds(), **toy_sizes)
def test_small_integers_are_exact(t, h, i, seed):
    # One column of x and of dy: a, b and e are -1, 0 or 1, sums of their products small.
    inputs = operands(t, h, i, "bfloat16", seed, lambda *at: small_integers(*at, most=1))
    inputs[0][:, 1:] = 0
    inputs[1][:, 1:] = 0
    got = ops.gated_mlp_backward(*inputs, activation="relu", out_dtype="float32", target="toy")
    for array, ref in zip(got, reference(*inputs, activation="relu"), strict=True):
        assert (array == ref.value).all()


def test_the_gradients_of_the_hidden_features_are_rounded_once():
    # h = a * b with a = b = 1 + 2^-7 is no bfloat16 number.
    one = np.ones((1, 1), DTYPES["bfloat16"])
    more = np.full((1, 1), 1 + 2**-7, DTYPES["bfloat16"])
    got = ops.gated_mlp_backward(
        one, one, more, more, one, activation="relu", out_dtype="float32", target="toy"
    )
    exact = (1 + 2**-7) ** 2
    assert got[3].item() == float(np.array(exact, DTYPES["bfloat16"])) != exact


CONFIGS = [
    dataclasses.replace(
        base,
        hidden=hidden,
        dx=dataclasses.replace(base.dx, wave_m=1, wave_n=1, prefetch=1, rows=10),
        dweight=dataclasses.replace(base.dweight, rows=16),
    )
    for base in [OP.configure({"T": 21, "H": 40, "I": 70}, "float32", TOY)]
    for hidden in (
        dataclasses.replace(base.hidden, wave_m=1, wave_n=1, prefetch=1, tail=0, hold_a=False),
        dataclasses.replace(base.hidden, wave_m=1, wave_n=1, rows=8),
        dataclasses.replace(base.hidden, wave_m=2, wave_n=1, prefetch=3, tail=2, hold_a=True),
        dataclasses.replace(base.hidden, wave_m=1, wave_n=2, tail=99, evict_scalar=False),
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
def test_no_config_changes_a_result(dtype, kept):
    make = lambda *where: small_integers(*where, most=1)  # noqa: E731
    inputs = operands(21, 40, 70, dtype, 4, make, kept)
    want = ops.gated_mlp_backward(*inputs, activation="relu", target="toy")
    for config in CONFIGS:
        assert OP.config_problems(config, dtype, TOY) == ()
        got = ops.gated_mlp_backward(*inputs, activation="relu", config=config, target="toy")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


@given(t=st.integers(1, 5000), h=st.integers(1, 9000), i=st.integers(1, 16000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, t, h, i):
    axes, spec = {"T": t, "H": h, "I": i}, spec_for(target)
    config = OP.configure(axes, dtype, spec)
    assert OP.config_problems(config, dtype, spec) == ()
    small = OP.reduced(axes, config, spec)
    assert all(1 <= small[letter] <= axes[letter] for letter in axes)


@pytest.mark.parametrize("sizes", [(512, 8192, 1024), (512, 1024, 2048)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wide_layers_fit(sizes, dtype):
    axes = dict(zip("THI", sizes, strict=True))
    inputs = [Abstract(shape, dtype) for shape in OP.input_shapes(axes)]
    assert OP.launch(inputs, {"activation": "gelu_tanh"}, target="trn2").time().total_ns > 0


def test_wrong_calls_say_why():
    inputs = operands(2, 3, 4, "float32")
    with pytest.raises(ConfigError, match="config is 3; a GatedMlpBackwardConfig is needed"):
        ops.gated_mlp_backward(*inputs, config=3, target="toy")
    config = OP.configure({"T": 2, "H": 3, "I": 4}, "float32", TOY)
    wrong = dataclasses.replace(config, ddown=dataclasses.replace(config.ddown, wave_m=0))
    with pytest.raises(ConfigError, match=r"ddown: config\.wave_m is 0"):
        ops.gated_mlp_backward(*inputs, config=wrong, target="toy")
    with pytest.raises(OptionError, match="activation is 'swish'; allowed are relu, gelu"):
        ops.gated_mlp_backward(*inputs, activation="swish", target="toy")
    with pytest.raises(ShapeError, match=r"I is 4 in gate \[I, H\] = \[4, 3\] but 3 in up"):
        ops.gated_mlp_backward(*inputs[:3], inputs[3][:3], inputs[4], target="toy")
    with pytest.raises(DtypeError, match="x_up is a NoneType; a NumPy array is needed"):
        ops.gated_mlp_backward(*inputs[:5], np.ones((2, 4), np.float32), target="toy")


def test_a_special_value_reaches_its_token_and_all_weights():
    inputs = operands(5, 17, 20, "float32")
    inputs[1][2, 3] = np.nan
    dx, dgate, dup, ddown = ops.gated_mlp_backward(*inputs, target="toy")
    assert np.isnan(dx[2]).all()
    assert np.isfinite(np.delete(dx, 2, axis=0)).all()
    assert np.isnan(dgate).all()
    assert np.isnan(dup).all()
    assert np.isnan(ddown).all()


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hold", [True, False])
def test_work_instructions_and_bytes_are_exactly_the_formula(activation, hold):
    t, h, i = 40, 36, 3 * TOY.moving_fmax + 5
    config = OP.configure({"T": t, "H": h, "I": i}, "bfloat16", TOY)
    waves = dataclasses.replace(config.hidden, wave_m=2, wave_n=2, hold_a=hold)
    config = dataclasses.replace(config, hidden=waves)
    inputs = operands(t, h, i, "bfloat16")
    trace = OP.launch(inputs, {"activation": activation}, config=config, target="toy").trace
    tiles, slices, blocks, walks = 5 * 4, -(-h // TOY.partitions), 3, 2
    # The five products as the matmul operators run them.
    want = Counter()
    for dims, layout in (
        ((h, i, t), "tn"), ((i, h, t), "tn"), ((i, h, t), "tn"),
        ((t, h, i), "nn"), ((t, h, i), "nn"),
    ):  # fmt: skip
        op = OPERATORS["matmul_tn" if layout == "tn" else "matmul"]
        name = {(h, "tn"): "ddown", (i, "tn"): "dweight", (t, "nn"): "dx"}[dims[0], layout]
        shapes = op.input_shapes(dict(zip("MNK", dims, strict=True)))
        arrays = [Abstract(shape, "bfloat16") for shape in shapes]
        run = op.launch(arrays, {}, config=getattr(config, name), target="toy")
        want += Counter(e.opcode for e in run.trace)
    residuals = 5 * -(-h // (config.dx.wave_n * TOY.moving_fmax))
    columns = 5 * -(-h // TOY.moving_fmax)
    want["dma_copy"] += residuals
    want["tensor_tensor"] += columns
    want["tensor_copy"] -= columns
    want["nc_matmul"] += 3 * tiles * slices
    want["dma_transpose"] += 2 * blocks * walks * slices  # gate and up
    want["dma_transpose"] += (2 if hold else 3 * walks) * blocks * slices
    want["dma_copy"] += blocks * walks * slices + 3 * tiles
    want["tensor_copy"] += tiles
    want["tensor_tensor"] += 4 * tiles
    want["activation"] += tiles
    if activation in ("silu", "gelu"):
        want["activation"] += tiles
    elif activation == "relu":
        want["tensor_scalar"] += tiles
    else:
        want["activation"] += 3 * tiles
        want["tensor_scalar"] += 3 * tiles
        want["tensor_tensor"] += 3 * tiles
        want["scalar_tensor_tensor"] += tiles
    assert Counter(e.opcode for e in trace) == want
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    assert 2 * sum(work.macs for work in passes) == 8 * 2 * t * h * i
    assert OP.flops({"T": t, "H": h, "I": i}) == 6 * 2 * t * h * i
    stored = sum(e.work.hbm_write_bytes for e in trace if isinstance(e.work, DmaWork))
    assert stored == 2 * (t * h + 3 * h * i + 3 * t * i) + 4 * t * h


def test_what_was_kept_spares_its_products():
    t, h, i = 40, 36, 3 * TOY.moving_fmax + 5
    config = OP.configure({"T": t, "H": h, "I": i}, "bfloat16", TOY)
    waves = dataclasses.replace(config.hidden, wave_m=2, wave_n=2, hold_a=True)
    config = dataclasses.replace(config, hidden=waves)
    counts = []
    for kept in (False, True):
        inputs = operands(t, h, i, "bfloat16", kept=kept)
        op = KEPT if kept else OP
        trace = op.launch(inputs, {}, config=config, target="toy").trace
        counts.append(Counter(e.opcode for e in trace))
    rows, tiles, slices, blocks, walks = 5, 5 * 4, -(-h // TOY.partitions), 3, 2
    spared = Counter(nc_matmul=2 * tiles * slices, tensor_copy=tiles)
    # gate and up, and x once a block of rows.
    spared["dma_transpose"] = (2 * walks + 1) * blocks * slices
    counts[1]["dma_copy"] -= 2 * rows * walks
    assert counts[0] - counts[1] == spared
    assert not counts[1] - counts[0]


def test_values_change_no_event():
    inputs = operands(21, 37, 40, "bfloat16", kept=True)
    shapes = [Abstract(x.shape, "bfloat16") for x in inputs]
    first, second = (KEPT.launch(i, {}, target="toy").trace for i in (inputs, shapes))
    assert [(e.opcode, e.work) for e in first] == [(e.opcode, e.work) for e in second]


# -- mutants ---------------------------------------------------------------------------------------


def slope_of_relu(monkeypatch):
    real = KERNEL.slope
    monkeypatch.setattr(KERNEL, "slope", lambda name, z: real("relu", z))


def forget_half_of_dx(monkeypatch):
    real = KERNEL._multiply

    def wrong(c, a, b, residual, layout, config):
        real(c, a, b, None, layout, config)

    monkeypatch.setattr(KERNEL, "_multiply", wrong)


def slope_without_its_activation(monkeypatch):
    def wrong(features, activation):
        for tile in features:
            tile["f"] = tile["a"]
            tile["slope"] = KERNEL.slope(activation, tile["a"])

    monkeypatch.setattr(KERNEL, "_activate", wrong)


def down_in_place_of_up(monkeypatch):
    real = KERNEL._evict

    def wrong(hidden, step, tile, feature, config):
        real({**hidden, "da": hidden["db"], "db": hidden["da"]}, step, tile, feature, config)

    monkeypatch.setattr(KERNEL, "_evict", wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mutant",
    [slope_of_relu, forget_half_of_dx, slope_without_its_activation, down_in_place_of_up],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    inputs = operands(20, 24, 40, dtype)
    compare(ops.gated_mlp_backward(*inputs, target="toy"), inputs, "toy", "right")
    mutant(monkeypatch)
    got = ops.gated_mlp_backward(*inputs, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, inputs, "toy", mutant.__name__)
