"""``python -m bench peers``: AWS's nearest kernel, from a checkout, in the same model as ours.

Both run at the same sizes, AWS's from shapes alone. AWS's time is the best of one core and two, in
program order and behind a reorder window that mimics its compiler, and counts per core: a launch on
two cores counts twice. Ours is one core in program order, and is checked first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.check import source_hash
from bench.peer_table import PEERS, SDK, Peer
from bench.progress import Journal, each
from bench.record import SCHEMA_VERSION, BenchError, Result
from bench.running import SOURCES, Work, entry_of, run_one
from nki_kernels.conformance import shims
from nki_kernels.conformance.command import commit_of
from nki_kernels.conformance.orchestrator import launch_judged
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.operators.shapes import parse

#: Instructions the reorder window looks at beside program order: AWS's compiler reorders.
WINDOWS = (0, 16)
_DTYPE = "bfloat16"
#: What a kernel written by others may end in, from its own refusal to a call it does not take.
_REFUSALS = (
    NkiKernelsError, AssertionError, TypeError, ValueError, LookupError, AttributeError,
    ArithmeticError, ImportError, NotImplementedError, MemoryError,
)  # fmt: skip
_REASON = 300
#: Bytes the process of one launch may hold.
_MEMORY = 8 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """One of AWS's kernels beside one of our operators, by the timing model.

    Attributes:
        peer: AWS's kernel; `op`: ours; `shape`: of ours.
        commit: of the checkout.
        differs: in what the two do not do the same.
        failure: why AWS's kernel has no time; None if it has.
        finding: what the checks say about AWS's kernel; its time is taken all the same.
        lnc, window: the cores and the reorder window of AWS's best time.
        us_per_core: that time, times the cores.
        limiting_engine: its busiest engine, and `busy_percent` of its time.
        hbm_bytes: it read and wrote, all cores together.
        instructions: it executed, all cores together.
        percent_of_roofline: our operator's bound against `us_per_core`.
        device: published for hardware at these sizes, in words.
        ours: the record of our kernel.
        ratio: `us_per_core` against our time; above 1 ours is faster.
    """

    peer: str
    op: str
    shape: str
    target: str
    commit: str
    differs: str
    failure: str | None = None
    finding: str | None = None
    lnc: int | None = None
    window: int | None = None
    us_per_core: float | None = None
    limiting_engine: str | None = None
    busy_percent: float | None = None
    hbm_bytes: int | None = None
    instructions: int | None = None
    percent_of_roofline: float | None = None
    device: str = ""
    ours: dict[str, Any]
    ratio: float | None = None
    source: str = "model"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class PeerWork:
    """One comparison, in words that another process understands.

    Attributes:
        at: index of the peer in `PEERS`.
        seconds: host time that one launch of AWS's kernel may take.
    """

    at: int
    shape: str
    target: str
    checkout: Path
    seconds: int

    def __str__(self) -> str:
        return f"{PEERS[self.at].name} {self.shape} {self.target}"


def peer_work(
    names: Sequence[str],
    shapes: Sequence[str],
    target: str,
    checkouts: dict[str, Path | None],
    seconds: int,
) -> list[PeerWork]:
    """Return the comparisons asked for.

    Args:
        names: our operators or AWS's kernels; none: all of those whose checkout is named.
        shapes: free-form or named shapes of ours; none: those of the table.
        target: hardware generation.
        checkouts: folder of each source, None where it was not named.
        seconds: host time of one launch.

    Raises:
        BenchError: a name that is none, no checkout, or a folder that is none.
    """
    known = {name for peer in PEERS for name in (peer.name, peer.op)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchError(f"no peer {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    for source, folder in checkouts.items():
        if folder is not None and not (folder / _ROOTS[source]).is_dir():
            raise BenchError(
                f"--{source} {folder}: no {_ROOTS[source]} in it; name a checkout of "
                f"{_REPOSITORIES[source]}"
            )
    works = []
    for at, peer in enumerate(PEERS):
        folder = checkouts[peer.source]
        if folder is not None and (not names or {peer.name, peer.op} & set(names)):
            works += [PeerWork(at, s, target, folder, seconds) for s in shapes or peer.shapes]
    if not works:
        options = ", ".join(f"--{s} PATH ({_REPOSITORIES[s]})" for s in checkouts)
        raise BenchError(f"no checkout of what was asked for is named; name it with {options}")
    return works


_ROOTS = {"library": "src/nkilib_src/nkilib", SDK: "nki/examples"}
_REPOSITORIES = {
    "library": "aws-neuron/nki-library, branch 2.29_release",
    SDK: "aws-neuron/aws-neuron-sdk",
}


def run_peers(works: Sequence[PeerWork], jobs: int, partial: Path | None) -> list[PeerResult]:
    """Time AWS's kernels and ours, in the order given; see `bench.running.run_all`."""
    journal = Journal(partial, source_hash(*SOURCES))
    todo = [work for work in works if str(work) not in journal.found]
    for index, result in each(compare_one, todo, str, jobs):
        journal.add(str(todo[index]), dataclasses.asdict(result))
    return [PeerResult(**journal.found[str(work)]) for work in works]


