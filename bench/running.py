"""The cases a command line names, and running them: in several processes, resumable."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import entries
from bench.check import source_hash
from bench.entries import Entry
from bench.harness import measure, refused
from bench.own import OwnEntry, is_own, own_entry
from bench.progress import Journal, each
from bench.record import BenchError, Result
from bench.room import require_room
from nki_kernels.hardware import spec_for
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.operators.contract import supports
from nki_kernels.operators.shapes import DEFAULTS, Case, cases, parse

#: What a verdict or a time depends on.
SOURCES = ("nki_kernels", "reference", "bench", "tests/tolerance.py")


@dataclass(frozen=True, slots=True)
class Work:
    """One case to run, in words that another process understands.

    Attributes:
        op: the operator's name, or FILE.py:NAME.
        shape: a registry name or free-form sizes.
        keep_going: a kernel that refuses the case gives a failed result instead of an error.
    """

    op: str
    shape: str
    dtype: str
    target: str
    full: bool = False
    keep_going: bool = False

    @property
    def entry(self) -> Entry:
        """The operator."""
        return entry_of(self.op)

    @property
    def case(self) -> Case:
        """The problem."""
        return parse(self.entry.op, self.shape)

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.target}"


def entry_of(name: str) -> Entry:
    """Return an operator by name, or the user's benchmark that ``FILE.py:NAME`` names.

    Raises:
        BenchError: there is none of that name.
    """
    if is_own(name):
        return own_entry(name)
    if name not in entries.ENTRIES:
        raise BenchError(
            f"no operator {name!r}; there are {', '.join(entries.ENTRIES)}, and FILE.py:NAME for "
            "your own; see 'python -m bench list'"
        )
    return entries.ENTRIES[name]


def entries_of(names: Sequence[str]) -> dict[str, Entry]:
    """Return the named operators by name; all of them when none is named."""
    return {name: entry_of(name) for name in names or entries.ENTRIES}


def known_target(target: str) -> None:
    """Refuse a target that is none.

    Raises:
        BenchError: the targets there are.
    """
    try:
        spec_for(target)
    except ValueError as error:
        raise BenchError(f"--target: {error}; choose one of them") from None


def default_shapes(entry: Entry) -> tuple[str, ...]:
    """Return what is timed when no shape is named."""
    return entry.shapes if isinstance(entry, OwnEntry) else DEFAULTS[entry.op.name]


def all_shapes(entry: Entry) -> tuple[str, ...]:
    """Return every shape of the registry and every default one."""
    return tuple(dict.fromkeys([*default_shapes(entry), *(c.name for c in cases(entry.op.name))]))


def named_work(arguments: argparse.Namespace) -> Iterator[Work]:
    """Yield what ``[op ...] --shape --dtype --target`` ask for.

    Raises:
        BenchError, ShapeError: an operator, target, shape or dtype that is none.
    """
    targets = arguments.target or ["trn2"]
    for target in targets:
        known_target(target)
    everything = getattr(arguments, "all", False)
    if everything and arguments.shape:
        raise BenchError("--all and --shape exclude each other; leave one of them out")
    for op_name, entry in entries_of(arguments.op).items():
        op = entry.op
        shapes = all_shapes(entry) if everything else arguments.shape or default_shapes(entry)
        for shape in shapes:
            parse(op, shape)
            for name in arguments.dtype or [_usual_dtype(entry)]:
                if not supports(op, name):
                    raise BenchError(
                        f"{op.name}: dtype {name!r} is not supported; allowed are "
                        f"{', '.join(op.dtypes)}; choose one of them"
                    )
                for target in targets:
                    full = getattr(arguments, "check", "auto") == "full"
                    dtype = str(as_dtype(name))
                    yield Work(op_name, shape, dtype, target, full, everything)


def _usual_dtype(entry: Entry) -> str:
    return "bfloat16" if supports(entry.op, "bfloat16") else entry.op.dtypes[0]


def jobs_of(arguments: argparse.Namespace) -> int:
    """Return the number of processes: as asked, else one per core with --all and one without.

    Raises:
        BenchError: fewer than one.
    """
    jobs: int | None = arguments.jobs
    if jobs is None:
        return (os.cpu_count() or 1) if getattr(arguments, "all", False) else 1
    if jobs < 1:
        raise BenchError(f"--jobs is {jobs}; at least 1 is needed; name the processes to start")
    return jobs


def run_one(work: Work) -> Result:
    """Check and time one case."""
    entry, case = work.entry, work.case
    try:
        return measure(entry, case, work.dtype, work.target, full=work.full)
    except NkiKernelsError as error:
        if not work.keep_going:
            raise
        return refused(entry, case, work.dtype, work.target, str(error))


def run_all(works: Sequence[Work], jobs: int, partial: Path | None) -> list[Result]:
    """Check and time the cases, in the order given.

    Args:
        works: the cases.
        jobs: processes.
        partial: file that remembers what is done if the command is interrupted; None: nothing is.

    Raises:
        BenchError: a case needs more memory than there is; nothing has been run then.
    """
    for work in works:
        room = min(jobs, len(works))
        require_room(work.entry, work.case, work.dtype, work.target, full=work.full, jobs=room)
    journal = Journal(partial, source_hash(*SOURCES))
    todo = [work for work in works if _key(work) not in journal.found]
    for index, result in each(run_one, todo, str, jobs):
        journal.add(_key(todo[index]), dataclasses.asdict(result))
    return [Result(**journal.found[_key(work)]) for work in works]


def _key(work: Work) -> str:
    return f"{work} {'full' if work.full else 'auto'}"


def partial_of(path: Path | None) -> Path | None:
    """Return the file that remembers the finished part of the work for `path`."""
    return None if path is None else path.with_name(f"{path.name}.partial")
