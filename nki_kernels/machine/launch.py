"""From a kernel and its arguments to results and a trace: `jit`, `simulate`, `launch`."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nki_kernels.hardware import spec_for
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine import core, ordering
from nki_kernels.machine.arguments import Arguments, like, values
from nki_kernels.machine.checks import findings
from nki_kernels.machine.core import Run
from nki_kernels.machine.cores import Team
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import DoesNotFit, KernelError, OptionError
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.options import Options, default_options
from nki_kernels.machine.placement import Placement, place
from nki_kernels.machine.races import race_errors
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import Trace

if TYPE_CHECKING:
    from nki_kernels.machine.timeline import Timeline

_LOG = logging.getLogger("nki")
DEFAULT_TARGET = "trn2"
_said: set[str] = set()


@dataclass(slots=True)
class Launch:
    """One executed kernel.

    Attributes:
        result: what the kernel returned, in the caller's array type; `Abstract` where values are
            unknown.
        outputs: the returned tensors as NumPy arrays, None where values are unknown.
        trace: every event and tile.
        placement: addresses of the tiles.
    """

    result: Any
    outputs: tuple[Array | None, ...]
    trace: Trace
    placement: Placement | None
    _timelines: dict[int, Timeline] = field(default_factory=dict, repr=False)

    def time(self, window: int = 0) -> Timeline:
        """Return the modelled timeline (unvalidated), computed once.

        Args:
            window: 0 keeps program order; else how many instructions of a queue a compiler that
                reorders looks at (see `machine.reorder`; 16 mimics neuronx-cc).

        Raises:
            OptionError: no such window.
        """
        from nki_kernels.machine.reorder import reorder, window_problem
        from nki_kernels.machine.scheduler import schedule

        problem = window_problem(window)
        if problem:
            raise OptionError(problem)
        if window not in self._timelines:
            trace = reorder(self.trace, self.placement, window)
            self._timelines[window] = schedule(trace, self.placement)
        return self._timelines[window]


def current_target() -> str:
    """Return the target the environment names, or trn2 (said once; AWS defaults to trn3)."""
    named = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if named:
        return named
    if "target" not in _said:
        _said.add("target")
        _LOG.warning(
            "NEURON_PLATFORM_TARGET_OVERRIDE is not set: kernels run for %s (AWS's own default "
            "is trn3)",
            DEFAULT_TARGET,
        )
    return DEFAULT_TARGET


def launch(
    kernel: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | CoreSpec | None = None,
    lnc: int | None = None,
    options: Options | None = None,
) -> Launch:
    """Execute `kernel` on the embedded machine.

    Args:
        kernel: a function or a `Kernel`.
        args: NumPy arrays, CPU torch tensors, `Abstract` (a shape without values), and
            compile-time constants of any other type.
        kwargs: the same, by name.
        target: "trn1", "trn2", "trn3" or "toy"; None reads the environment.
        lnc: cores of the launch, 1 or 2; None takes the kernel's bracket or the environment.
        options: what is checked; None takes the environment's.

    Raises:
        NkiKernelsError: for every mistake of the kernel or the call. Then no argument has changed.
    """
    with _no_collection():
        job = Job(kernel, args, kwargs or {}, target=target, lnc=lnc, options=options)
        returned = run_cores([job])
        job.examine(returned[0])
        return job.deliver()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the cycle collector: a trace is thousands of objects that live on and form no cycle.

    The collector would walk all of them again and again, an eighth of the time of a launch. Nor
    does it walk them once as soon as it may: frozen and thawed, they are as old as if it had.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what the caller froze stays frozen
            gc.freeze()
            gc.unfreeze()
        gc.enable()


class Job:
    """A launch in three steps: arguments bound, cores run (elsewhere), results judged and returned.

    Several jobs are the ranks of one world: all are judged before the first one delivers.
    """

    def __init__(
        self,
        kernel: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        target: str | CoreSpec | None,
        lnc: int | None,
        options: Options | None,
    ) -> None:
        self.function, bracket, self._schedule = _unwrap(kernel)
        spec = target if isinstance(target, CoreSpec) else spec_for(target or current_target())
        self.options = options or default_options()
        name = getattr(self.function, "__name__", "kernel")
        self.trace = Trace(kernel=name, spec=spec, lnc=_cores(lnc, bracket))
        self.placement: Placement | None = None
        self.runs: list[Run] = []
        for number in range(self.trace.lnc):
            run = Run(spec, self.options, self.trace, _enter.__code__, number)
            run.gridded = bracket is not None
            self.runs.append(run)
        self._bound = Arguments(self.function, name)
        self._tensors = self._bound.bind(self.runs[0], args, kwargs)
        self._returned: Any = None
        self._outputs: list[NkiTensor] = []
        self._changed: list[tuple[NkiTensor, Array]] = []

    def execute(self, run: Run) -> Any:
        """Run the kernel on one core; return what it returned."""
        token = core._CURRENT.set(run)
        try:
            with np.errstate(all="ignore"):
                return _enter(self.function, *self._tensors)
        finally:
            core._CURRENT.reset(token)

    def examine(self, returned: Any) -> None:
        """Judge outputs, capacity and the checks made on the whole trace; nothing is written."""
        options, trace, bound = self.options, self.trace, self._bound
        self._returned = returned
        ordering.apply(trace, self._schedule)
        with np.errstate(all="ignore"):
            _collect(returned, self._outputs, trace.kernel)
            for tensor in self._outputs:
                bound.check_output(tensor, options)
            if returned is None:
                bound.check_silence(options)
            if options.capacity != "off" or options.alias != "off":
                try:
                    self.placement = place(trace)
                except DoesNotFit as error:
                    bound.run.report(options.capacity, error)
            for check, finding in findings(trace, self.placement, options):
                bound.run.report(options.level(check), finding)
            team = bound.run.team
            if team is not None and options.lnc_race != "off":
                rank = bound.run.rank
                for race in race_errors(trace, team.digests[rank], team.rows[rank]):
                    bound.run.report(options.lnc_race, race)
            self._changed = bound.changed()

    def deliver(self) -> Launch:
        """Write the caller's arrays and return the results."""
        with np.errstate(all="ignore"):
            arrays = tuple(None if t.mem.abstract else values(t) for t in self._outputs)
            for tensor, array in self._changed:
                self._bound.write_back(tensor, array)
            pairs = zip(self._outputs, arrays, strict=True)
            converted = iter([self._bound.convert(t, a) for t, a in pairs])
            result = _rebuild(self._returned, converted)
        return Launch(result, arrays, self.trace, self.placement)


