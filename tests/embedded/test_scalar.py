"""NkiScalar (NKI 0.7): loads, stores, wrapping arithmetic, addresses and loops, what is refused."""

from __future__ import annotations

import operator

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import (
    AbstractValue,
    DtypeError,
    RuleViolation,
    ShapeError,
    UninitializedRead,
)
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import ControlWork
from tests.embedded.harness import hbm, ps, refused, same, sb, tile, traced, values

ints = st.integers(-(2**31), 2**31 - 1)
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def stored(scalar, place=sb):
    out = place(1, 1, dtype=nl.int32)
    nisa.scalar_store(out, scalar)
    return out


def wrapped(value):
    return (value + 2**31) % 2**32 - 2**31


def one(value):
    return np.array([[value]], np.int32)


@given(a=ints, b=ints, symbol=st.sampled_from(sorted(OPS)), side=st.integers(0, 2))
def test_arithmetic_wraps_at_32_bits(a, b, symbol, side):
    def call(x, y):
        left = a if side == 1 else nisa.scalar_load(tile(x))
        right = b if side == 2 else nisa.scalar_load(tile(y))
        return stored(OPS[symbol](left, right))

    same(values(call, one(a), one(b)), one(wrapped(OPS[symbol](a, b))))


def test_documented_examples():
    def call(x):
        big = nisa.scalar_load(tile(x))
        return stored(big * big), stored(-big), stored(big * 4 + 1), stored(2**31 - 1 - big + big)

    found = values(call, one(100000))
    assert [int(v[0, 0]) for v in found] == [1410065408, -100000, 400001, 2**31 - 1]


@pytest.mark.parametrize("place", [sb, hbm])
def test_scalars_pass_through_memory(place):
    def call(x):
        landed = place(1, 1, dtype=nl.int32)
        nisa.dma_copy(landed, x)
        scalar = nisa.scalar_load(landed)
        assert scalar.dtype is nl.int32
        return stored(scalar, place)

    same(values(call, one(-7)), one(-7))


def test_a_loop_index_addresses_and_bounds_are_expressions():
    def call(x, y):
        out = sb(1, 8, dtype=nl.int32)
        nisa.memset(out, 0)
        count = nisa.scalar_load(tile(x))

        def body(i):
            spot = out.ap([[8, 1], [1, 1]], scalar_offset=i * 2 + 1, indirect_dim=1)
            nisa.tensor_copy(spot, tile(y))
            nisa.scalar_store(spot, i * 10)

        nl.fori_loop(0, count + 1, body)
        return out

    assert values(call, one(2), one(0)).tolist() == [[0, 0, 0, 10, 0, 20, 0, 0]]


def test_the_index_is_a_register_if_a_bound_is():
    kinds = []

    def kernel():
        nl.fori_loop(0, nisa.register_alloc(1), lambda i: kinds.append(type(i)))
        nl.fori_loop(0, 1, lambda i: kinds.append(type(i)))

    traced(kernel)
    assert kinds == [nisa.VirtualRegister, nisa.NkiScalar]


def test_what_comes_from_a_tile_without_values():
    def kernel(x):
        scalar = nisa.scalar_load(tile(x)) + 1
        assert scalar.abstract
        with pytest.raises(AbstractValue):
            scalar.read()
        assert stored(scalar).mem.abstract

    launch(kernel, (Abstract((1, 1), "int32"),), target="toy")


def test_events():
    def kernel(x):
        nisa.scalar_store(sb(1, 1, dtype=nl.int32), nisa.scalar_load(tile(x)) * 3)

    load, times, store = list(traced(kernel, one(1)).trace)[-3:]
    assert [e.opcode for e in (load, times, store)] == [
        "scalar_load", "scalar_arithmetic", "scalar_store",
    ]  # fmt: skip
    assert load.work == ControlWork("register_load")
    assert times.hidden_reads == load.hidden_writes
    assert store.hidden_reads == times.hidden_writes
    assert store.work == ControlWork("register_store")


def scalar():
    made = sb(1, 1, dtype=nl.int32)
    nisa.memset(made, 1)
    return nisa.scalar_load(made)


REFUSED = [
    (lambda: nisa.scalar_load(sb(1, 1, dtype=nl.uint32)), "scalar_load: src is uint32", DtypeError),
    (lambda: nisa.scalar_load(sb(1, 2, dtype=nl.int32)), "one element", ShapeError),
    (lambda: nisa.scalar_load(3), "one element", ShapeError),
    (lambda: nisa.scalar_load(ps(1, 1, dtype=nl.int32)), "src is in PSUM", RuleViolation),
    (lambda: nisa.scalar_load(sb(1, 1, dtype=nl.int32)), "nisa.scalar_load", UninitializedRead),
    (lambda: nisa.scalar_store(sb(1, 1), scalar()), "scalar_store: dst is float32", DtypeError),
    (lambda: nisa.scalar_store(sb(1, 1, dtype=nl.int32), 3), "value=3", RuleViolation),
    (lambda: nisa.scalar_store(sb(1, 1, dtype=nl.int32), nisa.register_alloc(3)),
     "must be an NkiScalar", RuleViolation),
    (lambda: scalar() + 1.5, "NkiScalar + 1.5", RuleViolation),
    (lambda: 2**31 - scalar(), "ints of 32 bits", RuleViolation),
    (lambda: scalar() * nisa.register_alloc(2), "scalar_load", RuleViolation),
    (lambda: scalar() < 3, "only at run time", AbstractValue),
    (lambda: range(scalar()), "only at run time", AbstractValue),
    (lambda: nisa.register_move(scalar(), 1), "NkiScalar and cannot be written", RuleViolation),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says", "error"), REFUSED)
def test_refused(call, says, error):
    refused(call, says, error=error)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("trips", [0, 2])
def test_a_loop_whose_end_has_no_value_runs_as_often_as_asked(trips, step):
    seen = []

    def kernel(x):
        register = nisa.register_alloc()
        nisa.register_load(register, tile(x))
        nl.fori_loop(0, register, seen.append, step)

    def run(options):
        launch(kernel, (Abstract((1, 1), "int32"),), target="toy", options=options)

    run(Options(unknown_trips=trips))
    assert len(seen) == trips
    with pytest.raises(AbstractValue, match="loaded from a tile without values"):
        run(Options())
