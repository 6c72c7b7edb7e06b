"""``python -m bench tune``: search an operator's config by modelled time, from shapes only.

From the operator's own choice, one field at a time: halved, doubled, one less, one more, the other
way. The first step that helps is taken, until none does or the budget is spent. A config that wins
is checked against the reference before it counts, though tuning cannot change the mathematics.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.check import check, source_hash
from bench.entries import Entry
from bench.progress import Journal, each
from bench.record import SCHEMA_VERSION, BenchError, write_text
from bench.running import Work
from bench.table import render
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.timeline import MODEL_VERSION
from nki_kernels.operators.contract import Axes
from nki_kernels.operators.tuned import case_key, file_of

#: Configs timed per case unless told otherwise.
BUDGET = 40
#: What fields of words may be.
_WORDS: Mapping[str, tuple[str, ...]] = {"transpose": ("dma", "pe")}
#: Fields that stand for what no document settles, not for speed.
_SETTLED = frozenset({"banks"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """One tuned case.

    Attributes:
        op, shape, dtype, target: the case.
        key: its name in the files of tuned configs.
        config: fields of the best config that differ from the operator's choice.
        tuned_ns, heuristic_ns: modelled times of the best config and of the operator's choice.
        tried: configs timed.
        exhausted: the budget ended the search, not the lack of a better neighbour.
        failure: the best config failed its check; `config` is empty then.
    """

    op: str
    shape: str
    dtype: str
    target: str
    key: str
    config: dict[str, Any]
    tuned_ns: float
    heuristic_ns: float
    tried: int
    exhausted: bool
    failure: str | None = None
    source: str = "model"
    schema_version: int = SCHEMA_VERSION

    @property
    def regret_percent(self) -> float:
        """How much longer the operator's choice takes, in percent of the best time."""
        return 100 * (self.heuristic_ns / self.tuned_ns - 1)


@dataclass(frozen=True, slots=True)
class Search:
    """One case to tune, in words that another process understands."""

    work: Work
    budget: int

    def __str__(self) -> str:
        return str(self.work)


def neighbours(config: Any) -> Iterator[Any]:
    """Yield the configs one step away, a field at a time."""
    for field in dataclasses.fields(config):
        if field.name in _SETTLED:
            continue
        value = getattr(config, field.name)
        steps: tuple[Any, ...] = ()
        if isinstance(value, bool):
            steps = (not value,)
        elif isinstance(value, int):
            steps = tuple(dict.fromkeys((value * 2, value // 2, value + 1, value - 1)))
        elif isinstance(value, str):
            steps = _WORDS.get(field.name, ())
        for step in steps:
            if step != value and not (isinstance(step, int) and step < 0):
                yield dataclasses.replace(config, **{field.name: step})


def modelled_ns(entry: Entry, axes: Axes, dtype: str, config: Any, target: str) -> float | None:
    """Return the modelled time of a config from shapes only; None when it cannot run."""
    if entry.op.config_problems(config, dtype, spec_for(target)):
        return None
    try:
        inputs, options = entry.shapes_only(axes, dtype), entry.op.options_of(axes)
        return float(entry.op.launch(inputs, options, config=config, target=target).time().total_ns)
    except (NkiKernelsError, ValueError, ZeroDivisionError):
        # A kernel need not survive a config that nobody chose: it is no candidate.
        return None


def tune_one(search: Search) -> Tuned:
    """Search the config of one case."""
    work = search.work
    entry, axes = work.entry, work.case.axes
    start = entry.op.configure(axes, work.dtype, spec_for(work.target))
    first = modelled_ns(entry, axes, work.dtype, start, work.target)
    if first is None:
        raise BenchError(f"{work}: its own config does not run; see 'python -m bench run'")
    best, best_ns, times = start, first, {start: first}
    improved = True
    while improved and len(times) < search.budget:
        improved = False
        for config in neighbours(best):
            if config in times or len(times) >= search.budget:
                continue
            found = modelled_ns(entry, axes, work.dtype, config, work.target)
            times[config] = float("inf") if found is None else found
            if times[config] < best_ns:
                best, best_ns, improved = config, times[config], True
                break
    failure = None
    if best is not start:
        failure = check(entry, axes, work.dtype, best, work.target, full=False).failure
    if failure is not None:
        best, best_ns = start, first
    return Tuned(
        op=work.op, shape=work.shape, dtype=work.dtype, target=work.target,
        key=case_key(entry.op, axes, work.dtype), config=_changed(start, best),
        tuned_ns=best_ns, heuristic_ns=first, tried=len(times),
        exhausted=len(times) >= search.budget, failure=failure,
    )  # fmt: skip


def _changed(old: Any, new: Any) -> dict[str, Any]:
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return {name: after[name] for name in after if after[name] != before[name]}


def tune_all(works: Sequence[Work], budget: int, jobs: int, state: Path | None) -> list[Tuned]:
    """Search the configs of the cases, in the order given; `state` lets a rerun go on.

    Raises:
        BenchError: a budget below 2 tries nothing.
    """
    if budget < 2:
        raise BenchError(f"--budget is {budget}; at least 2 are needed; name configs per case")
    journal = Journal(state, f"{source_hash('nki_kernels', 'reference', 'bench')} {budget}")
    todo = [Search(work, budget) for work in works if str(work) not in journal.found]
    for index, found in each(tune_one, todo, str, jobs):
        journal.add(str(todo[index].work), dataclasses.asdict(found))
    return [Tuned(**journal.found[str(work)]) for work in works]


def write_tuned(results: Sequence[Tuned]) -> list[Path]:
    """Merge the results into the files of their targets; return the files."""
    written = []
    for target in dict.fromkeys(r.target for r in results):
        path = file_of(target)
        old = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
        new = {
            r.key: {
                "config": r.config,
                "tuned_ns": round(r.tuned_ns, 1),
                "heuristic_ns": round(r.heuristic_ns, 1),
            }
            for r in results
            if r.target == target
        }
        content = {"model": MODEL_VERSION, "cases": {**old, **new}}
        write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
        written.append(path)
    return written


def tune_table(results: Sequence[Tuned]) -> str:
    """Return the cases, then the regret of each operator's own choice."""
    rows = [
        (f"{r.op} {r.shape} {r.dtype} {r.target}", f"{r.heuristic_ns / 1e3:.1f}",
         f"{r.tuned_ns / 1e3:.1f}", f"{r.regret_percent:.2f}",
         f"{r.tried}{'+' if r.exhausted else ''}", _words(r.config))
        for r in results
    ]  # fmt: skip
    header = ("case (model, unvalidated)", "own us", "best us", "regret %", "tried", "best config")
    lines = render(rows, header, left=1)
    lines += [f"FAILED {r.op} {r.shape}: {r.failure}" for r in results if r.failure]
    lines += ["", "regret of the operator's own choice, percent"]
    groups: dict[tuple[str, str], list[float]] = {}
    for r in results:
        groups.setdefault((r.op, r.target), []).append(r.regret_percent)
    summary = [
        (f"{op} {target}", f"{statistics.median(v):.2f}", f"{max(v):.2f}", str(len(v)))
        for (op, target), v in groups.items()
    ]
    lines += render(summary, ("operator", "median", "worst", "cases"), left=1)
    lines.append("tried: configs timed; + means that the budget ended the search.")
    return "\n".join(lines)


def _words(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items()) or "its own"
