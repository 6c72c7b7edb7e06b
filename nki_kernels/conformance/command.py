"""``python -m nki_kernels conformance PATH``: AWS's test files to a table of what matches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nki_kernels import toolchain

SCHEMA_VERSION = 1
USAGE_ERROR = 2
_INSTALL = "pip install 'nki-kernels[conformance]'"
#: Characters of a reason.
_REASON = 600
TESTS = Path("test", "integration", "nkilib")
#: Entries that must match, easiest first; the others are tried as well.
LISTED = (
    "core/embeddings/rope_hf", "core/cumsum/cumsum",
    "experimental/dynamic_shapes/dynamic_elementwise_add", "core/utils/tensor_view",
    "core/utils/tp_broadcast", "core/utils/cross_partition_copy", "core/embeddings/rope",
    "core/subkernels/indexed_flatten", "core/subkernels/find_nonzero_indices",
    "experimental/conv/depthwise_conv1d", "experimental/conv/conv1d",
    "core/subkernels/rmsnorm_tkg", "core/subkernels/layernorm_tkg", "core/rmsnorm/rmsnorm_quant",
    "core/max/cascaded_max", "experimental/loss/cross_entropy_forward",
    "experimental/loss/cross_entropy_backward", "core/attention/gen_mask_tkg",
    "core/output_projection/output_proj_cte", "core/output_projection/output_proj_tkg",
)  # fmt: skip


@dataclass
class Entry:
    """One test file of AWS's: its rows by outcome.

    Attributes:
        name: path of the file without ``test_``.
        runs: rows that ran to the end on each core count; `matches`: those whose outputs matched.
        refused: rows AWS's kernel must refuse, and did.
        skipped: rows left out by AWS or as too large; `large`: the latter; `left_out`: the reasons.
        why: reasons of the rows that did not run or match, counted.
        findings: what the checks say about rows that then ran with the checks as warnings.
        worst: the largest share of the allowed error among the matches.
    """

    name: str
    rows: int = 0
    runs: Counter[int] = field(default_factory=Counter)
    matches: Counter[int] = field(default_factory=Counter)
    refused: int = 0
    skipped: int = 0
    large: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0

    def add(self, record: dict[str, Any], *, passed: bool) -> None:
        """Count one row."""
        self.rows += 1
        stage, lnc = record["stage"], int(record.get("lnc", 0))
        if stage in ("too large", "skipped"):
            self.skipped += 1
            self.large += stage == "too large"
            self.left_out[f"left out: {record.get('error', stage)}"[:_REASON]] += 1
            return
        if passed and (record["negative"] or stage in ("inputs", "launch")):
            # The test expects an error, some of them from its own preparations.
            self.refused += 1
            return
        if record.get("finding"):
            self.findings[record["finding"]] += 1
        if stage in ("compare", "done", "no reference"):
            self.runs[lnc] += 1
        if passed and stage == "done":
            self.matches[lnc] += 1
            self.worst = max(self.worst, float(record.get("worst", 0.0)))
        elif passed:
            self.why[f"passed without a comparison ({stage})"] += 1
        else:
            where = f" ({record['where']})" if record.get("where") else ""
            self.why[f"{stage}: {record.get('error', 'failed')}{where}"[:_REASON]] += 1

    @property
    def reasons(self) -> Counter[str]:
        """Why rows did not run or match; where none ran at all, why they were left out too."""
        return self.why if self.runs.total() else self.why + self.left_out

    @property
    def matched(self) -> bool:
        """True if something ran, everything that ran matched and nothing failed."""
        return sum(self.matches.values()) > 0 and not self.why


def commit_of(library: Path) -> str:
    """The commit of a checkout, "unknown" outside git."""
    command = ["git", "-C", str(library), "rev-parse", "HEAD"]
    if not (library / ".git").exists():
        return "unknown (no git checkout)"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def run_conformance(options: Any) -> int:
    """Run the chosen test files and print the table.

    Args:
        options: path, only, rows, megabytes, target, workers, json, verbose.

    Returns:
        0 if every chosen entry matched, 1 if not, 2 if there is nothing to run.
    """
    if toolchain.current().kind != "embedded":
        return _in_child()
    library = Path(options.path).resolve()
    problem = _problem(library)
    files = [] if problem else _files(library, options.only)
    if not files and not problem:
        problem = f"no test file of {library} has a name with {options.only!r} in it"
    if problem:
        allowed = "allowed: a checkout of aws-neuron/nki-library, branch 2.29_release or later"
        print(f"nki_kernels conformance: {problem}; {allowed}", file=sys.stderr)
        return USAGE_ERROR
    absent = _absent("torch", "scipy", "typing_extensions")
    if absent:
        what = f"{', '.join(absent)} not installed: what imports them does not run ({_INSTALL})"
        print(f"nki_kernels conformance: {what}", file=sys.stderr)
    entries = _run(library, files, options)
    commit = commit_of(library)
    print(_json(entries, commit, options) if options.json else _table(entries, commit, options))
    return int(not all(e.matched for e in entries))


def _in_child() -> int:
    """Repeat the command where the embedded nki is in force."""
    environment = {**os.environ, toolchain.ENV: "embedded"}
    command = [sys.executable, "-m", "nki_kernels", *sys.argv[1:]]
    return subprocess.run(command, env=environment, check=False).returncode


def _problem(library: Path) -> str:
    if not (library / "src" / "nkilib_src").is_dir() or not (library / TESTS).is_dir():
        return f"no src/nkilib_src and {TESTS.as_posix()} in {library}"
    return "" if not _absent("pytest") else f"pytest is not installed ({_INSTALL})"


def _absent(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _name(library: Path, file: Path) -> str:
    inner = file.relative_to(library / TESTS)
    return (inner.parent / inner.stem.removeprefix("test_")).as_posix()


def _files(library: Path, only: Sequence[str]) -> list[Path]:
    """The test files asked for: listed ones first, then by name; without `only`, all of them."""
    found = {_name(library, f): f for f in sorted((library / TESTS).rglob("test_*.py"))}
    order = [n for n in LISTED if n in found] + [n for n in found if n not in LISTED]
    if "listed" in only:
        return [found[n] for n in LISTED if n in found]
    # Files of helpers have no test function.
    return [
        found[n]
        for n in order
        if (not only or any(o in n for o in only)) and "def test_" in found[n].read_text()
    ]


class _Recorder:
    """Collects the reports of the session, of its workers too."""

    def __init__(self, library: Path, verbose: bool) -> None:
        self.library = library
        self.verbose = verbose
        self.entries: dict[str, Entry] = {}

    def pytest_collectreport(self, report: Any) -> None:
        """A file that does not import is an entry that does not run."""
        if report.failed:
            file = self.library / report.nodeid.partition("::")[0]
            text = str(report.longrepr).strip().splitlines()
            record = {"stage": "import", "negative": False, "error": text[-1] if text else ""}
            self._entry(file).add(record, passed=False)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One row: its record travels in the report's user properties."""
        from nki_kernels.conformance.plugin import RECORD

        for key, text in report.user_properties:
            if key == RECORD:
                record = json.loads(text)
                file = self.library / report.nodeid.partition("::")[0]
                self._entry(file).add(record, passed=report.passed)
                if self.verbose:
                    outcome = "ok" if report.passed else record.get("error", report.outcome)
                    row = f"{report.nodeid.rpartition('::')[2]} {record.get('seconds')} s"
                    print(f"{self._entry(file).name}: {row}: {outcome}", file=sys.stderr)

    def _entry(self, file: Path) -> Entry:
        name = _name(self.library, file)
        return self.entries.setdefault(name, Entry(name))


