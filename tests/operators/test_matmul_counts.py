"""What matmul's trace must contain: work, instructions and bytes, exactly."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from tests.operators.test_matmul import CONFIGS, DTYPES, MATMUL, TOY, operands

COUNTED = [(1, 1, 1), (9, 17, 20), (16, 32, 24), (40, 70, 45)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", COUNTED)
def test_work_is_exactly_the_formula(shape, dtype):
    m, n, k = shape
    run = MATMUL.launch(operands(*shape, dtype), {}, target="toy")
    passes = [
        e.work for e in run.trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"
    ]  # fmt: skip
    assert sum(work.macs for work in passes) == m * n * k
    assert 2 * m * n * k == MATMUL.flops({"M": m, "N": n, "K": k})
    tiles = zip(shape, (TOY.stationary_fmax, TOY.moving_fmax, TOY.partitions), strict=True)
    assert len(passes) == math.prod(-(-size // tile) for size, tile in tiles)
    moved = [e.work for e in run.trace if isinstance(e.work, DmaWork)]
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    assert sum(work.hbm_write_bytes for work in moved) == m * n * itemsize


def formula(shape, config):
    """Return how many instructions of each kind, and how many elements of A and B are read."""
    m, n, k = shape
    tiles_m, tiles_n = -(-m // TOY.stationary_fmax), -(-n // TOY.moving_fmax)
    slices = -(-k // TOY.partitions)
    waves_m, waves_n = -(-tiles_m // config.wave_m), -(-tiles_n // config.wave_n)
    reads_of_a = 1 if config.hold_a else waves_n
    by_pe = config.transpose == "pe"
    counts = {
        "nc_matmul": tiles_m * tiles_n * slices,
        "nc_transpose": by_pe * tiles_m * slices * reads_of_a,
        "dma_transpose": (not by_pe) * waves_m * slices * reads_of_a,
        "tensor_copy": tiles_m * tiles_n + by_pe * waves_m * slices * reads_of_a,
        "dma_copy": waves_m * waves_n * slices
        + tiles_m * waves_n
        + by_pe * tiles_m * slices * reads_of_a,
    }
    return counts, m * k * reads_of_a + k * n * waves_m


@pytest.mark.parametrize("config", CONFIGS[::5], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", COUNTED)
def test_instructions_and_bytes_are_exactly_the_formula(shape, dtype, config):
    if dtype == "float32":
        config = dataclasses.replace(config, transpose="pe")
    run = MATMUL.launch(operands(*shape, dtype), {}, config=config, target="toy")
    counts, elements = formula(shape, config)
    assert Counter(e.opcode for e in run.trace) == Counter({k: v for k, v in counts.items() if v})
    read = sum(e.work.hbm_read_bytes for e in run.trace if isinstance(e.work, DmaWork))
    assert read == elements * np.dtype(DTYPES[dtype]).itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", COUNTED)
def test_values_change_no_event(shape, dtype):
    inputs = operands(*shape, dtype)
    with_values = MATMUL.launch(inputs, {}, target="toy")
    shapes_only = MATMUL.launch([Abstract(x.shape, dtype) for x in inputs], {}, target="toy")
    assert shapes_only.outputs == (None,)

    def facts(run):
        return [(e.opcode, e.engine, e.work, e.loop) for e in run.trace]

    assert facts(shapes_only) == facts(with_values)
    assert shapes_only.time().total_ns == with_values.time().total_ns
