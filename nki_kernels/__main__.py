"""``python -m nki_kernels``: run a script with ``nki`` importable; say what is in force.

A command is one function that adds its parser and names its handler; it is listed in ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import nki_kernels
from nki_kernels import toolchain

if TYPE_CHECKING:
    # The class is generic for the type checker only.
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

USAGE_ERROR = 2
TARGET_ENV = "NEURON_PLATFORM_TARGET_OVERRIDE"


def add_run(commands: Subparsers) -> None:
    """Add ``run SCRIPT [ARG ...]``."""
    parser = commands.add_parser(
        "run",
        help="run a Python script as `python SCRIPT` would, with `import nki` working",
        description="Run a Python script as `python SCRIPT` would, with `import nki` working. "
        f"Which nki that is: see `python -m nki_kernels env`; {toolchain.ENV} overrides.",
    )
    parser.add_argument("script", help="path of the script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments for the script")
    parser.set_defaults(handler=lambda options: run_script(options.script, options.args))


def add_env(commands: Subparsers) -> None:
    """Add ``env [--json]``."""
    parser = commands.add_parser(
        "env", help="print versions, the nki in force and why, and the target"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(handler=lambda options: print_environment(as_json=options.json))


def add_profile(commands: Subparsers) -> None:
    """Add ``profile FILE.py:KERNEL [--arg ...] [--output ...]``."""
    parser = commands.add_parser(
        "profile",
        help="model a kernel's time: what limits it, what it waits for, what to change first",
        description="Run a kernel of any file on the embedded NKI (whichever nki is in force) and "
        "report its modelled time. Arguments may be shapes without values.",
    )
    parser.add_argument("kernel", metavar="FILE.py:KERNEL", help="a kernel of any file")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="[NAME=]VALUE",
        help="an argument of the kernel: 'q=bf16[1,8,4096,128]' (a shape without values; with "
        ":zeros, :ones, :arange or :random it has them), 'x=@x.npy', 'eps=1e-6', 'mode=fast'",
    )
    parser.add_argument("--target", help="trn1, trn2, trn3 or toy (default: the environment's)")
    parser.add_argument("--lnc", type=int, choices=(1, 2), help="cores of the launch")
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help="write x.html (page), x.perfetto.json (trace) or x.json (record); may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="replace output files that exist")
    parser.add_argument("--against", metavar="OLD.json", help="compare with an earlier record")
    parser.add_argument(
        "--band",
        action="store_true",
        help="also time the kernel at the bounds of every uncertain number of the hardware",
    )
    parser.add_argument("--json", action="store_true", help="print the record instead of a report")
    parser.set_defaults(handler=_profile)


def _profile(options: argparse.Namespace) -> int:
    from nki_kernels.profiler import command  # here: the other commands need no machine

    sys.excepthook = _hook_without_our_frames(options.kernel.rpartition(":")[0])
    return command.run(options)


def add_lint(commands: Subparsers) -> None:
    """Add ``lint FILE ... [--json] [--quiet]``."""
    parser = commands.add_parser(
        "lint",
        help="say what NKI's frontends will refuse in a kernel's source, without running it",
        description="Errors: what the tracer or every frontend refuses. Infos: what the parser "
        "frontend (the default up to NKI 0.6) refuses, and what is deprecated. Exit code 1 if "
        "there are errors.",
    )
    parser.add_argument("paths", nargs="+", metavar="FILE", help="Python files or directories")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="leave out the infos")
    parser.set_defaults(handler=_lint)


def _lint(options: argparse.Namespace) -> int:
    from nki_kernels.lint import run_lint  # here: the other commands need no rules

    return run_lint(options.paths, as_json=options.json, quiet=options.quiet)


def add_conformance(commands: Subparsers) -> None:
    """Add ``conformance PATH [--only NAME ...]``."""
    parser = commands.add_parser(
        "conformance",
        help="run AWS's kernel library on the embedded NKI, against its own references",
        description="Run the test files of a checkout of aws-neuron/nki-library, each kernel on "
        "the embedded NKI against the reference of its own test (needs the extra `conformance`). "
        "Exit code 0 if every entry matches.",
    )
    parser.add_argument("path", help="the checkout")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="parts of the names of entries, or `listed`: those that must match",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=4, help="smallest rows per test and core count")
    parser.add_argument("--megabytes", type=int, default=64, help="leave out larger cases")
    parser.add_argument("--seconds", type=int, default=60, help="leave out longer cases")
    parser.add_argument("--target", default="trn2", choices=("trn2", "trn3"))
    parser.add_argument("--workers", type=int, default=1, help="processes (pytest-xdist)")
    parser.add_argument("--reasons", type=int, default=2, help="reasons shown per entry")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="say on stderr what each row did")
    parser.set_defaults(handler=_conformance)


def _conformance(options: argparse.Namespace) -> int:
    from nki_kernels.conformance import run_conformance  # here: the other commands need no pytest

    return run_conformance(options)


def add_docs(commands: Subparsers) -> None:
    """Add ``docs [--check]``."""
    parser = commands.add_parser(
        "docs",
        help="write the pages of nki.isa from its declarations",
        description="Write the README of each family of instructions and the support matrix into "
        "the embedded nki/isa, from the declarations. Needs the embedded nki.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a page is stale"
    )
    parser.set_defaults(handler=lambda options: write_docs(check=options.check))


def write_docs(*, check: bool) -> int:
    """Write the generated pages, or with ``check`` name the stale ones; return the exit code."""
    from nki_kernels.hardware import TARGETS  # here: the other commands need no pages
    from nki_kernels.machine import pages

    kind = toolchain.current().kind
    if kind != "embedded":
        print(
            f"nki_kernels docs: the nki in force is {kind}; the pages are those of the embedded "
            f"one; set {toolchain.ENV}=embedded",
            file=sys.stderr,
        )
        return USAGE_ERROR
    isa = importlib.import_module("nki.isa")
    specs = tuple(TARGETS[name] for name in ("trn1", "trn2", "trn3"))
    directory = Path(str(isa.__file__)).parent
    stale = pages.write(pages.pages(isa, specs), directory, check=check)
    for name in stale:
        print(f"{'stale' if check else 'wrote'} {directory / name}")
    return int(check and bool(stale))


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_run,
    add_env,
    add_profile,
    add_lint,
    add_conformance,
    add_docs,
)


def run_script(script: str, args: Sequence[str]) -> int:
    """Run ``script`` as the program, as ``python script args...`` would.

    Args:
        script: path of a Python file.
        args: what the script finds in ``sys.argv[1:]``.

    Returns:
        0 when the script ran to its end. ``SystemExit`` and exceptions of the script pass through.
    """
    if not Path(script).is_file():
        print(
            f"nki_kernels run: {script!r} is not a file (looked in {os.getcwd()}); "
            "allowed: the path of a Python script; check the path",
            file=sys.stderr,
        )
        return USAGE_ERROR
    # Loaded now, before the script's own directory goes on the path: a file nki.py beside the
    # script must not replace the nki that was decided on.
    importlib.import_module("nki")
    sys.argv[:] = [script, *args]
    directory = str(Path(script).resolve().parent)
    if sys.flags.safe_path:
        pass  # `python -P script.py` puts no directory on the path
    else:
        sys.path[0] = directory  # in place of the directory that `-m` put there
    sys.excepthook = _hook_without_our_frames(script)
    runpy.run_path(script, run_name="__main__")
    return 0


def _hook_without_our_frames(
    script: str,
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """Return an ``excepthook`` whose traceback starts in the script, as python's own does."""

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        start = trace
        while start is not None and start.tb_frame.f_code.co_filename != script:
            start = start.tb_next
        # No frame of the script: it did not compile, and python shows the error alone.
        if start is not None or isinstance(value, SyntaxError):
            value = value.with_traceback(start)
        sys.__excepthook__(kind, value, start)

    return hook


