"""The schedule of a launch: when every event happens, and why not earlier."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.trace import Trace

#: Counts up whenever a modelled time changes for the same trace.
MODEL_VERSION = "2"

Floats = npt.NDArray[np.float64]


class Cause(enum.IntEnum):
    """What an event's start waited for."""

    launch = 0
    engine = 1
    result = 2
    read = 3
    memory = 4
    queue = 5
    barrier = 6
    port = 7
    bank = 8


@dataclass(slots=True)
class Timeline:
    """The schedule of one launch, in ns after the kernel's first instruction could start.

    Attributes:
        trace: the events; the arrays below have one entry per event, in the same order.
        start: when the event takes its engine (a DMA: its trigger queue).
        issue: when the engine (the trigger queue) is free for the next.
        result: when its result may be used.
        service: when a DMA's payload starts; equal to `start` for all else.
        service_end: when it ends; equal to `issue` for all else.
        cause: what bound the start, a `Cause`.
        cause_event: the event it waited for, or -1.
        launch_ns: start and end of the kernel outside its instructions.
        makespan_ns: last result.
        busy_ns: by engine name, time in which it could take nothing else (the busier core under
            LNC2). "dma" is the busiest of the DMA engines, the memory interface and the queues.
        throttled_ns: Tensor engine time in the throttled state.
        table_loads: activation tables loaded.
        hbm_read_bytes: bytes read from HBM.
        hbm_write_bytes: bytes written to HBM.
        estimates: distinct estimated numbers and laws the schedule rests on.
        validated: always False until the model's error is known.
    """

    trace: Trace
    start: Floats
    issue: Floats
    result: Floats
    service: Floats
    service_end: Floats
    cause: npt.NDArray[np.int8]
    cause_event: npt.NDArray[np.int64]
    launch_ns: float
    makespan_ns: float
    busy_ns: dict[str, float]
    throttled_ns: float
    table_loads: int
    hbm_read_bytes: int
    hbm_write_bytes: int
    estimates: int
    validated: Literal[False] = False

    @property
    def total_ns(self) -> float:
        """Modelled time of the kernel, its start and end included."""
        return self.launch_ns + self.makespan_ns

    @property
    def limiting_engine(self) -> str:
        """Name of the engine that is busy the longest ("none" for an empty trace)."""
        name = max(self.busy_ns, key=lambda engine: self.busy_ns[engine])
        return name if self.busy_ns[name] > 0 else "none"

    def intervals(self, engine: Engine, core: int = 0) -> list[tuple[float, float]]:
        """Return the merged busy intervals of an engine; for `Engine.dma`, of payloads."""
        spans = sorted(
            (float(self.service[i]), float(self.service_end[i]))
            for i, event in enumerate(self.trace.events)
            if event.core == core and event.engine is engine
        )
        merged: list[tuple[float, float]] = []
        for low, high in spans:
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged
