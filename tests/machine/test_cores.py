"""Two cores in one launch: exchanges, barriers, who waits for whom, and what never hangs."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine import crew
from nki_kernels.machine.errors import (
    KernelError,
    NkiKernelsError,
    RuleViolation,
    UninitializedRead,
)
from nki_kernels.machine.launch import Launch, launch
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, where
from tests.machine.kernels import counted, hbm, loaded, sbuf

pytestmark = pytest.mark.usefixtures("toy")


def swap(src, dst, pipe=0, **options):
    other = 1 - nl.program_id()
    return nisa.sendrecv(
        src=src, dst=dst, send_to_rank=other, recv_from_rank=other, pipe_id=pipe, **options
    )


@nki.jit
def sum_of_halves(x):
    """Each core reduces half of the columns; both end with the sum of both parts."""
    rows, columns = x.shape
    half = columns // 2
    start = nl.program_id() * half
    part = loaded(x[:, start : start + half])
    mine = sbuf(rows, 1)
    theirs = sbuf(rows, 1)
    nisa.tensor_reduce(dst=mine, op=nl.add, data=part, axis=1)
    swap(mine, theirs)
    nisa.tensor_tensor(dst=mine, data1=mine, data2=theirs, op=nl.add)
    out = hbm(rows, 2)
    nisa.dma_copy(dst=out[:, nl.program_id() : nl.program_id() + 1], src=mine)
    return out


@nki.jit
def rows_then_other_rows(x):
    """Each core writes half of the rows to a shared tensor, then reads the other's half."""
    rows, columns = x.shape
    half = rows // 2
    mine, other = nl.program_id() * half, (1 - nl.program_id()) * half
    between = hbm(rows, columns)
    nisa.dma_copy(dst=between[mine : mine + half], src=loaded(x[mine : mine + half]))
    nisa.core_barrier(between, (0, 1))
    out = hbm(rows, columns)
    nisa.dma_copy(dst=out[other : other + half], src=loaded(between[other : other + half]))
    return out


def test_partial_sums_meet():
    x = counted(3, 8)
    assert np.array_equal(sum_of_halves[2](x), np.repeat(x.sum(1, keepdims=True), 2, 1))


def test_a_barrier_hands_over_shared_memory():
    x = counted(4, 6)
    assert np.array_equal(rows_then_other_rows[2](x), x)


def test_without_the_barrier_the_other_half_is_unwritten():
    @nki.jit
    def kernel(x):
        between = hbm(2, 4)
        mine, other = nl.program_id(), 1 - nl.program_id()
        nisa.dma_copy(dst=between[mine : mine + 1], src=loaded(x[mine : mine + 1]))
        loaded(between[other : other + 1])

    with pytest.raises(UninitializedRead) as caught:
        kernel[2](counted(2, 4))
    assert caught.value.__notes__ == ["raised on core 0"]


DTYPES = [nl.float32, nl.bfloat16, nl.int8, nl.int32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exchange_moves_bits(dtype):
    @nki.jit
    def kernel(x):
        tile = loaded(x[nl.program_id()])
        got = nl.ndarray(tile.shape, tile.dtype, buffer=nl.sbuf)
        swap(tile, got)
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[nl.program_id()], src=got)
        return out

    x = np.arange(2 * 2 * 3).reshape(2, 2, 3).astype(dtype.host)
    assert np.array_equal(kernel[2](x), x[::-1])


def test_both_ends_are_read_before_either_is_written():
    @nki.jit
    def kernel(x):
        tile = loaded(x[nl.program_id()])
        swap(tile, tile)
        out = hbm(*x.shape)
        nisa.dma_copy(dst=out[nl.program_id()], src=tile)
        return out

    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    assert np.array_equal(kernel[2](x), x[::-1])


def test_an_exchange_into_a_part_leaves_the_rest_unwritten():
    @nki.jit
    def kernel(x):
        buffer = sbuf(1, 4)
        mine, other = 2 * nl.program_id(), 2 - 2 * nl.program_id()
        nisa.dma_copy(dst=buffer[:, mine : mine + 1], src=x)
        swap(buffer[:, mine : mine + 1], buffer[:, other : other + 1])
        loaded_all = sbuf(1, 4)
        nisa.tensor_copy(dst=loaded_all, src=buffer)

    with pytest.raises(UninitializedRead, match="reads 2 of 4 elements"):
        kernel[2](counted(1, 1))


# -- shapes without values -------------------------------------------------------------------------


def outline(run: Launch) -> list[tuple]:
    return [
        (e.seq, e.core, e.opcode, e.engine, e.loop, e.work, where(e.site),
         [a[1:] for a in e.reads], [a[1:] for a in e.writes])
        for e in run.trace
    ]  # fmt: skip


