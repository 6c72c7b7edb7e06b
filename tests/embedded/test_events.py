"""What each instruction leaves in the trace: engine, accesses, hidden state, work; by hand."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork, StreamWork, resolve
from tests.embedded.harness import columns, event, hbm, ps, rows, sb, traced

E = nisa.engine
F32, BF16 = "float32", "bfloat16"


def places(accesses):
    """(memory, offset, shape, strides, bytes per element, indirect) of each access."""
    return [(a.tile.memory, a.offset, a.shape, a.strides, a.itemsize, a.whole) for a in accesses]


def summary(found):
    return found.opcode, found.engine, found.hidden_reads, found.hidden_writes


# -- Tensor ----------------------------------------------------------------------------------------


def test_a_matmul():
    def call():
        stationary, moving = sb(8, 16, dtype=nl.bfloat16), sb(8, 20, dtype=nl.float16)
        nisa.nc_matmul(ps(8, 32)[:4, 16:22], stationary[:6, 0:8:2], moving[:6, 2:8])

    found = event(call)
    assert summary(found) == ("nc_matmul", E.tensor, (), ("pe_stationary",))
    assert places(found.reads) == [
        ("sbuf", 0, (6, 4), (16, 2), 2, False), ("sbuf", 2, (6, 6), (20, 1), 2, False),
    ]  # fmt: skip
    assert places(found.writes) == [("psum", 16, (4, 6), (32, 1), 4, False)]
    assert found.work == PeWork(
        k=6,
        m=4,
        n=6,
        dtype=BF16,
        mode="matmul",
        stationary_step_bytes=4,
        moving_step_bytes=2,
        inferred=True,
    )
    assert found.work.macs == 6 * 4 * 6


def test_an_accumulating_matmul_reads_what_it_adds_to():
    def call():
        total, x = ps(2, 3), sb(4, 3)
        nisa.nc_matmul(total, x[:, 0:2], x)
        nisa.nc_matmul(total, x[:, 0:2], x)
        nisa.nc_matmul(total, x[:, 0:2], x, accumulate=False)

    first, second, third = traced(call).trace.events
    assert [e.work.accumulate for e in (first, second, third)] == [False, True, False]
    assert [len(e.reads) for e in (first, second, third)] == [2, 3, 2]
    assert second.reads[2] == second.writes[0]
    assert second.work.dtype == F32


def test_double_row_tiles_and_hints():
    e4m3 = nl.float8_e4m3

    def call():
        nisa.nc_matmul(
            ps(2, 5), sb(2, 2, 2, dtype=e4m3), sb(2, 2, 5, dtype=e4m3), is_moving_onezero=True,
            tile_position=(4, 0), tile_size=(2, 8), perf_mode=nisa.matmul_perf_mode.double_row,
        )  # fmt: skip

    work = event(call).work
    assert work == PeWork(
        k=2, m=2, n=5, dtype="float8_e4m3", mode="matmul", stationary_step_bytes=1,
        moving_step_bytes=1, double_row=True, onezero=True, row_start=4, tile_rows=2, tile_cols=8,
        inferred=True,
    )  # fmt: skip
    assert work.macs == 2 * 2 * 2 * 5


def test_transposes():
    found = event(lambda: nisa.nc_transpose(ps(5, 3), sb(3, 5)))
    assert summary(found)[:2] == ("nc_transpose", E.tensor)
    assert found.work == PeWork(
        k=3, m=5, n=3, dtype=F32, mode="transpose", stationary_step_bytes=4, moving_step_bytes=4
    )
    vector = event(lambda: nisa.nc_transpose(sb(2, 2), sb(2, 2)))
    assert (vector.engine, vector.hidden_writes) == (E.vector, ())
    assert vector.work == StreamWork(
        law="nc_transpose", function="", n=2, partitions=2, sources=((F32, "sbuf", 4),),
        dst=(F32, "sbuf", 4),
    )  # fmt: skip

    def by_matmul():
        eye = nl.shared_identity_matrix(3, nl.float32)
        source = sb(3, 5)
        nisa.memset(source, 1.0)
        nisa.nc_matmul(ps(5, 3), source, eye, is_transpose=True)

    found = event(by_matmul)
    assert (found.work.mode, found.work.accumulate, found.work.n) == ("transpose", False, 3)


# -- Vector, Scalar, GpSimd ------------------------------------------------------------------------

STREAMS = {
    "tensor_copy": (
        lambda: nisa.tensor_copy(ps(4, 6), sb(4, 2, 3, dtype=nl.bfloat16)), E.vector,
        StreamWork("tensor_copy", "", 6, 4, ((BF16, "sbuf", 2),), (F32, "psum", 4))),
    "strided copy": (
        lambda: nisa.tensor_copy(sb(4, 16)[:, 0:16:4], sb(4, 1).broadcast(1, 4), engine=E.scalar),
        E.scalar, StreamWork("tensor_copy", "", 4, 4, ((F32, "sbuf", 0),), (F32, "sbuf", 16))),
    "dynamic copy": (
        lambda: nisa.tensor_copy(sb(4, 2), sb(4, 8).ap(
            [[8, 4], [1, 2]], scalar_offset=nisa.register_alloc(1), indirect_dim=1)),
        E.vector,
        StreamWork("tensor_copy", "", 2, 4, ((F32, "sbuf", 4),), (F32, "sbuf", 4), dynamic=True)),
    "memset": (
        lambda: nisa.memset(sb(4, 6, dtype=nl.bfloat16), 0.0), E.vector,
        StreamWork("memset", "", 6, 4, (), (BF16, "sbuf", 2))),
    "tensor_tensor": (
        lambda: nisa.tensor_tensor(sb(4, 6), ps(4, 6), sb(4, 6, dtype=nl.bfloat16), nl.subtract),
        E.vector,
        StreamWork("tensor_tensor", "subtract", 6, 4, ((F32, "psum", 4), (BF16, "sbuf", 2)),
                   (F32, "sbuf", 4))),
    "tensor_scalar": (
        lambda: nisa.tensor_scalar(sb(4, 6), sb(4, 6), nl.multiply, sb(4, 1), op1=nl.add,
                                   operand1=1.0), E.vector,
        StreamWork("tensor_scalar", "multiply", 6, 4, ((F32, "sbuf", 4),), (F32, "sbuf", 4),
                   vectors=1)),
    "two vectors": (
        lambda: nisa.tensor_scalar(sb(4, 6), sb(4, 6), nl.multiply, sb(4, 1), op1=nl.add,
                                   operand1=ps(4, 1)), E.vector,
        StreamWork("tensor_scalar", "multiply", 6, 4, ((F32, "sbuf", 4),), (F32, "sbuf", 4),
                   vectors=2)),
    "activation": (
        lambda: nisa.activation(sb(4, 6, dtype=nl.bfloat16), nl.exp, ps(4, 6), bias=sb(4, 1),
                                reduce_op=nl.add, reduce_res=sb(4, 1),
                                reduce_cmd=nisa.reduce_cmd.reset_reduce), E.scalar,
        StreamWork("activation", "exp", 6, 4, ((F32, "psum", 4),), (BF16, "sbuf", 2), vectors=1,
                   reduces=True, reads_accumulator=True)),
    "iota": (
        lambda: nisa.iota(sb(4, 6, dtype=nl.int32), [[1, 6]]), E.gpsimd,
        StreamWork("iota", "", 6, 4, (), ("int32", "sbuf", 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_stream_work(name):
    call, engine, work = STREAMS[name]
    found = event(call)
    assert found.engine is engine
    assert found.work == work


def test_operands_that_are_tensors_are_read_and_results_written():
    def call():
        nisa.activation(
            sb(4, 6), nl.exp, sb(4, 6), bias=sb(4, 1), scale=ps(4, 1), reduce_op=nl.add,
            reduce_res=sb(4, 1), reduce_cmd=nisa.reduce_cmd.reduce,
        )  # fmt: skip

    found = event(call)
    assert [a.shape for a in found.reads] == [(4, 6), (4, 1), (4, 1)]
    assert [a.shape for a in found.writes] == [(4, 6), (4, 1)]
    numbers = event(lambda: nisa.tensor_scalar(sb(4, 6), sb(4, 6), nl.add, 1.0))
    assert len(numbers.reads) == 1


def test_a_run_time_index_is_read_and_the_access_marked():
    def call():
        index = sb(1, 1, dtype=nl.int32)
        nisa.memset(index, 2)
        view = sb(4, 8).ap([[8, 4], [1, 2]], scalar_offset=index, indirect_dim=1)
        nisa.tensor_copy(sb(4, 2), view)

    found = event(call)
    source, index = found.reads
    assert (source.whole, source.tile.shape) == (True, (4, 8))
    assert (index.whole, index.tile.dtype, index.shape) == (False, "int32", (1, 1))


# -- DMA -------------------------------------------------------------------------------------------


def each(engines, count, size):
    return tuple((e, ((count, size),)) for e in engines)


def dma(**changed):
    """The work of a load of (4, 6) float32 in one run per partition."""
    fields = {
        "kind": "copy", "nbytes": 96, "src": "hbm", "dst": "sbuf",
        "descriptors": each(range(4), 1, 24), "queue": E.gpsimd, "mode": "dge_sw",
        "hbm_read_bytes": 96, "hbm_write_bytes": 0, "casts": False, "itemsize": 4,
    }  # fmt: skip
    return DmaWork(**fields | changed)


def gathered():
    index = sb(4, 1, dtype=nl.int32)
    nisa.memset(index, 0)
    nisa.dma_copy(sb(4, 6), hbm(9, 6).ap([[6, 4], [1, 6]], vector_offset=index))


MODE = nisa.dge_mode
STORED = {"src": "sbuf", "dst": "hbm", "hbm_read_bytes": 0, "hbm_write_bytes": 96}
DMAS = {
    "load": (lambda: nisa.dma_copy(sb(4, 6), hbm(4, 6)), dma()),
    "store": (lambda: nisa.dma_copy(hbm(4, 6), sb(4, 6)), dma(**STORED)),
    "upper partitions": (
        lambda: nisa.dma_copy(hbm(2, 6), sb(8, 6)[5:7]),
        dma(**STORED | {"nbytes": 48, "hbm_write_bytes": 48,
                        "descriptors": each((5, 6), 1, 24)})),
    "columns": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 12)[:, 0:6]), dma()),
    "every other element": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 12)[:, 0:12:2]),
        dma(descriptors=each(range(4), 6, 4))),
    "two runs a partition": (
        lambda: nisa.dma_copy(sb(4, 2, 3), hbm(4, 2, 5)[:, :, 0:3]),
        dma(descriptors=each(range(4), 2, 12))),
    "a broadcast row": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(1, 6).broadcast(0, 4)), dma()),
    "a cast on load": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 6, dtype=nl.bfloat16)),
        dma(casts=True, hbm_read_bytes=48)),
    "a cast on store": (
        lambda: nisa.dma_copy(hbm(4, 6, dtype=nl.bfloat16), sb(4, 6)),
        dma(**STORED | {"casts": True, "hbm_write_bytes": 48})),
    "inside SBUF": (
        lambda: nisa.dma_copy(sb(4, 6), sb(4, 6)), dma(src="sbuf", hbm_read_bytes=0)),
    "inside HBM": (
        lambda: nisa.dma_copy(hbm(4, 6), hbm(4, 6)),
        dma(dst="hbm", hbm_write_bytes=96, descriptors=((0, ((1, 96),)),))),
    "rows inside HBM": (
        lambda: nisa.dma_copy(hbm(4, 6), hbm(4, 12)[:, 0:6]),
        dma(dst="hbm", hbm_write_bytes=96, descriptors=each(range(4), 1, 24))),
    "hardware descriptors": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 6), dge_mode=MODE.hwdge),
        dma(queue=E.sync, mode="dge_hw")),
    "on the Scalar queue": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 6), dge_mode=MODE.hwdge, engine=E.scalar),
        dma(queue=E.scalar, mode="dge_hw")),
    "prepared descriptors": (
        lambda: nisa.dma_copy(sb(4, 6), hbm(4, 6), dge_mode=MODE.none),
        dma(queue=E.sync, mode="static")),
    "gather": (gathered, dma(kind="indirect")),
    "transpose": (
        lambda: nisa.dma_transpose(sb(6, 4), hbm(4, 6)),
        dma(kind="transpose", descriptors=each(range(8), 1, 12))),
}  # fmt: skip


@pytest.mark.parametrize("name", DMAS)
def test_dma_work(name):
    call, work = DMAS[name]
    found = event(call)
    assert found.engine is E.dma
    assert found.work == work


def test_eight_partitions_share_a_dma_engine_on_trn2():
    work = event(lambda: nisa.dma_copy(sb(20, 512), hbm(20, 512)), target="trn2").work
    assert work.descriptors == ((0, ((8, 2048),)), (1, ((8, 2048),)), (2, ((4, 2048),)))


def test_a_long_run_is_cut_at_64_kib():
    count = 20 * 1024
    work = event(lambda: nisa.dma_copy(sb(1, count), hbm(1, count)), target="trn2").work
    assert work.descriptors == ((0, ((2, 64 * 1024),)),)


def test_a_gather_reads_the_index_and_the_whole_table():
    table, index = event(gathered).reads
    assert (table.whole, table.tile.shape) == (True, (9, 6))
    assert (index.whole, index.shape) == (False, (4, 1))


@given(p=rows, n=columns, step=st.integers(1, 3), load=st.booleans())
def test_the_descriptors_of_a_copy_carry_every_byte_once(p, n, step, load):
    def call():
        chip, far = sb(p, n), hbm(p, n * step)[:, 0 : n * step : step]
        nisa.dma_copy(*((chip, far) if load else (far, chip)))

    work = event(call).work
    runs = [run for _, listed in work.descriptors for run in listed]
    assert sum(count * size for count, size in runs) == work.nbytes == 4 * p * n
    assert work.hbm_read_bytes + work.hbm_write_bytes == work.nbytes


# -- around ----------------------------------------------------------------------------------------


def helper(t):
    nisa.memset(t, 0.0)


def test_the_call_site_is_the_kernel_line_with_its_helpers():
    def call():
        helper(sb(2, 2))

    frames = resolve(event(call).site)
    assert [f.function for f in frames[:2]] == ["helper", "call"]
    assert frames[0].text == "nisa.memset(t, 0.0)"
    assert frames[0].file == __file__


def test_events_are_numbered_and_tiles_know_when_they_were_born():
    def call():
        first = sb(2, 2)
        nisa.memset(first, 0.0)
        second = sb(2, 2)
        nisa.tensor_copy(second, first)

    trace = traced(call).trace
    assert [e.seq for e in trace] == [0, 1]
    assert [t.seq for t in trace.tiles] == [0, 1]
    assert [e.core for e in trace] == [0, 0]


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
def test_a_handle_shows_its_event(target):
    def call():
        handle = nisa.memset(sb(2, 2), 0.0)
        assert isinstance(handle, nisa.NkiInstruction)
        assert "memset on vector at" in repr(handle)

    traced(call, target=target)


def test_values_and_shapes_alone_leave_the_same_events():
    def kernel(x):
        t, total = sb(4, 6), ps(6, 6)
        nisa.dma_copy(t, x)
        nisa.nc_matmul(total, t, t)
        nisa.activation(t[:, 0:3], nl.exp, t[:, 3:6])
        out = nl.ndarray((4, 6), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(out, t)
        return out

    given_values = launch(kernel, (np.ones((4, 6), np.float32),), target="toy").trace
    shapes = launch(kernel, (Abstract((4, 6), "float32"),), target="toy").trace
    seen = [
        [(e.opcode, e.engine, e.work, places(e.reads), places(e.writes)) for e in trace]
        for trace in (given_values, shapes)
    ]
    assert seen[0] == seen[1]