def run_cores(jobs: list[Job]) -> list[Any]:
    """Execute every core of every job; return what core 0 of each returned.

    One core runs in the caller's thread, several take turns (`crew`).
    """
    if len(jobs) == 1 and len(jobs[0].runs) == 1:
        return [jobs[0].execute(jobs[0].runs[0])]
    team = Team([job.runs for job in jobs])
    every = team.execute(lambda run: jobs[run.rank].execute(run))
    return [every[at * len(jobs[0].runs)] for at in range(len(jobs))]


def _enter(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The frame below which call sites are no kernel lines."""
    return function(*args, **kwargs)


def _unwrap(kernel: Any) -> tuple[Callable[..., Any], int | None, ordering.Schedule]:
    if isinstance(kernel, Kernel):
        return kernel.func, kernel.lnc, kernel.schedule
    if not callable(kernel):
        raise KernelError(f"launch: {kernel!r} is no kernel; pass a function or an @nki.jit kernel")
    return kernel, None, ()


def _cores(asked: Any, bracket: int | None) -> int:
    if asked is None:
        return bracket or _environment_lnc()
    if not is_int(asked) or asked not in (1, 2):
        raise KernelError(
            f"launch: lnc={asked!r}; a launch has 1 or 2 cores: pass one of these, or None for the "
            "kernel's bracket or NEURON_LOGICAL_NC_CONFIG"
        )
    return int(asked)


def _environment_lnc() -> int:
    raw = os.environ.get("NEURON_LOGICAL_NC_CONFIG", "1")
    if raw not in ("1", "2"):
        raise KernelError(f"NEURON_LOGICAL_NC_CONFIG={raw!r}; allowed are 1 and 2")
    return int(raw)


def _collect(returned: Any, outputs: list[NkiTensor], kernel: str) -> None:
    if isinstance(returned, NkiTensor):
        outputs.append(returned)
    elif isinstance(returned, (tuple, list)):
        for item in returned:
            _collect(item, outputs, kernel)
    elif returned is not None:
        raise KernelError(
            f"kernel {kernel!r} returns {returned!r}; a kernel returns None, an HBM tensor, or a "
            "tuple of them"
        )


def _rebuild(returned: Any, converted: Any) -> Any:
    if isinstance(returned, NkiTensor):
        return next(converted)
    if isinstance(returned, (tuple, list)):
        return like(returned, [_rebuild(item, converted) for item in returned])
    return returned


class Kernel:
    """A jitted kernel: call it with arrays or inside a kernel, or index it with a core count."""

    def __init__(
        self, func: Callable[..., Any], lnc: int | None = None, schedule: ordering.Schedule = ()
    ) -> None:
        self.func = func
        self.lnc = lnc
        self.schedule = schedule
        functools.update_wrapper(self, func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel; inside another kernel it is inlined."""
        if core._CURRENT.get() is not None:
            return self.func(*args, **kwargs)
        return launch(self, args, kwargs).result

    def __getitem__(self, lnc: Any) -> Kernel:
        """Return the kernel for a launch on `lnc` cores (1 or 2)."""
        count = lnc[0] if isinstance(lnc, tuple) and len(lnc) == 1 else lnc
        if isinstance(count, bool) or not isinstance(count, int) or count not in (1, 2):
            raise KernelError(
                f"kernel {self.__name__!r}[{lnc!r}]: the bracket is the number of cores, 1 or 2"  # type: ignore[attr-defined]
            )
        return Kernel(self.func, count, self.schedule)

    def with_schedule(self, edges: Any) -> Kernel:
        """Return the kernel with order between its named instructions, beside what it has.

        Args:
            edges: pairs ("consumer", "producer") or ("consumer", ["producer", ...]) of the names
                given with ``name=``.
        """
        name = getattr(self.func, "__name__", "kernel")
        added = ordering.checked(name, edges)
        return Kernel(self.func, self.lnc, ordering.checked(name, (*self.schedule, *added)))

    def __repr__(self) -> str:
        return f"<nki kernel {getattr(self.func, '__name__', self.func)!r}>"


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Make a kernel of a function: ``@nki.jit`` or ``@nki.jit(keyword=...)``.

    Keywords steer the real compiler and have no meaning here (since NKI 0.3.0 ``mode`` and
    ``platform_target`` are ignored there too).
    """
    if fn is None:
        return functools.partial(jit, **kwargs)
    return fn if isinstance(fn, Kernel) else Kernel(fn)


def simulate(kernel: Any) -> Callable[..., Any]:
    """Return a function that runs a kernel, ``kernel[2]`` or a plain function on the CPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return launch(kernel, args, kwargs).result

    return run
