"""The bounded reorder window: legal, local, and worth something where a compiler would gain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import TOY, Engine
from nki_kernels.machine.dependencies import Dependencies, queue_number, split
from nki_kernels.machine.errors import OptionError
from nki_kernels.machine.launch import Launch
from nki_kernels.machine.placement import place
from nki_kernels.machine.reorder import reorder
from nki_kernels.machine.scheduler import schedule
from nki_kernels.machine.trace import Event, Tile, Trace
from tests.machine.trace_builder import Builder, view

T, V, S, G, Y = Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd, Engine.sync


def _position(trace: Trace) -> dict[int, int]:
    return {id(event): place for place, event in enumerate(trace.events)}


def _loads_behind_a_store(count: int) -> Builder:
    """Load, work, store, in a hardware queue that keeps its order."""
    b = Builder()
    source, target = (b.tile(128 * count, 512, memory="hbm") for _ in range(2))
    for i in range(count):
        rows = (128 * i, 128 * i + 128)
        x, y = b.tile(128, 512), b.tile(128, 512)
        b.dma(view(x), view(source, rows), Y, "dge_hw")
        b.copy(y, x, V)
        b.dma(view(target, rows), view(y), Y, "dge_hw")
    return b


def test_loads_move_ahead_of_a_store_that_waits() -> None:
    b = _loads_behind_a_store(16)
    program = schedule(b.trace)
    moved = reorder(b.trace, None, 16)
    assert [e.seq for e in moved.events] != [e.seq for e in b.trace.events]
    # In order every load waits for the store ahead of it, which waits for its own load.
    assert schedule(moved).makespan_ns < 0.6 * program.makespan_ns


@pytest.mark.parametrize("window", [0, 1])
def test_small_windows_keep_the_program(window: int) -> None:
    b = _loads_behind_a_store(4)
    assert reorder(b.trace, None, window) is b.trace


def test_nothing_crosses_a_barrier() -> None:
    b = _loads_behind_a_store(2)
    fence = b.control("loop_iteration")
    x = b.tile(128, 512)
    late = b.dma(view(x), view(b.tile(128, 512, memory="hbm")), Y, "dge_hw")
    where = _position(reorder(b.trace, None, 16))
    events = b.trace.events
    assert where[id(events[fence])] == fence
    assert where[id(events[late])] > fence


def test_users_of_a_register_keep_their_order() -> None:
    b = Builder()
    slow, x = b.tile(128, 4096), b.tile()
    b.copy(slow, slow, V)
    b.control("register_load", (), ("register:0",))
    b.control("register_store", ("register:0",), ())
    b.copy(x, x, S)
    b.control("register_load", (), ("register:0",))
    moved = [e.opcode for e in reorder(b.trace, None, 16).events if e.opcode.startswith("reg")]
    assert moved == ["register_load", "register_store", "register_load"]


@pytest.mark.parametrize("window", [-1, 1.5, True, "16"])
def test_a_window_that_is_none(window: object) -> None:
    run = Launch(None, (), Builder().trace, None)
    with pytest.raises(OptionError, match=r"reorder window: .*; allowed are 0 \(program order\)"):
        run.time(window)  # type: ignore[arg-type]


def test_a_launch_times_each_window_once() -> None:
    run = Launch(None, (), _loads_behind_a_store(8).trace, None)
    assert run.time() is run.time(0)
    assert run.time(16) is run.time(16)
    assert run.time(16).makespan_ns < run.time().makespan_ns


@given(data=st.data(), window=st.integers(2, 20))
def test_any_program_keeps_its_dependencies_and_its_window(
    data: st.DataObject, window: int
) -> None:
    b = Builder(TOY)
    rows = TOY.partitions
    chip = [b.tile(rows, 8) for _ in range(4)]
    memory = b.tile(rows, 8, memory="hbm")
    tiles = st.sampled_from(chip)
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(("copy", "load", "store", "fence", "fresh")))
        if kind == "copy":
            b.copy(data.draw(tiles), data.draw(tiles), data.draw(st.sampled_from((V, S))))
        elif kind == "load":
            b.dma(view(data.draw(tiles)), view(memory))
        elif kind == "store":
            b.dma(view(memory), view(data.draw(tiles)))
        elif kind == "fence":
            b.control("loop_iteration")
        else:
            fresh: Tile = b.tile(rows, 8)
            b.copy(fresh, data.draw(tiles), V)
    trace = b.trace
    placement = place(trace)
    moved = reorder(trace, placement, window)
    where = _position(moved)
    assert sorted(where.values()) == list(range(len(trace.events)))
    edges = Dependencies(trace, placement, ordered=False).edges
    for number, event in enumerate(trace.events):
        for edge in edges[number]:
            assert where[id(trace.events[split(edge)[0]])] < where[id(event)]
    _assert_within(trace, moved, window)
    assert schedule(moved, placement).makespan_ns > 0


def _assert_within(trace: Trace, moved: Trace, window: int) -> None:
    """No instruction overtakes more than the window lets it."""

    def by_queue(events: list[Event]) -> dict[int, list[int]]:
        queues: dict[int, list[int]] = {}
        for event in events:
            queues.setdefault(queue_number(event), []).append(event.seq)
        return queues

    program = by_queue(trace.events)
    for queue, order in by_queue(moved.events).items():
        left = list(program[queue])
        for seq in order:
            assert left.index(seq) < window
            left.remove(seq)
