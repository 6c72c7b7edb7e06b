"""The kernels of the validation compute what they say and move what their originals moved."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.validate import trn1, whole
from bench.validate.baselines import documented_ns, roofline_ns
from bench.validate.run import Timed
from nki_kernels.hardware import TRN2
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from nki_kernels.machine.tensor import Abstract


def integers(*shape):
    return np.random.default_rng(7).integers(-3, 4, shape).astype(np.float32)


def run(kernel, *args, **options):
    return launch(kernel, args, {}, target="trn2", lnc=1, options=Options(**options))


@pytest.mark.parametrize(
    ("kernel", "extra", "sizes"),
    [
        (whole.matmul_tiled, (), (256, 256, 1024)),
        (whole.matmul_hoisted, (), (256, 256, 1024)),
        (whole.matmul_blocked, (), (1024, 2048, 1024)),
        (trn1.matmul_block_free, (), (256, 512, 1024)),
        (whole.gemm, (1,), (256, 256, 384)),
        (whole.gemm, (3,), (256, 256, 384)),
    ],
)
def test_matmuls_are_exact_on_small_integers(kernel, extra, sizes):
    k, m, n = sizes
    a, b = integers(k, m), integers(k, n)
    assert np.array_equal(run(kernel, a, b, *extra).outputs[0], a.T @ b)


@pytest.mark.parametrize("rows", [5, 8, 17])
def test_maxpool(rows):
    x = integers(19, 40)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3))
    assert np.array_equal(run(whole.maxpool, x, rows).outputs[0], windows.max((2, 3)))


def test_additions():
    a, b = integers(128, 12), integers(128, 12) + 1
    assert np.array_equal(run(whole.add_streamed, a, b, 4).outputs[0], a + b)
    a, b = a.reshape(-1, 1), b.reshape(-1, 1)
    assert np.array_equal(run(whole.add_tiled, a, b, 64).outputs[0], a + b)


def dmas(kernel, *args):
    timed = Timed(kernel, *args)
    moved = timed.timeline.hbm_read_bytes + timed.timeline.hbm_write_bytes
    return len(timed.find("dma_copy")), moved


def test_counts_are_those_of_the_measured_kernels():
    image = Abstract((4096, 4096), "float32")
    assert dmas(whole.maxpool, image, 89) == (184, 268_271_632)
    assert dmas(whole.maxpool, image, 128) == (128, 268_271_632)
    square = Abstract((512, 512), "float32")
    gemm = Timed(whole.gemm, square, square, 4)
    # Each float32 nc_matmul is two MATMUL passes: 128 were counted.
    assert len(gemm.find("nc_matmul")) * TRN2.pe.fp32_passes == 128
    assert len(gemm.find("dma_copy")) == 33
    wide = Abstract((128, 2000), "float32")
    assert dmas(whole.add_streamed, wide, wide, 2000)[0] == 3
    assert dmas(whole.add_streamed, wide, wide, 1000)[0] == 6


def test_tutorial_versions_move_the_bytes_of_their_loops():
    # 1/4, 1/4, 1/4 of the tutorial's K, M, N: every tile count of a version scales with its loops.
    a, b = Abstract((2048, 1024), "float32"), Abstract((2048, 2048), "float32")
    m, n, k = 8, 4, 16
    left, right, out = 64 * 1024, 256 * 1024, 256 * 1024
    tiled = m * n * k * (left + right) + m * n * out
    assert dmas(whole.matmul_tiled, a, b) == (m * n * (2 * k + 1), tiled)
    hoisted = m * k * left + m * n * k * right + m * n * out
    assert dmas(whole.matmul_hoisted, a, b) == (m * k + m * n * k + m * n, hoisted)


def test_the_roofline_is_the_larger_bound():
    a, b = Abstract((1024, 2048), "float32"), Abstract((1024, 1024), "float32")
    # 256 products of 128 x 128 x 512, in a form all floats here hold exactly.
    flops = 2 * 1024 * 2048 * 1024
    product = flops / 256 / (TRN2.peak_tflops("float32") * 1e3)
    blocked = run(whole.matmul_blocked, a, b).trace
    assert roofline_ns(blocked) == math.fsum([product] * 256)
    tiled = run(whole.matmul_tiled, a, b).trace
    assert roofline_ns(tiled) == dmas(whole.matmul_tiled, a, b)[1] / TRN2.hbm_bytes_per_ns


def test_documented_formulas_take_the_longest_engine():
    wide = Abstract((128, 2000), "float32")
    # One float32 addition from SBUF: 2 n cycles, longer than its three triggers.
    trace = run(whole.add_streamed, wide, wide, 2000).trace
    vector = 2 * 2000 / TRN2.vector.clock_ghz
    moved = 3 * 128 * 2000 * 4 / TRN2.hbm_bytes_per_ns
    assert documented_ns(trace) == max(vector, moved)
    column = Abstract((1280, 1), "float32")
    trace = run(whole.add_tiled, column, column, 128).trace
    triggers = sum(event.opcode == "dma_copy" for event in trace)
    assert documented_ns(trace) == triggers * TRN2.dma.hw_queue_ns


def scan_of_states(delta, u, a, b, c):
    """The selective scan, one time step after the other."""
    state = np.zeros((*delta.shape[:1], b.shape[0]))
    out = np.zeros(delta.shape)
    for t in range(delta.shape[1]):
        decay = np.exp(delta[:, t : t + 1].astype(float) * a)
        state = decay * state + (delta[:, t] * u[:, t])[:, None] * b[:, t]
        out[:, t] = state @ c[:, t]
    return out


@pytest.mark.parametrize(
    ("kernel", "extra"),
    [(trn1.mamba_v1, ()), (trn1.mamba_tiled, (32,)), (trn1.mamba_tiled, (8,))],
)
def test_mamba(kernel, extra):
    rng = np.random.default_rng(0)
    delta, u = (rng.random((256, 32), np.float32) for _ in range(2))
    a = -rng.random((256, 4), np.float32)
    b, c = (rng.standard_normal((4, 32)).astype(np.float32) for _ in range(2))
    found = run(kernel, delta, u, a, b, c, *extra).outputs[0]
    expected = scan_of_states(delta, u, a, b, c)
    terms = scan_of_states(delta, u, a, np.abs(b), np.abs(c))
    # Every term is rounded a few times a step: exponential, products, the scan, the sum of states.
    allowed = 6 * (delta.shape[1] + b.shape[0]) * np.spacing(terms.astype(np.float32))
    assert (np.abs(found - expected) <= allowed).all()


def test_the_versions_of_mamba_move_less_and_less():
    wide, narrow = Abstract((256, 64), "float32"), Abstract((4, 64), "float32")
    arguments = (wide, wide, Abstract((256, 4), "float32"), narrow, narrow)
    loaded = [
        Timed(kernel, *arguments, *extra, target="trn1").timeline.hbm_read_bytes
        for kernel, extra in ((trn1.mamba_v1, ()), (trn1.mamba_tiled, (64,)))
    ]
    per_tile = 2 * 128 * 64 * 4
    rows = 2 * 2 * 4 * 128 * 64 * 4
    assert loaded == [
        2 * 4 * per_tile + 2 * 4 * 128 * 4 + rows,
        2 * per_tile + 2 * 128 * 4 * 4 + rows,
    ]
