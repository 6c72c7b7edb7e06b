"""What a run leaves behind: tiles, accesses and events. Data only; no format, no time, no values.

Every consumer (placement, timeline, checks, profiler) reads these records and nothing else of a
run. Events never hold tensor data, so a long run keeps only its trace alive.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Literal, NamedTuple, TypeAlias

from nki_kernels.hardware.spec import CoreSpec, Engine

Memory: TypeAlias = Literal["sbuf", "psum", "hbm"]

#: A call site: (code object, instruction offset) per frame, innermost first, up to the kernel.
#: Kept raw because resolving a line costs more than the instruction that is being recorded.
Site: TypeAlias = tuple[tuple[CodeType, int], ...]

#: Hidden state that an event writes where both cores of a launch met.
MEETING = "cores"

#: Dynamic loops around an event, outermost first: (loop number, iteration).
LoopPath: TypeAlias = tuple[tuple[int, int], ...]


class Frame(NamedTuple):
    """One resolved frame of a call site."""

    file: str
    line: int
    function: str
    text: str


#: Frames of this package's own machinery are no kernel lines; they are dropped from call sites.
_INTERNAL: tuple[str, ...] = (
    str(Path(__file__).parent), str(Path(__file__).parents[1] / "embedded"), "<nisa."
)  # fmt: skip


def resolve(site: Site) -> tuple[Frame, ...]:
    """Return file, line, function and text of every kernel frame of `site`, innermost first."""
    frames = []
    for code, lasti in site:
        if code.co_filename.startswith(_INTERNAL):
            continue
        line = code.co_firstlineno
        for start, end, number in code.co_lines():
            if start <= lasti < end and number is not None:
                line = number
                break
        text = linecache.getline(code.co_filename, line).strip()
        frames.append(Frame(code.co_filename, line, code.co_name, text))
    return tuple(frames)


def where(site: Site) -> str:
    """Return ``file:line`` of the innermost frame, for messages."""
    frames = resolve(site)
    return f"{frames[0].file}:{frames[0].line}" if frames else "<outside a kernel>"


def caller() -> str:
    """Return ``file:line`` of the innermost frame outside this package, for messages."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass(slots=True, eq=False)
class Tile:
    """One allocation: the identity of memory, without its bytes.

    Attributes:
        id: position in `Trace.tiles`.
        row_bytes: bytes per partition (SBUF, PSUM), or bytes of the innermost dimension (HBM).
        partitions: extent of dimension 0 on chip; for HBM the number of rows.
        address: (start partition, byte offset in the partition) where the kernel fixed it.
        seq: sequence number of the first event after the allocation: where its life begins.
        role: "input", "output" (HBM returned by the kernel), "temp".
    """

    id: int
    name: str
    memory: Memory
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    row_bytes: int
    partitions: int
    address: tuple[int, int] | None
    seq: int
    core: int
    site: Site
    role: str = "temp"
    shared: bool = False


