"""`profile`, and the `Profile` it returns: one launch, and everything that can be said about it."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nki_kernels import toolchain
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.errors import ToolchainError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from nki_kernels.machine.placement import Placement, place
from nki_kernels.machine.sensitivity import Sensitivity, sensitivity
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import Trace
from nki_kernels.profiler.advice import Advice, Case, advise, verdict
from nki_kernels.profiler.band import band_record
from nki_kernels.profiler.faults import RULES
from nki_kernels.profiler.gaps import Gap, busiest, idle_gaps
from nki_kernels.profiler.lines import Line, Sites, line_costs
from nki_kernels.profiler.occupancy import Curve, curves, tile_spans
from nki_kernels.profiler.output import save
from nki_kernels.profiler.path import CriticalPath, Order
from nki_kernels.profiler.summary import summarise

#: A notebook shows the whole page up to this many instructions, its first part beyond.
_NOTEBOOK_EVENTS = 20_000
_FRAME = (
    '<iframe srcdoc="{page}" style="width:100%;height:760px;border:1px solid #8884" '
    'sandbox="allow-scripts" title="{title}"></iframe>'
)


@dataclass(frozen=True)
class Profile:
    """One launch, executed or traced, placed and timed.

    Print it for the report; `summary()`, `advice`, `gaps`, `lines` and `curves` hold the same as
    data, `band` says how far its time can be trusted, and `save` writes a page, a trace for
    Perfetto or JSON.

    Attributes:
        trace: every event (static).
        placement: where the tiles lie (static).
        timeline: when everything happens (model, unvalidated).
        result: what the kernel returned; `Abstract` where arguments had no values.
    """

    trace: Trace
    placement: Placement
    timeline: Timeline
    result: Any = None

    @cached_property
    def case(self) -> Case:
        """The call sites, queues and critical path the rest is derived from."""
        order = Order(self.timeline)
        path = CriticalPath(self.timeline, order)
        return Case(self.timeline, Sites(self.trace), order, path)

    @cached_property
    def advice(self) -> list[Advice]:
        """What to change first: performance faults by name, the most time at stake first."""
        return advise(self.case, RULES)

    @property
    def verdict(self) -> str:
        """One sentence: what bounds the kernel."""
        return verdict(self.case, float(self.summary()["mbu_estimated_percent"]))

    @cached_property
    def gaps(self) -> list[Gap]:
        """Idle stretches of the busiest engine, the longest first."""
        return idle_gaps(self.timeline, self.case.order, *busiest(self.timeline))

    @cached_property
    def lines(self) -> list[Line]:
        """Cost per kernel line, the most critical-path time first."""
        return line_costs(self.timeline, self.case.sites, self.case.path.event_ns)

    @cached_property
    def spans(self) -> dict[int, tuple[float, float]]:
        """When each tile occupies its memory, in ns, by tile id."""
        return tile_spans(self.timeline, self.placement)

    @cached_property
    def curves(self) -> list[Curve]:
        """SBUF and PSUM in use over time."""
        return curves(self.timeline, self.spans)

    @cached_property
    def band(self) -> Sensitivity:
        """The time at the bounds of every uncertain number; costs some 50 schedules of the run."""
        return sensitivity(self.trace, self.placement)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return summarise(self.timeline, self.placement)

    def summary(self) -> dict[str, Any]:
        """Return the figures by name: percent of the total time, bytes, counts, microseconds."""
        return dict(self._summary)

    @property
    def label(self) -> str:
        """Where the figures come from."""
        return label(self.trace.spec, self.timeline)

    def record(self, *, band: bool = False) -> dict[str, Any]:
        """Return everything but the single instructions, ready for JSON (`schema_version`).

        Args:
            band: with `band`, under that name.
        """
        from nki_kernels.profiler.record import record

        found = record(self)
        return found | {"band": band_record(self.band)} if band else found

    def html(self) -> str:
        """Return one self-contained page: timeline, occupancy, roofline, source, advice."""
        from nki_kernels.profiler.page import page

        return page(self)

    def perfetto(self) -> dict[str, Any]:
        """Return the timeline in the JSON trace format that Perfetto's UI opens."""
        from nki_kernels.profiler.perfetto import perfetto

        return perfetto(self)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the profile to a file; its suffix says what.

        Args:
            path: ``*.html`` (page), ``*.perfetto.json`` (trace) or ``*.json`` (record).
            force: replace an existing file.

        Returns:
            the path.

        Raises:
            OptionError: another suffix; a file that exists (without `force`); a directory that
                does not. Nothing has been written then.
        """
        return save(path, self.rendered, force=force)

    def rendered(self, kind: str, *, band: bool = False) -> str:
        """Return the text of a file of one kind: "html", "perfetto" or "json" (with the `band`)."""
        if kind == "html":
            return self.html()
        data = self.perfetto() if kind == "perfetto" else self.record(band=band)
        indent = None if kind == "perfetto" else 1
        return json.dumps(data, indent=indent, separators=(",", ":") if not indent else None)

    def __repr__(self) -> str:
        total = self.timeline.total_ns / 1e3
        return (
            f"<Profile of {self.trace.kernel!r} on {self.trace.spec.name}: {total:.2f} us "
            f"({self.label}), {len(self.trace)} instructions; print it>"
        )

    def __str__(self) -> str:
        from nki_kernels.profiler.text import text

        return text(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the page, or the report where that is too large."""
        if len(self.trace) > _NOTEBOOK_EVENTS:
            hint = "Too large to show inline: profile.save('profile.html') writes the page."
            return f"<pre>{html.escape(str(self))}</pre><p>{hint}</p>"
        title = html.escape(f"profile of {self.trace.kernel}", quote=True)
        return _FRAME.format(page=html.escape(self.html(), quote=True), title=title)


def label(spec: CoreSpec, timeline: Timeline) -> str:
    """Return where the figures come from: "model, unvalidated", and whether projected."""
    projected = ", projected hardware numbers" if spec.projected else ""
    return f"model, {'validated' if timeline.validated else 'unvalidated'}{projected}"


def profile(
    kernel: Any,
    *args: Any,
    target: str | None = None,
    lnc: int | None = None,
    options: Options | None = None,
    **kwargs: Any,
) -> Profile:
    """Run a kernel on the embedded machine and model its time.

    Args:
        kernel: an ``@nki.jit`` kernel or a plain function, this library's or anyone's.
        *args: its arguments: NumPy arrays, torch tensors, `nki_kernels.Abstract` (a shape without
            values), constants.
        target: "trn1", "trn2", "trn3" or "toy"; None reads NEURON_PLATFORM_TARGET_OVERRIDE.
        lnc: cores, 1 or 2; None takes the kernel's bracket or the environment.
        options: which checks run.
        **kwargs: more arguments of the kernel, by name.

    Returns:
        The profile; print it, read `summary()`, or `save("profile.html")`.

    Raises:
        NkiKernelsError: for every mistake of the kernel or the call.
        ValueError: an unknown target.
        ToolchainError: AWS's own nki is in force in this process, so the kernel is not for ours.
    """
    tool = toolchain.current()
    if tool.kind != "embedded":
        raise ToolchainError(
            f"profile: the nki in force is AWS's {tool.version} in {tool.path}; a kernel decorated "
            "by it cannot run on the embedded machine: use `python -m nki_kernels profile "
            f"FILE.py:KERNEL`, which starts a process of its own, or set {toolchain.ENV}=embedded"
        )
    run = launch(kernel, args, kwargs, target=target, lnc=lnc, options=options)
    return Profile(run.trace, run.placement or place(run.trace), run.time(), run.result)
