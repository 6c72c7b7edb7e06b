"""Traces written by hand: tiles, 2-D accesses and one call per instruction."""

from __future__ import annotations

from typing import Literal

from nki_kernels.hardware import TRN2, CoreSpec, Engine
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.scheduler import schedule
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import (
    Access,
    ControlWork,
    DmaWork,
    Event,
    Memory,
    PeWork,
    Site,
    StreamWork,
    Tile,
    Trace,
    Work,
)

Mode = Literal["dge_sw", "dge_hw", "static"]


def view(
    tile: Tile, rows: tuple[int, int] | None = None, cols: tuple[int, int, int] | None = None
) -> Access:
    """Return rows [low, high) and columns range(low, high, step) of a 2-D tile."""
    width = tile.shape[1]
    low, high = rows or (0, tile.shape[0])
    first, last, step = cols or (0, width, 1)
    return Access(
        tile,
        low * width + first,
        (high - low, len(range(first, last, step))),
        (width, step),
        tile.itemsize,
    )


def _operand(access: Access) -> tuple[str, Memory, int]:
    return (access.tile.dtype, access.tile.memory, access.strides[-1] * access.itemsize)


class Builder:
    """A trace under construction, on one core at a time (set `core`)."""

    def __init__(self, spec: CoreSpec = TRN2, lnc: int = 1) -> None:
        self.trace = Trace("hand-made", spec, lnc)
        self.core = 0

    def tile(
        self,
        rows: int = 128,
        cols: int = 512,
        dtype: str = "float32",
        memory: Memory = "sbuf",
        *,
        address: tuple[int, int] | None = None,
        site: Site = (),
    ) -> Tile:
        """Allocate a 2-D tile."""
        tiles = self.trace.tiles
        size = as_dtype(dtype).itemsize
        tile = Tile(
            id=len(tiles),
            name=f"t{len(tiles)}",
            memory=memory,
            shape=(rows, cols),
            dtype=dtype,
            itemsize=size,
            row_bytes=cols * size,
            partitions=rows,
            address=address,
            seq=len(self.trace.events),
            core=self.core,
            site=site,
        )
        tiles.append(tile)
        return tile

    def event(
        self,
        opcode: str,
        engine: Engine,
        work: Work,
        reads: tuple[Access, ...] = (),
        writes: tuple[Access, ...] = (),
        hidden_reads: tuple[str, ...] = (),
        hidden_writes: tuple[str, ...] = (),
    ) -> int:
        """Record an event; return its number."""
        events = self.trace.events
        events.append(
            Event(
                len(events),
                self.core,
                (),
                opcode,
                engine,
                reads,
                writes,
                hidden_reads,
                hidden_writes,
                work,
                (),
            )
        )
        return len(events) - 1

    def stream(
        self,
        law: str,
        engine: Engine,
        dst: Access,
        *sources: Access,
        function: str = "",
        vectors: int = 0,
        reads_accumulator: bool = False,
    ) -> int:
        """Record an instruction of Vector, Scalar or GpSimd over whole accesses."""
        sized = sources[0] if sources and law == "tensor_reduce" else dst
        work = StreamWork(
            law=law,
            function=function,
            n=sized.shape[1],
            partitions=sized.shape[0],
            sources=tuple(_operand(s) for s in sources),
            dst=_operand(dst),
            vectors=vectors,
            reads_accumulator=reads_accumulator,
        )
        hidden = ("act_table",) if law == "activation" else ()
        return self.event(law, engine, work, sources, (dst,), hidden)

    def copy(self, dst: Tile, src: Tile, engine: Engine = Engine.vector) -> int:
        """Record a tensor_copy of whole tiles."""
        return self.stream("tensor_copy", engine, view(dst), view(src))

    def matmul(
        self,
        dst: Access,
        stationary: Access,
        moving: Access,
        *,
        accumulate: bool = False,
        mode: Literal["matmul", "transpose"] = "matmul",
    ) -> int:
        """Record an nc_matmul of [K, M] and [K, N] accesses."""
        work = PeWork(
            k=stationary.shape[0],
            m=stationary.shape[1],
            n=moving.shape[1],
            dtype=moving.tile.dtype,
            mode=mode,
            stationary_step_bytes=stationary.strides[-1] * stationary.itemsize,
            moving_step_bytes=moving.strides[-1] * moving.itemsize,
            accumulate=accumulate,
        )
        reads = (stationary, moving, dst) if accumulate else (stationary, moving)
        return self.event("nc_matmul", Engine.tensor, work, reads, (dst,), (), ("pe_stationary",))

    def dma(
        self,
        dst: Access,
        src: Access,
        queue: Engine = Engine.gpsimd,
        mode: Mode = "dge_sw",
        kind: Literal["copy", "transpose", "compute", "indirect"] = "copy",
    ) -> int:
        """Record a DMA of one contiguous run per row, eight rows to an engine."""
        run = dst.shape[1] * dst.itemsize
        per_engine = self.trace.spec.partitions_per_dma_engine
        counts: dict[int, int] = {}
        for row in range(dst.shape[0]):
            counts[row // per_engine] = counts.get(row // per_engine, 0) + 1
        nbytes = dst.shape[0] * run
        work = DmaWork(
            kind=kind,
            nbytes=nbytes,
            src=src.tile.memory,
            dst=dst.tile.memory,
            descriptors=tuple((e, ((count, run),)) for e, count in counts.items()),
            queue=queue,
            mode=mode,
            hbm_read_bytes=nbytes if src.tile.memory == "hbm" else 0,
            hbm_write_bytes=nbytes if dst.tile.memory == "hbm" else 0,
            itemsize=dst.itemsize,
        )
        return self.event("dma_copy", Engine.dma, work, (src,), (dst,))

    def control(
        self,
        kind: Literal[
            "register_move", "register_load", "register_store", "loop_iteration", "barrier"
        ],
        hidden_reads: tuple[str, ...] = (),
        hidden_writes: tuple[str, ...] = (),
    ) -> int:
        """Record sequencer work."""
        return self.event(kind, Engine.sync, ControlWork(kind), (), (), hidden_reads, hidden_writes)

    def timeline(self) -> Timeline:
        """Return the schedule without placement."""
        return schedule(self.trace)


def spacing(t: Timeline) -> float:
    """Steady interval between the last two starts."""
    return float(t.start[-1] - t.start[-2])


def stream_of_matmuls(
    dtype: str, n: int, *, k: int = 128, count: int = 60, step: int = 1, spec: CoreSpec = TRN2
) -> Timeline:
    b = Builder(spec)
    w, x = b.tile(k, 128, dtype), b.tile(k, n * step, dtype)
    p = b.tile(128, n, memory="psum")
    for i in range(count):
        b.matmul(view(p), view(w), view(x, None, (0, n * step, step)), accumulate=i > 0)
    return b.timeline()
