"""Runs a kernel of the validation and reads figures off its timeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.validate.baselines import documented_ns, roofline_ns
from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options

#: The generation the published figures were measured on, unless a reading says another.
TARGET = "trn2"

Kernel = Callable[..., Any]


class Timed:
    """One timed run, all figures in ns."""

    def __init__(
        self,
        kernel: Kernel,
        *args: Any,
        options: Options | None = None,
        target: str = TARGET,
    ) -> None:
        # Long unrolled programs are what some of the measured kernels are.
        options = replace(options or Options(), instruction_count="off")
        run = launch(kernel, args, {}, target=target, lnc=1, options=options)
        self.trace = run.trace
        self.timeline = run.time()

    @property
    def total(self) -> float:
        """The kernel's time, start and end included."""
        return self.timeline.total_ns

    @property
    def roofline(self) -> float:
        """The roofline baseline."""
        return roofline_ns(self.trace)

    @property
    def documented(self) -> float:
        """The documented-formula baseline."""
        return documented_ns(self.trace)

    def find(self, opcode: str) -> list[int]:
        """Return the numbers of the events of an instruction, in program order."""
        return [i for i, event in enumerate(self.trace.events) if event.opcode == opcode]

    def completion(self, event: int) -> float:
        """Time from the start of an event to its result."""
        return float(self.timeline.result[event] - self.timeline.start[event])

    def spacing(self, events: list[int]) -> float:
        """Steady interval: between the last two starts."""
        return float(self.timeline.start[events[-1]] - self.timeline.start[events[-2]])

    def active(self, engine: Engine) -> float:
        """Time in which an engine is busy, overlaps counted once; for DMA, payloads."""
        return sum(high - low for low, high in self.timeline.intervals(engine))