def _run(library: Path, files: Sequence[Path], options: Any) -> list[Entry]:
    import pytest

    recorder = _Recorder(library, options.verbose)
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch, "pytest.ini")
        settings.write_text("[pytest]\n")
        arguments = [
            "-c", str(settings), f"--rootdir={library}", "--noconftest", "-q", "-W", "ignore",
            "--continue-on-collection-errors", "-p", "no:cacheprovider", "--tb=no",
            "-p", "nki_kernels.conformance.plugin",
            f"--library={library}", f"--rows={options.rows}", f"--megabytes={options.megabytes}",
            f"--seconds={options.seconds}",
            f"--platform-target={options.target}",
        ]  # fmt: skip
        if options.workers > 1:
            arguments += ["-n", str(options.workers)]
        arguments += [str(f) for f in files]
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            kept, sys.stdout = sys.stdout, nothing
            try:
                pytest.main(arguments, plugins=[recorder])
            finally:
                sys.stdout = kept
    empty = [Entry(_name(library, f)) for f in files if _name(library, f) not in recorder.entries]
    for entry in empty:
        entry.why[f"no row for {options.target}"] = 1
    order = {_name(library, f): i for i, f in enumerate(files)}
    return sorted([*recorder.entries.values(), *empty], key=lambda e: order.get(e.name, -1))


def _json(entries: Sequence[Entry], commit: str, options: Any) -> str:
    rows = [
        {
            "entry": e.name, "listed": e.name in LISTED, "rows": e.rows, "runs": dict(e.runs),
            "matches": dict(e.matches), "refused": e.refused, "skipped": e.skipped,
            "worst": e.worst, "findings": dict(e.findings), "why_not": dict(e.reasons),
        }
        for e in entries
    ]  # fmt: skip
    facts = {"schema_version": SCHEMA_VERSION, "commit": commit, "target": options.target}
    return json.dumps({**facts, "entries": rows}, indent=2)


def _table(entries: Sequence[Entry], commit: str, options: Any) -> str:
    """Markdown, so that it can be kept as it stands."""
    columns = "rows | runs LNC1 | matches | runs LNC2 | matches | refused | findings | error"
    lines = [
        f"nki-library commit {commit}, {options.target}; an error of 1 is all that is allowed",
        "",
        f"| entry | {columns} | why not |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for e in entries:
        every = e.reasons
        why = "; ".join(f"{n} x {w}" for w, n in every.most_common(options.reasons))
        why += "" if len(every) <= options.reasons else f"; {len(every) - options.reasons} more"
        why = " ".join(why.split()).replace("|", "/")
        counts = f"{e.runs[1]} | {e.matches[1]} | {e.runs[2]} | {e.matches[2]} | {e.refused}"
        counts += f" | {e.findings.total()}"
        lines.append(f"| `{e.name}` | {e.rows - e.skipped} | {counts} | {e.worst:.2g} | {why} |")
    shown = [(e.name, f, n) for e in entries for f, n in e.findings.most_common(options.reasons)]
    lines += ["", *(f"- `{name}` ({n} rows): {' '.join(f.split())}" for name, f, n in shown)]
    matched = sum(e.matched for e in entries)
    lines += ["", f"{matched} of {len(entries)} entries match in every row"]
    return "\n".join(lines)
