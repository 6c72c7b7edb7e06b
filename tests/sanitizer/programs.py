"""Bugs of values and of whole programs: ranges, integers, loops, names, length, two cores."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np

from tests.sanitizer.bug import Bug, filled, hbm, loaded, ones, pair, sb, stored

X = (ones(4, 4),)
BIG = 2**24 + 1


def applied(arguments, x):
    op, bias, scale = arguments
    out = sb(4, 4)
    nisa.activation(out, op, loaded(x), bias=bias, scale=scale)
    return stored(out)


DOMAIN = [
    Bug("the root of a row of zeros", "domain",
        *pair(applied, (nl.rsqrt, -1.0, 1.0), (nl.rsqrt, 1e-6, 1.0)),
        ("nl.rsqrt gets 0.0 at index [0, 0] of data", "2^-87 to 2^97"), X),
    Bug("the logarithm of a negative number", "domain",
        *pair(applied, (nl.log, -2.0, 1.0), (nl.log, 2.0, 1.0)),
        ("nl.log gets -1.0", "2^-64 to 2^64"), X),
    Bug("a sine without range reduction", "domain",
        *pair(applied, (nl.sin, 0.0, 9.0), (nl.sin, 0.0, 3.0)),
        ("nl.sin gets 9.0", "-3.14159 to 3.14159"), X),
    Bug("the reciprocal of a tiny number", "domain",
        *pair(applied, (nl.reciprocal, 0.0, 2.0**-50), (nl.reciprocal, 0.0, 2.0**-40)),
        ("nl.reciprocal gets", "2^-42 to 2^42 in magnitude"), X),
]  # fmt: skip


def address(engine, rows):
    out = sb(4, 1, dtype=nl.int32)
    nisa.tensor_tensor(out, loaded(rows), filled(4, 1, value=1, dtype=nl.int32), nl.add,
                       engine=engine)  # fmt: skip
    return stored(out)


def row_offset(width, rows):
    out = sb(4, 1, dtype=nl.int32)
    nisa.tensor_scalar(out, loaded(rows), nl.multiply, width)
    return stored(out)


def as_float(dtype, rows):
    out = sb(4, 1, dtype=dtype)
    nisa.tensor_copy(out, loaded(rows))
    return stored(out)


def rows_of(first):
    return np.arange(first, first + 4, dtype=np.int32).reshape(4, 1)


INTEGERS = [
    Bug("addresses on the vector engine", "integers",
        *pair(address, nisa.engine.vector, nisa.engine.gpsimd),
        (f"data1 [4, 1] int32 holds {BIG} at index [1, 0]", "reads as 16777216"),
        (rows_of(2**24),)),
    Bug("an offset that grows past 2^24", "integers", *pair(row_offset, 200_000, 100_000),
        ("nl.multiply of integers gives 20000000", "counts to 2^24 only"), (rows_of(100),)),
    Bug("integers of an id through float32", "integers", *pair(as_float, nl.float32, nl.int32),
        ("src [4, 1] int32 holds",), (rows_of(2**24),)),
]  # fmt: skip


def shifted(loop, x):
    buffer = loaded(x)
    for i in loop(3):
        nisa.tensor_copy(buffer[:, i + 1 : i + 2], buffer[:, i : i + 1])
    return stored(buffer)


def same_output(own, x):
    out = hbm(4, 4)
    tile = loaded(x)
    for i in nl.affine_range(4):
        at = i if own else 0
        nisa.dma_copy(dst=out[:, at : at + 1], src=tile[:, i : i + 1])
    return out


def decayed(loop, x):
    state = filled(4, 1)
    tile = loaded(x)
    for i in loop(4):
        nisa.tensor_scalar(state, state, nl.multiply, 0.5, op1=nl.add, operand1=tile[:, i : i + 1])
    return stored(state)


def fused(arguments, x):
    """Two operators a step; the carried tile is the first operand or the last."""
    first, op1, loop = arguments
    tile, total = loaded(x), filled(4, 1, value=1)
    for i in loop(4):
        column = tile[:, i : i + 1]
        data, operand1 = (total, column) if first else (column, total)
        nisa.scalar_tensor_tensor(total, data, nl.multiply, 0.5, op1, operand1)
    return stored(total)


CARRIED = ("reads elements of the sbuf tile", "use range()")
LOOPS = [
    Bug("an affine_range that shifts", "independent", *pair(shifted, nl.affine_range, range),
        ("iteration 1 of the nl.affine_range", "reads elements", "that iteration 0 wrote"), X),
    Bug("an affine_range with a recurrence", "independent", *pair(decayed, nl.affine_range, range),
        CARRIED, X),
    Bug("an affine_range that scales its sum", "independent",
        *pair(fused, (True, nl.add, nl.affine_range), (True, nl.add, range)), CARRIED, X),
    Bug("an affine_range of alternating differences", "independent",
        *pair(fused, (False, nl.subtract, nl.affine_range), (False, nl.subtract, range)),
        CARRIED, X),
    Bug("iterations that overwrite each other's output", "independent",
        *pair(same_output, False, True), ("iteration 1", "overwrites elements of the hbm tile"),
        X),
]  # fmt: skip


def labelled(indexed, x):
    tiles = []
    for i in range(2):
        tile = sb(4, 4, name=f"work_{i}" if indexed else "work")
        nisa.dma_copy(dst=tile, src=x)
        tiles.append(tile)
    return tuple(stored(tile) for tile in tiles)


def unrolled(device, x):
    tile = loaded(x)

    def body(_):
        nisa.tensor_scalar(tile, tile, nl.add, 1.0)

    if device:
        nl.fori_loop(0, 60, body)
    else:
        for i in range(60):
            body(i)
    return stored(tile)


PROGRAM = [
    Bug("one name for two tiles", "names", *pair(labelled, False, True),
        ("has the name of the sbuf tile 'work'", "put the loop index into it"), X),
    Bug("a long unrolled loop", "instruction_count", *pair(unrolled, False, True),
        ("core 0 has 62 instructions", "use nl.fori_loop"), X),
]  # fmt: skip


def handed_over(ordered, x):
    out, middle = hbm(4, 4), hbm(4, 4)
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=middle, src=loaded(x))
    if ordered:
        nisa.core_barrier(data=middle, cores=(0, 1))
    if nl.program_id(0) == 1:
        nisa.dma_copy(dst=out, src=loaded(middle))
    return out


def both_write(own, x):
    out = hbm(4, 4)
    core = nl.program_id(0)
    columns = slice(2 * core, 2 * core + 2) if own else slice(0, 4)
    tile = loaded(x)
    nisa.tensor_scalar(tile, tile, nl.add, float(core))
    nisa.dma_copy(dst=out[:, columns], src=tile[:, columns])
    return out


CORES = [
    Bug("a core reads what the other may not have written", "lnc_race",
        *pair(handed_over, False, True), ("core",), X, lnc=2),
    Bug("both cores write one output", "lnc_race", *pair(both_write, False, True), ("core",), X,
        lnc=2),
]  # fmt: skip

BUGS = [*DOMAIN, *INTEGERS, *LOOPS, *PROGRAM, *CORES]