KERNELS = [sum_of_halves, rows_then_other_rows]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_shapes_alone_give_the_same_trace_and_time(kernel):
    valued = launch(kernel, (counted(4, 8),), lnc=2)
    shapes = launch(kernel, (Abstract((4, 8), "float32"),), lnc=2)
    assert outline(valued) == outline(shapes)
    assert shapes.outputs == (None,)
    one, other = valued.time(), shapes.time()
    assert one.total_ns == other.total_ns > 0
    assert np.array_equal(one.start, other.start)


def test_a_partner_without_values_takes_them_from_the_receiver():
    @nki.jit
    def kernel(x, y):
        tile = loaded(x) if nl.program_id() == 0 else loaded(y)
        got = sbuf(*x.shape)
        swap(tile, got)
        with_values = hbm(*x.shape)
        without = hbm(*x.shape)
        nisa.dma_copy(dst=without if nl.program_id() == 0 else with_values, src=got)
        return with_values, without

    with_values, without = launch(
        kernel, (counted(2, 2), Abstract((2, 2), "float32")), lnc=2
    ).outputs
    assert np.array_equal(with_values, counted(2, 2))
    assert without is None


# -- order -----------------------------------------------------------------------------------------


def test_a_hundred_runs_leave_one_trace():
    first = outline(launch(sum_of_halves, (counted(3, 8),), lnc=2))
    for _ in range(99):
        assert outline(launch(sum_of_halves, (counted(3, 8),), lnc=2)) == first


def test_a_core_runs_until_it_waits():
    run = launch(rows_then_other_rows, (counted(4, 6),), lnc=2)
    # Core 0 to its barrier, core 1 to its own and on, then core 0 again.
    assert [e.core for e in run.trace] == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0]


@given(choices=st.lists(st.integers(0, 1), max_size=12), columns=st.sampled_from([2, 8]))
def test_no_schedule_of_the_cores_changes_a_value_or_a_cores_events(choices, columns):
    x = counted(4, columns)
    wanted = [launch(kernel, (x,), lnc=2) for kernel in KERNELS]
    left = iter(choices)

    def chosen(able):
        return able[next(left, 0) % len(able)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "first", chosen)
        found = [launch(kernel, (x,), lnc=2) for kernel in KERNELS]
    for want, got in zip(wanted, found, strict=True):
        assert np.array_equal(want.outputs[0], got.outputs[0])
        for core in (0, 1):
            assert [e[2:] for e in outline(want) if e[1] == core] == [
                e[2:] for e in outline(got) if e[1] == core
            ]


@given(st.lists(st.sampled_from(["compute", "swap", "barrier"]), max_size=10))
def test_any_program_of_exchanges_runs_and_is_timed(steps):
    @nki.jit
    def kernel(x):
        me = nl.program_id()
        tile, got = loaded(x[me]), sbuf(*x.shape[1:])
        shared = hbm(*x.shape)
        for step in steps:
            if step == "compute":
                nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0)
            elif step == "swap":
                swap(tile, got)
                nisa.tensor_tensor(dst=tile, data1=tile, data2=got, op=nl.subtract)
            else:
                nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(dst=shared[me], src=tile)
        return shared

    x = np.arange(4, dtype=np.float32).reshape(2, 1, 2)
    want = x.copy()
    for step in steps:
        want = want + 1 if step == "compute" else want - want[::-1] if step == "swap" else want
    run = launch(kernel, (x,), lnc=2)
    assert np.array_equal(run.outputs[0], want)
    assert run.time().total_ns > 0


def test_the_events_of_an_exchange_and_a_barrier():
    run = launch(sum_of_halves, (counted(3, 8),), lnc=2)
    sent = [e for e in run.trace if e.opcode == "sendrecv"]
    assert [e.core for e in sent] == [0, 1]
    for mine, other in (sent, sent[::-1]):
        assert mine.reads[0].tile.core == mine.core
        assert mine.writes[0].tile.core == other.core
        assert mine.reads[0].tile.memory == mine.writes[0].tile.memory == "sbuf"
        assert isinstance(mine.work, DmaWork)
        assert mine.work.nbytes == 3 * 4
        assert mine.work.hbm_read_bytes == mine.work.hbm_write_bytes == 0
    run = launch(rows_then_other_rows, (counted(4, 6),), lnc=2)
    met = [e for e in run.trace if e.opcode == "core_barrier"]
    assert [e.core for e in met] == [0, 1]
    assert {e.work.kind for e in met} == {"barrier"}
    assert met[0].reads == met[1].reads == met[0].writes


