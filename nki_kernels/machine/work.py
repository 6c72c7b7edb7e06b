"""Builders of work records: what an instruction occupies, from its operands' signatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.operators import operator
from nki_kernels.machine.rules import Operands
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import ControlWork, DmaWork, Memory, PeWork, StreamWork

#: Commands of an accumulator that take the elements in.
_REDUCING = ("reduce", "reset_reduce", "load_reduce")


#: Runs of each DMA engine: ``(engine, ((count, bytes), ...))``.
Descriptors: TypeAlias = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def inner_step(view: NkiTensor) -> int:
    """Return the byte step between neighbouring elements of a partition (0 for a broadcast)."""
    for extent, stride in zip(reversed(view.shape[1:]), reversed(view.strides[1:]), strict=True):
        if extent > 1:
            return stride * view.dtype.itemsize
    return view.dtype.itemsize


def operand(view: NkiTensor) -> tuple[str, Memory, int]:
    """Return (dtype, memory, innermost byte step) of a full-size operand."""
    return (str(view.dtype), view.mem.tile.memory, inner_step(view))


def stream(
    law: str,
    data: tuple[str, ...] = (),
    vectors: tuple[str, ...] = (),
    function: str | None = None,
    n_of: str = "dst",
    joins: str | None = None,
) -> Callable[[Operands], StreamWork]:
    """Cost of an instruction that streams `data` through an engine into ``dst``.

    Args:
        law: name of the cost law, normally the instruction's.
        data: full-size inputs.
        vectors: operands that cost a per-partition read where they are tensors.
        function: the argument that holds the ALU operator or activation.
        n_of: the operand whose elements per partition are streamed.
        joins: the argument that holds the operator of the last of two steps.
    """

    def build(ops: Operands) -> StreamWork:
        dst = ops["dst"]
        sized = ops[n_of]
        present = [v for name in data if (v := ops.tensor(name)) is not None]
        return StreamWork(
            law=law,
            function=operator(ops[function]).name if function else "",
            n=sized.free_size,
            partitions=sized.shape[0],
            sources=tuple(operand(v) for v in present),
            dst=operand(dst),
            vectors=sum(ops.tensor(name) is not None for name in vectors),
            reduces=_is_set(ops, "reduce_cmd"),
            reads_accumulator="reduce_res" in ops.values and ops.tensor("reduce_res") is not None,
            dynamic=any(v.dynamic is not None for _, v in ops.tensors()),
            joins=operator(ops[joins]).name if joins else "",
        )

    return build


def _is_set(ops: Operands, name: str) -> bool:
    command = ops.values.get(name)
    return command is not None and getattr(command, "name", "") in _REDUCING


def matmul(ops: Operands) -> PeWork:
    """Cost of nc_matmul: k rows of weights, m columns, n rows streamed."""
    stationary, moving = ops["stationary"], ops["moving"]
    double_row = mode_name(ops["perf_mode"]) == "double_row"
    per_row = 2 if double_row else 1
    position, size = ops["tile_position"], ops["tile_size"]
    return PeWork(
        k=moving.shape[0],
        m=stationary.free_size // per_row,
        n=moving.free_size // per_row,
        dtype=_wider(stationary, moving),
        mode="transpose" if ops["is_transpose"] else "matmul",
        stationary_step_bytes=inner_step(stationary),
        moving_step_bytes=inner_step(moving),
        double_row=double_row,
        inferred=ops["accumulate"] is None,
        onezero=bool(ops["is_stationary_onezero"] or ops["is_moving_onezero"]),
        row_start=position[0] if position else 0,
        col_start=position[1] if position else 0,
        tile_rows=size[0] if size else 0,
        tile_cols=size[1] if size else 0,
    )


def mode_name(mode: Any) -> str:
    """Return the name of a matmul performance mode given as enum or string."""
    return str(getattr(mode, "value", mode))


def transpose(ops: Operands) -> PeWork | StreamWork:
    """Cost of nc_transpose on the Tensor engine (data is the stationary operand) or on Vector."""
    data = ops["data"]
    if ops.engine is not Engine.tensor:
        return stream("nc_transpose", data=("data",))(ops)
    return PeWork(
        k=data.shape[0],
        m=data.free_size,
        n=data.shape[0],
        dtype=str(data.dtype),
        mode="transpose",
        stationary_step_bytes=inner_step(data),
        moving_step_bytes=data.dtype.itemsize,
    )


def _wider(a: NkiTensor, b: NkiTensor) -> str:
    return str(a.dtype if a.dtype.itemsize >= b.dtype.itemsize else b.dtype)


def control(kind: Any) -> Callable[[Operands], ControlWork]:
    """Cost of a sequencer instruction."""
    return lambda ops: ControlWork(kind)


# -- DMA -------------------------------------------------------------------------------------------


def dma(kind: Literal["copy", "transpose"]) -> Callable[[Operands], DmaWork]:
    """Cost of a DMA: bytes, contiguous runs per DMA engine, the queue that triggers it."""

    def build(ops: Operands) -> DmaWork:
        dst, src = ops["dst"], ops["src"]
        wire = max(dst.dtype.itemsize, src.dtype.itemsize)
        nbytes = dst.size * wire
        queue, mode = queue_of(ops)
        if kind == "transpose":
            # All engines cooperate on a transpose: one share each.
            engines = min(ops.spec.dma_engines, nbytes)
            each, extra = divmod(nbytes, engines)
            descriptors: Descriptors = tuple(
                (e, ((1, each + int(e < extra)),)) for e in range(engines)
            )
        else:
            run = math.gcd(contiguous_run(src), contiguous_run(dst)) * wire
            descriptors = _descriptors(src, dst, run, ops.spec)
        indirect = any(v.dynamic is not None and v.dynamic.kind == "vector" for v in (src, dst))
        return DmaWork(
            kind="indirect" if indirect else kind,
            nbytes=nbytes,
            src=src.mem.tile.memory,
            dst=dst.mem.tile.memory,
            descriptors=descriptors,
            queue=queue,
            mode=mode,
            hbm_read_bytes=src.size * src.dtype.itemsize if not src.on_chip else 0,
            hbm_write_bytes=dst.size * dst.dtype.itemsize if not dst.on_chip else 0,
            casts=src.dtype != dst.dtype,
            itemsize=wire,
        )

    return build


def dma_compute(ops: Operands) -> DmaWork:
    """Cost of a DMA that adds: each source is read in runs that suit both it and the destination.

    With a vector_offset the rows are indexed by software descriptors, else descriptors are static
    (nki.isa.dma_compute).
    """
    dst = ops["dst"]
    sources = [view for name, view in ops.tensors() if name != "dst"]
    wire = max(v.dtype.itemsize for v in (dst, *sources))
    shares: dict[int, tuple[tuple[int, int], ...]] = {}
    for src in sources:
        run = math.gcd(contiguous_run(src), contiguous_run(dst)) * wire
        for engine, runs in _descriptors(src, dst, run, ops.spec):
            shares[engine] = shares.get(engine, ()) + runs
    indexed = any(v.dynamic is not None for v in (dst, *sources))
    from_hbm = [v for v in sources if not v.on_chip]
    return DmaWork(
        kind="compute",
        nbytes=sum(v.size for v in sources) * wire,
        src="hbm" if from_hbm else "sbuf",
        dst=dst.mem.tile.memory,
        descriptors=tuple(shares.items()),
        queue=Engine.gpsimd if indexed else Engine.sync,
        mode="dge_sw" if indexed else "static",
        hbm_read_bytes=sum(v.size * v.dtype.itemsize for v in from_hbm),
        hbm_write_bytes=dst.size * dst.dtype.itemsize if not dst.on_chip else 0,
        casts=any(v.dtype != dst.dtype for v in sources),
        itemsize=wire,
    )


def sendrecv(ops: Operands) -> DmaWork:
    """Cost of a tile sent from this core's SBUF to the other's.

    Its queue is not documented beyond "any engine"; GpSimd's, as for every DMA without a name (and
    as documented for ``dma_engine.gpsimd_dma``).
    """
    src, dst = ops["src"], ops["dst"]
    wire = src.dtype.itemsize
    run = math.gcd(contiguous_run(src), contiguous_run(dst)) * wire
    return DmaWork(
        kind="copy",
        nbytes=src.size * wire,
        src="sbuf",
        dst="sbuf",
        descriptors=_descriptors(src, dst, run, ops.spec),
        queue=Engine.gpsimd,
        mode="dge_sw",
        hbm_read_bytes=0,
        hbm_write_bytes=0,
        itemsize=wire,
    )


def collective(
    srcs: Sequence[NkiTensor], dsts: Sequence[NkiTensor], spec: CoreSpec, cores: int
) -> DmaWork:
    """Cost of a collective on this rank: its sources read and its destinations written.

    The links between ranks and the wait for the others are not modelled. `cores` share the bytes.
    """
    moved = sum(v.size * v.dtype.itemsize for v in dsts) // cores
    read = sum(v.size * v.dtype.itemsize for v in srcs) // cores
    chip = dsts[0].on_chip
    run = min(contiguous_run(v) * v.dtype.itemsize for v in dsts)
    size = min(run, spec.dma.max_descriptor_bytes)
    return DmaWork(
        kind="copy",
        nbytes=max(1, moved),
        src="sbuf" if chip else "hbm",
        dst="sbuf" if chip else "hbm",
        descriptors=_spread(max(1, -(-moved // size)), size, spec),
        queue=Engine.sync,
        mode="static",
        hbm_read_bytes=0 if chip else read,
        hbm_write_bytes=0 if chip else moved,
        itemsize=dsts[0].dtype.itemsize,
    )


def queue_of(ops: Operands) -> tuple[Engine, Literal["dge_sw", "dge_hw", "static"]]:
    """Return the engine whose queue triggers a DMA, and how its descriptors are made.

    Unnamed transfers go to one queue, GpSimd's with software descriptors: that is where the
    published single-queue measurements were taken. Hardware generation is reachable from Sync and
    Scalar only (nki.isa.dma_copy); Sync unless the call names Scalar.
    """
    mode = getattr(ops["dge_mode"], "name", "unknown")
    asked = ops.values.get("engine", Engine.unknown)
    if mode == "hwdge":
        return (Engine.scalar if asked is Engine.scalar else Engine.sync), "dge_hw"
    if mode == "none":
        return Engine.sync, "static"
    return Engine.gpsimd, "dge_sw"


def contiguous_run(view: NkiTensor) -> int:
    """Return the elements of the longest contiguous block the view is made of.

    On chip a block ends with its partition: neighbouring partitions are separate memories.
    """
    first = 1 if view.on_chip else 0
    run = 1
    dims = list(zip(view.shape, view.strides, strict=True))[first:]
    for extent, stride in reversed(dims):
        if extent == 1:
            continue
        if stride != run:
            break
        run *= extent
    return run


def _descriptors(src: NkiTensor, dst: NkiTensor, run: int, spec: CoreSpec) -> Descriptors:
    """Split a copy by partition (8 to a DMA engine on a full core), then by contiguous run."""
    size = min(run, spec.dma.max_descriptor_bytes)
    wire = max(src.dtype.itemsize, dst.dtype.itemsize)
    chip = dst if dst.on_chip else src if src.on_chip else None
    if chip is None:
        return _spread(-(-dst.size * wire // size), size, spec)
    per_partition = -(-chip.free_size * wire // size)
    start = chip.start_partition
    counts: dict[int, int] = {}
    for partition in range(start, start + chip.shape[0]):
        engine = partition // spec.partitions_per_dma_engine
        counts[engine] = counts.get(engine, 0) + per_partition
    return tuple((engine, ((count, size),)) for engine, count in counts.items())


def _spread(count: int, size: int, spec: CoreSpec) -> Descriptors:
    """Deal `count` descriptors of `size` bytes evenly over the DMA engines."""
    engines = min(spec.dma_engines, count)
    each, extra = divmod(count, engines)
    return tuple((e, ((each + (e < extra), size),)) for e in range(engines))
