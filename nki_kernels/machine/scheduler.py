"""When every event of a trace happens: in-order queues, shared servers, events in order of time.

Each engine takes its instructions in program order, as soon as what they wait for has happened
(`dependencies`). A DMA trigger stands in the queue of the engine that triggers it, or, where
software writes the descriptors of a store, in a second queue of that engine; its payload then
passes the DMA engines, the memory interface of the core and, under LNC2, of the core pair, in turns
with the payloads of the other queues. Of all that could be next the one that starts first is taken,
so servers see their requests in order of time and the result is the same to the last bit every run.

The model is unvalidated: it has not yet been compared with whole kernels on hardware.
"""

from __future__ import annotations

import heapq

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.costs import (
    Milestones,
    PeMilestones,
    control_ns,
    dma_timing,
    pe_timing,
    stream_timing,
)
from nki_kernels.machine.dependencies import QUEUES, STORE_QUEUE, Dependencies, Wait, split
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.servers import (
    SOFTWARE_STORE,
    Core,
    Pair,
    Queue,
    Record,
    Transfer,
    handoffs,
    pe_cells,
)
from nki_kernels.machine.stream_costs import COPIES
from nki_kernels.machine.timeline import Cause, Timeline
from nki_kernels.machine.trace import DmaWork, Event, PeWork, StreamWork, Trace

#: Two queues with one engine behind them.
_SHARED = (Engine.gpsimd, Engine.gpsimd + STORE_QUEUE)


_WAIT_CAUSE = {
    Wait.result: Cause.result,
    Wait.read: Cause.read,
    Wait.reuse_result: Cause.memory,
    Wait.reuse_read: Cause.memory,
}


def schedule(trace: Trace, placement: Placement | None = None) -> Timeline:
    """Return when every event of `trace` happens.

    Args:
        trace: the events of one launch.
        placement: addresses, for the waits on reused memory; None leaves those out.

    Returns:
        the timeline; deterministic, and near-linear in events.
    """
    return _Scheduler(trace, placement).run()