# -- errors ----------------------------------------------------------------------------------------


def fails(body, error=KernelError, **options) -> str:
    """Run `body(core)` on two cores; return the message, in which both ends must have lines."""

    def kernel():
        body(nl.program_id())

    with pytest.raises(error) as caught:
        launch(kernel, lnc=2, **options)
    return str(caught.value)


def ran(call, **options) -> Launch:
    """A launch of a kernel that makes one call and returns nothing."""

    def kernel():
        call()

    return launch(kernel, **options)


def filled(*shape, dtype=nl.float32):
    tile = sbuf(*shape, dtype=dtype)
    nisa.memset(tile, 0)
    return tile


def only_core_0_swaps(core):
    if core == 0:
        swap(filled(1, 2), sbuf(1, 2))
    else:
        filled(1, 2)


def only_core_1_meets(core):
    if core == 1:
        nisa.core_barrier(hbm(1, 2), (0, 1))


def pipes_differ(core):
    swap(filled(1, 2), sbuf(1, 2), pipe=core)


def one_swaps_one_meets(core):
    if core == 0:
        swap(filled(1, 2), sbuf(1, 2))
    else:
        nisa.core_barrier(hbm(1, 2), (0, 1))


def one_swaps_twice(core):
    for _ in range(1 + core):
        swap(filled(1, 2), sbuf(1, 2))


DEADLOCKS = [
    (only_core_0_swaps, ["core 0 waits at nisa.sendrecv, ", "for core 1; core 1 ended (its last"]),
    (only_core_1_meets, ["core 0 ended", "core 1 waits at nisa.core_barrier, ", "for core 0"]),
    (pipes_differ, ["core 0 waits at nisa.sendrecv, ", "core 1 waits at nisa.sendrecv, "]),
    (one_swaps_one_meets, ["core 0 waits at nisa.sendrecv", "core 1 waits at nisa.core_barrier"]),
    (one_swaps_twice, ["core 0 ended (its last instruction: ", "core 1 waits at nisa.sendrecv"]),
]


@pytest.mark.parametrize(("body", "says"), DEADLOCKS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_deadlock_is_an_error_that_names_both_lines(body, says):
    message = fails(body)
    for part in says:
        assert part in message
    assert message.count(f"{__file__}:") == 2 or "core 0 ended;" in message
    assert message.endswith(
        "nobody can go on; every core and rank must run the same exchanges (sendrecv, "
        "core_barrier, collectives) in the same order"
    )


ENDS = [
    ((1, 2), (1, 2), nl.float32, nl.bfloat16, "sends [1, 2] float32", "receives [1, 2] bfloat16"),
    ((1, 2), (1, 3), nl.float32, nl.float32, "sends [1, 2] float32", "receives [1, 3] float32"),
    ((2, 2), (1, 4), nl.float32, nl.float32, "sends [2, 2] float32", "receives [1, 4] float32"),
]


@pytest.mark.parametrize(("one", "other", "a", "b", "sends", "receives"), ENDS)
def test_ends_that_do_not_fit_are_named(one, other, a, b, sends, receives):
    def body(core):
        shape, dtype = ((one, a), (other, b))[core]
        swap(filled(*shape, dtype=dtype), sbuf(*shape, dtype=dtype))

    message = fails(body)
    assert message.startswith("nisa.sendrecv: core 0 at ")
    assert sends in message
    assert receives in message
    assert message.endswith("both ends must have one shape and dtype")
    assert message.count(f"{__file__}:") == 2


def test_a_barrier_is_on_one_tensor():
    def body(core):
        a, b = hbm(1, 2), hbm(1, 2)
        nisa.core_barrier((a, b)[core], (0, 1))

    message = fails(body)
    assert "nisa.core_barrier: core 0 at " in message
    assert message.endswith("both cores must name the same shared tensor")


def test_an_error_on_one_core_ends_both():
    seen = []

    def body(core):
        seen.append(core)
        if core == 1:
            raise ValueError("mine")
        swap(filled(1, 2), sbuf(1, 2))
        seen.append("after")

    assert fails(body, ValueError) == "mine"
    assert seen == [0, 1]


def test_a_waiting_core_cannot_hold_its_end():
    def body(core):
        if core == 1:
            raise ValueError("mine")
        for _ in range(3):
            try:
                swap(filled(1, 2), sbuf(1, 2))
            except NkiKernelsError:
                continue

    assert fails(body, ValueError) == "mine"


def test_a_failing_launch_changes_nothing():
    x = counted(1, 2)

    @nki.jit
    def kernel(x):
        nisa.dma_copy(dst=x, src=filled(1, 2))
        if nl.program_id() == 1:
            swap(filled(1, 2), sbuf(1, 2))

    with pytest.raises(KernelError):
        kernel[2](x)
    assert np.array_equal(x, counted(1, 2))


RULES = [
    (lambda: nisa.sendrecv(hbm(1, 2), sbuf(1, 2), 1, 1, 0), "src is in HBM; it must be in SBUF"),
    (lambda: nisa.sendrecv(filled(1, 2), hbm(1, 2), 1, 1, 0), "dst is in HBM; it must be in SBUF"),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(2, 1), 1, 1, 0), "src [1, 2], dst [2, 1]; shapes"),
    (
        lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2, dtype=nl.int32), 1, 1, 0),
        "src float32, dst int32: dtypes must be equal",
    ),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 2, 1, 0), "send_to_rank=2; it must be 0 or 1"),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 1, True, 0), "recv_from_rank=True; it must"),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 1, 1, "a"), "pipe_id='a'; it must be an int"),
    (
        lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 1, 1, 0, dma_engine=1),
        "dma_engine=1; it must be a member of nisa.dma_engine",
    ),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 0, 1, 0), "send_to_rank=0 on core 0; the"),
    (lambda: nisa.sendrecv(filled(1, 2), sbuf(1, 2), 1, 0, 0), "recv_from_rank=0 on core 0; the"),
    (lambda: nisa.core_barrier(hbm(1, 2), (1, 0)), "cores=(1, 0); it must be (0, 1), or (0,)"),
    (lambda: nisa.core_barrier(hbm(1, 2), False), "cores=False; it must be (0, 1), or (0,)"),
    (lambda: nisa.core_barrier(hbm(1, 2), (0, 1), engine=3), "engine=3; it must be a member of"),
    (
        lambda: nisa.core_barrier(nl.ndarray((1, 2), nl.float32, buffer=nl.hbm), (0, 1)),
        "is in private HBM, which the other core never sees; allocate it with buffer=nl.shared_hbm",
    ),
]


