"""The whole test pattern for matmul_mx and its _nt form, on trn3: no other core has MX data."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.matmul import mx as kernel
from nki_kernels.kernels.matmul.mx import MatmulMxConfig
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators.matmul_mx import MATMUL_MXS
from reference.mx import matmul_mx as reference
from tests.operators.test_matmul import DTYPES
from tests.strategies.matrices import extents, normal, seeds, small_integers, wide
from tests.tolerance import assert_close

TRN3 = spec_for("trn3")
KINDS = ["e4m3", "e5m2"]
both = pytest.mark.parametrize("transposed", [False, True], ids=["kn", "nk"])


def operands(transposed, m, n, k, dtype="bfloat16", seed=0, make=normal):
    shapes = MATMUL_MXS[transposed].input_shapes({"M": m, "N": n, "K": k})
    return tuple(make(seed + at, shape, DTYPES[dtype]) for at, shape in enumerate(shapes))


def run(transposed, inputs, **keywords):
    return ops.matmul_mx(*inputs, transpose_b=transposed, target="trn3", **keywords)


def compare(got, transposed, inputs, case, kind="e4m3"):
    op = MATMUL_MXS[transposed]
    ref = reference(*inputs, transpose_b=transposed, kind=kind)
    chain = op.chain(op.axes(*(x.shape for x in inputs)), TRN3)
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


@both
@settings(max_examples=25)
@given(
    m=extents(TRN3.stationary_fmax, 270),
    n=extents(TRN3.moving_fmax, 530),
    blocks=extents(16, 35),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    kind=st.sampled_from(KINDS),
    uneven=st.booleans(),
    seed=seeds(),
)
def test_any_shape_matches_the_reference(transposed, m, n, blocks, dtype, kind, uneven, seed):
    inputs = operands(transposed, m, n, 32 * blocks, dtype, seed, wide if uneven else normal)
    got = run(transposed, inputs, kind=kind, out_dtype="float32")
    compare(got, transposed, inputs, f"{m}x{n}x{32 * blocks} {dtype} {kind}", kind)


@both
@pytest.mark.parametrize("sizes", [(1, 1, 32), (129, 513, 544), (256, 512, 1024)])
def test_small_integers_are_exact(transposed, sizes):
    make = lambda *at: small_integers(*at, most=8)  # noqa: E731
    inputs = operands(transposed, *sizes, make=make)
    got = run(transposed, inputs, out_dtype="float32")
    plain = np.asarray(inputs[1], np.float64)
    want = np.asarray(inputs[0], np.float64) @ (plain.T if transposed else plain)
    assert (got == want).all()


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_the_result_is_rounded_once_to_the_output_dtype(out_dtype):
    inputs = operands(False, 9, 17, 64, make=lambda *at: small_integers(*at, most=8))
    got = run(False, inputs, out_dtype=out_dtype)
    assert got.tobytes() == reference(*inputs).value.astype(DTYPES[out_dtype]).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_reaches_its_row_and_no_other(value):
    inputs = operands(False, 5, 7, 64)
    inputs[0][2, 3] = value
    got = run(False, inputs)
    assert np.isnan(got[2]).all()
    assert np.isfinite(np.delete(got, 2, axis=0)).all()


CONFIGS = [
    MatmulMxConfig(rows, columns, ahead, hwdge)
    for rows, columns, ahead, hwdge in (
        (1, 512, 0, True), (128, 1024, 1, False), (384, 513, 3, True), (1000, 100, 9, True)
    )
]  # fmt: skip


@both
def test_no_config_changes_a_result(transposed):
    inputs = operands(transposed, 300, 700, 160, make=lambda *at: small_integers(*at, most=8))
    want = run(transposed, inputs, out_dtype="float32").tobytes()
    for config in CONFIGS[1:]:
        assert MATMUL_MXS[transposed].config_problems(config, "bfloat16", TRN3) == ()
        assert run(transposed, inputs, out_dtype="float32", config=config).tobytes() == want


@given(m=st.integers(1, 70000), n=st.integers(1, 20000), blocks=st.integers(1, 1000))
def test_a_chosen_config_has_no_problems(m, n, blocks):
    axes, op = {"M": m, "N": n, "K": 32 * blocks}, MATMUL_MXS[False]
    config = op.configure(axes, "bfloat16", TRN3)
    assert op.config_problems(config, "bfloat16", TRN3) == ()
    small = op.reduced(axes, config, TRN3)
    assert all(1 <= small[letter] <= axes[letter] for letter in axes)
    assert op.limits(small, "bfloat16", TRN3) == ()


@both
@pytest.mark.parametrize("sizes", [(600, 1100, 16384), (2048, 1024, 4096), (16, 3000, 32768)])
def test_long_contractions_fit(transposed, sizes):
    op = MATMUL_MXS[transposed]
    shapes = op.input_shapes(dict(zip("MNK", sizes, strict=True)))
    run = op.launch([Abstract(shape, "bfloat16") for shape in shapes], {}, target="trn3")
    assert run.time().total_ns > 0


def test_wrong_calls_say_why():
    a, b = operands(False, 2, 3, 64)
    with pytest.raises(ShapeError, match="K is 40; values share a scale in blocks of 32"):
        ops.matmul_mx(*operands(False, 2, 3, 40), target="trn3")
    with pytest.raises(ShapeError, match="trn2 is gen3; MX data needs gen4; use matmul"):
        ops.matmul_mx(a, b, target="trn2")
    with pytest.raises(DtypeError, match="a has dtype float32; allowed are bfloat16, float16"):
        ops.matmul_mx(a.astype(np.float32), b, target="trn3")
    with pytest.raises(OptionError, match="kind is 'e2m1'; allowed are e4m3, e5m2"):
        ops.matmul_mx(a, b, kind="e2m1", target="trn3")
    with pytest.raises(ConfigError, match="config is 3; a MatmulMxConfig is needed"):
        ops.matmul_mx(a, b, config=3, target="trn3")
    wrong = dataclasses.replace(CONFIGS[1], ahead=-1)
    with pytest.raises(ConfigError, match=r"config\.ahead is -1; it must be an int of at least 0"):
        ops.matmul_mx(a, b, config=wrong, target="trn3")


# -- counts ----------------------------------------------------------------------------------------


@both
def test_work_instructions_and_bytes_are_exactly_the_formula(transposed):
    m, n, k = 700, 1100, 1024 + 96
    op, config = MATMUL_MXS[transposed], MatmulMxConfig(512, 1024, 2, True)
    shapes = op.input_shapes({"M": m, "N": n, "K": k})
    inputs = [Abstract(shape, "bfloat16") for shape in shapes]
    trace = op.launch(inputs, {}, config=config, target="trn3").trace
    slabs, blocks, panels, banks, rows = 3, 2, 2, 3, 4 + 2
    loads_a, loads_b = blocks * slabs, blocks * panels * slabs
    want = Counter({"nc_matmul_mx": rows * banks * slabs, "tensor_copy": rows * banks})
    want["quantize_mx"] = loads_a + loads_b
    # The last slab has 24 partitions of the 32 that PE takes.
    want["memset"] = blocks + blocks * panels
    want["dma_transpose"] = loads_a + transposed * loads_b
    want["dma_copy"] = (not transposed) * loads_b + rows * panels
    assert Counter(e.opcode for e in trace) == want
    passes = [e.work for e in trace if isinstance(e.work, PeWork)]
    padded = 2 * 128 + 32
    assert sum(work.k * work.m * work.n for work in passes) == padded * m * n
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    assert sum(work.hbm_read_bytes for work in moved) == 2 * (m * k + blocks * n * k)
    assert sum(work.hbm_write_bytes for work in moved) == 2 * m * n


def test_values_change_no_event():
    inputs = operands(True, 130, 140, 96)
    shapes = [Abstract(x.shape, "bfloat16") for x in inputs]
    first, second = (MATMUL_MXS[True].launch(i, {}, target="trn3").trace for i in (inputs, shapes))
    assert [(e.opcode, e.work) for e in first] == [(e.opcode, e.work) for e in second]


# -- mutants ---------------------------------------------------------------------------------------


def the_other_kind(monkeypatch):
    real = kernel._quantize
    monkeypatch.setattr(kernel, "_quantize", lambda raw, packed: real(raw, "float8_e5m2_x4"))


def scales_of_the_first_columns(monkeypatch):
    real = kernel._quantize

    def wrong(raw, packed):
        elements, scales = real(raw, packed)
        return elements, scales[:, 0:1].broadcast(1, scales.shape[1])

    monkeypatch.setattr(kernel, "_quantize", wrong)


def the_first_rows_for_all(monkeypatch):
    real = kernel._multiply

    def wrong(c, step, ready, config):
        real(c, step, {**ready, ("b", step["n"][0]): ready["b", 0]}, config)

    monkeypatch.setattr(kernel, "_multiply", wrong)


@both
@pytest.mark.parametrize(
    "mutant",
    [the_other_kind, scales_of_the_first_columns, the_first_rows_for_all],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, transposed, monkeypatch):
    inputs = operands(transposed, 20, 48, 64, make=wide)
    config = MatmulMxConfig(128, 24, 1, True)
    keywords = {"config": config, "out_dtype": "float32"}
    compare(run(transposed, inputs, **keywords), transposed, inputs, "right")
    mutant(monkeypatch)
    got = run(transposed, inputs, **keywords)
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, transposed, inputs, mutant.__name__)