class _Scheduler:
    """One pass over a trace in order of time."""

    def __init__(self, trace: Trace, placement: Placement | None) -> None:
        self.trace = trace
        self.spec = trace.spec
        self.dependencies = Dependencies(trace, placement)
        self.record = Record(len(trace.events))
        self.cores: dict[int, Core] = {}
        for number, event in enumerate(trace.events):
            core = self.cores.get(event.core)
            if core is None:
                core = self.cores[event.core] = Core(event.core, self.spec)
            core.add(number, event)
        self.pair = Pair()
        self.throttled = 0.0
        self.table_loads = 0
        self.estimated: set[object] = set()
        #: (start, core, place): the next instruction of queue `place`, once its start is known, or
        #: from QUEUES on the next turn of that queue's transfers.
        self._ready: list[tuple[float, int, int]] = []
        #: Queues whose next instruction waits for an event that has no time yet.
        self._waiting: dict[int, list[tuple[Core, Queue]]] = {}
        self._set_of = {f: str(i) for i, s in enumerate(self.spec.scalar.table_sets) for f in s}
        self._handoff = handoffs(self.spec)

    def run(self) -> Timeline:
        """Schedule everything."""
        for core in self.cores.values():
            self._open(core, 0.0)
        self._pass_barriers()
        ready = self._ready
        while ready:
            start, number, place = heapq.heappop(ready)
            core = self.cores[number]
            if place >= QUEUES:
                self._turn(core, place - QUEUES, start)
                continue
            queue = core.queues[place]
            event = queue.events[queue.head]
            if place in _SHARED and self._free(core, queue, event)[0] > start:
                # The other queue of this engine was served meanwhile.
                self._offer(core, queue)
                continue
            self._execute(core, queue, event, start)
            queue.head += 1
            self._offer(core, queue)
            if not isinstance(self.trace.events[event].work, DmaWork):
                self._finish(core, event)
        return self._timeline()

    def _finish(self, core: Core, event: int) -> None:
        """Note that the moments of an event are known; offer what waited for them."""
        self.record.done[event] = 1
        core.horizon = max(core.horizon, self.record.result[event])
        core.left -= 1
        for waiting in self._waiting.pop(event, ()):
            self._offer(*waiting)
        if not core.left:
            self._pass_barriers()

    # -- program order -------------------------------------------------------------------------

    def _open(self, core: Core, now: float) -> None:
        """Make the queues of the core's current segment available from `now` on."""
        segment = core.segments[core.segment]
        core.left = sum(len(events) for events in segment.values())
        for place, events in segment.items():
            queue = core.queues[place]
            queue.events, queue.head = events, 0
            queue.dispatched = max(queue.dispatched, now)
            self._offer(core, queue)

    def _offer(self, core: Core, queue: Queue) -> None:
        """Work out when the next instruction of a queue starts, or what it waits for."""
        if queue.head == len(queue.events):
            return
        number = queue.events[queue.head]
        event = self.trace.events[number]
        record = self.record
        ready, cause, source = 0.0, Cause.launch, -1
        consumer = SOFTWARE_STORE if queue.number >= STORE_QUEUE else event.engine
        for edge in self.dependencies.edges[number]:
            other = edge >> 2
            if not record.done[other]:
                self._waiting.setdefault(other, []).append((core, queue))
                return
            moment = record.read[other] if edge & 1 else record.result[other]
            moment += self._handoff[self.trace.events[other].engine][consumer]
            if moment > ready:
                ready, cause, source = moment, _WAIT_CAUSE[split(edge)[1]], other
        free, why = self._free(core, queue, number)
        if free >= ready:
            ready, source = free, -1
            cause = why if queue.head or core.segment or free > 0.0 else Cause.launch
            if core.segment and not queue.head:
                cause, source = Cause.barrier, core.barriers[core.segment - 1][0]
        record.cause[number] = cause
        record.cause_event[number] = source
        heapq.heappush(self._ready, (ready, core.number, queue.number))

    def _free(self, core: Core, queue: Queue, number: int) -> tuple[float, Cause]:
        """Return when the queue and what stands behind it can take an event, and what binds."""
        event, pipe = self.trace.events[number], queue.pipe
        work = event.work
        free, why = queue.dispatched, Cause.engine
        if isinstance(work, DmaWork):
            if pipe.triggers > free:
                free, why = pipe.triggers, Cause.queue
            if work.mode != "dge_hw" and pipe.free > free:
                free, why = pipe.free, Cause.engine
        elif event.engine is Engine.tensor:
            # Weights load while the stream before still runs: start is that of the load.
            load = self._pe(work, throttled=False).load
            cells = pe_cells(work, self.spec)
            streaming = max([core.streaming[c] for c in cells])
            streamed = max([core.streamed[c] for c in cells])
            free = max(free, core.loaded, streaming, streamed - load)
        else:
            free = max(free, pipe.free)
        return free, why

    def _pass_barriers(self) -> None:
        """Take every barrier that has been reached; one between cores when all have reached it."""
        moved = True
        while moved:
            moved = False
            for core in self.cores.values():
                if core.left or core.segment == len(core.barriers):
                    continue
                others = [core]
                if self._at_shared(core):
                    everyone = self.cores.values()
                    others = [c for c in everyone if self._at_shared(c)]
                    if any(c not in others and not self._ended(c) for c in everyone):
                        continue
                start = max(c.horizon for c in others)
                for other in others:
                    self._barrier(other, start)
                moved = True

    @staticmethod
    def _at_shared(core: Core) -> bool:
        """Return True if the core stands at a barrier between cores."""
        reached = not core.left and core.segment < len(core.barriers)
        return reached and core.barriers[core.segment][1].kind == "barrier"

    @staticmethod
    def _ended(core: Core) -> bool:
        return not core.left and core.segment == len(core.barriers)

    def _barrier(self, core: Core, start: float) -> None:
        number, work = core.barriers[core.segment]
        end = start + control_ns(work, self.spec)
        self._write(number, start, end, end, end)
        self.record.cause[number] = Cause.engine
        self.record.done[number] = 1
        self._note(f"sync.{work.kind}")
        core.horizon = end
        core.segment += 1
        self._open(core, end)

    # -- one event -----------------------------------------------------------------------------

    def _execute(self, core: Core, queue: Queue, number: int, start: float) -> None:
        event = self.trace.events[number]
        work = event.work
        if isinstance(work, PeWork):
            self._run_pe(core, queue, number, work, start)
        elif isinstance(work, DmaWork):
            self._run_dma(core, queue, number, work, start)
        elif isinstance(work, StreamWork):
            self._run_stream(core, queue, number, work, start)
        else:
            end = start + control_ns(work, self.spec)
            self._write(number, start, end, end, end)
            core.busy[event.engine] += end - start
            queue.dispatched, queue.pipe.free = start, end
            self._note(f"sync.{work.kind}")

    def _write(self, number: int, start: float, issue: float, read: float, result: float) -> None:
        record = self.record
        record.start[number] = record.service[number] = start
        record.issue[number] = record.service_end[number] = issue
        record.read[number] = read
        record.result[number] = result

    def _pe(self, work: object, *, throttled: bool) -> PeMilestones:
        if not isinstance(work, PeWork):
            raise TypeError(f"the Tensor engine cannot run {work!r}")
        return pe_timing(work, self.spec, throttled)

    def _run_pe(self, core: Core, queue: Queue, number: int, work: PeWork, start: float) -> None:
        """Load weights behind the stream before, stream, drain.

        Tiles of the array that do not touch stream side by side; one port loads their weights.
        """
        loaded = start + self._pe(work, throttled=False).load
        cells = pe_cells(work, self.spec)
        free = max([core.streamed[c] for c in cells])
        stream = max(loaded, free)
        throttle = core.throttle
        throttle.advance(stream)
        cost = self._pe(work, throttled=throttle.on)
        issue = stream + cost.issue
        throttle.work(stream, issue, cost.weight)
        result = stream + cost.result
        if throttle.on and throttle.idle:
            result += cost.front
        begin = max(start, free)
        self._write(number, begin, issue, issue, result)
        queue.dispatched, core.loaded = start, loaded
        for cell in cells:
            core.streaming[cell], core.streamed[cell] = stream, issue
        # Where tiles overlap in time the engine is busy once.
        core.busy[Engine.tensor] += max(0.0, issue - max(begin, queue.pipe.free))
        queue.pipe.free = max(queue.pipe.free, issue)
        if throttle.on:
            self.throttled += cost.issue
        self._note("pe")

    def _run_stream(
        self, core: Core, queue: Queue, number: int, work: StreamWork, start: float
    ) -> None:
        """Load a table if need be, avoid collisions with the other engines, stream."""
        event = self.trace.events[number]
        engine = event.engine
        cost = stream_timing(work, engine, self.spec)
        begin = self._collide(core, number, engine, cost, start)
        run = begin + self._load_table(core, event, work)
        self._write(number, begin, run + cost.issue, run + cost.read, run + cost.result)
        queue.dispatched = begin
        queue.pipe.free = run + cost.issue
        core.busy[engine] += run + cost.issue - begin
        self._occupy(core, number, engine, cost, run + cost.read)
        self._note(engine.name)
        if cost.estimated:
            self.estimated.add((work.law, engine, work.function, work.sources, work.dst))

    def _load_table(self, core: Core, event: Event, work: StreamWork) -> float:
        """Return the time to switch to the function's table; copies are in every table."""
        if "act_table" not in event.hidden_reads or work.function in COPIES:
            return 0.0
        wanted = self._set_of.get(work.function, work.function)
        if wanted == core.table:
            return 0.0
        core.table = wanted
        self.table_loads += 1
        return self.spec.scalar.table_load_ns

    def _collide(
        self, core: Core, number: int, engine: Engine, cost: Milestones, start: float
    ) -> float:
        """Return the start after the shared SBUF port and the PSUM banks are free."""
        spec = self.spec
        begin, cause = start, self.record.cause[number]
        uses_port = engine is Engine.gpsimd or self._locks_port(engine, cost)
        if uses_port and spec.vector.shares_gpsimd_port:
            other = Engine.vector if engine is Engine.gpsimd else Engine.gpsimd
            if core.port[other] > begin:
                begin, cause = core.port[other], Cause.port
        for bank in self._banks(number):
            other = Engine.scalar if engine is Engine.vector else Engine.vector
            until = core.bank.get((other, bank), 0.0)
            if until > begin:
                begin, cause = until, Cause.bank
        if begin > start:
            self.record.cause[number] = cause
            self.record.cause_event[number] = -1
        return begin

    def _locks_port(self, engine: Engine, cost: Milestones) -> bool:
        return engine is Engine.vector and (cost.fast or self.spec.vector.gpsimd_exclusive)

    def _banks(self, number: int) -> tuple[int, ...]:
        banks = self.dependencies.banks.get(number, ())
        # The first generation shares one PSUM port: one bank stands for all.
        return (0,) if banks and self.spec.scalar.psum_exclusive else banks

    def _occupy(
        self, core: Core, number: int, engine: Engine, cost: Milestones, end: float
    ) -> None:
        if engine is Engine.gpsimd or self._locks_port(engine, cost):
            core.port[engine] = max(core.port[engine], end)
        for bank in self._banks(number):
            core.bank[engine, bank] = end

    def _run_dma(self, core: Core, queue: Queue, number: int, work: DmaWork, start: float) -> None:
        """Trigger, wait for the servers, move, notify."""
        cost = dma_timing(work, self.spec)
        pipe = queue.pipe
        queue.dispatched, pipe.triggers = start, start + cost.queue
        pipe.trigger_busy += cost.queue
        if work.mode != "dge_hw":
            # Software writes these descriptors: the engine does nothing else meanwhile.
            pipe.free = max(pipe.free, pipe.triggers)
        record = self.record
        record.start[number], record.issue[number] = start, start + cost.queue
        self._note("dma")
        ready = start + cost.dispatch
        transfers = core.transfers[queue.number]
        transfers.append(Transfer(number, cost, ready, cost.turns))
        if len(transfers) == 1:
            heapq.heappush(self._ready, (ready, core.number, QUEUES + queue.number))

    def _turn(self, core: Core, place: int, now: float) -> None:
        """Serve a turn of the first transfer of a queue; the queue's next turn comes after it."""
        transfers = core.transfers[place]
        transfer = transfers[0]
        cost, number = transfer.cost, transfer.event
        begin, end = core.serve(cost, now, self.pair if len(self.cores) > 1 else None)
        if transfer.service < 0.0:
            transfer.service = begin
        transfer.turns -= 1
        if transfer.turns:
            heapq.heappush(self._ready, (end, core.number, QUEUES + place))
            return
        transfers.popleft()
        if transfers:
            # Its last turn has been asked for: the next transfer of the queue may ask.
            following = max(now, transfers[0].ready)
            heapq.heappush(self._ready, (following, core.number, QUEUES + place))
        result = end + cost.latency + cost.notify
        record = self.record
        record.service[number] = transfer.service
        record.service_end[number] = max(end, transfer.service)
        record.read[number] = record.result[number] = result
        self._finish(core, number)

    # -- the result ----------------------------------------------------------------------------

    def _note(self, name: str) -> None:
        """Remember that the numbers of a part of the spec were used."""
        self.estimated.add(name)

    def _estimates(self) -> int:
        """Return how many estimated numbers and laws the schedule used."""
        parts = {name for name in self.estimated if isinstance(name, str)}
        sync = {
            "sync.register_move": "register_move_ns",
            "sync.register_load": "register_memory_ns",
            "sync.register_store": "register_memory_ns",
            "sync.loop_iteration": "loop_iteration_ns",
            "sync.barrier": "core_barrier_ns",
        }
        used = {f"sync.{sync[p]}" for p in parts if p in sync}
        used |= {f"sync.{n}" for n in ("same_engine_ns", "other_engine_ns")}
        used |= {"sync.from_dma_ns"} if "dma" in parts else set()
        pair = len(self.cores) > 1
        used |= {"sync.launch_lnc2_ns", "sync.pair_bytes_per_ns"} if pair else {"sync.launch_ns"}
        count = len(self.estimated) - len(parts)
        for name, origin in self.spec.origins().items():
            part = name.partition(".")[0]
            if origin.kind == "estimated" and (part in parts or name in used):
                count += 1
        return count

    def _busy(self) -> dict[str, float]:
        names = ("tensor", "vector", "scalar", "gpsimd", "sync")
        cores = list(self.cores.values())
        busy = {n: max((c.busy[Engine[n]] for c in cores), default=0.0) for n in names}
        busy["dma"] = 0.0
        for core in cores:
            queues = [pipe.trigger_busy for pipe in core.pipes]
            busy["dma"] = max(busy["dma"], core.memory_busy, *core.dma_busy, *queues)
        return busy

    def _timeline(self) -> Timeline:
        record, sync = self.record, self.spec.sync
        missing = len(record.done) - sum(record.done)
        if missing:
            raise RuntimeError(
                f"{missing} of {len(record.done)} events have no time: the trace waits for itself"
            )
        dma = [e.work for e in self.trace.events if isinstance(e.work, DmaWork)]
        return Timeline(
            trace=self.trace,
            start=np.array(record.start, np.float64),
            issue=np.array(record.issue, np.float64),
            result=np.array(record.result, np.float64),
            service=np.array(record.service, np.float64),
            service_end=np.array(record.service_end, np.float64),
            cause=np.array(record.cause, np.int8),
            cause_event=np.array(record.cause_event, np.int64),
            launch_ns=sync.launch_lnc2_ns if self.trace.lnc > 1 else sync.launch_ns,
            makespan_ns=max(record.result, default=0.0),
            busy_ns=self._busy(),
            throttled_ns=self.throttled,
            table_loads=self.table_loads,
            hbm_read_bytes=sum(w.hbm_read_bytes for w in dma),
            hbm_write_bytes=sum(w.hbm_write_bytes for w in dma),
            estimates=self._estimates(),
        )
