"""The whole test pattern for linear and linear_kn: a product with its epilogue."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.matmul import epilogue as epilogue_module
from nki_kernels.machine.errors import DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.linear import ACTIVATIONS
from nki_kernels.operators.shapes import cases
from reference.matmul import activate
from reference.matmul import linear as reference
from tests.operators.test_matmul import DTYPES, toy_sizes
from tests.strategies.matrices import normal, seeds, small_integers, wide
from tests.tolerance import assert_close

LINEAR, LINEAR_KN = OPERATORS["linear"], OPERATORS["linear_kn"]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
EXTRAS = list(itertools.product([False, True], [False, True]))  # with a bias, with a residual


def operands(op, m, n, k, dtype, extras=(True, True), seed=0, make=normal):
    shapes = op.input_shapes({"M": m, "N": n, "K": k})
    arrays = [make(seed + i, shape, DTYPES[dtype]) for i, shape in enumerate(shapes)]
    return (*arrays[:2], *(x if used else None for x, used in zip(arrays[2:], extras, strict=True)))


def run(op, inputs, **keywords):
    return ops.linear(*inputs, transpose_weight=op is LINEAR, **keywords)


def compare(got, op, inputs, target, case, **options):
    ref = reference(*inputs, transpose_weight=op is LINEAR, **options)
    chain = op.chain(op.axes(*(None if x is None else x.shape for x in inputs)), spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


parametrize_op = pytest.mark.parametrize("op", [LINEAR, LINEAR_KN], ids=lambda op: op.name)


@parametrize_op
def test_named_cases_match_the_reference(op):
    tiles = {"M": TRN2.stationary_fmax, "N": TRN2.moving_fmax, "K": TRN2.partitions}
    for case in cases(op.name):
        config = op.configure(case.axes, "bfloat16", TRN2)
        cut = [
            min(size, tiles[letter] + (size % tiles[letter] or tiles[letter]))
            for letter, size in case.axes.items()
        ]
        inputs = operands(op, *cut, "bfloat16")
        got = run(op, inputs, activation="silu", config=config, target="trn2")
        compare(got, op, inputs, "trn2", case.name, activation="silu")


@parametrize_op
@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    uneven=st.booleans(),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    scale=st.sampled_from([1.0, -0.5, 3.7, 0.0]),
    extras=st.sampled_from(EXTRAS),
    **toy_sizes,
)
def test_any_epilogue_matches_the_reference(
    op, m, n, k, dtype, seed, uneven, activation, scale, extras
):
    inputs = operands(op, m, n, k, dtype, extras, seed, wide if uneven else normal)
    options = {"activation": activation, "scale": scale}
    got = run(op, inputs, **options, target="toy")
    compare(got, op, inputs, "toy", f"{m}x{n}x{k} {options}", **options)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_generation_and_activation_matches_the_reference(target, dtype, activation):
    spec = spec_for(target)
    sizes = spec.stationary_fmax + 3, spec.moving_fmax + 5, spec.partitions + 7
    inputs = operands(LINEAR, *sizes, dtype)
    options = {"activation": activation, "scale": 0.25}
    got = run(LINEAR, inputs, **options, target=target)
    compare(got, LINEAR, inputs, target, "ragged", **options)


@parametrize_op
@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    extras=st.sampled_from(EXTRAS),
    activation=st.sampled_from([None, "relu"]),
    scale=st.sampled_from([1.0, 2.0, -3.0]),
    **toy_sizes,
)
def test_small_integers_are_exact(op, m, n, k, dtype, seed, extras, activation, scale):
    make = lambda *where: small_integers(*where, most=8)  # noqa: E731
    inputs = operands(op, m, n, k, dtype, extras, seed, make)
    options = {"activation": activation, "scale": scale}
    got = run(op, inputs, **options, out_dtype="float32", target="toy")
    want = reference(*inputs, transpose_weight=op is LINEAR, **options).value
    assert (got == want).all()


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_once_to_the_output_dtype(dtype, out_dtype):
    make = lambda *where: small_integers(*where, most=16)  # noqa: E731
    inputs = operands(LINEAR, 9, 17, 20, dtype, make=make)
    got = ops.linear(*inputs, out_dtype=out_dtype, target="toy")
    assert got.tobytes() == reference(*inputs).value.astype(DTYPES[out_dtype]).tobytes()


def test_without_extras_it_is_the_matmul_to_the_bit():
    x, weight, *_ = operands(LINEAR, 21, 37, 30, "bfloat16")
    same = ops.matmul(x, weight, transpose_b=True, target="toy")
    assert ops.linear(x, weight, target="toy").tobytes() == same.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_a_special_value_passes_as_the_formula_says(value, activation):
    x, weight, bias, _ = operands(LINEAR, 3, 5, 4, "float32")
    bias[2] = value
    with np.errstate(invalid="ignore"):
        want = reference(x, weight, bias, activation=activation).value
    got = ops.linear(x, weight, bias, activation=activation, target="toy")
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (np.isposinf(got) == np.isposinf(want)).all()
    assert np.isfinite(got[:, [0, 1, 3, 4]]).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "swish"}, "activation is 'swish'; allowed are None, relu, gelu, gelu_tanh"),
        ({"scale": math.inf}, "scale is inf; a number that float32 holds is needed"),
        ({"scale": 1e39}, "scale is 1e+39; a number that float32 holds is needed"),
        ({"scale": 1e-40}, "scale is 1e-40; a number that float32 holds is needed"),
        ({"scale": "2"}, "scale is '2'; a number that float32 holds is needed"),
        ({"scale": True}, "scale is True; a number that float32 holds is needed"),
    ],
)
def test_an_option_that_is_wrong_says_so(options, text):
    with pytest.raises(OptionError) as caught:
        ops.linear(*operands(LINEAR, 2, 3, 4, "float32"), **options, target="toy")
    assert text in str(caught.value)


def test_operands_that_do_not_fit_say_so():
    x, weight, bias, residual = operands(LINEAR, 2, 3, 4, "float32")
    with pytest.raises(ShapeError, match=r"N is 3 in weight \[N, K\] = \[3, 4\] but 2 in bias"):
        ops.linear(x, weight, bias[:2], residual, target="toy")
    with pytest.raises(ShapeError, match=r"M is 2 in x \[M, K\] = \[2, 4\] but 1 in residual"):
        ops.linear(x, weight, None, residual[:1], target="toy")
    with pytest.raises(DtypeError, match=r"dtypes differ: .*bias float16"):
        ops.linear(x, weight, bias.astype(np.float16), target="toy")
    with pytest.raises(ShapeError, match=r"linear_kn.*: K is 4 in x .* but 3 in weight \[K, N\]"):
        ops.linear(x, weight, transpose_weight=False, target="toy")


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("extras", EXTRAS)
def test_an_epilogue_adds_exactly_its_instructions(activation, scale, extras):
    m, n, k = 40, 70, 45
    axes = {"M": m, "N": n, "K": k}
    config = LINEAR.configure(axes, "bfloat16", TOY)
    options = {"activation": activation, "scale": scale}
    inputs = operands(LINEAR, m, n, k, "bfloat16", extras)
    plain = LINEAR.launch((*inputs[:2], None, None), {}, config=config, target="toy").trace
    whole = LINEAR.launch(inputs, options, config=config, target="toy").trace
    tiles = -(-m // TOY.stationary_fmax) * -(-n // TOY.moving_fmax)
    waves_m = -(-m // (config.wave_m * TOY.stationary_fmax))
    waves_n = -(-n // (config.wave_n * TOY.moving_fmax))
    row_tiles = waves_n * -(-m // TOY.stationary_fmax)
    bias, residual = extras
    before = bias and residual and activation is None  # added up by GpSimd, once for all
    adds = bias + residual - before
    want = Counter(e.opcode for e in plain)
    want["dma_copy"] += bias * waves_m * waves_n + residual * row_tiles
    want["tensor_tensor"] += before * row_tiles
    scaled = "scalar_tensor_tensor" if scale != 1.0 else "tensor_tensor"
    if adds or activation is not None or scale != 1.0:
        want["tensor_copy"] -= tiles  # nothing is left for a plain copy
    first_adds = 1 if adds and (bias or activation is None) else 0
    want[scaled] += first_adds * tiles
    want["tensor_tensor"] += (adds - first_adds) * tiles
    want["activation"] += (activation is not None) * tiles
    if not adds and activation is None and scale != 1.0:
        want["tensor_scalar"] += -(-tiles // 2)
        want["activation"] += tiles // 2
    got = Counter(e.opcode for e in whole)
    if not adds and activation is None and scale != 1.0:
        # Vector and Scalar share the tiles of each wave.
        assert got["tensor_scalar"] + got["activation"] == tiles
        assert 0 < got["activation"] <= got["tensor_scalar"]
    else:
        assert got == +want


def test_values_change_no_event():
    inputs = operands(LINEAR, 21, 37, 30, "bfloat16")
    options = {"activation": "gelu", "scale": 0.5}
    values = LINEAR.launch(inputs, options, target="toy")
    shapes = LINEAR.launch([Abstract(x.shape, "bfloat16") for x in inputs], options, target="toy")
    assert [(e.opcode, e.work) for e in shapes.trace] == [(e.opcode, e.work) for e in values.trace]
    assert shapes.time().total_ns == values.time().total_ns


def test_with_enough_to_multiply_an_epilogue_is_hidden():
    axes = {"M": 2048, "N": 2048, "K": 4096}
    inputs = [Abstract(shape, "bfloat16") for shape in LINEAR.input_shapes(axes)]
    plain = LINEAR.launch((*inputs[:2], None, None), {}, target="trn2").time().total_ns
    whole = LINEAR.launch(inputs, {"scale": 0.5}, target="trn2").time().total_ns
    assert plain < whole < 1.02 * plain


# -- mutants ---------------------------------------------------------------------------------------


def bias_from_the_first_column(monkeypatch):
    real = epilogue_module.load_bias
    monkeypatch.setattr(
        epilogue_module,
        "load_bias",
        lambda bias, n, rows, config: real(bias, (0, n[1] - n[0]), rows, config),
    )


def forget_the_scale(monkeypatch):
    monkeypatch.setattr(
        epilogue_module,
        "_scale_and_add",
        lambda dst, data, scale, addend: nisa.tensor_tensor(dst, data, addend, op=np_add()),
    )


def np_add():
    import nki.language as nl

    return nl.add


def activate_after_the_residual(monkeypatch):
    real = epilogue_module.evict

    def wrong(dst, psum, epilogue, bias, residual, engine):
        real(dst, psum, epilogue, bias if bias is not None else residual, None, engine)

    from nki_kernels.kernels.matmul import kernel

    monkeypatch.setattr(kernel, "evict", wrong)


def the_other_gelu(monkeypatch):
    real = epilogue_module.activation_of
    monkeypatch.setattr(
        epilogue_module, "activation_of", lambda name: real(name.replace("gelu_tanh", "silu"))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mutant", "activation", "extras"),
    [
        (bias_from_the_first_column, None, (True, False)),
        (forget_the_scale, None, (True, True)),
        (activate_after_the_residual, "relu", (False, True)),
        (the_other_gelu, "gelu_tanh", (True, False)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutated_epilogue_is_rejected(mutant, activation, extras, dtype, monkeypatch):
    inputs = operands(LINEAR, 20, 90, 24, dtype, extras)
    options = {"activation": activation, "scale": 0.5}
    compare(run(LINEAR, inputs, **options, target="toy"), LINEAR, inputs, "toy", "ok", **options)
    mutant(monkeypatch)
    got = run(LINEAR, inputs, **options, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, LINEAR, inputs, "toy", mutant.__name__, **options)


def test_the_reference_knows_its_activations():
    z = np.array([-1.0, 0.0, 2.0])
    assert activate(z, None) is z
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed are relu"):
        activate(z, "tanh")
