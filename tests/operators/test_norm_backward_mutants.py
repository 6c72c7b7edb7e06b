"""Mutants of the backward kernels, which the comparison must reject; counts from their traces."""

from __future__ import annotations

import sys
from collections import Counter

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.kernels.norm import LayerNormBackwardConfig, RmsNormBackwardConfig
from nki_kernels.kernels.norm import steps as steps_module
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators import OPERATORS
from tests.operators.norm_gradients import BACKWARD, EVERY, call, compare, operands
from tests.operators.norms import DTYPES, TOY

N, H, EPS = 3 * TOY.partitions + 5, 29, 0.25
CONFIGS = {
    "rms_norm_backward": RmsNormBackwardConfig(chunk=13, pool=5, ahead=1, overlap=True, hwdge=True),
    "layer_norm_backward": LayerNormBackwardConfig(
        chunk=13, pool=5, vector_stats=5, ahead=1, overlap=True, hwdge=True
    ),
}


class Patch:
    """Replaces pieces of the kernel of one operator, and instructions, for one test."""

    def __init__(self, op, monkeypatch):
        self.op = op
        self.monkeypatch = monkeypatch
        self.module = sys.modules[OPERATORS[op].kernel.__module__]

    def piece(self, name, change, module=None):
        module = module or self.module
        real = getattr(module, name)
        self.monkeypatch.setattr(module, name, lambda *a, **k: change(real, *a, **k))

    def instruction(self, name, change):
        real = getattr(nisa, name)
        self.monkeypatch.setattr(nisa, name, lambda **k: change(real, **k))


def keep_the_sums_of_the_last_row_tile(patch):
    """Overwrite the column sums with every row tile."""
    patch.piece("collect", lambda real, *a: real(*a[:-1], True))


def leave_out_the_last_block(patch):
    def fewer(real, total, sums, size, first):
        real(total, sums, size if first else size - 1, first)

    patch.piece("collect", fewer)


def forget_the_weight(patch):
    patch.piece("broadcast_rows", lambda real, *args: None)


def forget_eps(patch):
    patch.piece("root_constants", lambda real, value: real(0.0))


def sum_along_the_rows_without_the_last_chunk(patch):
    """Leave the last chunk out of the row sums."""

    def fewer(real, columns):
        return real(columns[:, 0 : columns.shape[1] - 1])

    patch.piece("add_up", fewer)


def leave_out_the_inner_product(patch):
    """dx = r * g, as if r did not depend on x."""

    def nothing(real, result, data, by, column):
        nisa.memset(dst=result, value=0.0)

    patch.piece("multiply_columns", nothing)


def divide_by_one_more(patch):
    def biased(real, result, data, by, column):
        real(result, data, by * H / (H + 1) if isinstance(by, float) else by, column)

    patch.piece("multiply_columns", biased)


def forget_one_factor(patch):
    """-r^2 instead of -r^3."""

    def plain(real, result, data, by, column):
        if isinstance(by, float):
            return real(result, data, by, column)
        nisa.tensor_tensor(dst=result, data1=data, data2=column, op=nl.multiply)
        return None

    patch.piece("multiply_columns", plain)


def let_gpsimd_take_a_column_less(patch):
    """Multiply a column of GpSimd's share by itself."""

    def shifted(real, **k):
        if k.get("engine") == nisa.engine.gpsimd:
            k["data2"] = k["data1"]
        return real(**k)

    patch.instruction("tensor_tensor", shifted)


def store_what_was_stored_before(patch):
    stores = []

    def stale(real, ready, config):
        if ready is not None:
            stores.append(ready[1])
            same = [s for s in stores[:-1] if s.shape == ready[1].shape]
            ready = (ready[0], same[0] if same else ready[1])
        return real(ready, config)

    patch.piece("store_ready", stale)


def load_the_first_rows(patch):
    def first(real, source, rows, columns, config):
        return real(source, (0, rows[1] - rows[0]), columns, config)

    patch.piece("load_chunk", first, module=steps_module)