def environment() -> dict[str, Any]:
    """Return versions, the toolchain in force and the target, ready for JSON."""
    from nki_kernels.machine.launch import DEFAULT_TARGET  # here: `run` does not need the machine

    tool = dataclasses.asdict(toolchain.current())
    tool["path"] = str(tool["path"])
    target = os.environ.get(TARGET_ENV)
    problem = None if target is None else _target_problem(target)
    return {
        "nki_kernels": nki_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("numpy", "ml_dtypes", "torch")},
        "toolchain": tool,
        "target": {
            "name": target or DEFAULT_TARGET,
            "set_by": TARGET_ENV if target else f"default; {TARGET_ENV} is not set",
            "problem": problem,
        },
    }


def _target_problem(target: str) -> str | None:
    """Say why a kernel cannot run for a target; None if it can."""
    from nki_kernels.hardware import spec_for

    try:
        spec_for(target)
    except ValueError as error:
        return f"{TARGET_ENV}: {error}; set one of these or unset it"
    return None


def print_environment(*, as_json: bool) -> int:
    """Print ``environment()`` as JSON or as aligned lines; return the exit code.

    A target that is none is an error: nothing could be launched.
    """
    facts = environment()
    tool, target = facts["toolchain"], facts["target"]
    if target["problem"] is not None:
        print(f"error: {target['problem']}", file=sys.stderr)
    code = 0 if target["problem"] is None else USAGE_ERROR
    if as_json:
        print(json.dumps(facts, indent=2))
        return code
    lines = {
        "nki_kernels": facts["nki_kernels"],
        "python": f"{facts['python']} ({facts['platform']})",
        **{name: version or "not installed" for name, version in facts["packages"].items()},
        "nki": f"{tool['kind']} {tool['version']}: {tool['reason']}",
        "nki_path": tool["path"],
        "target": f"{target['name']} ({target['set_by']})",
    }
    for name, text in lines.items():
        print(f"{name:<12} {text}")
    return code


def _version(distribution: str) -> str | None:
    """Version of an installed distribution, found without importing it; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m nki_kernels", description="Run, inspect and check NKI kernels on a CPU."
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (2 for a usage error)."""
    options = parser().parse_args(argv)
    code: int = options.handler(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
