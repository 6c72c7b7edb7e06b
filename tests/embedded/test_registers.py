"""Registers: moves, loads and stores, what may not be done with one, loops that use them."""

from __future__ import annotations

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import (
    AbstractValue,
    DtypeError,
    KernelError,
    NkiKernelsError,
    RuleViolation,
    ShapeError,
    UninitializedRead,
)
from nki_kernels.machine.trace import ControlWork
from tests.embedded.harness import hbm, ps, refused, same, sb, tile, traced, values


def store(register, dtype=nl.int32):
    out = sb(1, 1, dtype=dtype)
    nisa.register_store(out, register)
    return out


def test_alloc_move_and_store():
    def kernel():
        a, b, c = nisa.register_alloc(7), nisa.register_alloc(), nisa.register_alloc(None)
        nisa.register_move(b, -3)
        nisa.register_move(c, a)
        nisa.register_move(a, 1)
        return tuple(store(r) for r in (a, b, c))

    assert [int(v) for v in map(np.ravel, values(kernel)) for v in v] == [1, -3, 7]


@pytest.mark.parametrize(("value", "want"), [(2**31, -(2**31)), (-(2**31) - 1, 2**31 - 1)])
def test_a_register_has_32_bits(value, want):
    same(values(lambda: store(nisa.register_alloc(value))), np.array([[want]], np.int32))

    def moved():
        register = nisa.register_alloc(0)
        nisa.register_move(register, value)
        return store(register)

    same(values(moved), np.array([[want]], np.int32))


@pytest.mark.parametrize("place", ["sbuf", "hbm"])
@pytest.mark.parametrize(
    "x",
    [
        np.array([[-5]], np.int32), np.array([[2**32 - 1]], np.uint32), np.array([[-7]], np.int8),
        np.array([[200]], np.uint8), np.array([[2.5]], np.float32),
        np.array([[np.inf]], np.float32), np.array([[-300]], np.int16),
    ],
    ids=lambda x: str(x.dtype),
)  # fmt: skip
def test_a_load_and_a_store_give_the_same_bits_back(x, place):
    def kernel(source):
        register, kind = nisa.register_alloc(), source.dtype
        nisa.register_load(register, tile(source) if place == "sbuf" else source[0])
        if place == "sbuf":
            return store(register, kind)
        out = hbm(1, dtype=kind)
        nisa.register_store(out, register)
        return out

    same(values(kernel, x).reshape(1, 1), x)


def test_a_store_to_a_narrow_integer_keeps_the_low_bits():
    got = values(lambda: store(nisa.register_alloc(0x1FE), nl.uint8))
    same(got, np.array([[0xFE]], np.uint8))
    same(values(lambda: store(nisa.register_alloc(4), nl.bool_)), np.array([[True]]))


def test_a_tile_initialises_a_register():
    x = np.array([[42]], np.int32)
    same(values(lambda source: store(nisa.register_alloc(tile(source))), x), x)


def test_loads_and_stores_at_run_time_addresses():
    def kernel(source):
        t, at, r = tile(source), nisa.register_alloc(2), nisa.register_alloc()
        spot = t.ap([[4, 1], [1, 1]], scalar_offset=at, indirect_dim=1)
        nisa.register_load(r, spot)
        nisa.register_move(at, 0)
        nisa.register_store(spot, r)
        return t

    got = values(kernel, np.array([[2, 3, 4, 5]], np.int32))
    same(got, np.array([[4, 3, 4, 5]], np.int32))


