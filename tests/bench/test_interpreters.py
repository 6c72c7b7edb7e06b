"""Ours beside the interpreter of a triton-viz checkout: a stand-in of its layout, not its code."""

from __future__ import annotations

import pytest

from bench.interpreters import measure_interpreters
from bench.record import BenchError

INTERPRETER = """
import numpy as np

def nki_patch_lang():
    pass

class NKIBeta2InterpretedFunction:
    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, *args, grid):
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        *inputs, out = arrays
        out[...] = {factor} * self.kernel.reference(*inputs)
"""
MATMUL = """
import nki.isa as nisa
import nki.language as nl
import numpy as np

def matmul_kernel(lhsT, rhs, result):
    for m in range(4):
        acc = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        for k in range(4):
            a = nl.ndarray((128, 128), dtype=lhsT.dtype, buffer=nl.sbuf)
            b = nl.ndarray((128, 512), dtype=rhs.dtype, buffer=nl.sbuf)
            nisa.dma_copy(a, lhsT[k * 128 : (k + 1) * 128, m * 128 : (m + 1) * 128])
            nisa.dma_copy(b, rhs[k * 128 : (k + 1) * 128, :])
            nisa.nc_matmul(acc, a, b)
        c = nl.ndarray((128, 512), nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(c, acc)
        nisa.dma_copy(result[m * 128 : (m + 1) * 128, :], c)

matmul_kernel.reference = lambda a, b: a.astype(np.float32).T @ b.astype(np.float32)
"""
ATTENTION = """
import nki.isa as nisa
import nki.language as nl
import numpy as np

def reference(q, k, v):
    s = q[0, 0].astype(np.float64) @ k[0, 0].T.astype(np.float64) / np.sqrt(128)
    p = np.exp(s - s.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True) @ v[0, 0])[None, None]

def tiled_attention_kernel(q, k, v, out, *sizes):
    answer = reference(q.numpy(), k.numpy(), v.numpy())[0, 0].astype(np.float32)
    for row in range(0, 2048, 128):
        tile = nl.ndarray((128, 128), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(tile, q[0, 0, row : row + 128, :])
        tile.mem.array(tile.region, np.float32)[...] = answer[row : row + 128]
        nisa.dma_copy(out[0, 0, row : row + 128, :], tile)

tiled_attention_kernel.reference = reference
"""


@pytest.fixture
def checkout(tmp_path):
    def make(factor=1):
        core = tmp_path / "triton_viz/core/simulation"
        core.mkdir(parents=True)
        (core / "nki_beta2.py").write_text(INTERPRETER.replace("{factor}", str(factor)))
        examples = tmp_path / "examples/nki_beta2"
        examples.mkdir(parents=True)
        (examples / "matmul.py").write_text(MATMUL)
        (examples / "tiled_attention.py").write_text(ATTENTION)
        return tmp_path

    return make


def test_both_sides_run_the_examples_and_the_ratio_is_theirs_below(checkout, monkeypatch):
    monkeypatch.setattr("bench.interpreters._TURNS", 1)
    results = list(measure_interpreters(checkout()))
    assert len(results) == 6
    for ours, theirs, ratio in (results[:3], results[3:]):
        assert round(ratio.value * theirs.value / ours.value, 9) == 1
        assert (ratio.limit, ratio.within) == (1.0, ratio.value <= 1.0)


def test_a_wrong_result_is_refused_and_not_timed(checkout):
    with pytest.raises(BenchError, match=r"theirs failed: .*theirs computed something else"):
        list(measure_interpreters(checkout(factor=2)))


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(BenchError, match=r"no triton_viz/core.* name a checkout of"):
        list(measure_interpreters(tmp_path))
