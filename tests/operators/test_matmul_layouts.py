"""matmul and bmm for every way of storing their operands."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.matmul import kernel
from nki_kernels.kernels.matmul.kernel import MatmulConfig
from nki_kernels.machine.errors import ConfigError, ShapeError
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.matmul import MATMULS
from nki_kernels.operators.shapes import cases, parse
from reference.matmul import matmul as reference
from tests.operators.test_matmul import CONFIGS, DTYPES, toy_sizes
from tests.strategies.matrices import normal, seeds, small_integers, wide
from tests.tolerance import assert_close

TOY, TRN2 = spec_for("toy"), spec_for("trn2")
#: (batched, transpose_a, transpose_b), without the plain product of test_matmul.py.
STORED = [key for key in MATMULS if key != (False, False, False)]
NAMES = {key: MATMULS[key].name for key in STORED}
parametrize_stored = pytest.mark.parametrize("key", STORED, ids=NAMES.get)


def operands(key, axes, dtype, seed=0, make=normal):
    shapes = MATMULS[key].input_shapes(axes)
    return tuple(make(seed + i, shape, DTYPES[dtype]) for i, shape in enumerate(shapes))


def run(key, a, b, **keywords):
    return ops.matmul(a, b, transpose_a=key[1], transpose_b=key[2], **keywords)


def compare(got, key, a, b, target, case):
    ref = reference(a, b, transpose_a=key[1], transpose_b=key[2])
    op = MATMULS[key]
    chain = op.chain(op.axes(a.shape, b.shape), spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


def test_the_names_say_how_operands_are_stored():
    assert list(OPERATORS)[:4] == ["matmul", "matmul_nt", "matmul_tn", "matmul_tt"]
    assert [str(x) for x in OPERATORS["matmul_nt"].inputs] == ["a [M, K]", "b [N, K]"]
    assert [str(x) for x in OPERATORS["matmul_tn"].inputs] == ["a [K, M]", "b [K, N]"]
    assert [str(x) for x in OPERATORS["bmm_tt"].inputs] == ["a [B, K, M]", "b [B, N, K]"]
    assert OPERATORS["bmm_nt"].output_shapes((7, 2, 3), (7, 5, 3)) == ((7, 2, 5),)


@parametrize_stored
def test_named_cases_match_the_reference(key):
    op = MATMULS[key]
    for case in cases(op.name)[:3]:
        config = op.configure(case.axes, "bfloat16", TRN2)
        tiles = {"M": TRN2.stationary_fmax, "N": TRN2.moving_fmax, "K": TRN2.partitions, "B": 2}
        cut = {
            letter: min(size, tiles[letter] + (size % tiles[letter] or tiles[letter]))
            for letter, size in parse(op, case.name).axes.items()
        }
        a, b = operands(key, cut, "bfloat16")
        compare(run(key, a, b, config=config, target="trn2"), key, a, b, "trn2", case.name)


@parametrize_stored
@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    uneven=st.booleans(),
    batch=st.integers(1, 3),
    **toy_sizes,
)
def test_any_shape_matches_the_reference(key, m, n, k, dtype, seed, uneven, batch):
    axes = {"B": batch, "M": m, "N": n, "K": k}
    a, b = operands(key, axes, dtype, seed, wide if uneven else normal)
    compare(run(key, a, b, target="toy"), key, a, b, "toy", repr(axes))


@parametrize_stored
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_generation_matches_the_reference(key, target, dtype):
    spec = spec_for(target)
    axes = {"B": 2, "M": spec.partitions + 3, "N": spec.moving_fmax + 5, "K": spec.partitions + 7}
    a, b = operands(key, axes, dtype)
    compare(run(key, a, b, target=target), key, a, b, target, "ragged")


@parametrize_stored
@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_small_integers_are_exact(key, m, n, k, dtype, seed):
    axes = {"B": 2, "M": m, "N": n, "K": k}
    a, b = operands(key, axes, dtype, seed, lambda *where: small_integers(*where, most=8))
    got = run(key, a, b, out_dtype="float32", target="toy")
    assert got.dtype == np.float32
    assert (got == reference(a, b, transpose_a=key[1], transpose_b=key[2]).value).all()


@parametrize_stored
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_config_changes_a_result(key, dtype):
    axes = {"B": 2, "M": 21, "N": 37, "K": 30}
    a, b = operands(key, axes, dtype, 4, lambda *where: small_integers(*where, most=3))
    want = run(key, a, b, target="toy").tobytes()
    flips = key[2] or not key[1]
    for config in CONFIGS[::3]:
        if config.transpose == "dma" and dtype == "float32" and flips:
            continue  # a DMA transposes 2-byte types only
        assert run(key, a, b, config=config, target="toy").tobytes() == want


@parametrize_stored
@given(m=st.integers(1, 5000), n=st.integers(1, 5000), k=st.integers(1, 5000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chosen_config_has_no_problems(key, dtype, target, m, n, k):
    op, spec = MATMULS[key], spec_for(target)
    config = op.configure({"B": 3, "M": m, "N": n, "K": k}, dtype, spec)
    assert op.config_problems(config, dtype, spec) == ()


def test_without_a_transpose_float32_has_all_banks():
    config = MatmulConfig(4, 2, 1, 1, False, "dma", True, True)
    assert OPERATORS["matmul_tn"].config_problems(config, "float32", TRN2) == ()
    assert OPERATORS["matmul_tn"].configure({"M": 999, "N": 999, "K": 9}, "float32", TRN2).wave_m
    a, b = operands((False, False, True), {"M": 2, "N": 2, "K": 2}, "float32")
    with pytest.raises(ConfigError, match=r"config.transpose is 'dma' for 4-byte elements"):
        ops.matmul(a, b, transpose_b=True, config=config, target="trn2")


@pytest.mark.parametrize(
    ("a", "b", "flags", "text"),
    [
        ((3, 4), (4, 6), (False, True), "matmul_nt(float32[3, 4], float32[4, 6]): K is 4 in a"),
        ((3, 4), (4, 6), (True, False), "K is 3 in a [K, M] = [3, 4] but 4 in b [K, N]"),
        ((2, 3, 4), (3, 4, 6), (False, False), "B is 2 in a [B, M, K] = [2, 3, 4] but 3 in b"),
        ((2, 3, 4), (4, 6), (False, False), "b has 2 dimensions, shape [4, 6]; 3 are needed"),
        ((0, 3, 4), (0, 4, 6), (False, False), "a [B, M, K] = [0, 3, 4] has a zero-size axis"),
    ],
)
def test_an_illegal_call_says_why(a, b, flags, text):
    arrays = np.zeros(a, np.float32), np.zeros(b, np.float32)
    with pytest.raises(ShapeError) as caught:
        ops.matmul(*arrays, transpose_a=flags[0], transpose_b=flags[1], target="toy")
    assert text in str(caught.value)


@parametrize_stored
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 8, 15])
def test_work_instructions_and_bytes_are_exactly_the_formula(key, dtype, index):
    config = CONFIGS[index]
    if dtype == "float32":
        config = dataclasses.replace(config, transpose="pe")
    batches, m, n, k = 3 if key[0] else 1, 40, 70, 45
    a, b = operands(key, {"B": batches, "M": m, "N": n, "K": k}, dtype)
    trace = MATMULS[key].launch((a, b), {}, config=config, target="toy").trace
    tiles_m, tiles_n = -(-m // TOY.stationary_fmax), -(-n // TOY.moving_fmax)
    row_tiles_n, slices = -(-n // TOY.stationary_fmax), -(-k // TOY.partitions)
    waves_m, waves_n = -(-tiles_m // config.wave_m), -(-tiles_n // config.wave_n)
    reads_a = 1 if config.hold_a else waves_n
    by_pe = config.transpose == "pe"
    loads = {
        "a": (not key[1], waves_m * reads_a, tiles_m * reads_a),
        "b": (key[2], waves_n * waves_m, row_tiles_n * waves_m),
    }
    want = Counter({"nc_matmul": tiles_m * tiles_n * slices})
    want["dma_copy"], want["tensor_copy"] = tiles_m * waves_n, tiles_m * tiles_n
    for flipped, pieces, tiles in loads.values():
        if not flipped:
            want["dma_copy"] += pieces * slices
        elif by_pe:
            want["dma_copy"] += tiles * slices
            want["nc_transpose"] += tiles * slices
        else:
            want["dma_transpose"] += pieces * slices
    # A slice of A has one or two row tiles, and so has a bank; a slice of B may be two banks wide.
    if by_pe:
        want["tensor_copy"] += slices * waves_m * reads_a * loads["a"][0]
        want["tensor_copy"] += slices * tiles_n * waves_m * loads["b"][0]
    assert Counter(e.opcode for e in trace) == Counter({x: batches * c for x, c in want.items()})
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    assert sum(work.macs for work in passes) == batches * m * n * k
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    elements = batches * (m * k * reads_a + k * n * waves_m)
    assert sum(work.hbm_read_bytes for work in moved) == elements * itemsize
    assert sum(work.hbm_write_bytes for work in moved) == batches * m * n * itemsize


def use_the_first_matrix(monkeypatch, key):
    real = kernel._load

    def first(operands, step, *rest):
        return real(operands, {**step, "batch": 0}, *rest)

    monkeypatch.setattr(kernel, "_load", first)


def swap_contraction_slices(monkeypatch, key):
    real = nisa.dma_transpose
    seen = []

    def wrong(dst, src, **keywords):
        seen.append(src)
        same = seen[0] if seen[0].shape == src.shape else src
        return real(dst, same, **keywords)

    monkeypatch.setattr(nisa, "dma_transpose", wrong)


@pytest.mark.parametrize(
    ("key", "mutant"),
    [
        ((True, False, False), use_the_first_matrix),
        ((True, True, True), use_the_first_matrix),
        ((False, False, True), swap_contraction_slices),
        ((False, True, True), swap_contraction_slices),
    ],
)
def test_a_mutated_kernel_is_rejected(key, mutant, monkeypatch):
    size = {"B": 2, "M": 2 * TOY.stationary_fmax, "N": 2 * TOY.moving_fmax, "K": 24}
    a, b = operands(key, size, "bfloat16")
    compare(run(key, a, b, target="toy"), key, a, b, "toy", "right")
    mutant(monkeypatch, key)
    with pytest.raises(AssertionError, match="worst at"):
        compare(run(key, a, b, target="toy"), key, a, b, "toy", mutant.__name__)


def test_a_batch_multiplies_the_flops():
    axes = {"B": 3, "M": 5, "N": 7, "K": 11}
    assert OPERATORS["bmm"].flops(axes) == 2 * math.prod(axes.values())
