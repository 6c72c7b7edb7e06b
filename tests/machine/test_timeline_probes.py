"""The schedule against the isolated trn2 probes published by the voyager-compiler project."""

from __future__ import annotations

import numpy as np
import pytest

from nki_kernels.hardware import TRN2, Engine
from nki_kernels.hardware.origin import estimated
from nki_kernels.machine.timeline import Cause, Timeline
from tests.machine.timing import LAW, PROBE, error
from tests.machine.trace_builder import Builder, Mode, spacing, stream_of_matmuls, view

V, S, Y = Engine.vector, Engine.scalar, Engine.sync
SYNC = TRN2.sync


def duration(t: Timeline, event: int) -> float:
    return float(t.result[event] - t.start[event])


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


def _store_between_loads(mode: Mode, queue: Engine) -> tuple[Timeline, int, int]:
    """A store that waits for a long copy, then a load that waits for nothing."""
    b = Builder()
    source, target = (b.tile(256, 4096, memory="hbm") for _ in range(2))
    first, second, result = (b.tile(128, 4096) for _ in range(3))
    b.dma(view(first), view(source, (0, 128)), queue, mode)
    b.copy(result, first)
    store = b.dma(view(target, (0, 128)), view(result), queue, mode)
    load = b.dma(view(second), view(source, (128, 256)), queue, mode)
    return b.timeline(), store, load


def test_a_waiting_software_store_holds_back_no_load() -> None:
    t, store, load = _store_between_loads("dge_sw", Engine.gpsimd)
    assert t.start[load] < t.start[store]
    assert t.cause[load] == Cause.queue
    assert t.cause[store] == Cause.result


def test_hardware_queues_stay_in_order() -> None:
    t, store, load = _store_between_loads("dge_hw", Y)
    assert t.start[load] >= t.issue[store]


def test_loads_and_software_stores_share_one_descriptor_generator() -> None:
    b = Builder()
    source, target = (b.tile(128 * 20, 128, memory="hbm") for _ in range(2))
    tiles = [b.tile(128, 128) for _ in range(20)]
    for i, tile in enumerate(tiles):
        rows = (128 * i, 128 * i + 128)
        b.dma(view(tile), view(source, rows))
        b.dma(view(target, rows), view(tile))
    t = b.timeline()
    # A trigger takes as long whichever of the two queues it stands in.
    dma = TRN2.dma
    each = dma.sw_queue_ns + 128 * dma.sw_queue_descriptor_ns
    assert round(float(np.diff(np.sort(t.start)).min()), 6) >= round(each, 6)


def test_transfers_of_different_queues_take_turns() -> None:
    def ends(second: Engine) -> tuple[float, float]:
        b = Builder()
        h = b.tile(128 * 4, 8192, memory="hbm")
        for i in range(3):
            b.dma(view(b.tile(128, 8192)), view(h, (128 * i, 128 * i + 128)), Y, "static")
        b.dma(view(b.tile(128, 512)), view(h, (384, 512), (0, 512, 1)), second, "static")
        t = b.timeline()
        return float(t.result[3]), float(t.service_end[:3].max())

    behind, alone = ends(Y)
    beside, shared = ends(S)
    # 4 MiB each in three transfers, 256 KiB in the fourth: in its own queue it gets every second
    # turn, and the long ones lose what it took.
    assert behind > alone
    assert beside < 2 * (4 + 1) * TRN2.dma.turn_ns
    taken = 2**18 / TRN2.hbm_bytes_per_ns
    assert error(shared, alone + taken) <= LAW


def test_turns_move_what_one_piece_would() -> None:
    def last(turn_ns: float) -> float:
        dma = TRN2.dma.derive(turn_ns=estimated(turn_ns, "test"))
        b = Builder(TRN2.derive(dma=dma))
        h = b.tile(128 * 4, 4096, memory="hbm")
        for i in range(4):
            b.dma(view(b.tile(128, 4096)), view(h, (128 * i, 128 * i + 128)))
        return b.timeline().makespan_ns

    assert error(last(300.0), last(1e9)) <= LAW
