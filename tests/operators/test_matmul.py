"""The whole test pattern of an operator, for matmul; its counts are in test_matmul_counts.py."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.check import AFFORDABLE_FLOPS
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.matmul.kernel import MatmulConfig
from nki_kernels.machine.errors import ConfigError, NkiKernelsError
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases, parse
from reference.matmul import matmul as reference
from tests.operators.test_contract import ILLEGAL
from tests.strategies.matrices import extents, normal, seeds, small_integers, wide
from tests.tolerance import assert_close

MATMUL = OPERATORS["matmul"]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def compare(got, a, b, target, case):
    ref = reference(a, b)
    axes = MATMUL.axes(a.shape, b.shape)
    chain = MATMUL.chain(axes, spec_for(target))
    keywords = {"op": "matmul", "roundings": MATMUL.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


def operands(m, n, k, dtype, seed=0, make=normal):
    host = DTYPES[dtype]
    return make(seed, (m, k), host), make(seed + 1, (k, n), host)


# -- named cases -----------------------------------------------------------------------------------

#: Each model's shapes, cut to at most two tiles per axis with the real remainder.
NAMED = [case.name for case in cases("matmul")]


def reduced(axes):
    tiles = {"M": TRN2.stationary_fmax, "N": TRN2.moving_fmax, "K": TRN2.partitions}
    return {
        letter: min(size, tiles[letter] + (size % tiles[letter] or tiles[letter]))
        for letter, size in axes.items()
    }


@pytest.mark.parametrize("name", NAMED)
def test_a_named_case_matches_the_reference(name):
    axes = parse(MATMUL, name).axes
    config = MATMUL.configure(axes, "bfloat16", TRN2)
    cut = reduced(axes)
    a, b = operands(cut["M"], cut["N"], cut["K"], "bfloat16")
    compare(ops.matmul(a, b, config=config, target="trn2"), a, b, "trn2", name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt-oss-20b:decode:router", "minilm-l6:prefill:attn-out"])
def test_a_named_case_matches_at_full_size(name, dtype):
    axes = parse(MATMUL, name).axes
    a, b = operands(axes["M"], axes["N"], axes["K"], dtype)
    compare(ops.matmul(a, b, target="trn2"), a, b, "trn2", name)


# -- properties ------------------------------------------------------------------------------------

toy_sizes = {
    "m": extents(TOY.stationary_fmax, 2 * TOY.stationary_fmax + 3),
    "n": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "k": extents(TOY.partitions, 3 * TOY.partitions + 3),
}


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), uneven=st.booleans(), **toy_sizes)
def test_any_shape_matches_the_reference(m, n, k, dtype, seed, uneven):
    a, b = operands(m, n, k, dtype, seed, wide if uneven else normal)
    compare(ops.matmul(a, b, target="toy"), a, b, "toy", f"{m}x{n}x{k}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [127, 128, 129])
@pytest.mark.parametrize("n", [511, 512, 513])
@pytest.mark.parametrize("k", [127, 129, 256])
def test_sizes_around_the_real_tiles_match_the_reference(m, n, k, dtype):
    a, b = operands(m, n, k, dtype)
    compare(ops.matmul(a, b, target="trn2"), a, b, "trn2", f"{m}x{n}x{k}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_generation_matches_the_reference(target, dtype):
    spec = spec_for(target)
    a, b = operands(spec.partitions + 3, spec.moving_fmax + 5, 2 * spec.partitions - 1, dtype)
    compare(ops.matmul(a, b, target=target), a, b, target, "ragged")


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_permuting_rows_and_columns_permutes_the_result(m, n, k, dtype, seed):
    # Integers: the host's BLAS may add in another order when a column moves.
    a, b = operands(m, n, k, dtype, seed, lambda *where: small_integers(*where, most=8))
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(m), rng.permutation(n)
    whole = ops.matmul(a, b, target="toy")
    permuted = ops.matmul(a[rows], np.ascontiguousarray(b[:, columns]), target="toy")
    assert permuted.tobytes() == whole[rows][:, columns].tobytes()


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_the_identity_returns_the_other_operand(m, n, k, dtype, seed):
    a, _ = operands(m, n, k, dtype, seed, wide)
    b, _ = operands(k, m, n, dtype, seed, wide)
    one = np.eye(k, dtype=DTYPES[dtype])
    assert ops.matmul(a, one, target="toy").tobytes() == a.tobytes()
    assert ops.matmul(one, b, target="toy").tobytes() == b.tobytes()


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_zero_padding_of_the_contraction_is_inert(m, n, k, dtype, seed):
    a, b = operands(m, n, k, dtype, seed)
    padded = ops.matmul(np.pad(a, ((0, 0), (0, 3))), np.pad(b, ((0, 3), (0, 0))), target="toy")
    compare(padded, a, b, "toy", "padded")


# -- exactness -------------------------------------------------------------------------------------


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_small_integers_are_exact(m, n, k, dtype, seed):
    a, b = operands(m, n, k, dtype, seed, lambda *where: small_integers(*where, most=8))
    got = ops.matmul(a, b, out_dtype="float32", target="toy")
    assert got.dtype == np.float32
    assert (got == reference(a, b).value).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact_in_the_input_dtype(dtype):
    # 150 products of -1, 0, 1 stay within +-256, exact even in bfloat16.
    a, b = operands(140, 530, 150, dtype, 5, lambda *where: small_integers(*where, most=1))
    got = ops.matmul(a, b, target="trn2")
    assert got.dtype == DTYPES[dtype]
    assert (got.astype(np.float64) == reference(a, b).value).all()


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_once_to_the_output_dtype(dtype, out_dtype):
    a, b = operands(9, 17, 20, dtype, 3, lambda *where: small_integers(*where, most=16))
    got = ops.matmul(a, b, out_dtype=out_dtype, target="toy")
    assert got.tobytes() == reference(a, b).value.astype(DTYPES[out_dtype]).tobytes()


CONFIGS = [
    MatmulConfig(wave_m, wave_n, prefetch, tail, hold_a, transpose, hwdge, evict_scalar)
    for (wave_m, wave_n), prefetch, tail, transpose in itertools.product(
        [(1, 1), (2, 1), (1, 2)], [1, 3], [0, 1, 2, 9], ["dma", "pe"]
    )
    for hold_a, hwdge, evict_scalar in [(False, True, True), (True, False, False)]
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_config_changes_a_result(dtype):
    a, b = operands(21, 37, 30, dtype, 4, lambda *where: small_integers(*where, most=3))
    want = ops.matmul(a, b, target="toy").tobytes()
    for config in CONFIGS:
        if config.transpose == "dma" and dtype == "float32":
            continue  # a DMA transposes 2-byte types only
        assert ops.matmul(a, b, config=config, target="toy").tobytes() == want


@pytest.mark.parametrize("rows", [8, 9, 10, 16])
@pytest.mark.parametrize("stored", [(False, False), (True, True)])
def test_passes_of_a_device_loop_and_their_rest_change_no_result(stored, rows):
    a, b = operands(27, 37, 30, "bfloat16")
    a, b = (
        np.ascontiguousarray(x.T) if turn else x for x, turn in zip((a, b), stored, strict=True)
    )
    op = OPERATORS["matmul_tt" if stored[0] else "matmul"]
    config = op.configure({"M": 27, "N": 37, "K": 30}, "bfloat16", TOY)
    want = op.launch((a, b), {}, config=config, target="toy")
    assert not any(event.loop for event in want.trace)
    looped = op.launch((a, b), {}, config=dataclasses.replace(config, rows=rows), target="toy")
    assert looped.result.tobytes() == want.result.tobytes()
    # Two passes are written out; what is longer is a loop.
    assert any(event.loop for event in looped.trace) == (2 * rows < 27)


def test_the_rows_of_a_residual_follow_the_passes():
    op = OPERATORS["linear"]
    x, weight, bias, residual = (
        normal(seed, shape, DTYPES["bfloat16"])
        for seed, shape in enumerate(op.input_shapes({"M": 27, "N": 37, "K": 30}))
    )
    config = op.configure({"M": 27, "N": 37, "K": 30}, "bfloat16", TOY)
    config = dataclasses.replace(config, rows=8)
    got = op.launch((x, weight, bias, residual), {}, config=config, target="toy").result
    assert got.tobytes() == ops.linear(x, weight, bias, residual, target="toy").tobytes()


@pytest.mark.parametrize("sizes", [(65536, 4096, 4096), (65536, 12288, 5120), (10**6, 64, 64)])
def test_a_program_stays_bounded(sizes):
    m, n, k = sizes
    rows = (
        OPERATORS["matmul"].configure(dict(zip("MNK", sizes, strict=True)), "bfloat16", TRN2).rows
    )
    each = -(-n // TRN2.moving_fmax) * -(-k // TRN2.partitions)
    body = -(-rows // TRN2.stationary_fmax) * each
    rest = -(-(m % rows) // TRN2.stationary_fmax) * each
    assert body + rest < 90_000


# -- illegal calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_raises_before_anything_runs(name, monkeypatch):
    (a, b), options, error, text = ILLEGAL[name]
    monkeypatch.setattr(
        "nki_kernels.operators.contract.launch", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(error) as caught:
        ops.matmul(a, b, **options, target="trn2")
    assert text in str(caught.value)


GOOD = MatmulConfig(1, 1, 1, 1, False, "dma", False, False)


@pytest.mark.parametrize(
    ("changes", "dtype", "target", "text"),
    [
        ({"wave_m": 0}, "bfloat16", "trn2", "config.wave_m is 0; it must be an int of at least 1"),
        ({"tail": -1}, "bfloat16", "trn2", "config.tail is -1; it must be an int of at least 0"),
        ({"prefetch": 1.5}, "bfloat16", "trn2", "config.prefetch is 1.5; it must be an int"),
        ({"transpose": "act"}, "bfloat16", "trn2", "allowed are 'dma' and 'pe'"),
        ({"wave_m": 3, "wave_n": 3}, "bfloat16", "trn2", "trn2 has 8 PSUM banks"),
        (
            {"wave_m": 4, "wave_n": 2, "transpose": "pe"},
            "bfloat16",
            "trn2",
            "6 PSUM banks for accumulators with transpose='pe'",
        ),
        ({}, "float32", "trn2", "config.transpose is 'dma' for 4-byte elements"),
        ({"hwdge": True}, "bfloat16", "trn1", "need gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(changes, dtype, target, text):
    a, b = operands(2, 2, 2, dtype)
    config = dataclasses.replace(GOOD, **changes)
    with pytest.raises(ConfigError) as caught:
        ops.matmul(a, b, config=config, target=target)
    assert text in str(caught.value)


def test_a_config_is_a_matmul_config():
    a, b = operands(2, 2, 2, "bfloat16")
    with pytest.raises(ConfigError, match=r"config is \(1, 2\); a MatmulConfig is needed"):
        ops.matmul(a, b, config=(1, 2), target="trn2")


@given(m=st.integers(1, 5000), n=st.integers(1, 5000), k=st.integers(1, 5000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, m, n, k):
    spec = spec_for(target)
    config = MATMUL.configure({"M": m, "N": n, "K": k}, dtype, spec)
    assert MATMUL.config_problems(config, dtype, spec) == ()


def test_an_unknown_target_lists_the_known_ones():
    a, b = operands(2, 2, 2, "float32")
    with pytest.raises(ValueError, match=r"'trn9': unknown; allowed are trn1, .*toy"):
        ops.matmul(a, b, target="trn9")


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 300, 40), (300, 1, 40), (130, 300, 1), (1, 1, 300), (1, 513, 1)]
)
def test_edges(shape, dtype):
    a, b = operands(*shape, dtype)
    compare(ops.matmul(a, b, target="trn2"), a, b, "trn2", "edge")


def test_the_inputs_stay_as_they_were_and_the_result_is_new():
    a, b = operands(9, 17, 20, "float32")
    before = a.tobytes(), b.tobytes()
    first = ops.matmul(a, b, target="toy")
    second = ops.matmul(a, b, target="toy")
    assert (a.tobytes(), b.tobytes()) == before
    assert first.tobytes() == second.tobytes()
    assert not any(np.shares_memory(first, other) for other in (a, b, second))


def test_read_only_inputs_are_fine():
    a, b = operands(9, 17, 20, "float32")
    a.flags.writeable = b.flags.writeable = False
    compare(ops.matmul(a, b, target="toy"), a, b, "toy", "read-only")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_special_value_reaches_its_row_and_no_other(value):
    a, b = operands(9, 17, 20, "float32")
    a[4, 7] = value
    got = ops.matmul(a, b, target="toy")
    assert not np.isfinite(got[4]).any()
    others = np.arange(9) != 4
    compare(got[others], a[others], b, "toy", "other rows")


def test_the_target_comes_from_the_environment(monkeypatch):
    a, b = operands(9, 17, 20, "float32")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "toy")
    assert MATMUL.launch((a, b), {}).trace.spec is TOY


# -- mutants ---------------------------------------------------------------------------------------


def last_call(monkeypatch, name, change, count):
    """Change the last of `count` calls of an instruction."""
    real, seen = getattr(nisa, name), []

    def faulty(*args, **kwargs):
        seen.append(name)
        return change(real, *args, **kwargs) if len(seen) == count else real(*args, **kwargs)

    monkeypatch.setattr(nisa, name, faulty)


def drop_last_contraction_tile(monkeypatch, counts):
    last_call(monkeypatch, "nc_matmul", lambda real, *args, **kwargs: None, counts["nc_matmul"])


def drop_last_contraction_row(monkeypatch, counts):
    def shorter(real, dst, stationary, moving, **kwargs):
        rows = stationary.shape[0] - 1
        return real(dst, stationary[0:rows], moving[0:rows], **kwargs)

    last_call(monkeypatch, "nc_matmul", shorter, counts["nc_matmul"])


def shift_last_stationary_row(monkeypatch, counts):
    def shifted(real, dst, stationary, moving, **kwargs):
        real(dst, stationary, moving, **kwargs)
        one = slice(0, 1)
        return real(dst, stationary[one], moving[one], **{**kwargs, "accumulate": True})

    last_call(monkeypatch, "nc_matmul", shifted, counts["nc_matmul"])


def round_partial_sums(monkeypatch, counts):
    real = nisa.nc_matmul

    def rounded(dst, *args, **kwargs):
        done = real(dst, *args, **kwargs)
        # No instruction rounds PSUM in place, so reach under the machine.
        sums = dst.mem.array(dst.region, np.float32)
        sums[...] = sums.astype(ml_dtypes.bfloat16)
        return done

    monkeypatch.setattr(nisa, "nc_matmul", rounded)


def store_a_stale_tile(monkeypatch, counts):
    real, stores = nisa.dma_copy, []

    def stale(dst, src, *args, **kwargs):
        if nl.is_hbm(dst.buffer):
            stores.append(src)
            same = [s for s in stores[:-1] if s.shape == src.shape and s.dtype == src.dtype]
            src = same[0] if same else src
        return real(dst, src, *args, **kwargs)

    monkeypatch.setattr(nisa, "dma_copy", stale)


MUTANTS = [
    drop_last_contraction_tile, drop_last_contraction_row, shift_last_stationary_row,
    round_partial_sums, store_a_stale_tile,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    spec = TOY
    m, n, k = 4 * spec.stationary_fmax, 4 * spec.moving_fmax, 6 * spec.partitions
    a, b = operands(m, n, k, dtype)
    run = MATMUL.launch((a, b), {}, target="toy")
    compare(run.result, a, b, "toy", "right")
    counts = {"nc_matmul": sum(e.opcode == "nc_matmul" for e in run.trace)}
    mutant(monkeypatch, counts)
    with pytest.raises(AssertionError, match="worst at"):
        compare(ops.matmul(a, b, target="toy"), a, b, "toy", mutant.__name__)


def test_a_kernel_that_forgets_to_write_is_refused(monkeypatch):
    a, b = operands(9, 17, 20, "float32")
    stores = [
        e for e in MATMUL.launch((a, b), {}, target="toy").trace
        if e.opcode == "dma_copy" and e.writes[0].tile.memory == "hbm"
    ]  # fmt: skip
    real, seen = nisa.dma_copy, []

    def forgetful(dst, src, *args, **kwargs):
        if nl.is_hbm(dst.buffer):
            seen.append(dst)
            if len(seen) == len(stores):
                return None
        return real(dst, src, *args, **kwargs)

    monkeypatch.setattr(nisa, "dma_copy", forgetful)
    with pytest.raises(NkiKernelsError, match="no instruction wrote"):
        ops.matmul(a, b, target="toy")


# -- the config ------------------------------------------------------------------------------------

SIZES = st.integers(1, 200_000)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@given(dtype=st.sampled_from(list(DTYPES)), m=SIZES, n=SIZES, k=SIZES)
def test_the_config_is_plain_and_its_wave_fits(target, dtype, m, n, k):
    spec = spec_for(target)
    config = MATMUL.configure({"M": m, "N": n, "K": k}, dtype, spec)
    assert isinstance(config, MatmulConfig)
    assert all(type(v) in (int, bool, str) for v in dataclasses.asdict(config).values())
    banks = config.wave_m * config.wave_n
    assert 1 <= banks <= spec.psum_banks
    assert (config.wave_m - 1) * spec.stationary_fmax < m
    assert (config.wave_n - 1) * spec.moving_fmax < n
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    held = config.wave_m * spec.stationary_fmax * -(-k // spec.partitions) * itemsize
    flying = config.prefetch * config.wave_n * spec.moving_fmax * itemsize
    assert flying + (held if config.hold_a else 0) < spec.sbuf_usable_bytes


@given(dtype=st.sampled_from(list(DTYPES)), m=SIZES, n=SIZES, k=SIZES)
def test_the_reduced_problem_keeps_waves_and_remainders(dtype, m, n, k):
    axes = {"M": m, "N": n, "K": k}
    config = MATMUL.configure(axes, dtype, TRN2)
    small = MATMUL.reduced(axes, config, TRN2)
    blocks = {
        "M": config.wave_m * TRN2.stationary_fmax,
        "N": config.wave_n * TRN2.moving_fmax,
        "K": (config.tail + 1) * TRN2.partitions,
    }
    for letter, block in blocks.items():
        assert 1 <= small[letter] <= min(axes[letter], 2 * block)
        assert (small[letter] > block) == (axes[letter] > block)
        assert small[letter] % block == axes[letter] % block
    assert MATMUL.flops(small) < AFFORDABLE_FLOPS
