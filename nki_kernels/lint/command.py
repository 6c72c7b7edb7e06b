"""``python -m nki_kernels lint``: files to findings, text or JSON, exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nki_kernels import toolchain
from nki_kernels.lint import parser, tracer  # noqa: F401  (registers their rules)
from nki_kernels.lint.rule import Finding, Severity, findings
from nki_kernels.lint.source import Source

SCHEMA_VERSION = 1
USAGE_ERROR = 2


def lint_source(text: str, path: str = "<text>") -> list[Finding]:
    """Return the findings of one file's text; a syntax error is a finding."""
    try:
        source = Source(path, text)
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 1
        what = f"not Python: {error.msg}"
        return [Finding(path, line, column, "syntax", Severity.error.value, what)]
    return findings(source)


def lint_paths(paths: Iterable[Path]) -> list[Finding]:
    """Return the findings of files, and of the Python files below directories.

    Raises:
        OSError: a path does not exist or cannot be read.
    """
    found = []
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found += lint_source(file.read_text(encoding="utf-8"), str(file))
    return found


def run_lint(paths: Sequence[str], *, as_json: bool, quiet: bool = False) -> int:
    """Print the findings.

    Args:
        paths: files and directories.
        as_json: print one JSON object.
        quiet: leave out findings of severity info.

    Returns:
        0 without errors (there may be infos), 1 with, 2 if a path cannot be read.
    """
    if toolchain.current().kind != "embedded":
        return _in_child(paths, as_json=as_json, quiet=quiet)
    try:
        found = lint_paths(Path(p) for p in paths)
    except (OSError, UnicodeDecodeError) as error:
        print(
            f"nki_kernels lint: {error}; allowed: Python files and directories; check the paths",
            file=sys.stderr,
        )
        return USAGE_ERROR
    errors = sum(f.severity == Severity.error.value for f in found)
    shown = [f for f in found if not quiet or f.severity == Severity.error.value]
    if as_json:
        rows = [dataclasses.asdict(f) for f in shown]
        print(json.dumps({"schema_version": SCHEMA_VERSION, "findings": rows}, indent=2))
    else:
        for finding in shown:
            print(finding)
        infos = len(found) - errors
        print(f"{errors} error{'s' * (errors != 1)}, {infos} info{'s' * (infos != 1)}")
    return int(errors > 0)


def _in_child(paths: Sequence[str], *, as_json: bool, quiet: bool) -> int:
    """Run where the embedded nki is in force: names and signatures are read from it."""
    flags = ["--json"] * as_json + ["--quiet"] * quiet
    command = [sys.executable, "-m", "nki_kernels", "lint", *flags, "--", *paths]
    environment = {**os.environ, toolchain.ENV: "embedded"}
    return subprocess.run(command, env=environment, check=False).returncode
