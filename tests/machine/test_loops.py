"""Device loops and registers."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import (
    AbstractValue,
    DtypeError,
    KernelError,
    OutOfBounds,
    RuleViolation,
    ShapeError,
    UninitializedRead,
)
from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import ControlWork
from tests.machine.kernels import counted, hbm, inside, loaded, refused, sbuf

INT = np.int32


def number(value: int) -> np.ndarray:
    return np.array([[value]], INT)


@given(lower=st.integers(-3, 5), upper=st.integers(-3, 5), step=st.integers(1, 3))
@pytest.mark.parametrize("bound", ["int", "numpy", "register", "loaded register"])
def test_fori_loop_is_range(bound, lower, upper, step):
    def body(low, high):
        def make(value, tensor):
            if bound == "numpy":
                return np.int64(value)
            if bound == "register":
                return nisa.register_alloc(value)
            if bound == "loaded register":
                register = nisa.register_alloc()
                nisa.register_load(register, tensor)
                return register
            return value

        seen = []
        nl.fori_loop(
            make(lower, low), make(upper, high), lambda i: seen.append(i.read()), step=step
        )
        return seen

    assert inside(body, number(lower), number(upper)) == list(range(lower, upper, step))


def test_the_index_addresses_memory_and_the_trace_knows_the_iteration():
    """Copy rows 0 to 3 to rows 3 to 0 of the output, twice: two nested loops."""

    def kernel(x):
        result = hbm(4, 6)

        def outer(j):
            def inner(i):
                row = sbuf(1, 6)
                nisa.dma_copy(dst=row, src=x.select(0, i))
                nisa.dma_copy(dst=result.ap([[6, 1], [1, 6]], scalar_offset=i), src=row)

            nl.fori_loop(0, 4, inner)

        nl.fori_loop(0, 2, outer)
        return result

    done = launch(kernel, (counted(4, 6),), target="toy")
    assert np.array_equal(done.result, counted(4, 6))
    copies = [e.loop for e in done.trace if e.opcode == "dma_copy"]
    assert copies == [
        ((1, j), (number, i)) for j, number in ((0, 2), (1, 3)) for i in range(4) for _ in range(2)
    ]
    boundaries = [e.loop for e in done.trace if e.work == ControlWork("loop_iteration")]
    assert len(boundaries) == 2 + 2 * 4


def test_a_loop_leaves_the_path_it_found():
    def kernel(x):
        nl.fori_loop(0, 1, lambda i: None)
        tile = loaded(x)
        nisa.memset(tile, 0.0)

    assert launch(kernel, (counted(1, 1),), target="toy").trace.events[-1].loop == ()


def test_while_loop_counts_down_through_memory():
    def body(x):
        state, one = loaded(x), sbuf(1, 1, dtype="int32")
        nisa.memset(one, 1)
        rounds = []

        def decrement(register):
            rounds.append(register.read())
            nisa.tensor_tensor(state, state, one, nl.subtract, engine=nisa.engine.gpsimd)
            nisa.register_load(register, state)
            return register

        start = nisa.register_alloc()
        nisa.register_load(start, state)
        nl.while_loop(start, decrement)
        return rounds

    assert inside(body, number(3)) == [3, 2, 1]
    assert inside(body, number(0)) == []


def test_a_tile_of_the_body_starts_unwritten_in_every_iteration():
    def body():
        def once(i):
            tile = sbuf(1, 1)
            if not seen:
                nisa.memset(tile, 1.0)
            nisa.tensor_copy(dst=sbuf(1, 1), src=tile)
            seen.append(i)

        seen = []
        nl.fori_loop(0, 2, once)

    refused(body, UninitializedRead, "nisa.tensor_copy at", "src reads 1 of 1 elements")


def test_a_row_chosen_at_run_time_fills_a_tile_of_another_shape():
    """A selected row is [6], the tile [1, 6]: elements correspond in row-major order."""

    def body(x):
        row = sbuf(1, 6)
        nisa.dma_copy(dst=row, src=x.select(0, nisa.register_alloc(3)))
        assert np.array_equal(row.numpy(), counted(4, 6)[3:])
        with pytest.raises(UninitializedRead, match="on of tensor"):
            nisa.dma_copy(dst=row, src=hbm(4, 6).select(0, nisa.register_alloc(3)))
        with pytest.raises(OutOfBounds, match="row 0 of its run-time addresses"):
            nisa.dma_copy(dst=row, src=x.select(0, nisa.register_alloc(4)))

    inside(body, counted(4, 6))


def test_state_is_carried_in_memory():
    def body(x):
        total = sbuf(1, 1)
        nisa.memset(total, 0.0)
        values = loaded(x)

        def add(i):
            nisa.tensor_tensor(total, total, values.select(1, i), nl.add)

        nl.fori_loop(0, 5, add)
        return total.numpy().item()

    assert inside(body, counted(1, 5)) == 10


# -- registers -------------------------------------------------------------------------------------


@given(value=st.integers(-(2**40), 2**40))
def test_a_register_holds_32_bits(value):
    def body():
        a, b = nisa.register_alloc(value), nisa.register_alloc()
        nisa.register_move(b, a)
        c = nisa.register_alloc()
        nisa.register_move(c, value)
        return a.read(), b.read(), c.read()

    want = int(np.array(value & 0xFFFFFFFF, np.uint32).astype(INT))
    assert inside(body) == (want, want, want)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
@given(data=st.data())
def test_a_register_goes_through_memory(dtype, data):
    info = np.iinfo(dtype)
    value = data.draw(st.integers(int(info.min), int(info.max)))

    def body(x):
        register, result = nisa.register_alloc(), sbuf(1, 1, dtype="int32")
        nisa.register_load(register, x)
        nisa.register_store(result, register)
        return register.read(), result.numpy().item()

    want = int(np.array(value).astype(np.uint32).astype(INT)) if dtype == "uint32" else value
    assert inside(body, np.array([value], dtype)) == (want, want)


def test_a_float_keeps_its_bits_in_a_register():
    def body(x):
        return nisa.register_alloc(loaded(x)).read()

    assert inside(body, np.ones((1, 1), np.float32)) == 0x3F800000


STEERING = {
    "if": bool,
    "int": int,
    "float": float,
    "index": lambda r: [0, 1][r],
    "range": range,
    "less": lambda r: r < 1,
    "iterate": list,
}


@pytest.mark.parametrize("use", STEERING)
def test_a_register_cannot_steer_python(use):
    says = "its value exists only at run time, so it cannot steer Python"
    refused(lambda: STEERING[use](nisa.register_alloc(0)), AbstractValue, "register 1: " + says)


def move_index(i):
    nisa.register_move(i, 1)


ERRORS = [
    (
        lambda t: nl.fori_loop(0, 2, lambda i: 1),
        KernelError,
        "nl.fori_loop: the body returned a value",
    ),
    (
        lambda t: nl.fori_loop(0, 2, move_index),
        RuleViolation,
        "is the index of a device loop or an NkiScalar and cannot",
    ),
    (lambda t: nl.fori_loop(0, 2, print, step=0), KernelError, "step=0; it must be a positive int"),
    (lambda t: nl.fori_loop(0, 2, print, step=True), KernelError, "step=True; it must be"),
    (
        lambda t: nl.fori_loop(0.0, 2, print),
        KernelError,
        "lower=0.0; it must be an int or a register",
    ),
    (lambda t: nl.fori_loop(0, t, print), KernelError, "upper=<NkiTensor"),
    (
        lambda t: nl.fori_loop(0, nisa.register_alloc(), print),
        AbstractValue,
        "read before a value was moved",
    ),
    (lambda t: nl.while_loop(1, print), KernelError, "init=1; it must be a register"),
    (
        lambda t: nl.fori_loop(0, 2, None),
        KernelError,
        "nl.fori_loop: body_fun=None; it must be a function of one register: define it and pass",
    ),
    (
        lambda t: nl.while_loop(nisa.register_alloc(1), 3),
        KernelError,
        "nl.while_loop: body_fun=3; it must be a function of one register",
    ),
    (
        lambda t: nl.while_loop(nisa.register_alloc(1), lambda r: None),
        KernelError,
        "the body returned None; it must return the next condition register",
    ),
    (lambda t: nisa.register_alloc("1"), RuleViolation, "x='1'; it must be None or an int"),
    (
        lambda t: nisa.register_move(1, 1),
        RuleViolation,
        "dst=1; it must come from nisa.register_alloc",
    ),
    (
        lambda t: nisa.register_move(nisa.register_alloc(), "1"),
        RuleViolation,
        "src='1'; it must be an",
    ),
    (
        lambda t: nisa.register_load(nisa.register_alloc(), t),
        ShapeError,
        "it must be a tensor of one",
    ),
    (
        lambda t: nisa.register_load(
            nisa.register_alloc(), nl.ndarray((1, 1), "int32", buffer=nl.psum)
        ),
        RuleViolation,
        "src is in PSUM; registers reach HBM and SBUF",
    ),
    (
        lambda t: nisa.register_load(nisa.register_alloc(), sbuf(1, 1, dtype="bfloat16")),
        DtypeError,
        "src is bfloat16; floats must be 32 bits wide",
    ),
    (
        lambda t: nisa.register_load(nisa.register_alloc(), sbuf(1, 1, dtype="float8_e4m3fn_x4")),
        DtypeError,
        "it must have at most 32 bits, unpacked",
    ),
    (
        lambda t: nisa.register_load(nisa.register_alloc(), sbuf(1, 1)),
        UninitializedRead,
        "nisa.register_load at",
    ),
    (
        lambda t: nisa.register_store(t[0, 0], nisa.register_alloc()),
        AbstractValue,
        "register 1: read before a value was moved or loaded into it",
    ),
    (
        lambda t: nisa.tensor_copy(dst=sbuf(1, 1), src=t[0:1].select(1, nisa.register_alloc())),
        AbstractValue,
        "register 1: read before a value was moved or loaded into it",
    ),
    (
        lambda t: nisa.tensor_copy(dst=sbuf(1, 1), src=t[0:1].select(1, sbuf(1, 1, dtype="int32"))),
        UninitializedRead,
        "the index of src reads 1 of 1 elements",
    ),
]


@pytest.mark.parametrize(("use", "error", "says"), ERRORS, ids=[e[2] for e in ERRORS])
def test_an_illegal_loop_or_register_says_what_is_allowed(use, error, says):
    refused(lambda x: use(loaded(x)), error, says, arrays=(counted(2, 2),))


def test_a_register_from_a_tile_without_values_has_none():
    """It may set addresses, whose results then have no values; it cannot bound a loop."""

    def kernel(x, index):
        register = nisa.register_alloc()
        nisa.register_load(register, index)
        copy = nisa.register_alloc()
        nisa.register_move(copy, register)
        row = sbuf(1, 3)
        nisa.dma_copy(dst=row, src=x.select(0, copy))
        assert row.mem.abstract
        with pytest.raises(AbstractValue, match="loaded from a tile without values"):
            nl.fori_loop(0, copy, print)

    launch(kernel, (counted(4, 3), Abstract((1, 1), INT)), target="toy")
