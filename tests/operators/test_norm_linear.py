"""The whole test pattern for norm_linear and norm_linear_kn."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.projection import stream as kernel
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases
from reference.projection import norm_linear as reference
from tests.operators.test_matmul import DTYPES, toy_sizes
from tests.strategies.matrices import normal, seeds, small_integers, wide
from tests.tolerance import assert_close

OPS = [OPERATORS["norm_linear"], OPERATORS["norm_linear_kn"]]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
KINDS = ["bfloat16", "float32"]
parametrize_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def operands(op, m, n, k, dtype, used=(True, True), seed=0, make=normal):
    shapes = op.input_shapes({"M": m, "N": n, "K": k})
    x, gain, weight, bias = [make(seed + i, s, DTYPES[dtype]) for i, s in enumerate(shapes)]
    return x, gain if used[0] else None, weight, bias if used[1] else None


def run(op, inputs, **keywords):
    return ops.norm_linear(*inputs, transpose_weight=op is OPS[0], **keywords)


def compare(got, op, inputs, target, case, **options):
    ref = reference(*inputs, transpose_weight=op is OPS[0], **options)
    axes = op.axes(*(None if x is None else x.shape for x in inputs))
    chain = op.chain(axes, spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, ref.value, ref.magnitude, case=case, **keywords)


@parametrize_op
def test_named_cases_match_the_reference(op):
    for case in cases(op.name, "llama3-8b"):
        config = op.configure(case.axes, "bfloat16", TRN2)
        inputs = operands(
            op, *[min(size, 130 + size % 100) for size in case.axes.values()], KINDS[0]
        )
        compare(run(op, inputs, config=config, target="trn2"), op, inputs, "trn2", case.name)


@parametrize_op
@given(
    dtype=st.sampled_from(KINDS),
    seed=seeds(),
    uneven=st.booleans(),
    used=st.tuples(st.booleans(), st.booleans()),
    eps=st.sampled_from([1e-6, 1e-5, 0.5]),
    **toy_sizes,
)
def test_any_shape_matches_the_reference(op, m, n, k, dtype, seed, uneven, used, eps):
    inputs = operands(op, m, n, k, dtype, used, seed, wide if uneven else normal)
    got = run(op, inputs, eps=eps, target="toy")
    compare(got, op, inputs, "toy", f"{m}x{n}x{k} {used} {eps}", eps=eps)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_generation_matches_the_reference(target, dtype):
    for op in OPS:
        inputs = operands(op, 131, 517, 135, dtype)
        compare(run(op, inputs, target=target), op, inputs, target, "ragged")


@given(seed=seeds(), **toy_sizes)
def test_integers_of_size_one_are_exact(m, n, k, seed):
    # Rows of 1 and -1 have a root mean square of 1, and sums of integers are exact.
    x, gain, weight, bias = operands(
        OPS[1], m, n, k, "bfloat16", seed=seed, make=lambda *at: small_integers(*at, most=8)
    )
    x = np.where(x < 0, -1, 1).astype(x.dtype)
    got = run(OPS[1], (x, gain, weight, bias), eps=0.0, out_dtype="float32", target="toy")
    assert (got == reference(x, gain, weight, bias, eps=0.0, transpose_weight=False).value).all()


def test_zero_huge_and_special_rows_are_those_of_the_norm():
    x, _, weight, bias = operands(OPS[0], 6, 5, 9, "float32")
    x[1] = 0
    x[2] = 1e18  # squares above 2^97, where Scalar's rsqrt ends
    x[3] = 1e25  # squares overflow
    x[4, 2] = np.nan
    x[5, 2] = np.inf
    got = ops.norm_linear(x, None, weight, bias, target="toy")
    inputs = (x[:3], None, weight, bias)
    compare(got[:3], OPS[0], inputs, "toy", "finite")
    assert (got[1] == bias).all()
    assert (got[3] == bias).all()
    assert np.isnan(got[4:]).all()


CONFIGS = [
    kernel.ProjectionConfig(kernel.MatmulConfig(*fields, "pe", True, scalar), chunk, True)
    for fields in ((1, 1, 1, 0, False), (2, 1, 3, 2, True), (1, 2, 2, 99, False))
    for scalar, chunk in ((True, 5), (False, 4096))
]


@parametrize_op
@pytest.mark.parametrize("dtype", KINDS)
def test_no_config_changes_the_mathematics(op, dtype):
    inputs = operands(op, 21, 100, 43, dtype)
    for config in CONFIGS:
        assert op.config_problems(config, dtype, TOY) == ()
        compare(run(op, inputs, config=config, target="toy"), op, inputs, "toy", repr(config))


@parametrize_op
@pytest.mark.parametrize("m", [16, 17, 24, 27])
def test_passes_of_a_device_loop_and_their_rest_match_the_reference(op, m):
    inputs = operands(op, m, 40, 30, "bfloat16")
    config = op.configure({"M": m, "N": 40, "K": 30}, "bfloat16", TOY)
    product = dataclasses.replace(config.product, wave_m=1, wave_n=1, rows=8)
    config = dataclasses.replace(config, product=product)
    launch = op.launch(inputs, {}, config=config, target="toy")
    assert any(event.loop for event in launch.trace) == (m > 16)
    compare(launch.result, op, inputs, "toy", m)


@given(m=st.integers(1, 5000), n=st.integers(1, 9000), k=st.integers(1, 20000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", KINDS)
def test_a_chosen_config_has_no_problems(dtype, target, m, n, k):
    axes, spec = {"M": m, "N": n, "K": k}, spec_for(target)
    for op in OPS:
        config = op.configure(axes, dtype, spec)
        assert op.config_problems(config, dtype, spec) == ()
        small = op.reduced(axes, config, spec)
        assert all(1 <= small[letter] <= axes[letter] for letter in axes)


@pytest.mark.parametrize("sizes", [(600, 600, 16384), (16, 5000, 16384)])
@pytest.mark.parametrize("dtype", KINDS)
def test_long_rows_fit(sizes, dtype):
    op = OPS[0]
    shapes = op.input_shapes(dict(zip("MNK", sizes, strict=True)))
    run = op.launch([Abstract(shape, dtype) for shape in shapes], {}, target="trn2")
    assert run.time().total_ns > 0


def test_wrong_calls_say_why():
    x, gain, weight, bias = operands(OPS[0], 2, 3, 4, "float32")
    with pytest.raises(ShapeError, match=r"K is 4 in x .* but 3 in norm_weight \[K\]"):
        ops.norm_linear(x, gain[:3], weight, bias, target="toy")
    with pytest.raises(DtypeError, match="x has dtype float16; allowed are bfloat16, float32"):
        ops.norm_linear(*(a.astype(np.float16) for a in (x, gain, weight, bias)), target="toy")
    with pytest.raises(OptionError, match="eps is -1"):
        ops.norm_linear(x, gain, weight, bias, eps=-1, target="toy")
    with pytest.raises(ConfigError, match="config is 3; a ProjectionConfig is needed"):
        ops.norm_linear(x, gain, weight, bias, config=3, target="toy")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chunk": 0}, "config.chunk is 0; it must be an int of at least 1"),
        (
            {"product": dataclasses.replace(CONFIGS[0].product, wave_m=0)},
            "product: config.wave_m is 0; it must be an int of at least 1",
        ),
    ],
)
def test_a_config_that_cannot_run_says_why(changes, text):
    config = dataclasses.replace(CONFIGS[0], **changes)
    with pytest.raises(ConfigError) as caught:
        ops.norm_linear(*operands(OPS[0], 2, 3, 4, "float32"), config=config, target="toy")
    assert text in str(caught.value)


# -- counts ----------------------------------------------------------------------------------------


@parametrize_op
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("hold", [True, False])
def test_work_instructions_and_bytes_are_exactly_the_formula(op, used, hold):
    m, n, k = 40, 3 * TOY.moving_fmax + 5, 45
    config = op.configure({"M": m, "N": n, "K": k}, "bfloat16", TOY)
    product = dataclasses.replace(config.product, wave_m=2, wave_n=2, hold_a=hold)
    config = dataclasses.replace(config, product=product, chunk=16)
    inputs = operands(op, m, n, k, "bfloat16", used)
    trace = op.launch(inputs, {}, config=config, target="toy").trace
    rows, blocks, waves, slices, chunks = 5, 3, 2, -(-k // TOY.partitions), 3
    loads = blocks * (1 if hold else waves) * slices
    stored = op is OPS[0]
    want = Counter({"nc_matmul": rows * 4 * slices, "memset": 1})
    want["dma_transpose"] = loads + stored * blocks * waves * slices
    want["dma_copy"] = (not stored) * blocks * waves * slices + rows * chunks + rows * waves
    want["activation"] = rows * (chunks + 1)
    want["tensor_scalar"] = rows + used[0] * loads
    evictions = rows * 4
    if used[1]:
        want["dma_copy"] += blocks * waves
        want["scalar_tensor_tensor"] += evictions
    if used[0]:
        for opcode in ("dma_copy", "nc_transpose", "tensor_copy"):
            want[opcode] += 2
    got = Counter(e.opcode for e in trace)
    if not used[1]:  # Vector and Scalar share the evictions
        assert got["activation"] > want["activation"]
        assert sum(got[o] - want[o] for o in ("activation", "tensor_scalar")) == evictions
        for opcode in ("activation", "tensor_scalar"):
            got.pop(opcode), want.pop(opcode)
    assert got == +want
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    assert 2 * sum(work.macs for work in passes) == 2 * m * n * k
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    assert sum(work.hbm_write_bytes for work in moved) == 2 * m * n
    again = m * k * (1 if hold else waves)
    parameters = used[0] * k + used[1] * n * (
        TOY.stationary_fmax * 2 + m - 2 * 2 * TOY.stationary_fmax
    )
    read = 2 * (again + m * k + blocks * n * k + parameters)
    assert sum(work.hbm_read_bytes for work in moved) == read


def test_values_change_no_event():
    inputs = operands(OPS[0], 21, 37, 30, "bfloat16")
    values = OPS[0].launch(inputs, {}, target="toy")
    shapes = OPS[0].launch([Abstract(x.shape, "bfloat16") for x in inputs], {}, target="toy")
    assert [(e.opcode, e.work) for e in shapes.trace] == [(e.opcode, e.work) for e in values.trace]


# -- mutants ---------------------------------------------------------------------------------------


def forget_the_gain(monkeypatch):
    monkeypatch.setattr(kernel, "_ready", kernel.ready_slice)


def the_factor_of_the_first_rows(monkeypatch):
    real = kernel._squares
    monkeypatch.setattr(
        kernel, "_squares", lambda x, rows, *rest: real(x, (0, rows[1] - rows[0]), *rest)
    )


def forget_the_mean(monkeypatch):
    real = kernel.inverse_rms
    monkeypatch.setattr(
        kernel, "inverse_rms", lambda squares, size, epsilon: real(squares, 1, epsilon)
    )


def bias_before_the_factor(monkeypatch):
    def wrong(dst, psum, factor, bias, engine):
        total = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=total, data1=psum, data2=bias, op=nl.add)
        nisa.tensor_scalar(dst=dst, data=total, op0=nl.multiply, operand0=factor)

    module = sys.modules["nki_kernels.kernels.projection.norm_linear"]
    monkeypatch.setattr(module, "evict_scaled", wrong)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    "mutant",
    [forget_the_gain, the_factor_of_the_first_rows, forget_the_mean, bias_before_the_factor],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    inputs = operands(OPS[1], 20, 40, 24, dtype)
    compare(run(OPS[1], inputs, target="toy"), OPS[1], inputs, "toy", "right")
    mutant(monkeypatch)
    got = run(OPS[1], inputs, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, OPS[1], inputs, "toy", mutant.__name__)
