"""``python -m bench``: list the operators, model their time, measure the embedded NKI itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from bench.entries import ENTRIES, Entry
from bench.goldens import differences, figures, read, write
from bench.harness import measure
from bench.host import (
    HostResult,
    host_table,
    measure_instructions,
    measure_matmul,
    measure_shapes_only,
)
from bench.record import BenchError, Result, require_writable, write_json
from bench.sensitivity import measure_band, sensitivity_table
from bench.table import results_table, shapes_table
from nki_kernels.hardware import spec_for
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.operators.contract import supports
from nki_kernels.operators.shapes import DEFAULTS, Case, parse

#: Exit codes: a failed check or a limit not kept; a request that cannot be met; Ctrl-C.
FAILED, MISUSED, INTERRUPTED = 1, 2, 130

_T = TypeVar("_T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (NkiKernelsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="operators, dtypes and named shapes")
    listing.add_argument("op", nargs="*", help="operators (default: all)")
    listing.set_defaults(command=_list)

    run = commands.add_parser("run", help="check kernels, then model their time")
    run.add_argument("op", nargs="*", help="operators (default: all)")
    run.add_argument("--shape", action="append", help="a named shape or sizes; may be repeated")
    run.add_argument("--dtype", action="append", help="bf16 (default), fp16, fp32; may be repeated")
    run.add_argument("--target", default="trn2", help="hardware generation (default trn2)")
    run.add_argument(
        "--check",
        choices=("auto", "full"),
        default="auto",
        help="auto: large shapes are checked at a reduced size, same code path; full: never",
    )
    run.add_argument("--json", type=Path, metavar="F", help="write the results to F as well")
    run.set_defaults(command=_run)

    host = commands.add_parser("host", help="speed of the embedded NKI on this machine")
    host.add_argument("--json", type=Path, metavar="F", help="write the figures to F as well")
    host.set_defaults(command=_host)

    band = commands.add_parser(
        "sensitivity", help="what the uncertain numbers of the hardware do to the modelled times"
    )
    band.add_argument("op", nargs="*", help="operators (default: all)")
    band.add_argument("--shape", action="append", help="a named shape or sizes; may be repeated")
    band.add_argument("--dtype", action="append", help="bf16 (default), fp16, fp32")
    band.add_argument("--target", default="trn2", help="hardware generation (default trn2)")
    band.add_argument("--json", type=Path, metavar="F", help="write the effects to F as well")
    band.set_defaults(command=_sensitivity)

    golden = commands.add_parser("goldens", help="modelled times against those checked in")
    golden.add_argument("--write", action="store_true", help="check in the times of now")
    golden.set_defaults(command=_goldens)

    validation = commands.add_parser("validate", help="the timing model against hardware")
    validation.add_argument("--json", type=Path, metavar="F", help="write the readings to F too")
    validation.add_argument(
        "--markdown", action="store_true", help="print only the summary the README shows"
    )
    validation.set_defaults(command=_validate)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    print(shapes_table([entry.op.name for entry in _entries(arguments.op)]))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    _known_target(arguments.target)
    work = list(_cases(arguments))
    if arguments.json is not None:
        require_writable(arguments.json)
    results: list[Result] = []
    for entry, case, dtype in _progress(work, lambda item: f"{item[0].op.name} {item[1].name}"):
        results.append(
            measure(entry, case, dtype, arguments.target, full=arguments.check == "full")
        )
    print(results_table(results))
    if arguments.json is not None:
        write_json(arguments.json, "model", results)
    return 0 if all(result.correct for result in results) else FAILED


def _known_target(target: str) -> None:
    try:
        spec_for(target)
    except ValueError as error:
        raise BenchError(str(error)) from None


def _host(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json)
    results: list[HostResult] = []
    parts: list[tuple[str, Callable[[], Iterator[HostResult]]]] = [
        ("instructions", measure_instructions),
        ("shapes only", measure_shapes_only),
        ("matmul against numpy", measure_matmul),
    ]
    for _, measured in _progress(parts, lambda part: part[0]):
        results.extend(measured())
    print(host_table(results))
    if arguments.json is not None:
        write_json(arguments.json, "host", results)
    return FAILED if any(result.within is False for result in results) else 0


def _sensitivity(arguments: argparse.Namespace) -> int:
    _known_target(arguments.target)
    first = not arguments.shape
    work = [w for w in _cases(arguments) if not first or w[1].name == _first(w[0])]
    if arguments.json is not None:
        require_writable(arguments.json)
    bands = [
        measure_band(entry, case, dtype, arguments.target)
        for entry, case, dtype in _progress(work, lambda item: f"{item[0].op.name} {item[1].name}")
    ]
    print(sensitivity_table(bands))
    if arguments.json is not None:
        write_json(arguments.json, "model", bands)
    return 0


def _first(entry: Entry) -> str:
    """Return the name of the operator's first default shape."""
    return parse(entry.op, DEFAULTS[entry.op.name][0]).name


def _goldens(arguments: argparse.Namespace) -> int:
    found = dict(figures())
    if arguments.write:
        write(found)
        print(f"{len(found)} modelled times written; give the reason in the commit")
        return 0
    lines = differences(found, read())
    print("\n".join(lines) or f"{len(found)} modelled times are as checked in")
    return FAILED if lines else 0


def _validate(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json)
    # Probes are kernels: `nki` must be importable, which only this command needs.
    from bench.validate import KIND, PARTS, broken, ladders, markdown, report

    readings = [
        reading for _, found in _progress(PARTS, lambda part: part[0]) for reading in found()
    ]
    print(markdown(readings) if arguments.markdown else report(readings))
    if arguments.json is not None:
        write_json(arguments.json, KIND, [*readings, *ladders(readings)])
    return FAILED if broken(readings) else 0


def _entries(names: Sequence[str]) -> list[Entry]:
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise BenchError(
            f"no operator {', '.join(map(repr, unknown))}; there are {', '.join(ENTRIES)}; "
            "see 'python -m bench list'"
        )
    return [ENTRIES[name] for name in dict.fromkeys(names)] or list(ENTRIES.values())


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[Entry, Case, str]]:
    for entry in _entries(arguments.op):
        for shape in arguments.shape or DEFAULTS[entry.op.name]:
            case = parse(entry.op, shape)
            for name in arguments.dtype or ["bfloat16"]:
                if not supports(entry.op, name):
                    raise BenchError(
                        f"{entry.op.name}: dtype {name!r} is not supported; allowed are "
                        f"{', '.join(entry.op.dtypes)}; choose one of them"
                    )
                yield entry, case, str(as_dtype(name))


def _progress(items: Sequence[_T], label: Callable[[_T], str]) -> Iterable[_T]:
    """Yield the items behind a progress bar on standard error, when that is a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        raise BenchError(
            "the progress bar needs the package rich; install the extra with pip install '.[bench]'"
        ) from None

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=len(items))
        for item in items:
            bar.update(task, description=label(item))
            yield item
            bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