def keep_products_in_bfloat16(patch):
    def rounded(real, data1, data2, config):
        result = real(data1, data2, config)
        narrow = nl.ndarray(result.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.tensor_copy(dst=narrow, src=result)
        nisa.tensor_copy(dst=result, src=narrow)
        return result

    patch.piece("multiply_shared", rounded)


ANY = tuple(DTYPES)
MUTANTS = [
    (keep_the_sums_of_the_last_row_tile, ANY), (leave_out_the_last_block, ANY),
    (forget_the_weight, ANY), (forget_eps, ANY), (leave_out_the_inner_product, ANY),
    (sum_along_the_rows_without_the_last_chunk, ANY), (divide_by_one_more, ANY),
    (forget_one_factor, ANY), (let_gpsimd_take_a_column_less, ANY),
    (store_what_was_stored_before, ANY), (load_the_first_rows, ANY),
    (keep_products_in_bfloat16, ("float32",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mutant", "dtype"),
    [(mutant, dtype) for mutant, dtypes in MUTANTS for dtype in dtypes],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("op", BACKWARD)
def test_a_mutated_kernel_is_rejected(op, mutant, dtype, monkeypatch):
    dy, x, weight = operands(op, N, H, dtype)
    # Gradients that agree with x, so that their inner product matters, and a mean that does.
    x = (x.astype(np.float64) + 0.5).astype(x.dtype)
    dy = (dy.astype(np.float64) + 2 * x.astype(np.float64)).astype(dy.dtype)
    inputs = (dy, x, weight)

    def run():
        return call(op, inputs, eps=EPS, config=CONFIGS[op], target="toy")

    compare(op, run(), inputs, "toy", "right", eps=EPS)
    mutant(Patch(op, monkeypatch))
    with pytest.raises(AssertionError, match="worst at"):
        compare(op, run(), inputs, "toy", mutant.__name__, eps=EPS)


@pytest.mark.parametrize("op", BACKWARD)
def test_a_kernel_that_forgets_to_write_is_refused(op, monkeypatch):
    seen = []

    def forgetful(real, ready, config):
        if ready is not None:
            seen.append(ready)
            if len(seen) == 3:
                return None
        return real(ready, config)

    Patch(op, monkeypatch).piece("store_ready", forgetful)
    with pytest.raises(NkiKernelsError, match="no instruction wrote"):
        call(op, operands(op, N, H, "float32"), config=CONFIGS[op], target="toy")


# -- counts ----------------------------------------------------------------------------------------

SHAPES = [(1, 1), (8, 8), (9, 17), (33, 29)]


def pieces(size, width):
    return -(-size // width)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "weighted"), EVERY)
def test_instructions_are_exactly_the_formula(op, weighted, shape):
    n, h = shape
    block = TOY.stationary_fmax
    config = CONFIGS[op]
    width = pieces(config.chunk, block) * block
    tiles, chunks, layer = pieces(n, TOY.partitions), pieces(h, width), "layer" in op
    cuts = [min(width, h - at) for at in range(0, h, width)]
    shares = sum(1 + (c > config.pool) for c in cuts)
    stats = (
        sum(pieces(min(config.vector_stats, c), TOY.bn_stats_fmax) for c in cuts) if layer else 0
    )
    scalar = sum(c > config.vector_stats for c in cuts) if layer else 0
    whole, rest = h // block, h % block > 0
    ends = pieces(whole, TOY.partitions) * (1 + layer)
    reduces = chunks > 1
    parts = ((whole > 0) + rest) * (1 + layer)
    counts = Counter(
        dma_copy=3 * tiles * chunks + weighted + ends + rest * (1 + layer),
        nc_matmul=tiles * pieces(h, block) * (1 + layer),
        nc_transpose=ends,
        # Once per part of the sums the first row tile's, and each end.
        tensor_copy=(parts + ends + rest * (1 + layer)),
        memset=1 + layer + (3 * scalar if layer else 0),
        bn_stats=tiles * stats,
        bn_aggr=tiles * layer,
    )
    if layer:
        counts["tensor_tensor"] = tiles * 2 * shares * weighted + (tiles - 1) * parts
        # Two passes of statistics, two row sums, and one part of dx.
        counts["activation"] = tiles * (2 * scalar + 3 * chunks)
        counts["scalar_tensor_tensor"] = tiles * (2 * chunks + 5)
        counts["tensor_reduce"] = 2 * tiles * reduces
    else:
        counts["tensor_tensor"] = tiles * shares * (1 + weighted) + (tiles - 1) * parts
        # Squares and the row sum; without a weight Scalar scales dy.
        counts["activation"] = tiles * (2 * chunks + (not weighted) * chunks)
        counts["scalar_tensor_tensor"] = tiles * ((1 + weighted) * chunks + 3)
        counts["tensor_reduce"] = 2 * tiles * reduces
    counts["tensor_scalar"] = tiles  # the root
    inputs = operands(op, n, h, "bfloat16", weighted=weighted)
    run = OPERATORS[op].launch(inputs, {}, config=config, target="toy")
    assert Counter(e.opcode for e in run.trace) == {k: v for k, v in counts.items() if v}


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "weighted"), EVERY)
def test_bytes_and_work_are_exactly_the_formula(op, weighted, shape, out_dtype):
    n, h = shape
    inputs = operands(op, n, h, "float32", weighted=weighted)
    run = OPERATORS[op].launch(inputs, {"out_dtype": out_dtype}, target="toy")
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    vectors = weighted * min(n, TOY.partitions) * h
    assert sum(work.hbm_read_bytes for work in moved) == 4 * (2 * n * h + vectors)
    outputs = 2 if "layer" in op else 1
    size = np.dtype(DTYPES[out_dtype]).itemsize
    assert sum(work.hbm_write_bytes for work in moved) == size * (n * h + outputs * h)
    axes = {"N": n, "H": h}
    assert OPERATORS[op].flops(axes) == (16 if "layer" in op else 10) * n * h
    assert OPERATORS[op].min_bytes(axes, "float32", out_dtype) == (
        4 * (2 * n * h + h) + size * (n * h + outputs * h)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "weighted"), EVERY)
def test_values_change_no_event(op, weighted, dtype):
    inputs = operands(op, 19, 29, dtype, weighted=weighted)
    with_values = OPERATORS[op].launch(inputs, {}, target="toy")
    shapes = [None if x is None else Abstract(x.shape, dtype) for x in inputs]
    shapes_only = OPERATORS[op].launch(shapes, {}, target="toy")

    def facts(run):
        return [(e.opcode, e.engine, e.work, e.loop) for e in run.trace]

    assert facts(shapes_only) == facts(with_values)
    assert shapes_only.time().total_ns == with_values.time().total_ns


def test_stages_see_every_chunk_once_and_in_order():
    for tiles, chunks, slack, ahead in [(1, 1, 0, 0), (3, 2, 1, 1), (2, 5, 0, 2)]:
        for overlap in (True, False):
            offsets = steps_module.backward_offsets(chunks, slack, ahead)
            steps = steps_module.pipeline(tiles, chunks, offsets, overlap)
            every = [(tile, chunk) for tile in range(tiles) for chunk in range(chunks)]
            at = {}
            for stage in ("load_x", "measure", "load_dy", "multiply", "write"):
                assert [step[stage] for step in steps if stage in step] == every
                at[stage] = {step[stage]: i for i, step in enumerate(steps) if stage in step}
            for tile, chunk in every:
                assert at["load_x"][tile, chunk] + ahead == at["measure"][tile, chunk]
                assert at["load_dy"][tile, chunk] + ahead == at["multiply"][tile, chunk]
                last = chunks - 1
                assert at["measure"][tile, last] + slack < at["multiply"][tile, 0]
                assert at["multiply"][tile, last] + slack < at["write"][tile, 0]
