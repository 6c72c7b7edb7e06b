"""The schedule: published probes, waits, shared servers, the throttle, barriers, two cores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import TOY, TRN1, TRN2, CoreSpec, Engine
from nki_kernels.machine.placement import place
from nki_kernels.machine.timeline import Cause, Timeline, schedule
from nki_kernels.machine.trace import Tile
from tests.machine.timing import LAW, PROBE, error
from tests.machine.trace_builder import Builder, view

T, V, S, G, Y = Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd, Engine.sync
SYNC = TRN2.sync


def duration(t: Timeline, event: int) -> float:
    return float(t.result[event] - t.start[event])


def spacing(t: Timeline) -> float:
    """Steady interval between the last two starts."""
    return float(t.start[-1] - t.start[-2])


# -- published probes (timing.md C.3) --------------------------------------------------------------


@pytest.mark.parametrize(("n", "measured"), [(128, 297), (512, 617), (2048, 1897), (8192, 7017)])
def test_v09a_dependent_scalar_copies(n: int, measured: float) -> None:
    b = Builder()
    x = b.tile(128, n)
    for _ in range(16):
        b.copy(x, x, S)
    t = b.timeline()
    assert all(error(duration(t, i), measured) <= LAW for i in range(16))
    # A dependent instruction starts when the result is there and handed over.
    assert error(spacing(t), duration(t, 0) + SYNC.same_engine_ns) <= LAW


@pytest.mark.parametrize("n", [128, 512, 2048, 8192])
@pytest.mark.parametrize(
    ("law", "startup", "slope"),
    [("tensor_tensor", 158.7, 1.0417), ("tensor_scalar", 160.3, 0.5208)],
)
def test_v09b_dependent_vector(law: str, startup: float, slope: float, n: int) -> None:
    b = Builder()
    x = b.tile(128, n)
    sources = [view(x)] * (2 if law == "tensor_tensor" else 1)
    for _ in range(16):
        b.stream(law, V, view(x), *sources)
    assert error(duration(b.timeline(), 7), startup + slope * n) <= LAW


@pytest.mark.parametrize(
    ("n", "seeds", "measured"),
    [(64, 0, 291), (256, 0, 691), (1024, 0, 2291), (2048, 0, 4424), (256, 1, 751), (1024, 1, 2351)],
)
def test_v09c_scan(n: int, seeds: int, measured: float) -> None:
    b = Builder()
    x = b.tile(128, n)
    b.stream("tensor_tensor_scan", V, view(x), view(x), vectors=seeds)
    assert error(duration(b.timeline(), 0), measured) <= PROBE


@pytest.mark.parametrize(("n", "activate"), [(64, 348), (256, 491), (1024, 1148), (2048, 2001)])
def test_v09d_exp_with_accumulate(n: int, activate: float) -> None:
    b = Builder()
    x = b.tile(128, n)
    b.stream("activation", S, view(x), view(x), function="exp", reads_accumulator=True)
    t = b.timeline()
    # The read starts when the accumulator is forwarded, 94 ns before the activation completes.
    law = TRN2.scalar
    forwarded = activate - 294.5 + law.accumulator_forward_ns
    expected = law.table_load_ns + forwarded + law.read_accumulator_ns
    assert error(duration(t, 0), expected) <= LAW


def stream_of_matmuls(
    dtype: str, n: int, *, k: int = 128, count: int = 60, step: int = 1, spec: CoreSpec = TRN2
) -> Timeline:
    b = Builder(spec)
    w, x = b.tile(k, 128, dtype), b.tile(k, n * step, dtype)
    p = b.tile(128, n, memory="psum")
    for i in range(count):
        b.matmul(view(p), view(w), view(x, None, (0, n * step, step)), accumulate=i > 0)
    return b.timeline()


@pytest.mark.parametrize(
    ("dtype", "n", "step", "measured"),
    [
        ("float32", 512, 1, 860.0),
        ("float32", 128, 1, 223.0),
        ("bfloat16", 512, 1, 216.0),
        ("bfloat16", 256, 1, 110.0),
    ],
)
def test_v09e_matmul_streams(dtype: str, n: int, step: int, measured: float) -> None:
    assert error(spacing(stream_of_matmuls(dtype, n, step=step)), measured) <= LAW


def test_v09e_strided_stream() -> None:
    assert error(spacing(stream_of_matmuls("float32", 128, step=16)), 437.0) <= PROBE


def test_v09f_half_the_rows_never_leave_the_throttle() -> None:
    t = stream_of_matmuls("float32", 512, k=64)
    assert error(spacing(t), 1707.0) <= LAW
    assert error(t.throttled_ns, t.busy_ns["tensor"]) <= LAW
    full = stream_of_matmuls("float32", 512)
    assert error(spacing(full), 860.0) <= LAW


@pytest.mark.parametrize(
    ("dtype", "n", "constant", "slope"),
    [
        ("float32", 128, 381, 8 / 2.4),
        ("float32", 512, 381, 8 / 2.4),
        ("bfloat16", 128, 203, 1.9875 / 2.4),
        ("bfloat16", 512, 203, 1.9875 / 2.4),
    ],
)
def test_cold_matmul(dtype: str, n: int, constant: float, slope: float) -> None:
    t = stream_of_matmuls(dtype, n, count=1)
    assert error(duration(t, 0), constant + slope * n) <= LAW


@pytest.mark.parametrize("cols", [64, 128, 256, 512])
def test_v09g_single_dma(cols: int) -> None:
    b = Builder()
    h = b.tile(128, cols, memory="hbm")
    b.dma(view(b.tile(128, cols)), view(h))
    load = b.timeline()
    nbytes = 512 * cols
    assert error(duration(load, 0), 751 + 293 + 1.3046 * nbytes / 368 + 314.5) <= LAW
    b = Builder()
    b.dma(view(b.tile(128, cols, memory="hbm")), view(b.tile(128, cols)))
    store = b.timeline()
    assert error(duration(store, 0), 565.5 + 162 + 0.9628 * nbytes / 368 + 355) <= LAW


@pytest.mark.parametrize(
    ("mode", "interval"), [("dge_sw", 607.0), ("dge_hw", 600.0), ("static", 86.0)]
)
def test_dma_triggers_of_one_queue_are_spaced(mode: str, interval: float) -> None:
    b = Builder()
    h = b.tile(2048, 32, memory="hbm")
    for i in range(16):
        x = b.tile(128, 32)
        b.dma(view(x), view(h, (128 * i, 128 * i + 128)), Y, mode)  # type: ignore[arg-type]
    t = b.timeline()
    assert error(spacing(t), interval) <= LAW
    assert t.cause[-1] in (Cause.queue, Cause.engine)


def test_many_loads_run_at_the_core_rate() -> None:
    b = Builder()
    h = b.tile(128 * 64, 2048, memory="hbm")
    for i in range(64):
        b.dma(view(b.tile(128, 2048)), view(h, (128 * i, 128 * i + 128)))
    t = b.timeline()
    ideal = 64 * 2**20 / TRN2.hbm_bytes_per_ns
    assert t.hbm_read_bytes == 64 * 2**20
    assert t.hbm_write_bytes == 0
    assert t.limiting_engine == "dma"
    assert error(t.busy_ns["dma"], ideal) <= LAW
    assert error(t.makespan_ns, ideal) <= PROBE


def test_queues_trigger_side_by_side_and_share_the_memory() -> None:
    def run(queues: list[Engine], cols: int) -> float:
        b = Builder()
        h = b.tile(128 * 48, cols, memory="hbm")
        for i in range(48):
            source = view(h, (128 * i, 128 * i + 128))
            b.dma(view(b.tile(128, cols)), source, queues[i % len(queues)], "dge_hw")
        return b.timeline().makespan_ns

    assert run([Y, S], 32) < 0.6 * run([Y], 32)
    assert error(run([Y, S], 4096), run([Y], 4096)) <= PROBE


# -- waits -----------------------------------------------------------------------------------------


def test_handoffs() -> None:
    b = Builder()
    x, y, h = b.tile(), b.tile(), b.tile(memory="hbm")
    b.dma(view(x), view(h))
    b.copy(y, x, V)
    b.copy(y, y, V)
    b.copy(y, y, S)
    b.dma(view(h), view(y))
    t = b.timeline()
    gaps = [float(t.start[i + 1] - t.result[i]) for i in range(4)]
    expected = [SYNC.from_dma_ns, SYNC.same_engine_ns, SYNC.other_engine_ns, SYNC.to_dma_ns]
    assert np.allclose(gaps, expected, rtol=0, atol=np.spacing(t.makespan_ns))
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