class Access(NamedTuple):
    """A strided pattern over one tile, in elements of `itemsize` bytes.

    Element (i0, i1, ...) lies at byte ``itemsize * (offset + sum(i_k * strides_k))`` of the tile;
    on chip, byte b of the tile is byte ``b % row_bytes`` of partition ``b // row_bytes``.
    `whole` marks an indirect operand: the access may touch any byte of the tile.
    """

    tile: Tile
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class PeWork:
    """A pass through the Tensor engine.

    `k` contraction rows (of one value; 2 with double row, 4 of an x4 type), `m` stationary columns,
    `n` moving rows streamed. `dtype` is the wider of the two operand types. Strides are the
    innermost byte steps of the operands. `inferred`: the kernel left it open whether the pass
    accumulates (``accumulate=None``).
    """

    k: int
    m: int
    n: int
    dtype: str
    mode: Literal["matmul", "transpose"]
    stationary_step_bytes: int
    moving_step_bytes: int
    accumulate: bool = False
    double_row: bool = False
    onezero: bool = False
    row_start: int = 0
    col_start: int = 0
    tile_rows: int = 0
    tile_cols: int = 0
    inferred: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates done (a transpose counts too: it occupies the array)."""
        values = 4 if self.dtype.endswith("_x4") else 2 if self.double_row else 1
        return self.k * self.m * self.n * values


@dataclass(frozen=True, slots=True)
class StreamWork:
    """An instruction that streams `n` elements per partition through Vector, Scalar or GpSimd.

    `law` names the cost law (the instruction, normally); `function` the ALU operator or activation.
    `sources` holds (dtype, memory, innermost byte step) of each full-size input, `dst` that of the
    output. `vectors` counts the [P, 1] operands read beside the data (bias, scale, operand0).
    `reduces` marks a running accumulation along the free axis; `reads_accumulator` an extra
    instruction that stores the accumulator. `joins` is the operator that joins the last full-size
    input to the rest, of an instruction with two operators.
    """

    law: str
    function: str
    n: int
    partitions: int
    sources: tuple[tuple[str, Memory, int], ...]
    dst: tuple[str, Memory, int]
    vectors: int = 0
    reduces: bool = False
    reads_accumulator: bool = False
    dynamic: bool = False
    joins: str = ""


@dataclass(frozen=True, slots=True)
class DmaWork:
    """One DMA instruction.

    `descriptors` lists, for each of the DMA engines that take part,
    ``(engine, ((count, bytes), ...))``: so many contiguous runs of so many bytes. `queue` is the
    engine whose queue triggers it. `mode` is "dge_sw", "dge_hw" or "static". Read and write bytes
    count HBM traffic only.
    """

    kind: Literal["copy", "transpose", "compute", "indirect"]
    nbytes: int
    src: Memory
    dst: Memory
    descriptors: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    queue: Engine
    mode: Literal["dge_sw", "dge_hw", "static"]
    hbm_read_bytes: int
    hbm_write_bytes: int
    casts: bool = False
    itemsize: int = 1


@dataclass(frozen=True, slots=True)
class ControlWork:
    """Sequencer work: register moves, loads and stores, and the boundary of a loop iteration."""

    kind: Literal["register_move", "register_load", "register_store", "loop_iteration", "barrier"]


Work: TypeAlias = PeWork | StreamWork | DmaWork | ControlWork


class Event:
    """One instruction, in program order.

    `engine` executes it (for a DMA: `Engine.dma`; the triggering queue is in the work record).
    `hidden_reads` and `hidden_writes` name state that is no tensor: "act_table" (with the function
    set in `work.function`), "act_accumulator", "vector_accumulator", "pe_stationary",
    "shuffle_mask", "vector_random", "gpsimd_random", "register:<n>", `MEETING`.
    """

    __slots__ = (
        "core", "engine", "hidden_reads", "hidden_writes", "loop", "opcode", "reads", "seq", "site",
        "work", "writes",
    )  # fmt: skip

    def __init__(
        self,
        seq: int,
        core: int,
        loop: LoopPath,
        opcode: str,
        engine: Engine,
        reads: tuple[Access, ...],
        writes: tuple[Access, ...],
        hidden_reads: tuple[str, ...],
        hidden_writes: tuple[str, ...],
        work: Work,
        site: Site,
    ) -> None:
        self.seq = seq
        self.core = core
        self.loop = loop
        self.opcode = opcode
        self.engine = engine
        self.reads = reads
        self.writes = writes
        self.hidden_reads = hidden_reads
        self.hidden_writes = hidden_writes
        self.work = work
        self.site = site

    def __repr__(self) -> str:
        return f"<{self.seq} {self.opcode} on {self.engine.name} at {where(self.site)}>"


@dataclass(slots=True)
class DeclaredLoop:
    """One run of a loop whose iterations the kernel declares independent.

    Attributes:
        site: where it begins.
        core: the core that ran it.
        tiles: number of tiles allocated before it.
        starts: sequence number of the first event of each iteration.
        end: the same of the first event after the loop.
    """

    site: Site
    core: int
    tiles: int
    starts: list[int]
    end: int


@dataclass(slots=True)
class Trace:
    """All events and tiles of one kernel launch, in program order of each core.

    Under LNC2 the cores take turns: what one did between two exchanges stands together. `names`
    holds the instructions that carry a label, by core and label; `orders` the (producer, consumer)
    sequence numbers of runtime dependencies that the kernel asked for.
    """

    kernel: str
    spec: CoreSpec
    lnc: int = 1
    events: list[Event] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    names: dict[tuple[int, str], list[Event]] = field(default_factory=dict)
    declared: list[DeclaredLoop] = field(default_factory=list)
    orders: list[tuple[int, int]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)
