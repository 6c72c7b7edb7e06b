"""Many ranks in one process: one launch per rank, meeting in `nki.collectives`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.launch import Job, Launch, run_cores
from nki_kernels.machine.options import Options


def launch_ranks(
    kernel: Any,
    args: Sequence[tuple[Any, ...]],
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    *,
    target: str | CoreSpec | None = None,
    lnc: int | None = None,
    options: Options | None = None,
) -> list[Launch]:
    """Run a kernel on every rank of a world; return a launch for each, in order of ranks.

    The ranks are threads of which one runs at a time, so a run repeats. Each has its own HBM, trace
    and timeline (which does not know the links between ranks). Nothing is written to any caller's
    array unless all ranks succeed.

    Args:
        kernel: a function or a `Kernel`, the same for all ranks.
        args: per rank, its arguments as for `launch`; their number is the size of the world.
        kwargs: per rank, arguments by name; None for none.
        target: as for `launch`.
        lnc: cores of each rank, 1 or 2.
        options: what is checked.

    Raises:
        KernelError: no ranks, or a rank waits for one that never comes (all lines are named).
        NkiKernelsError: the first error of any rank, with a note of where it was raised.
    """
    if (
        not isinstance(args, (list, tuple))
        or not args
        or not all(isinstance(a, tuple) for a in args)
    ):
        raise KernelError(
            f"launch_ranks: args={args!r}; it must be a list with a tuple of arguments per rank"
        )
    named = [{}] * len(args) if kwargs is None else kwargs
    if len(named) != len(args):
        raise KernelError(
            f"launch_ranks: {len(args)} ranks in args, {len(named)} in kwargs; pass as many of each"
        )
    jobs = [
        Job(kernel, positional, dict(by_name), target=target, lnc=lnc, options=options)
        for positional, by_name in zip(args, named, strict=True)
    ]
    for job, returned in zip(jobs, run_cores(jobs), strict=True):
        job.examine(returned)
    return [job.deliver() for job in jobs]
