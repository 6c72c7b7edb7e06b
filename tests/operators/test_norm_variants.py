"""The norms with a residual added on the way, and cast as models cast them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference.norm
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.norm import LayerNormConfig, RmsNormConfig
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.operators.shapes import cases, parse
from tests.operators.norms import DTYPES, TOY, TRN2
from tests.strategies.matrices import extents, normal, seeds, small_integers, wide
from tests.tolerance import assert_close

ADDED = ("add_rms_norm", "add_layer_norm")
CAST = ("rms_norm_llama", "rms_norm_gemma")
EVERY = (*ADDED, *CAST)
dtypes = st.sampled_from(list(DTYPES))
toy_sizes = {"n": extents(TOY.partitions, 3 * TOY.partitions + 5), "h": extents(16, 45)}


def operands(op, n, h, dtype, seed=0, make=normal):
    """Return one array per operand, all of them given."""
    host = DTYPES[dtype]
    shapes = OPERATORS[op].input_shapes({"N": n, "H": h})
    return tuple(
        (make if len(shape) == 2 else normal)(seed + i, shape, host)
        for i, shape in enumerate(shapes)
    )


def call(op, inputs, **keywords):
    found = getattr(ops, op)(*inputs, **keywords)
    return found if isinstance(found, tuple) else (found,)


def compare(op, got, inputs, target, case, **eps):
    refs = getattr(reference.norm, op)(*inputs, **eps)
    refs = refs if isinstance(refs[0], tuple) else (refs,)
    contract, (n, h) = OPERATORS[op], inputs[0].shape
    for operand, result, ref in zip(contract.outputs, got, refs, strict=True):
        assert result.dtype == inputs[0].dtype
        assert_close(
            result, ref.value, ref.magnitude, op=op, case=f"{case} {operand.name}",
            roundings=contract.roundings, chain=contract.chain({"N": n, "H": h}, spec_for(target)),
        )  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(op, c.name) for op in EVERY for c in cases(op)])
def test_a_named_case_matches_the_reference(op, name):
    axes = parse(OPERATORS[op], name).axes
    config = OPERATORS[op].configure(axes, "bfloat16", TRN2)
    cut = OPERATORS[op].reduced(axes, config, TRN2)
    inputs = operands(op, cut["N"], cut["H"], "bfloat16")
    compare(op, call(op, inputs, config=config, target="trn2"), inputs, "trn2", name)


@pytest.mark.parametrize("op", EVERY)
@given(dtype=dtypes, seed=seeds(), uneven=st.booleans(), **toy_sizes)
def test_any_shape_matches_the_reference(op, n, h, dtype, seed, uneven):
    inputs = operands(op, n, h, dtype, seed, wide if uneven and op in ADDED else normal)
    compare(op, call(op, inputs, target="toy"), inputs, "toy", f"{n}x{h}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize(("n", "h"), [(129, 513), (257, 128), (1, 1025), (300, 1)])
def test_sizes_around_the_real_tiles_match_the_reference(op, n, h, dtype):
    inputs = operands(op, n, h, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", f"{n}x{h}")


@pytest.mark.parametrize("op", ADDED)
@given(seed=seeds(), eps=st.floats(2**-40, 2**40), **toy_sizes)
def test_absent_parameters_and_any_eps(op, n, h, seed, eps):
    inputs = (*operands(op, n, h, "float32", seed)[:2], None)
    compare(op, call(op, inputs, eps=eps, target="toy"), inputs, "toy", f"{eps}", eps=eps)


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ADDED)
@given(dtype=dtypes, seed=seeds(), n=toy_sizes["n"], h=extents(8, 45))
def test_the_two_steps_give_the_same_bits(op, n, h, dtype, seed):
    x, residual, *vectors = operands(op, n, h, dtype, seed)
    config = OPERATORS[op].configure({"N": n, "H": h}, dtype, TOY)
    total, y = call(op, (x, residual, *vectors), config=config, target="toy")
    want = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    assert total.tobytes() == want.tobytes()
    plain = getattr(ops, op.removeprefix("add_"))
    assert y.tobytes() == plain(want, *vectors, config=config, target="toy").tobytes()


@given(dtype=dtypes, seed=seeds(), n=toy_sizes["n"], h=extents(8, 45))
def test_llama_rounds_before_the_weight(n, h, dtype, seed):
    x, weight = operands("rms_norm_llama", n, h, dtype, seed)
    before = ops.rms_norm(x, target="toy").astype(np.float32)
    want = (before * weight.astype(np.float32)).astype(x.dtype)
    assert ops.rms_norm_llama(x, weight, target="toy").tobytes() == want.tobytes()


@given(seed=seeds(), n=toy_sizes["n"], h=extents(8, 45))
def test_gemma_adds_one_in_float32(n, h, seed):
    x, weight = operands("rms_norm_gemma", n, h, "bfloat16", seed)
    want = ops.rms_norm(x.astype(np.float32), weight.astype(np.float32) + 1, target="toy")
    got = ops.rms_norm_gemma(x, weight, target="toy")
    assert got.tobytes() == want.astype(x.dtype).tobytes()


@pytest.mark.parametrize("op", ADDED)
@given(dtype=dtypes, seed=seeds(), **toy_sizes)
def test_the_order_of_the_terms_is_free(op, n, h, dtype, seed):
    x, residual, *vectors = operands(
        op, n, h, dtype, seed, lambda *where: small_integers(*where, most=50)
    )
    first = call(op, (x, residual, *vectors), target="toy")
    second = call(op, (residual, x, *vectors), target="toy")
    assert [a.tobytes() for a in first] == [a.tobytes() for a in second]


# -- special values --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 9, 18])
@pytest.mark.parametrize("op", EVERY)
def test_a_special_value_stays_in_its_row(op, row, value):
    inputs = operands(op, 19, 41, "float32")
    inputs[op in ADDED][row, 17] = value  # of the residual, where there is one
    *total, y = call(op, inputs, target="toy")
    assert np.isnan(y[row, 17])
    others = np.arange(19) != row
    kept = tuple(a[others] if a.ndim == 2 else a for a in inputs)
    compare(op, tuple(a[others] for a in (*total, y)), kept, "toy", "others")


# -- illegal calls, limits, counts -----------------------------------------------------------------


@pytest.mark.parametrize("op", ADDED)
def test_a_residual_of_another_shape_or_dtype_is_refused(op):
    x = np.zeros((3, 4), np.float32)
    with pytest.raises(ShapeError, match=r"N is 3 in x .* but 2 in residual .* = \[2, 4\]"):
        call(op, (x, x[:2]), target="toy")
    with pytest.raises(DtypeError, match="dtypes differ: x float32, residual float16"):
        call(op, (x, x.astype(np.float16)), target="toy")
    with pytest.raises(DtypeError, match="residual is a NoneType; a NumPy array is needed"):
        call(op, (x, None), target="toy")


@pytest.mark.parametrize("op", CAST)
def test_a_weight_is_needed(op):
    with pytest.raises(DtypeError, match="weight is a NoneType; a NumPy array is needed"):
        call(op, (np.zeros((3, 4), np.float32), None), target="toy")


@pytest.mark.parametrize("op", EVERY)
def test_a_bad_eps_or_config_is_refused(op):
    inputs = operands(op, 3, 4, "float32")
    with pytest.raises(OptionError, match=r"eps is -1; a number of at least 0"):
        call(op, inputs, eps=-1, target="toy")
    with pytest.raises(ConfigError, match=r"config is 3; an? \w+Config is needed"):
        call(op, inputs, config=3, target="toy")


@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", EVERY)
def test_the_longest_row_runs_and_one_more_says_so(op, dtype, target):
    spec = spec_for(target)
    (reason,) = OPERATORS[op].limits({"N": 1, "H": 10**6}, dtype, spec)
    most = int(re.search(r"at most H = (\d+) on", reason).group(1))
    for h in (most, most * 2 // 3, most // 3):
        shapes = OPERATORS[op].input_shapes({"N": 2 * spec.partitions + 1, "H": h})
        inputs = [Abstract(shape, dtype) for shape in shapes]
        OPERATORS[op].launch(inputs, {"out_dtype": "float32"}, target=target)
    assert OPERATORS[op].limits({"N": 1, "H": most + 1}, dtype, spec) != ()


@pytest.mark.parametrize("op", EVERY)
def test_bytes_and_work_are_exactly_the_formula(op):
    n, h = 19, 41
    inputs = operands(op, n, h, "bfloat16")
    run = OPERATORS[op].launch(inputs, {}, target="toy")
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    matrices = sum(x.ndim == 2 for x in inputs)
    vectors = (len(inputs) - matrices) * min(n, TOY.partitions) * h
    assert sum(work.hbm_read_bytes for work in moved) == 2 * (matrices * n * h + vectors)
    assert sum(work.hbm_write_bytes for work in moved) == 2 * matrices * n * h
    axes = {"N": n, "H": h}
    per_element = {"add_rms_norm": 5, "add_layer_norm": 9}.get(op, 4)
    assert OPERATORS[op].flops(axes) == per_element * n * h
    assert OPERATORS[op].output_shapes(*OPERATORS[op].input_shapes(axes)) == ((n, h),) * matrices


@pytest.mark.parametrize("op", EVERY)
def test_what_a_variant_adds_to_the_instructions_of_the_plain_norm(op):
    n, h, tiles = 19, 41, 3
    base = op.removeprefix("add_") if op in ADDED else "rms_norm"
    config = OPERATORS[base].configure({"N": n, "H": h}, "bfloat16", TOY)
    config = dataclasses.replace(config, chunk=h, piece=h)

    def counts(name, **options):
        run = OPERATORS[name].launch(
            operands(name, n, h, "bfloat16"), options, config=config, target="toy"
        )
        return Counter(event.opcode for event in run.trace)

    more = counts(op)
    more.subtract(counts(base))
    want = {
        # A load, an addition and a store per row tile.
        "add_rms_norm": {"dma_copy": 2 * tiles, "tensor_tensor": tiles},
        "add_layer_norm": {"dma_copy": 2 * tiles, "tensor_tensor": tiles},
        # Two instructions for one; 1 + weight.
        "rms_norm_llama": {
            "scalar_tensor_tensor": -tiles, "tensor_scalar": tiles, "tensor_tensor": tiles,
        },
        "rms_norm_gemma": {"tensor_scalar": 1},
    }  # fmt: skip
    assert {name: count for name, count in more.items() if count} == want[op]


@pytest.mark.parametrize("op", EVERY)
def test_defaults_and_inputs(op):
    inputs = operands(op, 5, 20, "float32")
    before = [x.tobytes() for x in inputs]
    eps = DEFAULT_EPS["layer_norm" if "layer" in op else "rms_norm"]
    first, second = call(op, inputs, target="toy"), call(op, inputs, eps=eps, target="toy")
    assert [a.tobytes() for a in first] == [a.tobytes() for a in second]
    assert [x.tobytes() for x in inputs] == before


# -- mutants ---------------------------------------------------------------------------------------


def forget_the_residual(k):
    k["data2"] = k["data1"]


def forget_the_one(k):
    k["operand0"] = 0.0


@pytest.mark.parametrize(
    ("op", "instruction", "mutant"),
    [
        ("add_rms_norm", "tensor_tensor", forget_the_residual),
        ("add_layer_norm", "tensor_tensor", forget_the_residual),
        ("rms_norm_gemma", "tensor_scalar", forget_the_one),
    ],
)
def test_a_mutated_kernel_is_rejected(op, instruction, mutant, monkeypatch):
    inputs = operands(op, 20, 45, "bfloat16")
    compare(op, call(op, inputs, target="toy"), inputs, "toy", "right")
    real = getattr(nisa, instruction)

    def mutated(**k):
        if k.get("op", k.get("op0")) == nl.add and k.get("engine") is None:
            mutant(k)
        return real(**k)

    monkeypatch.setattr(nisa, instruction, mutated)
    got = call(op, inputs, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(op, got, inputs, "toy", mutant.__name__)


@pytest.mark.parametrize("op", EVERY)
def test_a_chosen_config_is_of_its_norm(op):
    kind = LayerNormConfig if "layer" in op else RmsNormConfig
    for h in (16, 128, 4096, 16384):
        config = OPERATORS[op].configure({"N": 5, "H": h}, "bfloat16", TRN2)
        assert type(config) is kind
        assert OPERATORS[op].config_problems(config, "bfloat16", TRN2) == ()