REFUSED = {
    "no int": (lambda: nisa.register_alloc(1.5), RuleViolation, "x=1.5; it must be None or an int"),
    "move a float": (
        lambda: nisa.register_move(nisa.register_alloc(), 1.5), RuleViolation,
        "src=1.5; it must be an int or a register"),
    "move to an int": (
        lambda: nisa.register_move(3, 1), RuleViolation,
        "dst=3; it must come from nisa.register_alloc"),
    "store an int": (
        lambda: nisa.register_store(sb(1, 1, dtype=nl.int32), 3), RuleViolation,
        "src=3; it must come from nisa.register_alloc"),
    "many elements": (
        lambda: nisa.register_load(nisa.register_alloc(), sb(1, 2)), ShapeError,
        "it must be a tensor of one element"),
    "no tensor": (
        lambda: nisa.register_load(nisa.register_alloc(), 3), ShapeError,
        "src=3; it must be a tensor of one element"),
    "psum": (
        lambda: nisa.register_load(nisa.register_alloc(), ps(1, 1)), RuleViolation,
        "src is in PSUM; registers reach HBM and SBUF"),
    "packed": (
        lambda: nisa.register_load(nisa.register_alloc(), sb(1, 1, dtype=nl.float8_e5m2_x4)),
        DtypeError, "at most 32 bits, unpacked"),
    "bfloat16": (
        lambda: nisa.register_load(nisa.register_alloc(), sb(1, 1, dtype=nl.bfloat16)),
        DtypeError, "floats must be 32 bits wide"),
    "never written": (
        lambda: nisa.register_load(nisa.register_alloc(), sb(1, 1)), UninitializedRead,
        "nisa.register_load"),
    "no value": (
        lambda: store(nisa.register_alloc()), NkiKernelsError, "read before a value was moved"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, text = REFUSED[name]
    refused(call, text, error=error)


@pytest.mark.parametrize(
    "use", [bool, int, float, range, lambda r: r < 3, lambda r: r >= 3, lambda r: [0, 1][r]]
)
def test_a_register_cannot_steer_python(use):
    refused(lambda: use(nisa.register_alloc(1)), "exists only at run time", error=AbstractValue)


# -- loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bounds", "step"), [((0, 5), 1), ((1, 6), 2), ((3, 3), 1), ((0, 1), 7)])
@pytest.mark.parametrize("registers", [False, True])
def test_fori_loop_visits_the_range(bounds, step, registers):
    def kernel():
        seen = sb(1, 8, dtype=nl.int32)
        nisa.memset(seen, -1)

        def body(i):
            spot = seen.ap([[8, 1], [1, 1]], scalar_offset=i, indirect_dim=1)
            nisa.register_store(spot, i)

        low, high = (nisa.register_alloc(b) if registers else b for b in bounds)
        nl.fori_loop(low, high, body, step=step)
        return seen

    want = [i if i in range(*bounds, step) else -1 for i in range(8)]
    same(values(kernel), np.array([want], np.int32))


def test_while_loop_counts_down():
    def kernel():
        left, turns = nisa.register_alloc(3), sb(1, 1)
        count = tile_of(3)
        nisa.memset(turns, 0.0)

        def body(register):
            nisa.tensor_scalar(turns, turns, nl.add, 1.0)
            nisa.tensor_scalar(count, count, nl.subtract, 1.0)
            nisa.register_load(register, count)
            return register

        nl.while_loop(left, body)
        return turns

    same(values(kernel), np.array([[3]], np.float32))


def tile_of(value):
    t = sb(1, 1, dtype=nl.int32)
    nisa.memset(t, value)
    return t


def test_a_while_loop_may_not_run_at_all():
    def kernel():
        nl.while_loop(nisa.register_alloc(0), lambda r: nisa.memset(sb(1, 1), 0.0))

    assert [e.opcode for e in traced(kernel).trace.events if e.opcode != "loop_iteration"] == []


def test_a_loop_body_allocates_new_memory_every_time():
    def kernel():
        kept = []

        def body(i):
            t = sb(1, 1)
            if kept:
                nisa.tensor_copy(sb(1, 1), t)
            kept.append(t)
            nisa.memset(t, 1.0)

        nl.fori_loop(0, 2, body)

    refused(kernel, "no instruction wrote", error=UninitializedRead)


@pytest.mark.parametrize(("loop", "text"), [
    (lambda: nl.fori_loop(0, 2, lambda i: 3), "the body returned a value"),
    (lambda: nl.fori_loop(0, 2, lambda i: None, step=0), "step=0; it must be a positive int"),
    (lambda: nl.fori_loop(0.5, 2, lambda i: None), "lower=0.5; it must be an int or a register"),
    (lambda: nl.while_loop(3, lambda r: r), "init=3; it must be a register"),
    (lambda: nl.while_loop(nisa.register_alloc(1), lambda r: None), "the body returned None"),
])  # fmt: skip
def test_loops_refuse(loop, text):
    refused(loop, text, error=KernelError)


def test_the_index_of_a_loop_cannot_be_written():
    def kernel():
        nl.fori_loop(0, 2, lambda i: nisa.register_move(i, 0))

    refused(
        kernel, "is the index of a device loop or an NkiScalar and cannot be written", "copy it"
    )


def test_events_of_registers_and_loops():
    def kernel():
        a, t = nisa.register_alloc(3), sb(1, 1, dtype=nl.int32)
        nisa.register_move(a, 4)
        nisa.register_store(t, a)
        nisa.register_load(a, t)

        def body(i):
            nisa.memset(t, 0)

        nl.fori_loop(0, 2, body)

    events = traced(kernel).trace.events
    kinds = [e.work.kind if isinstance(e.work, ControlWork) else "work" for e in events]
    assert kinds == [
        "register_move", "register_store", "register_load", "loop_iteration", "work",
        "loop_iteration", "work",
    ]  # fmt: skip
    move, stored, loaded = events[:3]
    assert (move.hidden_reads, move.hidden_writes) == ((), ("register:1",))
    assert (stored.hidden_reads, stored.hidden_writes) == (("register:1",), ())
    assert (loaded.hidden_reads, loaded.hidden_writes) == ((), ("register:1",))
    assert [len(stored.writes), len(loaded.reads)] == [1, 1]
    assert [e.loop for e in events[3:]] == [((1, 0),), ((1, 0),), ((1, 1),), ((1, 1),)]


def test_what_takes_a_register_reads_it():
    """So that the model lets it wait for the load of that register."""

    def kernel(x):
        register, other = nisa.register_alloc(0), nisa.register_alloc(1)
        t, index = tile(x), sb(2, 4, dtype=nl.int32)
        nisa.iota(index, [[1, 4]], offset=other)
        nisa.affine_select(sb(2, 4), [[1, 4]], 0, t, 0.0, offset=register)
        chosen = t.ap([[4, 2], [1, 2]], scalar_offset=register, indirect_dim=1)
        nisa.tensor_tensor(sb(2, 2), chosen, chosen, nl.add)
        nisa.dma_copy(sb(2, 2), x.ap([[4, 2], [1, 2]], scalar_offset=other, indirect_dim=1))
        nisa.iota(index, [[1, 4]], offset=3)

    found = traced(kernel, np.zeros((2, 4), np.float32)).trace.events[1:]
    first, second = ("register:1",), ("register:2",)
    assert [e.hidden_reads for e in found] == [second, first, first * 2, second, ()]


def test_the_generation_is_known_inside_a_kernel():
    seen = []
    for target in ("trn1", "trn2", "trn3"):
        traced(
            lambda: seen.append((nisa.get_nc_version(), nisa.get_nc_sub_version())), target=target
        )
    gen = nisa.nc_version
    assert seen == [(gen.gen2, 0), (gen.gen3, 0), (gen.gen4, 0)]
    assert gen.gen3 >= gen.gen2
    with pytest.raises(KernelError, match=r"nisa\.get_nc_version outside a kernel"):
        nisa.get_nc_version()


def test_a_bfloat16_tile_is_no_index():
    def kernel(source):
        t = tile(source)
        nisa.tensor_copy(sb(1, 1), t.ap([[2, 1], [1, 1]], scalar_offset=t[:, 0:1], indirect_dim=1))

    with pytest.raises(RuleViolation, match="one int32 or uint32 element"):
        values(lambda s: (kernel(s), sb(1, 1))[1], np.zeros((1, 2), ml_dtypes.bfloat16))
