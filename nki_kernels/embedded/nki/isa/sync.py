"""The two cores of an LNC2 launch meet: sendrecv, core_barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nki.isa.enums import dma_engine as dma_engines
from nki.isa.enums import engine as engines

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import cores as meeting
from nki_kernels.machine import work
from nki_kernels.machine.errors import KernelError, RuleViolation
from nki_kernels.machine.instruction import Call, instruction
from nki_kernels.machine.rules import BufferIs, Operands, Rule, SameDtype
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor
from nki_kernels.machine.trace import where

#: Bytes per partition that GpSimd's own DMA engine moves, by bytes per element (nki.isa.sendrecv).
_GPSIMD_BYTES = {4: 1024, 2: 512, 1: 256}


@dataclass(frozen=True)
class _Pair(Rule):
    """Two cores share an HBM stack from gen3 on."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 3

    def problem(self, ops: Operands) -> str | None:
        if ops.spec.generation < self.since():
            return f"on {ops.spec.name}; two cores work as one from gen3 on: launch on one core"
        return None

    def __str__(self) -> str:
        return "gen3 or newer, launched on two cores"


@dataclass(frozen=True)
class _Ends(Rule):
    """One shape, one pipe, one partner."""

    def problem(self, ops: Operands) -> str | None:
        src, dst = ops["src"], ops["dst"]
        if src.shape != dst.shape:
            return f"src {list(src.shape)}, dst {list(dst.shape)}; shapes must be equal: slice one"
        for name, view in ops.tensors():
            if view.dynamic is not None and view.dynamic.kind == "vector":
                return f"{name} has a vector_offset; a tile is sent as it lies: gather it first"
        for name in ("send_to_rank", "recv_from_rank"):
            if isinstance(ops[name], bool) or ops[name] not in (0, 1):
                return f"{name}={ops[name]!r}; it must be 0 or 1: use 1 - nl.program_id()"
        if isinstance(ops["pipe_id"], bool) or not isinstance(ops["pipe_id"], int):
            return f"pipe_id={ops['pipe_id']!r}; it must be an int that both cores pass"
        return self._engine(ops, src)

    def _engine(self, ops: Operands, src: NkiTensor) -> str | None:
        mover = ops["dma_engine"]
        if not isinstance(mover, dma_engines):
            return f"dma_engine={mover!r}; it must be a member of nisa.dma_engine"
        if mover is dma_engines.dma:
            return None
        limit = _GPSIMD_BYTES[src.dtype.itemsize]
        held = src.free_size * src.dtype.itemsize
        if held > limit:
            return (
                f"src holds {held} bytes per partition; gpsimd_dma moves at most {limit} of "
                f"{src.dtype}: split it, or use dma_engine.dma"
            )
        return None

    def __str__(self) -> str:
        return (
            "`src` and `dst` of one shape; ranks 0 or 1; `gpsimd_dma` at most 1024, 512, 256 bytes "
            "per partition of 4-, 2-, 1-byte types"
        )


@instruction(
    engines=(Engine.dma,),
    reads=("src",),
    writes=("dst",),
    rules=(
        _Pair(),
        BufferIs("src", "sbuf"),
        BufferIs("dst", "sbuf", remedy="receive into SBUF"),
        SameDtype("src", "dst"),
        _Ends(),
    ),
    cost=work.sendrecv,
    source="nki.isa.sendrecv; cost: as a dma_copy (estimated)",
)
def sendrecv(
    call: Call,
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: dma_engines = dma_engines.dma,
    name: str | None = None,
) -> None:
    """The other core's dst = src, and dst = the other core's src, bit for bit.

    Both cores call it with the same `pipe_id`; `src` and `dst` may overlap (both are read first).
    The meeting orders everything the cores did before it against everything after it.
    Choices where the documents are silent: a core waits in the call, so exchanges on different
    pipes are met in program order; a core cannot send to itself.
    """
    other = 1 - call.run.core
    for operand, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        if rank != other and call.run.lnc > 1:
            raise RuleViolation(
                f"nisa.sendrecv at {where(call.site)}: {operand}={rank} on core {call.run.core}; "
                f"the partner is core {other}: use 1 - nl.program_id()"
            )
    meeting.exchange(call, pipe_id, src, dst)


@dataclass(frozen=True)
class _Who(Rule):
    """Which cores meet, on which engine."""

    def problem(self, ops: Operands) -> str | None:
        cores = ops["cores"]
        if cores not in (0, (0,), (0, 1)) or isinstance(cores, bool):
            return f"cores={cores!r}; it must be (0, 1), or (0,) in a launch on one core"
        if not isinstance(ops["engine"], engines):
            return f"engine={ops['engine']!r}; it must be a member of nisa.engine"
        return None

    def __str__(self) -> str:
        return "`cores` (0, 1), or (0,) on one core"


@instruction(
    engines=(Engine.gpsimd, Engine.vector, Engine.scalar, Engine.tensor, Engine.sync),
    reads=(),
    writes=("data",),
    updates=("data",),
    rules=(_Pair(), BufferIs("data", "hbm", "sbuf"), _Who()),
    cost=work.control("barrier"),
    lists=("cores",),
    source="nki.isa.core_barrier; cost: core_barrier_ns",
)
def core_barrier(
    call: Call,
    data: NkiTensor,
    cores: Any,
    engine: engines = engines.gpsimd,
    name: str | None = None,
) -> None:
    """No core goes on before both are here, and what they did to `data` is done.

    Nothing is computed. `data` lies in shared HBM and is the same tensor on both cores; a tile in
    SBUF, which published kernels pass as well, makes it a barrier for everything. ``cores=(0,)`` in
    a launch on one core does nothing (published kernels; undocumented).
    """
    run = call.run
    alone = cores in (0, (0,))
    if alone != (run.lnc == 1):
        raise KernelError(
            f"nisa.core_barrier at {where(call.site)}: cores={cores!r} in a launch on {run.lnc} "
            "core(s); pass (0, 1) with two and (0,) with one, or leave it out where "
            "nl.num_programs() is 1"
        )
    if alone:
        return
    if not data.on_chip and data.buffer is not MemoryRegion.shared_hbm:
        raise RuleViolation(
            f"nisa.core_barrier at {where(call.site)}: data {data!r} is in private HBM, which the "
            "other core never sees; allocate it with buffer=nl.shared_hbm"
        )
    meeting.barrier(call, data)
