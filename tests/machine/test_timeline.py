"""The schedule: published probes, waits, shared servers, the throttle, barriers, two cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import TOY, TRN1, TRN2, CoreSpec, Engine
from nki_kernels.machine.dependencies import Wait
from nki_kernels.machine.placement import place
from nki_kernels.machine.scheduler import _Scheduler, schedule
from nki_kernels.machine.timeline import Cause, Timeline
from nki_kernels.machine.trace import PeWork, Tile
from tests.machine.timing import LAW, PROBE, error
from tests.machine.trace_builder import Builder, Mode, spacing, stream_of_matmuls, view

T, V, S, G, Y = Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd, Engine.sync
SYNC = TRN2.sync


# -- waits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "queue", "trigger"),
    [
        ("static", Engine.sync, SYNC.to_dma_ns),
        ("dge_hw", Engine.sync, SYNC.to_dma_ns),
        ("dge_sw", Engine.gpsimd, SYNC.to_software_store_ns),
    ],
)
def test_handoffs(mode: Mode, queue: Engine, trigger: float) -> None:
    b = Builder()
    x, y, h = b.tile(), b.tile(), b.tile(memory="hbm")
    b.dma(view(x), view(h))
    b.copy(y, x, V)
    b.copy(y, y, V)
    b.copy(y, y, S)
    b.dma(view(h), view(y), queue, mode)
    t = b.timeline()
    gaps = [float(t.start[i + 1] - t.result[i]) for i in range(4)]
    expected = [SYNC.from_dma_ns, SYNC.same_engine_ns, SYNC.other_engine_ns, trigger]
    # Differences of times carry the rounding of the times themselves.
    assert np.abs(np.subtract(gaps, expected)).max() <= np.spacing(t.makespan_ns)
    assert [Cause(c) for c in t.cause] == [Cause.launch] + [Cause.result] * 4
    assert t.cause_event.tolist() == [-1, 0, 1, 2, 3]


def test_write_after_read_waits_for_the_read_only() -> None:
    b = Builder()
    x, y, z = b.tile(128, 4096), b.tile(128, 4096), b.tile(128, 4096)
    b.copy(y, x, S)
    b.copy(x, z, V)
    t = b.timeline()
    assert t.cause[1] == Cause.read
    assert SYNC.other_engine_ns < t.start[1] < t.result[0]


def test_independent_work_overlaps() -> None:
    b = Builder()
    for engine in (V, S):
        b.copy(b.tile(128, 4096), b.tile(128, 4096), engine)
    t = b.timeline()
    assert t.start.tolist() == [0.0, 0.0]


def test_independent_copies_keep_the_issue_interval() -> None:
    b = Builder()
    for _ in range(4):
        b.copy(b.tile(128, 128), b.tile(128, 128), S)
    assert error(spacing(b.timeline()), 199.0) <= LAW


def test_reused_memory_makes_its_successor_wait() -> None:
    b = Builder()
    for _ in range(24):
        p = b.tile(memory="psum")
        b.stream("memset", V, view(p))
        for _ in range(2):
            b.copy(b.tile(), p, S)
    without, placed = schedule(b.trace), schedule(b.trace, place(b.trace))
    bound = [i for i in range(72) if placed.cause[i] == Cause.memory]
    assert Cause.memory not in without.cause.tolist()
    assert bound
    for i in bound:
        # Eight banks: the memset waits for the second copy out of the tile eight before it.
        assert (i % 3, placed.cause_event[i]) == (0, i - 24 + 2)
        assert placed.start[i] > without.start[i]


def test_a_longer_rotation_shortens_the_pipeline() -> None:
    """More banks to rotate over: less waiting for evictions."""

    def run(banks: int) -> float:
        b = Builder()
        w, x = b.tile(128, 128, "bfloat16"), b.tile(128, 512, "bfloat16")
        for i in range(32):
            p = b.tile(memory="psum", address=(0, 2048 * (i % banks)))
            for k in range(2):
                b.matmul(view(p), view(w), view(x), accumulate=k > 0)
            b.copy(b.tile(), p, V)
        return schedule(b.trace, place(b.trace)).makespan_ns

    assert run(1) > run(2) >= run(4) >= run(8)


def test_weights_load_behind_the_stream_before() -> None:
    b = Builder()
    w, x = b.tile(128, 128), b.tile(128, 64)
    for _ in range(60):
        b.matmul(view(b.tile(128, 64, memory="psum")), view(w), view(x))
    t = b.timeline()
    # Two float32 passes of 64 rows hide no load of 256 cycles: the loads set the pace.
    assert error(spacing(t), 2 * 256 / 2.4) <= LAW


# -- the throttle ----------------------------------------------------------------------------------


def test_throttle_releases_after_its_window_and_returns_when_idle() -> None:
    b = Builder()
    w, x, p = b.tile(128, 128, "bfloat16"), b.tile(128, 512, "bfloat16"), b.tile(memory="psum")
    y = b.tile(128, 8192)
    for _ in range(30):
        b.matmul(view(p), view(w), view(x), accumulate=True)
    b.stream("tensor_copy", S, view(y, None, (0, 512, 1)), view(p))
    b.copy(y, y, S)
    b.stream("tensor_copy", S, view(w), view(y, None, (0, 128, 1)))
    for _ in range(30):
        b.matmul(view(p), view(w), view(x), accumulate=True)
    t = b.timeline()
    length = t.issue - t.start
    window = TRN2.pe.throttle_window_ns
    slow = [i for i in range(30) if length[i] > 1.5 * length[29]]
    assert slow == list(range(len(slow)))
    assert window <= t.start[len(slow)] <= window + length[0]
    assert length[33] > 1.5 * length[62]
    assert t.throttled_ns < t.busy_ns["tensor"]


def test_no_throttle_on_the_first_generation() -> None:
    t = stream_of_matmuls("bfloat16", 512, count=40, spec=TRN1)
    assert t.throttled_ns == 0
    assert error(spacing(t), 212.7) <= LAW


# -- Scalar tables, shared ports and banks ---------------------------------------------------------


def test_activation_tables() -> None:
    b = Builder()
    x = b.tile(128, 128)
    for function in ("copy", "exp", "copy", "exp", "square", "rsqrt", "gelu_new", "tanh_like"):
        b.stream("activation", S, view(b.tile(128, 128)), view(x), function=function)
    t = b.timeline()
    loads = (t.issue - t.start) > TRN2.scalar.table_load_ns
    assert loads.tolist() == [False, True, False, False, True, False, True, True]
    assert t.table_loads == 4


def pair_on_psum(first: Engine, second: Engine, *, same_bank: bool, spec: CoreSpec) -> Timeline:
    b = Builder(spec)
    bank = spec.psum_bank_bytes // 4
    p = b.tile(8, 2 * bank, memory="psum")
    other = (0, bank // 2, 1) if same_bank else (bank, 2 * bank, 1)
    for engine, cols in ((first, (bank // 2, bank, 1)), (second, other)):
        y = b.tile(8, len(range(*cols)))
        b.stream("tensor_copy", engine, view(y), view(p, None, cols))
    b.stream("memset", V, view(p))
    return b.timeline()


def test_scalar_and_vector_collide_on_one_bank() -> None:
    assert pair_on_psum(V, S, same_bank=False, spec=TRN2).start[1] == 0
    t = pair_on_psum(V, S, same_bank=True, spec=TRN2)
    assert max(t.start[:2]) > 0
    assert Cause.bank in t.cause.tolist()
    first = pair_on_psum(V, S, same_bank=False, spec=TRN1)
    assert Cause.bank in first.cause.tolist()


@pytest.mark.parametrize(("dtype", "waits"), [("bfloat16", True), ("float32", False)])
@pytest.mark.parametrize("first", [V, G])
def test_vector_fast_modes_lock_the_port(dtype: str, waits: bool, first: Engine) -> None:
    b = Builder()
    x, y = b.tile(128, 4096, dtype), b.tile(128, 4096)
    for engine in (first, V if first is G else G):
        if engine is V:
            b.stream("tensor_tensor", V, view(b.tile(128, 4096, dtype)), view(x), view(x))
        else:
            b.copy(b.tile(128, 4096), y, G)
    t = b.timeline()
    # Both could start at once; whoever is second in engine order waits.
    assert sorted(t.start.tolist())[0] == 0
    assert (max(t.start) > 0) == waits
    assert (Cause.port in t.cause.tolist()) == waits


# -- barriers, registers, two cores ----------------------------------------------------------------


def test_loop_iterations_drain_the_core() -> None:
    b = Builder()
    for _ in range(3):
        b.control("loop_iteration")
        for engine in (V, S):
            b.copy(b.tile(128, 512), b.tile(128, 512), engine)
    t = b.timeline()
    for i in (3, 6):
        assert t.start[i] == max(t.result[:i])
        assert t.start[i + 1] == t.start[i + 2] == t.start[i] + SYNC.loop_iteration_ns
        assert t.cause[i + 1] == Cause.barrier
        assert t.cause_event[i + 1] == i


def test_registers_order_their_users() -> None:
    b = Builder()
    b.control("register_move", hidden_writes=("register:1",))
    b.control("register_move", hidden_reads=("register:1",))
    t = b.timeline()
    assert t.result[0] == SYNC.register_move_ns
    assert t.start[1] == t.result[0] + SYNC.same_engine_ns


def test_a_barrier_between_cores_waits_for_both() -> None:
    b = Builder(lnc=2)
    for core, n in ((0, 8192), (1, 512)):
        b.core = core
        b.copy(b.tile(128, n), b.tile(128, n), V)
        b.control("barrier")
        b.copy(b.tile(128, 512), b.tile(128, 512), V)
    t = b.timeline()
    assert t.start[1] == t.start[4] == t.result[0]
    assert t.start[2] == t.start[5] == t.result[0] + SYNC.core_barrier_ns
    assert t.launch_ns == SYNC.launch_lnc2_ns


def test_a_core_without_the_barrier_does_not_hold_the_other() -> None:
    b = Builder(lnc=2)
    b.control("barrier")
    b.copy(b.tile(), b.tile(), V)
    b.core = 1
    b.copy(b.tile(), b.tile(), V)
    t = b.timeline()
    assert t.start[2] == 0
    assert t.start[1] == t.start[0] + SYNC.core_barrier_ns


def test_cores_share_the_memory_of_the_pair() -> None:
    def load(cores: int) -> Timeline:
        b = Builder(lnc=2)
        for core in range(cores):
            b.core = core
            h = b.tile(128 * 32, 4096, memory="hbm")
            for i in range(32):
                b.dma(view(b.tile(128, 4096)), view(h, (128 * i, 128 * i + 128)))
        return b.timeline()

    one, two = load(1), load(2)
    share = 2 * TRN2.hbm_bytes_per_ns / SYNC.pair_bytes_per_ns
    assert error(two.makespan_ns / one.makespan_ns, share) <= PROBE
    assert two.hbm_read_bytes == 2 * one.hbm_read_bytes


# -- errors ----------------------------------------------------------------------------------------


def test_the_tensor_engine_runs_matmuls_only() -> None:
    b = Builder()
    b.copy(b.tile(), b.tile(), T)
    with pytest.raises(
        TypeError, match=r"the Tensor engine cannot run StreamWork\(law='tensor_copy'"
    ):
        b.timeline()


def test_a_trace_that_waits_for_itself() -> None:
    b = Builder()
    for _ in range(2):
        b.copy(b.tile(), b.tile(), V)
    scheduler = _Scheduler(b.trace, None)
    scheduler.dependencies.edges[0] = (4 * 1 + Wait.result,)
    with pytest.raises(
        RuntimeError, match="2 of 2 events have no time: the trace waits for itself"
    ):
        scheduler.run()


# -- the result ------------------------------------------------------------------------------------


def test_empty_trace() -> None:
    t = Builder().timeline()
    assert t.total_ns == SYNC.launch_ns
    assert t.makespan_ns == 0
    assert t.limiting_engine == "none"


def test_total_and_label() -> None:
    t = stream_of_matmuls("bfloat16", 512, count=3)
    assert t.total_ns == SYNC.launch_ns + t.makespan_ns
    assert t.makespan_ns == max(t.result)
    assert t.limiting_engine == "tensor"
    assert t.validated is False


def test_estimates_count_what_was_used() -> None:
    b = Builder()
    b.copy(b.tile(), b.tile(), S)
    measured = b.timeline().estimates
    b.copy(b.tile(dtype="int32"), b.tile(), S)
    estimated = b.timeline().estimates
    b.dma(view(b.tile()), view(b.tile(memory="hbm")))
    assert estimated == measured + 1
    assert b.timeline().estimates > estimated


def test_intervals_are_merged() -> None:
    b = Builder()
    x = b.tile(128, 128)
    for _ in range(3):
        b.copy(b.tile(128, 128), b.tile(128, 128), S)
    b.copy(x, x, V)
    b.copy(b.tile(128, 128), x, S)
    t = b.timeline()
    spans = t.intervals(S)
    assert len(spans) == 1 + (t.start[4] > t.issue[2])
    assert error(sum(high - low for low, high in spans), t.busy_ns["scalar"]) <= LAW
    assert t.intervals(T) == []
    assert t.intervals(V)[0][0] == t.start[3]


def small(b: Builder, draw: Callable[[st.SearchStrategy[int]], int]) -> None:
    """A random program over a few tiles."""
    tiles: list[Tile] = [b.tile(8, 16) for _ in range(3)]
    p, h = b.tile(8, 16, memory="psum"), b.tile(8, 16, memory="hbm")
    for _ in range(draw(st.integers(1, 25))):
        kind, i, j = (draw(st.integers(0, high)) for high in (5, 2, 2))
        if kind == 0:
            b.dma(view(tiles[i]), view(h), (Y, S, G)[j], "dge_hw")
        elif kind == 1:
            b.dma(view(h), view(tiles[i]))
        elif kind == 2:
            b.matmul(view(p), view(tiles[i], None, (0, 8, 1)), view(tiles[j]), accumulate=j > 0)
        elif kind == 3:
            b.copy(tiles[i], p, (V, S)[j % 2])
        elif kind == 4:
            b.copy(tiles[i], tiles[j], (V, S, G)[i])
        else:
            b.control("loop_iteration")


@given(st.data())
def test_any_program_keeps_order_and_repeats(data: st.DataObject) -> None:
    b = Builder(TOY)
    small(b, data.draw)
    placement = place(b.trace)
    one, two = schedule(b.trace, placement), schedule(b.trace, placement)
    for name in ("start", "issue", "result", "service", "service_end", "cause", "cause_event"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert one.total_ns == two.total_ns
    events = b.trace.events
    last_write: dict[int, int] = {}
    for i, event in enumerate(events):
        assert one.start[i] <= one.issue[i]
        assert one.start[i] < one.result[i]
        for access in event.reads:
            producer = last_write.get(access.tile.id)
            if producer is not None and not (event.engine is T and events[producer].engine is T):
                assert one.start[i] >= one.result[producer]
        for access in event.writes:
            last_write[access.tile.id] = i
    for engine in (T, V, S, G):
        mine = [i for i, e in enumerate(events) if e.engine is engine]
        for before, after in pairwise(mine):
            assert one.start[after] >= one.issue[before]


# -- tiles of the Tensor engine --------------------------------------------------------------------


def _two_tiles(rows: tuple[int, int], columns: tuple[int, int]) -> Timeline:
    """Pairs of matmuls on tiles of 64 rows or columns, each with an accumulator of its own."""
    b = Builder()
    weights, data = b.tile(64, 64, "bfloat16"), b.tile(64, 512, "bfloat16")
    banks = [b.tile(64, 512, memory="psum") for _ in range(2)]
    for i in range(40):
        number = b.matmul(view(banks[i % 2]), view(weights), view(data), accumulate=i > 1)
        event = b.trace.events[number]
        assert isinstance(event.work, PeWork)
        event.work = replace(
            event.work,
            row_start=rows[i % 2],
            col_start=columns[i % 2],
            tile_rows=64,
            tile_cols=64,
        )
    return b.timeline()


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 64), (0, 0)), ((0, 0), (0, 64)), ((0, 64), (0, 64))]
)
def test_tiles_of_the_array_that_do_not_touch_stream_side_by_side(
    rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    apart, same = _two_tiles(rows, columns), _two_tiles((0, 0), (0, 0))
    one = 512 / TRN2.pe.clock_ghz
    assert same.makespan_ns > 40 * one
    assert apart.makespan_ns < 0.6 * same.makespan_ns
    assert apart.busy_ns["tensor"] <= apart.makespan_ns
    assert (np.diff(apart.start) >= 0).all()


# -- two cores, and orders beyond the data ---------------------------------------------------------


def test_a_core_waits_for_what_the_other_sends_into_its_tile() -> None:
    b = Builder(lnc=2)
    mine, out = b.tile(), b.tile()
    b.core = 1
    long, theirs = b.tile(128, 8192), b.tile()
    b.copy(long, long, V)
    b.copy(theirs, b.tile(), V)
    sent = b.dma(view(mine), view(theirs))
    b.core = 0
    used = b.copy(out, mine, V)
    t = b.timeline()
    assert t.start[used] >= t.result[sent] + SYNC.from_dma_ns
    assert t.cause_event[used] == sent


def test_tiles_of_two_cores_are_apart_whatever_they_hold() -> None:
    b = Builder(lnc=2)
    for core in (0, 1):
        b.core = core
        x = b.tile(128, 4096)
        b.copy(x, x, V)
    t = b.timeline()
    assert t.start.tolist() == [0.0, 0.0]


def test_an_order_the_kernel_asks_for_is_kept() -> None:
    def starts(*, ordered: bool) -> list[float]:
        b = Builder()
        first = b.copy(b.tile(128, 4096), b.tile(128, 4096), V)
        second = b.copy(b.tile(), b.tile(), S)
        if ordered:
            b.trace.orders.append((first, second))
        t = b.timeline()
        assert not ordered or t.start[second] == t.result[first] + SYNC.other_engine_ns
        return [float(t.start[second])]

    assert starts(ordered=False) == [0.0]
    assert starts(ordered=True) > [0.0]
