"""One run's state: target, memory pools, accumulators, registers, loop path, and the trace.

A run owns everything that changes while a kernel executes; one ContextVar names the current run.
Nothing needs a reset after an exception, and two runs never share state but the memo of verdicts.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine import allocation, dtypes, indirection
from nki_kernels.machine.checks.values import WIDE, check_integers
from nki_kernels.machine.dtypes import Array, DType, as_dtype
from nki_kernels.machine.errors import (
    AbstractValue,
    KernelError,
    NkiKernelsError,
    RuleViolation,
)
from nki_kernels.machine.generators import Xorwow
from nki_kernels.machine.layout import Signature, as_address, row_major
from nki_kernels.machine.memory import Memory, uninitialized
from nki_kernels.machine.options import NkiWarning, Options
from nki_kernels.machine.products import Products
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor
from nki_kernels.machine.trace import (
    Access,
    ControlWork,
    Event,
    LoopPath,
    Site,
    Tile,
    Trace,
    Work,
    where,
)
from nki_kernels.machine.trace import Memory as MemoryName

if TYPE_CHECKING:
    from nki_kernels.machine.cores import Team
    from nki_kernels.machine.instruction import Instruction, Plan

T = TypeVar("T")

_CURRENT: ContextVar[Run | None] = ContextVar("nki_run", default=None)

#: Verdicts by (target, options), then by operand signature: rules are pure functions of those.
_PLANS: dict[tuple[CoreSpec, Options], dict[Any, Plan]] = {}


@dataclass(slots=True)
class _Form:
    """What an allocation comes to, and the signature of its tensor on chip (`NkiTensor`)."""

    extents: tuple[int, ...]
    strides: tuple[int, ...]
    kind: DType
    dtype_name: str
    memory: MemoryName
    nbytes: int
    row_bytes: int
    partitions: int
    signature: Signature | None = None


_PLAIN = {int}

#: Frames of a call site kept per event; deeper helper stacks are cut at the outside.
MAX_FRAMES = 12


def current(what: str = "this call") -> Run:
    """Return the run in progress.

    Raises:
        KernelError: no kernel is running.
    """
    run = _CURRENT.get()
    if run is None:
        raise KernelError(
            f"{what} outside a kernel: NKI calls need a running kernel; decorate the function with "
            "@nki.jit and call it with arrays, or use nki.simulate(function)(arrays)"
        )
    return run


class VirtualRegister:
    """A 32-bit register of the engine sequencers.

    Its value is not known while a kernel is built: no conversion, comparison or condition.
    `value` is None while uninitialised, and when it came from a tile without values; only then
    `abstract` is True.
    """

    __slots__ = ("abstract", "frozen", "number", "value")

    def __init__(self, number: int, value: int | None, frozen: bool = False) -> None:
        self.number = number
        self.value = value
        self.abstract = False
        self.frozen = frozen

    def read(self) -> int:
        """Return the value for address computation."""
        if self.value is None:
            raise AbstractValue(
                f"register {self.number}: read before a value was moved or loaded into it, or "
                "loaded from a tile without values; load it first, and pass arrays for what "
                "decides addresses"
            )
        return self.value

    def _refuse(self, *_: object) -> Any:
        raise AbstractValue(
            f"register {self.number}: its value exists only at run time, so it cannot steer Python "
            "(if, while, int(), range(), comparison); use nl.fori_loop or nl.while_loop, or pass "
            "it as scalar_offset"
        )

    __bool__ = __int__ = __index__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __eq__ = __ne__ = __iter__ = _refuse
    __hash__ = object.__hash__


class Run:
    """The state of one kernel launch on one core.

    Attributes:
        spec: the core it runs on.
        options: what is checked.
        trace: events and tiles so far (shared between the cores of an LNC2 launch).
        core: this core's number; lnc: cores in the launch; gridded: True for one with a bracket.
        team: the cores it meets (`cores`), None for a launch on one core; rank: its rank there.
        label: what messages call it.
        act_accumulator, vector_accumulator: one float32 per partition; NaN until reset.
        generators: pseudo random numbers of the engines that have used theirs.
        executing: plan and arguments of the instruction in progress, for messages.
        valueless: hidden state (by its name in events) that holds something without values.
    """

    def __init__(
        self, spec: CoreSpec, options: Options, trace: Trace, boundary: CodeType, core: int = 0
    ) -> None:
        self.spec = spec
        self.options = options
        self.trace = trace
        self.core = core
        self.lnc = trace.lnc
        self.loop: LoopPath = ()
        self.loops = 0
        self.act_accumulator = np.full(spec.partitions, np.nan, np.float32)
        self.vector_accumulator = np.full(spec.partitions, np.nan, np.float32)
        self.generators: dict[Engine, Xorwow] = {}
        self.valueless: set[str] = set()
        self.executing: tuple[Plan, tuple[Any, ...]] | None = None
        self.registers = 0
        self.gridded = False
        self.team: Team | None = None
        self.rank = 0
        self.label = "core 0"
        self._boundary = boundary
        self._plans = _PLANS.setdefault((spec, options), {})
        self._products = Products()
        self._visible = {options.uninitialized, options.outputs} != {"error"}
        self._scratch: dict[str, Array] = {}
        self._forms: dict[Any, _Form] = {}
        self._widens = not options.precise_fp

    # -- allocation ------------------------------------------------------------------------------

    def allocate(
        self,
        shape: Any,
        dtype: Any,
        buffer: MemoryRegion,
        name: str = "",
        address: tuple[int, int] | None = None,
        role: str = "temp",
    ) -> NkiTensor:
        """Return a fresh tensor whose bytes are poison.

        Raises:
            ShapeError: no dimensions, more than five, a size below 1, more than 128 partitions.
            DoesNotFit: one tile larger than its memory.
            RuleViolation: an address outside the memory, or inside a PSUM bank.
        """
        address = as_address(address)
        site = self.site(2)
        form = None
        # 1 == True == 1.0, so only plain integers may look up what their equals were found to be.
        if shape.__class__ is tuple and set(map(type, shape)) == _PLAIN:
            try:
                form = self._forms.get((shape, dtype, buffer, address))
            except TypeError:
                form = None  # an unhashable dtype: judged below
        if form is None:
            form = self._form(shape, dtype, buffer, address, site)
        kind = form.kind
        tiles = self.trace.tiles
        number = len(tiles)
        tile = Tile(
            number, name or f"t{number}", form.memory, form.extents, form.dtype_name,
            kind.itemsize, form.row_bytes, form.partitions, address, len(self.trace.events),
            self.core, site, role, buffer is MemoryRegion.shared_hbm,
        )  # fmt: skip
        if self.team is not None and role == "temp" and buffer is MemoryRegion.shared_hbm:
            return self.team.share(self, tile, form.extents, form.nbytes, kind)
        tiles.append(tile)
        tensor = self.tensor(tile, form.extents, form.strides, kind, buffer, form.nbytes)
        if form.signature is not None:
            tensor._signature = form.signature
        elif form.memory != "hbm":
            form.signature = tensor.signature
        return tensor

    def _form(
        self,
        shape: Any,
        dtype: Any,
        buffer: MemoryRegion,
        address: tuple[int, int] | None,
        site: Site,
    ) -> _Form:
        """Judge an allocation, once per form: kernels allocate few forms many times."""
        kind = as_dtype(dtype)
        if not isinstance(buffer, MemoryRegion):
            raise RuleViolation(
                f"nl.ndarray: buffer={buffer!r}; allowed are nl.sbuf, nl.psum, nl.hbm, "
                "nl.private_hbm and nl.shared_hbm"
            )
        extents = allocation.extents_of(shape, buffer, self.spec)
        nbytes = math.prod(extents) * kind.itemsize
        memory: MemoryName = "hbm"
        row_bytes = extents[-1] * kind.itemsize
        partitions = nbytes // row_bytes
        if buffer is MemoryRegion.sbuf or buffer is MemoryRegion.psum:
            row_bytes = nbytes // extents[0]
            partitions = extents[0]
            memory = "sbuf" if buffer is MemoryRegion.sbuf else "psum"
            allocation.fits(self.spec, extents, kind, buffer, row_bytes, address, site)
        strides = row_major(extents)
        form = _Form(extents, strides, kind, str(kind), memory, nbytes, row_bytes, partitions)
        if shape.__class__ is tuple and set(map(type, shape)) == _PLAIN:
            with contextlib.suppress(TypeError):
                self._forms[shape, dtype, buffer, address] = form
        return form

    def tensor(
        self,
        tile: Tile,
        extents: tuple[int, ...],
        strides: tuple[int, ...],
        kind: DType,
        buffer: MemoryRegion,
        nbytes: int,
    ) -> NkiTensor:
        """Return the unwritten tensor of a new tile."""
        mem = Memory(tile, buffer, nbytes, self._products, self._visible)
        mem.whole = (0, extents, strides, kind.itemsize)
        mem.wide = self._widens and kind.is_float and kind.itemsize < 4
        mem.loop = self.loop
        return NkiTensor(mem, extents, strides, 0, kind)

    # -- scratch ---------------------------------------------------------------------------------

    def scratch(self, slot: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Return a reusable array; its contents last until the slot is asked for again."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._scratch.get(slot)
        if held is None or held.nbytes < size:
            held = self._scratch[slot] = np.empty(max(size, 4096), np.uint8)
        return np.ndarray(shape, dtype, held)

    # -- call sites ------------------------------------------------------------------------------

    def site(self, depth: int) -> Site:
        """Return the frames from the caller `depth` levels up to the kernel's entry."""
        frame = sys._getframe(depth + 1)
        boundary = self._boundary
        caller = frame.f_back
        if caller is not None and caller.f_code is boundary:
            return ((frame.f_code, frame.f_lasti),)  # the kernel's own line: most calls are
        frames: list[tuple[CodeType, int]] = []
        while frame is not None:
            code = frame.f_code
            if code is boundary or len(frames) == MAX_FRAMES:
                break
            frames.append((code, frame.f_lasti))
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(frames)

    def kernel_site(self) -> Site:
        """Return the call site of the kernel line in progress, from any depth of the machine."""
        return self.site(1)

    # -- instructions ----------------------------------------------------------------------------

    def issue(self, ins: Instruction, key: Any, args: tuple[Any, ...]) -> Event:
        """Check, execute and record one instruction call (called by the generated entry points)."""
        try:
            plan = self._plans.get(key)
        except TypeError:
            raise ins.unusable(self, args) from None
        if plan is None:
            plan = self._plans[key] = ins.plan(self, args)
        hidden_reads = plan.hidden_reads
        if plan.registers:
            read = [f"register:{index_of(args[at]).number}" for at in plan.registers]
            hidden_reads += tuple(read)
        extra: tuple[Access, ...] = ()
        concrete = True
        for at in plan.tensors:
            if args[at].dynamic is not None:
                args, extra, unresolved = indirection.resolve(self, plan, args)
                concrete = not unresolved
                break
        for at in plan.reads:
            view = args[at]
            mem = view.mem
            if not mem.full and view.dynamic is None and not mem.is_written(view.region):
                self._unwritten(plan, at, view, args)
            if mem.abstract:
                concrete = False
        state = None if plan.state is None else plan.state(self, args)
        accumulates = state is not None and state is not False
        if plan.hidden_reads and not self.valueless.isdisjoint(plan.hidden_reads):
            concrete = False
        self._execute(plan, args, state, accumulates, concrete)
        reads = tuple([args[at].access for at in plan.reads])
        writes = tuple([args[at].access for at in plan.writes])
        work = plan.work
        if accumulates:
            reads += writes
            if plan.updated_work is not None:
                work = plan.updated_work
        if extra:
            reads += extra
            for at in plan.writes:
                indirection.put_back(args[at])
        events = self.trace.events
        event = Event(
            len(events), self.core, self.loop, ins.name, plan.engine, reads, writes,
            hidden_reads, plan.hidden_writes, work, self.site(2),
        )  # fmt: skip
        events.append(event)
        if self.team is not None:
            views = [[args[at] for at in places] for places in (plan.reads, plan.writes)]
            self.team.note(event, self.rank, *views)
        return event

    def _execute(
        self, plan: Plan, args: tuple[Any, ...], state: Any, accumulates: bool, concrete: bool
    ) -> None:
        """Run the body if every operand has values; note what was written either way."""
        for at in plan.writes:
            mem = args[at].mem
            if mem.borrowed or mem._snapshots:
                mem.touch()
            if mem.abstract and (
                accumulates or at in plan.updates or not mem.covers(args[at].region)
            ):
                concrete = False
        if concrete:
            for at in plan.writes:
                args[at].mem.abstract = False
            self.executing = plan, args
            plan.body(self, plan.engine, state, args)
            self.valueless.difference_update(plan.hidden_writes)
        else:
            self.valueless.update(plan.hidden_writes)
        for at in plan.writes:
            view = args[at]
            mem = view.mem
            if not concrete:
                mem.lose_values()
            if not mem.full:
                if view.dynamic is None:
                    # An update wrote only what its body marked; without values, who knows.
                    if not concrete or at not in plan.updates:
                        mem.mark(view.region)
                elif not concrete:
                    mem.fill()
            if plan.ends_groups and mem.tile.memory == "psum":
                mem.end_groups(view.region)

    def _unwritten(self, plan: Plan, at: int, view: NkiTensor, args: tuple[Any, ...] = ()) -> None:
        level = self.options.uninitialized
        if level == "off":
            return
        parts = None if plan.parts is None else plan.parts(plan.names[at], args)
        if parts is not None:
            missing = [part for part in parts if not part.mem.is_written(part.region)]
            if not missing:
                return
            view = missing[0]
        error = uninitialized(plan.opcode, plan.names[at], view, where(self.kernel_site()))
        self.report(level, error)

    def report(self, level: str, error: NkiKernelsError) -> None:
        """Raise or warn, by level."""
        if level == "error":
            raise error
        if level == "warn":
            warnings.warn(str(error), NkiWarning, stacklevel=4)

    def control(self, opcode: str, work: Work, **fields: Any) -> Event:
        """Record an event of the sequencers that no operand rule guards."""
        events = self.trace.events
        event = Event(
            len(events), self.core, self.loop, opcode, fields.get("engine", Engine.sync),
            fields.get("reads", ()), fields.get("writes", ()), fields.get("hidden_reads", ()),
            fields.get("hidden_writes", ()), work, self.site(2),
        )  # fmt: skip
        events.append(event)
        return event

    # -- loops and registers ---------------------------------------------------------------------

    def register(self, value: int | None = None, frozen: bool = False) -> VirtualRegister:
        """Return a new register."""
        self.registers += 1
        return VirtualRegister(self.registers, value, frozen)

    def iterations(self, values: Iterable[T]) -> Iterator[T]:
        """Yield the values of a device loop, recording each iteration's boundary."""
        self.loops += 1
        number = self.loops
        outer = self.loop
        try:
            for count, value in enumerate(values):
                self.loop = (*outer, (number, count))
                self.control("loop_iteration", ControlWork("loop_iteration"))
                yield value
        finally:
            self.loop = outer


def index_of(value: Any) -> Any:
    """Return what gives a view its run-time address (a register or a tile), or the value itself."""
    dynamic = value.dynamic if isinstance(value, NkiTensor) else None
    return value if dynamic is None else dynamic.index


def float_values(view: NkiTensor, run: Run, slot: str) -> Array:
    """Return the view's values as float32: the tile's own if it is float32, else a scratch copy.

    A tfloat32 tile is stored as float32; only the Tensor engine rounds it.
    """
    values = view.mem.array(view.region, view.dtype.host)
    if values.dtype == np.float32:
        return values
    wide = run.scratch(slot, view.shape)
    if values.dtype == dtypes.bfloat16.host:
        # The upper half of a float32 (`dtypes.widen`), into the scratch.
        np.left_shift(values.view(np.uint16), 16, out=wide.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(wide, values, casting="unsafe")
    if view.dtype in WIDE:
        check_integers(run, view, values)
    return wide


def write_values(view: NkiTensor, values: Array) -> None:
    """Round `values` to the view's dtype and write them, in row-major order of both."""
    target = view.mem.array(view.region, view.dtype.host)
    if values.shape != target.shape:
        values = values.reshape(target.shape)
    dtypes.store(target, values)
