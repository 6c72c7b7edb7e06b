"""What the traces of the normalizations must contain: instructions and bytes, exactly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nki_kernels.kernels.norm import LayerNormConfig, RmsNormConfig
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES, EVERY, TOY, TRN2, operands

SHAPES = [(1, 1), (8, 16), (9, 17), (19, 50), (33, 49)]
CONFIGS = {
    "rms_norm": [
        RmsNormConfig(chunk=64, piece=64, ahead=0, together=0, scalar=0, pool=0, hwdge=False),
        RmsNormConfig(chunk=16, piece=5, ahead=1, together=0, scalar=0, pool=0, hwdge=True),
        RmsNormConfig(chunk=7, piece=16, ahead=1, together=0, scalar=0, pool=0, hwdge=True),
    ],
    "layer_norm": [
        LayerNormConfig(
            vector_stats=50, pool_shift=0, pool_scale=0,
            chunk=64, piece=64, ahead=0, overlap=False, hwdge=False,
        ),
        LayerNormConfig(
            vector_stats=0, pool_shift=7, pool_scale=20,
            chunk=16, piece=5, ahead=0, overlap=True, hwdge=True,
        ),
        LayerNormConfig(
            vector_stats=32, pool_shift=40, pool_scale=40,
            chunk=9, piece=16, ahead=0, overlap=True, hwdge=True,
        ),
    ],
}  # fmt: skip
COUNTED = [
    (op, present, config, shape)
    for op, present in EVERY
    for config in CONFIGS[op]
    for shape in SHAPES
]
IDS = [f"{op}-{'+'.join(p) or 'plain'}-{c.chunk}-{n}x{h}" for op, p, c, (n, h) in COUNTED]


def pieces(start, stop, size):
    """Return into how many pieces of `size` start .. stop - 1 is cut."""
    return max(0, -(-(stop - start) // size))


def rms_norm(n, h, present, config):
    tiles = pieces(0, n, TOY.partitions)
    stores = (tiles - 1) * pieces(0, h, config.chunk) + pieces(0, h, config.piece)
    return {
        "memset": 1,
        # The first rows and the weight come in pieces.
        "dma_copy": (1 + len(present)) * pieces(0, h, config.piece) + tiles - 1 + stores,
        "activation": pieces(0, h, config.piece) + (tiles - 1) * pieces(0, h, config.chunk),
        # One reciprocal square root per row tile, and the sum before it.
        "tensor_scalar": tiles + (0 if present else stores),
        "scalar_tensor_tensor": tiles + (stores if present else 0),
    }


def scaling(present, size, config):
    """Return the instructions that turn a piece of a row into its result."""
    if not present:
        return ["tensor_scalar"]
    if present == ("bias",):
        return ["tensor_scalar", "tensor_tensor"]
    if present == ("weight",):
        return ["scalar_tensor_tensor", "tensor_scalar"]
    part = size / max(size, config.chunk)
    by_scalar = min(size, int(config.pool_shift * part))
    by_pool = min(size, int((config.pool_shift + config.pool_scale) * part))
    return [
        "scalar_tensor_tensor",
        *["activation"] * (by_scalar > 0),
        *["tensor_tensor"] * (by_scalar < by_pool),
        *["scalar_tensor_tensor"] * (by_pool < size),
        *["tensor_tensor"] * (by_pool > 0),
    ]


def layer_norm(n, h, present, config):
    tiles = pieces(0, n, TOY.partitions)
    cuts = [min(config.chunk, h - at) for at in range(0, h, config.chunk)]
    counts = Counter(
        memset=1, dma_copy=len(present) * len(cuts),
        bn_aggr=tiles, tensor_scalar=tiles, scalar_tensor_tensor=tiles,
    )  # fmt: skip
    for index in range(tiles):
        by_vector = config.vector_stats
        if index == 0:
            by_vector = max(by_vector, (config.chunk + 1) // 2)
        for width in cuts:
            share = min(width, by_vector)
            counts["dma_copy"] += pieces(0, width, config.piece) if index == 0 else 1
            counts["bn_stats"] += pieces(0, share, TOY.bn_stats_fmax)
            # Mean, then squares about it; and the count of these columns, once per tile in turn.
            counts["activation"] += 2 * (share < width)
            counts["memset"] += share < width and index <= 2
            step = config.piece if index == tiles - 1 else config.chunk
            for at in range(0, width, step):
                counts.update(["dma_copy", *scaling(present, min(step, width - at), config)])
    return counts


FORMULAS = {"rms_norm": rms_norm, "layer_norm": layer_norm}


@pytest.mark.parametrize(("op", "present", "config", "shape"), COUNTED, ids=IDS)
def test_instructions_are_exactly_the_formula(op, present, config, shape):
    inputs = operands(op, *shape, "bfloat16", given=present)
    run = OPERATORS[op].launch(inputs, {}, config=config, target="toy")
    counts = {k: v for k, v in FORMULAS[op](*shape, present, config).items() if v}
    assert Counter(event.opcode for event in run.trace) == counts


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "present"), EVERY)
def test_bytes_are_exactly_the_formula(op, present, shape, dtype, out_dtype):
    n, h = shape
    inputs = operands(op, n, h, dtype, given=present)
    run = OPERATORS[op].launch(inputs, {"out_dtype": out_dtype}, target="toy")
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    itemsize, out_size = (np.dtype(DTYPES[name]).itemsize for name in (dtype, out_dtype))
    # Each partition of the first row tile reads the parameters for itself.
    vectors = len(present) * min(n, TOY.partitions) * h
    assert sum(work.hbm_read_bytes for work in moved) == (n * h + vectors) * itemsize
    assert sum(work.hbm_write_bytes for work in moved) == n * h * out_size


@pytest.mark.parametrize(("op", "per_element"), [("rms_norm", 4), ("layer_norm", 8)])
def test_work_and_compulsory_bytes(op, per_element):
    axes = {"N": 3, "H": 5}
    assert OPERATORS[op].flops(axes) == per_element * 15
    vectors = len(OPERATORS[op].inputs) - 1
    assert OPERATORS[op].min_bytes(axes, "bfloat16") == 2 * (15 + 5 * vectors + 15)
    assert OPERATORS[op].min_bytes(axes, "float16", "float32") == 2 * (15 + 5 * vectors) + 4 * 15
    assert OPERATORS[op].output_shapes(*OPERATORS[op].input_shapes(axes)) == ((3, 5),)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "present"), EVERY)
def test_values_change_no_event(op, present, shape, dtype):
    inputs = operands(op, *shape, dtype, given=present)
    with_values = OPERATORS[op].launch(inputs, {}, target="toy")
    shapes = [None if x is None else Abstract(x.shape, dtype) for x in inputs]
    shapes_only = OPERATORS[op].launch(shapes, {}, target="toy")
    assert shapes_only.outputs == (None,)

    def facts(run):
        return [(e.opcode, e.engine, e.work, e.loop) for e in run.trace]

    assert facts(shapes_only) == facts(with_values)
    assert shapes_only.time().total_ns == with_values.time().total_ns


@pytest.mark.parametrize(("op", "present"), EVERY)
def test_the_functions_of_the_scalar_engine_share_a_table(op, present):
    """Square is in one, and copy in every one: a reload would cost 1.3 us per row tile."""
    shapes = OPERATORS[op].input_shapes({"N": 1024, "H": 2048})
    names = [operand.name for operand in OPERATORS[op].inputs]
    inputs = [
        Abstract(shape, "bfloat16") if name in ("x", *present) else None
        for name, shape in zip(names, shapes, strict=True)
    ]
    functions = {
        event.work.function
        for event in OPERATORS[op].launch(inputs, {}, target="trn2").trace
        if event.opcode == "activation"
    }
    assert "square" in functions
    assert any(functions - {"copy"} <= table for table in TRN2.scalar.table_sets)