def compare_one(work: PeerWork) -> PeerResult:
    """Time one of AWS's kernels and ours at the same sizes."""
    peer = PEERS[work.at]
    mine = Work(peer.op, work.shape, _DTYPE, work.target, keep_going=True)
    ours = run_one(mine)
    facts: dict[str, Any] = {
        "peer": peer.name, "op": peer.op, "shape": work.shape, "target": work.target,
        "commit": commit_of(work.checkout), "differs": peer.differs,
        "device": peer.device.get(work.shape, ""), "ours": dataclasses.asdict(ours),
    }  # fmt: skip
    best: dict[str, Any] | None = None
    failures = []
    for lnc in peer.lncs:
        found = _timed(work, lnc)
        if isinstance(found, str):
            failures.append(f"{lnc} core{'s' * (lnc > 1)}: {found}")
        elif best is None or found["us_per_core"] < best["us_per_core"]:
            best = found
    if best is None:
        return PeerResult(**facts, failure="; ".join(dict.fromkeys(failures)))
    bound = mine.entry.op.roofline_ns(mine.case.axes, _DTYPE, spec_for(work.target)) / 1e3
    mine_us = ours.modelled_us
    return PeerResult(
        **facts,
        **best,
        percent_of_roofline=100 * bound / best["us_per_core"],
        ratio=None if mine_us is None else best["us_per_core"] / mine_us,
    )


def _timed(work: PeerWork, lnc: int) -> dict[str, Any] | str:
    """Time AWS's kernel on so many cores, in a process of its own; return its record or why not.

    A kernel may unroll without bound, fill the memory or wait for ever: its process is ended.
    """
    context = multiprocessing.get_context("spawn")
    answer, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, work, lnc))
    child.start()
    there.close()
    try:
        if not answer.poll(work.seconds):
            return f"more than {work.seconds} s on this host"
        found: dict[str, Any] | str = answer.recv()
        return found
    except EOFError:
        child.join()
        return f"its process ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _answer(there: Any, work: PeerWork, lnc: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        # AWS's kernels print.
        with contextlib.redirect_stdout(io.StringIO()):
            found: dict[str, Any] | str = _record(work, lnc)
    except _REFUSALS as error:
        found = _reason(error)
    there.send(found)


def _record(work: PeerWork, lnc: int) -> dict[str, Any]:
    """Launch AWS's kernel; return its better time and what limits it."""
    peer = PEERS[work.at]
    axes = parse(entry_of(peer.op).op, work.shape).axes
    findings: list[str] = []
    module = _imported(peer, work.checkout)
    kernel, _ = peer.call(module, axes, lnc)
    (run,) = launch_judged(
        kernel, lambda: [peer.call(module, axes, lnc)[1]], work.target, lnc, findings.append
    )
    timelines = {window: run.time(window=window) for window in WINDOWS}
    window = min(timelines, key=lambda w: timelines[w].total_ns)
    timeline = timelines[window]
    engine = timeline.limiting_engine
    return {
        "lnc": lnc,
        "window": window,
        "us_per_core": lnc * timeline.total_ns / 1e3,
        "limiting_engine": engine,
        "busy_percent": 100 * timeline.busy_ns.get(engine, 0.0) / timeline.total_ns,
        "hbm_bytes": timeline.hbm_read_bytes + timeline.hbm_write_bytes,
        "instructions": len(run.trace),
        "finding": " ".join(findings[0].split())[:_REASON] if findings else None,
    }


def _imported(peer: Peer, checkout: Path) -> ModuleType:
    """Import AWS's module; packages it names that are not public are stood in for."""
    if peer.source == SDK:
        path = checkout / _ROOTS[SDK] / peer.module
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    source = str(checkout.resolve() / "src")
    if source not in sys.path:
        shims.install(object)
        sys.path.insert(0, source)
    return importlib.import_module(f"nkilib_src.nkilib.{peer.module}")


def _reason(error: BaseException) -> str:
    """The error in a line; AWS's refusals come in a frame of words that are always the same."""
    text = " ".join(str(error).split()).removeprefix("[INTERNAL_ERROR] [NCC_INKI016] ")
    text = text.removeprefix("Kernel validation exception: ")
    text = text.removesuffix(
        " - Please check the validation message and adjust kernel inputs accordingly"
    )
    return f"{type(error).__name__}: {text}"[:_REASON]


def result_of(record: PeerResult) -> Result:
    """Our side of a comparison."""
    return Result(**record.ours)
