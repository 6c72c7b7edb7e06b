"""Two cores on the same bytes of shared HBM: refused unless a meeting orders them."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning, Options
from nki_kernels.machine.tensor import Abstract
from tests.machine.kernels import counted, hbm, loaded, sbuf

pytestmark = pytest.mark.usefixtures("toy")


def filled(value, *shape):
    tile = sbuf(*shape)
    nisa.memset(tile, value)
    return tile


def write(dst, value=1.0):
    nisa.dma_copy(dst=dst, src=filled(value, *dst.shape))


def raced(body, *arrays, **options):
    """The error of `body(core, *arrays)` on two cores."""

    def kernel(*inputs):
        body(nl.program_id(), *inputs)

    with pytest.raises(KernelError) as caught:
        launch(kernel, arrays, lnc=2, **options)
    return str(caught.value)


def clean(body, *arrays):
    def kernel(*inputs):
        body(nl.program_id(), *inputs)

    return launch(kernel, arrays, lnc=2)


def both_write(core, x):
    write(x[0:1], float(core))


def test_the_message_names_both_lines_and_what_to_do():
    message = raced(both_write, counted(2, 4))
    assert message.startswith("lnc_race: nisa.dma_copy at ")
    for text in (
        "(core 0) writes [1, 4] and nisa.dma_copy at ",
        "(core 1) writes [1, 4] of tensor 'argument 0' [2, 4] float32 (an argument)",
        "put nisa.core_barrier on this tensor between them, or give each core its own part",
    ):
        assert text in message
    assert message.count(f"{__file__}:") == 2


def test_it_warns_or_is_silent_when_told_to():
    def kernel(x):
        both_write(nl.program_id(), x)

    with pytest.warns(NkiWarning, match="lnc_race: "):
        launch(kernel, (counted(2, 4),), lnc=2, options=Options(lnc_race="warn"))
    launch(kernel, (counted(2, 4),), lnc=2, options=Options(lnc_race="off"))


def a_read_meets_a_write(core, x):
    if core == 0:
        loaded(x[0:1])
    else:
        write(x[0:1])


def a_barrier_on_another_tensor(core, x):
    other = hbm(1, 1)
    if core == 0:
        write(x[0:1])
    nisa.core_barrier(other, (0, 1))
    if core == 1:
        loaded(x[0:1])


def a_barrier_too_late(core, x):
    a_read_meets_a_write(core, x)
    nisa.core_barrier(x, (0, 1))


def partial_overlap(core, x):
    write(x[:, core : core + 3], float(core))


def interleaved_but_for_one(core, x):
    write(x[0:1, 0:8:2] if core == 0 else x[0:1, 3:8], float(core))


def equal_values_in_other_places(core, x):
    write(x[0:1, 0:3] if core == 0 else x[0:1, 1:4], 1.0)


def a_read_before_the_same_write(core, x):
    """Core 0 reads old values while core 1 may have written new ones."""
    if core == 0:
        loaded(x[0:1])
    write(x[0:1])


RACES = [
    a_read_meets_a_write, a_barrier_on_another_tensor, a_barrier_too_late, partial_overlap,
    interleaved_but_for_one, equal_values_in_other_places, a_read_before_the_same_write,
]  # fmt: skip


@pytest.mark.parametrize("body", RACES, ids=lambda b: b.__name__)
def test_unordered_uses_are_refused(body):
    message = raced(body, counted(2, 8))
    assert "lnc_race: " in message
    assert "the same bytes, and nothing orders the two" in message


@pytest.mark.parametrize("body", RACES[:5], ids=lambda b: b.__name__)
def test_it_needs_no_values(body):
    assert "lnc_race: " in raced(body, Abstract((2, 8), "float32"))


def rows(core, x):
    write(x[core : core + 1], float(core))


def columns(core, x):
    write(x[:, 4 * core : 4 * core + 4], float(core))


def interleaved(core, x):
    write(x[:, core::2], float(core))


def both_read(core, x):
    loaded(x)


def a_barrier_between(core, x):
    if core == 0:
        write(x[0:1])
    nisa.core_barrier(x, (0, 1))
    if core == 1:
        loaded(x[0:1])


def a_sendrecv_between(core, x):
    if core == 0:
        write(x[0:1])
    nisa.sendrecv(filled(0, 1, 1), sbuf(1, 1), 1 - core, 1 - core, 0)
    if core == 1:
        loaded(x[0:1])


def a_barrier_on_chip_between(core, x):
    if core == 0:
        write(x[0:1])
    nisa.core_barrier(filled(0, 1, 1), (0, 1))
    if core == 1:
        loaded(x[0:1])


def the_same_twice(core, x):
    """What a kernel does that does not split its work: both cores write the same, then read it."""
    write(x[0:1])
    loaded(x[0:1])


def private_memory(core, x):
    mine = nl.ndarray((1, 4), nl.float32, buffer=nl.hbm)
    write(mine, float(core))


CLEAN = [
    rows, columns, interleaved, both_read, a_barrier_between, a_sendrecv_between,
    a_barrier_on_chip_between, the_same_twice, private_memory,
]  # fmt: skip


@pytest.mark.parametrize("body", CLEAN, ids=lambda b: b.__name__)
@pytest.mark.parametrize("values", [True, False], ids=["values", "shapes"])
def test_ordered_or_equal_uses_are_not(body, values):
    clean(body, counted(2, 8) if values else Abstract((2, 8), "float32"))


def test_a_pair_of_lines_is_reported_once():
    def kernel(x):
        for _ in range(5):
            write(x, float(nl.program_id()))

    options = Options(lnc_race="warn")
    with pytest.warns(NkiWarning, match="lnc_race") as caught:
        launch(kernel, (counted(1, 4),), lnc=2, options=options)
    assert len(caught) == 1


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 9)),
    data=st.data(),
)
def test_two_writes_race_exactly_if_they_share_an_element(shape, data):
    """Against sets of elements, for slices with steps."""

    def cut(extent):
        low = data.draw(st.integers(0, extent - 1))
        return slice(low, data.draw(st.integers(low + 1, extent)), data.draw(st.integers(1, 3)))

    cuts = [(cut(shape[0]), cut(shape[1])) for _ in range(2)]
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    shared = set(numbers[cuts[0]].flat) & set(numbers[cuts[1]].flat)

    def kernel(x):
        core = nl.program_id()
        write(x[cuts[core]], float(core))

    arrays = (counted(*shape),)
    if shared:
        with pytest.raises(KernelError, match="lnc_race"):
            launch(kernel, arrays, lnc=2, target="trn2")
    else:
        launch(kernel, arrays, lnc=2, target="trn2")


@given(
    st.lists(
        st.tuples(st.sampled_from(["r", "w", "b"]), st.integers(0, 1), st.integers(0, 2)),
        max_size=10,
    )
)
def test_a_program_races_exactly_if_two_steps_between_barriers_do(steps):
    """Against all pairs; every write leaves another value."""
    races = False
    segment = []
    for kind, core, row in steps:
        if kind == "b":
            segment = []
            continue
        races |= any(c != core and r == row and "w" in (k, kind) for k, c, r in segment)
        segment.append((kind, core, row))

    def kernel(x):
        me = nl.program_id()
        for number, (kind, core, row) in enumerate(steps):
            if kind == "b":
                nisa.core_barrier(x, (0, 1))
            elif core == me and kind == "w":
                write(x[row : row + 1], float(number))
            elif core == me:
                loaded(x[row : row + 1])

    if races:
        with pytest.raises(KernelError, match="lnc_race"):
            launch(kernel, (-1 - counted(3, 2),), lnc=2)
    else:
        launch(kernel, (-1 - counted(3, 2),), lnc=2)


# -- run-time addresses ----------------------------------------------------------------------------


def rows_of(x, index):
    """The rows of `x` that `index` in HBM names, as a view with run-time addresses."""
    width = x.shape[1]
    pattern = [[width, index.shape[0]], [1, width]]
    return x.ap(pattern=pattern, vector_offset=loaded(index), indirect_dim=0)


def scattered(x, index, value):
    data = filled(value, index.shape[0], x.shape[1])
    nisa.dma_copy(dst=rows_of(x, index), src=data, oob_mode=nisa.oob_mode.skip)


def gathered(x, index):
    nisa.dma_copy(dst=sbuf(index.shape[0], x.shape[1]), src=rows_of(x, index))


def indices(*rows):
    return np.array(rows, np.int32)[:, None]


ROWS = st.lists(st.integers(0, 7), min_size=2, max_size=4)


@given(mine=ROWS, theirs=ROWS, kinds=st.sampled_from(["ww", "wr", "rw", "rr"]))
def test_scattered_rows_race_exactly_if_both_touch_one(mine, theirs, kinds):
    def kernel(x, *rows):
        core = nl.program_id()
        if kinds[core] == "w":
            scattered(x, rows[core], float(core))
        else:
            gathered(x, rows[core])

    arrays = (-1 - counted(8, 4), indices(*mine), indices(*theirs))
    if "w" in kinds and set(mine) & set(theirs):
        with pytest.raises(KernelError, match="lnc_race"):
            launch(kernel, arrays, lnc=2)
    else:
        launch(kernel, arrays, lnc=2)


@given(rows=ROWS, start=st.integers(0, 6), columns=st.integers(1, 4))
def test_scattered_rows_race_with_the_part_of_a_direct_access(rows, start, columns):
    def kernel(x, index):
        if nl.program_id() == 0:
            write(x[start : start + 2, 0:columns], 7.0)
        else:
            scattered(x, index, 8.0)

    arrays = (-1 - counted(8, 4), indices(*rows))
    if {start, start + 1} & set(rows):
        with pytest.raises(KernelError, match="lnc_race"):
            launch(kernel, arrays, lnc=2)
    else:
        launch(kernel, arrays, lnc=2)


def test_the_same_rows_scattered_twice_are_no_race():
    clean(lambda core, x, i: scattered(x, i, 5.0), counted(8, 4), indices(3, 1))


def test_rows_that_are_skipped_touch_nothing():
    def body(core, x, *rows):
        scattered(x, rows[core], float(core))

    clean(body, counted(8, 4), indices(0, 8), indices(8, 1))


def test_rows_at_unknown_addresses_are_left_out():
    def body(core, x, index):
        scattered(x, index, float(core))

    clean(body, Abstract((8, 4), "float32"), Abstract((2, 1), "int32"))


def test_a_barrier_orders_scattered_rows():
    def body(core, x, index):
        if core == 0:
            scattered(x, index, 1.0)
        nisa.core_barrier(x, (0, 1))
        if core == 1:
            scattered(x, index, 2.0)

    clean(body, counted(8, 4), indices(2, 5))


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2)])
def test_zeroing_twice_and_then_a_part_each_is_a_race(rows):
    """The slower core may wipe out what the faster one wrote (published kernels have that)."""

    def body(core, x):
        write(x, 0.0)
        if core == 0:
            write(x[rows], 3.0)

    assert "(core 0) writes [1, 4]" in raced(body, counted(2, 4))


def test_zeroing_twice_and_then_the_same_twice_is_no_race():
    def body(core, x):
        write(x, 0.0)
        write(x[0:1], 3.0)
        loaded(x[0:1])

    clean(body, counted(2, 4))