@pytest.mark.parametrize(("call", "says"), RULES, ids=[r[1] for r in RULES])
def test_an_illegal_call_is_named(call, says):
    message = fails(lambda core: call(), RuleViolation)
    assert says in message
    assert f"{__file__}:" in message


SIZES = [(nl.float32, 256), (nl.bfloat16, 256), (nl.int8, 256)]


@pytest.mark.parametrize(("dtype", "most"), SIZES, ids=str)
def test_gpsimd_moves_small_tiles_only(dtype, most):
    def body(core, columns):
        mover = nisa.dma_engine.gpsimd_dma
        swap(filled(1, columns, dtype=dtype), sbuf(1, columns, dtype=dtype), dma_engine=mover)

    launch(lambda: body(nl.program_id(), most), lnc=2, target="trn2")
    message = fails(lambda core: body(core, most + 1), RuleViolation, target="trn2")
    size = dtype.itemsize
    assert f"src holds {(most + 1) * size} bytes per partition; gpsimd_dma moves at most" in message
    assert f"at most {most * size} of {dtype}" in message


def test_a_launch_on_one_core_has_nobody_to_meet():
    def swaps():
        nisa.sendrecv(filled(1, 2), sbuf(1, 2), 1, 1, 0)

    with pytest.raises(KernelError) as caught:
        ran(swaps, lnc=1)
    assert "the launch has one core and this needs two; launch kernel[2](...)" in str(caught.value)
    for cores in ((0,), [0], 0):
        run = ran(lambda cores=cores: nisa.core_barrier(hbm(1, 2), cores), lnc=1)
        assert len(run.trace) == 0
    for cores, lnc in (((0, 1), 1), ((0,), 2)):
        with pytest.raises(KernelError) as caught:
            ran(lambda cores=cores: nisa.core_barrier(hbm(1, 2), cores), lnc=lnc)
        assert f"cores={cores} in a launch on {lnc} core(s); pass (0, 1)" in str(caught.value)


def test_a_barrier_takes_lists_and_tiles_on_chip():
    run = ran(lambda: nisa.core_barrier(filled(1, 1), [0, 1]), lnc=2)
    assert [len(e.writes) for e in run.trace if e.opcode == "core_barrier"] == [0, 0]


@pytest.mark.parametrize("call", [RULES[8][0], lambda: nisa.core_barrier(hbm(1, 2), (0,))])
def test_the_first_generation_has_no_pairs(call):
    with pytest.raises(RuleViolation, match="on trn1; two cores work as one from gen3 on"):
        ran(call, target="trn1", lnc=1)
