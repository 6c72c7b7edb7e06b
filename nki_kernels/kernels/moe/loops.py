"""Device loops over lists of blocks: how often each body runs, and where its blocks are listed."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.schedule import floor_division


def plan_loops(lists, config):
    """Return for each body how often it runs, and where in the lists its blocks begin."""
    pmax = nl.tile_size.pmax
    left, begun = {}, {}
    for size in lists:
        left[size] = lists[size]["total"]
        begun[size] = _column(pmax)
        nisa.memset(dst=begun[size], value=0.0)
    loops = []
    for body in config.bodies:
        names = sorted(set(body))
        trips = None
        for size in names:
            many = _column(pmax)
            floor_division(many, left[size], body.count(size), 0)
            if trips is not None:
                nisa.tensor_tensor(dst=many, data1=trips, data2=many, op=nl.minimum)
            trips = many
        starts = {}
        for size in names:
            starts[size] = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=starts[size], src=begun[size][0:1, :])
            rest, next_one = _column(pmax), _column(pmax)
            _add_times(rest, trips, -float(body.count(size)), left[size])
            _add_times(next_one, trips, 2.0 * body.count(size), begun[size])
            left[size], begun[size] = rest, next_one
        exact = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=exact, src=trips[0:1, :])
        register = nisa.register_alloc(0)
        nisa.register_load(register, exact)
        loops.append({"body": body, "trips": register, "at": starts})
    return loops


def _column(rows):
    return nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)


def _add_times(result, data, factor, addend):
    """result = data * factor + addend."""
    nisa.scalar_tensor_tensor(
        dst=result, data=data, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=addend
    )


def entries_at(row, at, count):
    """Return `count` entries of a list, from place `at` on."""
    found = nl.ndarray((1, 2 * count), dtype=nl.int32, buffer=nl.sbuf)
    source = row.ap(pattern=[[row.shape[1], 1], [1, 2 * count]], scalar_offset=at, indirect_dim=1)
    nisa.tensor_copy(dst=found, src=source)
    return found
