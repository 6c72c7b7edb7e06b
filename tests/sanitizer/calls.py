"""Bugs of single calls: memories, partitions, access patterns, types, banks."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from tests.sanitizer.bug import Bug, filled, hbm, loaded, ones, pair, ps, sb, stored

GPSIMD, VECTOR = nisa.engine.gpsimd, nisa.engine.vector
HW = nisa.dge_mode.hwdge


# -- buffer ----------------------------------------------------------------------------------------


def product(x):
    acc = ps(4, 4)
    tile = loaded(x)
    nisa.nc_matmul(acc, tile, tile, accumulate=False)
    return acc


def copy_sum(engine, x):
    result = sb(4, 4)
    nisa.tensor_copy(result, product(x), engine=engine)
    return stored(result)


def store_psum(direct, x):
    acc = product(x)
    if not direct:
        return stored(acc)
    out = hbm(4, 4)
    nisa.dma_copy(dst=out, src=acc)
    return out


def add_two(buffers, x):
    tiles = []
    for place in buffers:
        tile = nl.ndarray((4, 4), nl.float32, buffer=place)
        nisa.tensor_copy(tile, product(x))
        tiles.append(tile)
    nisa.tensor_tensor(out := sb(4, 4), *tiles, nl.add)
    return stored(out)


def square_of(chip, x):
    source = loaded(x) if chip else x
    out = sb(4, 4)
    nisa.activation(out, nl.square, source)
    return stored(out)


def matmul_operand(buffer, x):
    moving = nl.ndarray((4, 4), nl.float32, buffer=buffer)
    nisa.tensor_copy(moving, product(x))
    acc = ps(4, 4)
    nisa.nc_matmul(acc, loaded(x), moving, accumulate=False)
    return stored(acc)


def matmul_into(buffer, x):
    acc = nl.ndarray((4, 4), nl.float32, buffer=buffer)
    if buffer is nl.psum:
        nisa.nc_matmul(acc, loaded(x), loaded(x), accumulate=False)
    else:
        nisa.nc_matmul(acc, loaded(x), loaded(x))
    return stored(acc)


X = (ones(4, 4),)
BUFFER = [
    Bug("GpSimd reads PSUM", "buffer", *pair(copy_sum, GPSIMD, VECTOR),
        ("is in PSUM and the engine is gpsimd", "use the vector or scalar engine"), X),
    Bug("a DMA reads PSUM", "buffer", *pair(store_psum, True, False),
        ("src is in PSUM", "copy it to SBUF"), X),
    Bug("two operands in PSUM", "buffer",
        *pair(add_two, (nl.psum, nl.psum), (nl.psum, nl.sbuf)),
        ("data1 and data2 are all in PSUM", "copy one to SBUF"), X),
    Bug("an engine reads HBM", "buffer", *pair(square_of, False, True),
        ("data [4, 4] is in HBM", "load it with dma_copy"), X),
    Bug("a matmul operand in PSUM", "buffer", *pair(matmul_operand, nl.psum, nl.sbuf),
        ("moving is in PSUM", "copy it to SBUF with tensor_copy"), X),
    Bug("a matmul into SBUF", "buffer", *pair(matmul_into, nl.sbuf, nl.psum),
        ("dst is in SBUF; it must be in PSUM",), X),
]  # fmt: skip


# -- start_partition -------------------------------------------------------------------------------


def rows_from(rows, x):
    start, count = rows
    tile = loaded(x)
    nisa.tensor_scalar(tile[start : start + count, :], tile[start : start + count, :], nl.add, 1.0)
    return stored(tile)


def at_partition(start, x):
    tile = sb(40, 4, address=(start, 0))
    nisa.memset(tile, 0.0)
    return stored(tile)


T = (ones(128, 4),)
START = [
    Bug("16 rows from partition 16", "start_partition", *pair(rows_from, (16, 16), (32, 16)),
        ("covers 16 partitions from 16", "0, 32, 64, 96"), T),
    Bug("64 rows from partition 32", "start_partition", *pair(rows_from, (32, 64), (64, 64)),
        ("covers 64 partitions from 32", "may start at 0, 64"), T),
    Bug("96 rows from partition 32", "start_partition", *pair(rows_from, (32, 96), (0, 96)),
        ("covers 96 partitions from 32", "may start at 0:"), T),
    Bug("a tile fixed in the middle of a half", "start_partition",
        *pair(at_partition, 32, 64), ("covers 40 partitions from 32", "may start at 0, 64"), T),
]  # fmt: skip


# -- access_pattern --------------------------------------------------------------------------------


def long_row(split, x):
    tile = sb(1, 70000, dtype=nl.int8)
    view = tile.reshape((1, 2, 35000)) if split else tile
    nisa.memset(view.reshape((1, 4, 17500)) if split else view, 1)
    return stored(loaded(x))


def far_step(step, x):
    tile = sb(1, 2, step, dtype=nl.int8)
    nisa.memset(tile[:, :, 0:1], 1)
    return stored(loaded(x))


PATTERN = [
    Bug("a dimension of 70000 elements", "access_pattern", *pair(long_row, False, True),
        ("70000 elements in dimension 1", "counts to 65535", "reshape it"), X),
    Bug("a step of 40000 elements", "access_pattern", *pair(far_step, 40000, 30000),
        ("steps 40000 elements in dimension 1", "at most 32767"), X),
]  # fmt: skip


# -- dma_dtype and psum_bank -----------------------------------------------------------------------


def converting(mode, x):
    half = sb(4, 4, dtype=nl.bfloat16)
    nisa.dma_copy(dst=half, src=x, dge_mode=mode)
    return stored(half)


def bank_tile(columns, x):
    data = filled(4, 512)
    acc = ps(4, 1024)
    start, stop = columns
    nisa.nc_matmul(acc[:, start:stop], loaded(x), data[:, 0 : stop - start], accumulate=False)
    return stored(acc[:, start:stop])


MOVES = [
    Bug("hardware descriptors convert", "dma_dtype",
        *pair(converting, HW, nisa.dge_mode.swdge),
        ("src float32 to dst bfloat16 with hwdge", "use equal dtypes"), X),
    Bug("a result across two banks", "psum_bank", *pair(bank_tile, (256, 768), (512, 1024)),
        ("dst covers bytes 1024 to 3071", "across PSUM banks of 2048 bytes"), X),
    Bug("a result one column past its bank", "psum_bank", *pair(bank_tile, (511, 513), (510, 512)),
        ("dst covers bytes 2044 to 2051", "align the tile and narrow it"), X),
]  # fmt: skip


# -- operands --------------------------------------------------------------------------------------


def contraction(rows, x):
    acc = ps(4, 4)
    nisa.nc_matmul(acc, loaded(x)[0:rows, :], loaded(x), accumulate=False)
    return stored(acc)


def add_columns(columns, x):
    out = sb(4, 4)
    nisa.tensor_tensor(out, loaded(x), loaded(x)[:, 0:columns], nl.add)
    return stored(out)


def scaled_by(dtype, x):
    factor = filled(4, 1, value=2, dtype=dtype)
    out = sb(4, 4)
    nisa.tensor_scalar(out, loaded(x), nl.multiply, factor)
    return stored(out)


def sums_in(dtype, x):
    acc = ps(4, 4, dtype=dtype)
    nisa.nc_matmul(acc, loaded(x), loaded(x), accumulate=False)
    return stored(acc)


OPERANDS = [
    Bug("different contractions", "operands", *pair(contraction, 3, 4),
        ("the contraction (dimension 0) is 3 against 4",), X, stops=True),
    Bug("a broadcast nobody does", "operands", *pair(add_columns, 1, 4),
        ("data2 [4, 1]", "must agree"), X, stops=True),
    Bug("a bfloat16 vector operand", "operands", *pair(scaled_by, nl.bfloat16, nl.float32),
        ("operand0 is bfloat16", "must be float32"), X),
    Bug("sums in bfloat16 before gen4", "operands", *pair(sums_in, nl.bfloat16, nl.float32),
        ("dst is bfloat16", "PSUM accumulates in float32"), X),
]  # fmt: skip

BUGS = [*BUFFER, *START, *PATTERN, *MOVES, *OPERANDS]
