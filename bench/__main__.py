"""``python -m bench``: list the operators, model their time, measure the embedded NKI itself."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.compare import THRESHOLD_PERCENT, compare, compare_table
from bench.device import KIND as DEVICE
from bench.device import (
    device_errors,
    device_table,
    measure_all,
    neuron,
    read_device,
)
from bench.formats import to_csv, to_markdown
from bench.goldens import differences, figures, read, write
from bench.host import (
    HostResult,
    host_table,
    measure_growth,
    measure_instructions,
    measure_matmul,
    measure_shapes_only,
)
from bench.interpreters import measure_interpreters
from bench.nkibench import nkibench_table, nkibench_work
from bench.progress import progress
from bench.record import (
    BenchError,
    read_results,
    require_writable,
    write_bytes,
    write_json,
    write_text,
)
from bench.report import page_of, png_of
from bench.running import (
    default_shapes,
    entries_of,
    jobs_of,
    known_target,
    named_work,
    partial_of,
    run_all,
)
from bench.sensitivity import measure_band, sensitivity_table
from bench.table import results_table, shapes_table
from bench.tune import BUDGET, tune_all, tune_table, write_tuned
from nki_kernels import toolchain
from nki_kernels.__main__ import print_environment
from nki_kernels.machine.errors import NkiKernelsError

#: Exit codes: a failed check or a limit not kept; a request that cannot be met; Ctrl-C.
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


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
        print(f"interrupted; {_what_remains(arguments)}", file=sys.stderr)
        return INTERRUPTED


def _what_remains(arguments: argparse.Namespace) -> str:
    partial = partial_of(getattr(arguments, "json", None))
    if partial is not None and partial.is_file():
        return "the same command again goes on where this one stopped"
    return "nothing was written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="operators, dtypes and named shapes")
    listing.add_argument("op", nargs="*", help="operators (default: all)")
    listing.set_defaults(command=_list)

    run = commands.add_parser("run", help="check kernels, then model their time")
    _add_cases(run)
    run.add_argument("--all", action="store_true", help="every shape of the registry")
    run.add_argument(
        "--check",
        choices=("auto", "full"),
        default="auto",
        help="auto: large shapes are checked at a reduced size, same code path; full: never",
    )
    run.add_argument("--jobs", type=int, help="processes (default: 1; with --all one per core)")
    run.add_argument("--json", type=Path, metavar="F", help="write the results to F as well")
    run.add_argument("--csv", type=Path, metavar="F", help="write them to F as CSV")
    run.add_argument("--markdown", type=Path, metavar="F", help="write them to F as Markdown")
    run.set_defaults(command=_run)

    nkibench = commands.add_parser("nkibench", help="NKIBench: ours modelled, theirs on a device")
    nkibench.add_argument("--target", action="append", help="hardware (default trn2); repeatable")
    nkibench.add_argument("--jobs", type=int, help="processes (default 1)")
    nkibench.add_argument("--json", type=Path, metavar="F", help="write our results to F as well")
    nkibench.set_defaults(command=_nkibench)

    _add_peers(commands)

    tuning = commands.add_parser("tune", help="search configs by modelled time; report the regret")
    _add_cases(tuning)
    tuning.add_argument("--all", action="store_true", help="every shape of the registry")
    tuning.add_argument("--budget", type=int, default=BUDGET, help="configs per case (%(default)s)")
    tuning.add_argument("--jobs", type=int, help="processes (default: 1; with --all one per core)")
    tuning.add_argument("--json", type=Path, metavar="F", help="write the results to F as well")
    tuning.add_argument("--write", action="store_true", help="keep them in operators/tuned/")
    tuning.set_defaults(command=_tune)

    reporting = commands.add_parser("report", help="a page of the results, or a picture")
    reporting.add_argument("results", type=Path, nargs="+", metavar="F.json", help="of run --json")
    reporting.add_argument("-o", "--output", type=Path, metavar="F.html", help="write the page")
    reporting.add_argument("--png", type=Path, metavar="F.png", help="write roofline and heat map")
    reporting.set_defaults(command=_report)

    comparison = commands.add_parser("compare", help="what changed between two runs")
    comparison.add_argument("old", type=Path, metavar="OLD.json", help="written by run --json")
    comparison.add_argument("new", type=Path, metavar="NEW.json", help="written by run --json")
    comparison.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD_PERCENT,
        metavar="PERCENT",
        help="a case slower by more makes the exit code 1 (default %(default)s)",
    )
    comparison.set_defaults(command=_compare)

    _add_judgements(commands)
    return parser


def _add_peers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    peers = commands.add_parser("peers", help="AWS's nearest kernels beside ours, in one model")
    peers.add_argument("name", nargs="*", help="our operators or AWS's kernels (default: all)")
    peers.add_argument("--library", type=Path, help="checkout of aws-neuron/nki-library")
    peers.add_argument("--sdk", type=Path, help="checkout of aws-neuron/aws-neuron-sdk (tutorials)")
    peers.add_argument("--shape", action="append", help="sizes of our operator; may be repeated")
    peers.add_argument("--target", default="trn2", help="hardware (default trn2)")
    peers.add_argument(
        "--seconds", type=int, default=300, help="of one launch of AWS's kernel (%(default)s)"
    )
    peers.add_argument("--jobs", type=int, help="processes (default 1)")
    peers.add_argument("--json", type=Path, metavar="F", help="write the comparisons to F as well")
    peers.add_argument("--markdown", type=Path, metavar="F", help="write them to F as Markdown")
    peers.set_defaults(command=_peers)


def _add_judgements(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that judge the installation, the embedded NKI and the model."""
    env = commands.add_parser("env", help="versions, the nki in force and the target, judged")
    env.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")
    env.set_defaults(command=_env)

    host = commands.add_parser("host", help="speed of the embedded NKI on this machine")
    host.add_argument("--json", type=Path, metavar="F", help="write the figures to F as well")
    host.add_argument(
        "--triton-viz",
        type=Path,
        metavar="DIR",
        help="a checkout of triton-viz: its bare NKI interpreter on its examples as well",
    )
    host.set_defaults(command=_host)

    chip = commands.add_parser(
        "device", help="check and time the kernels on a real NeuronCore, beside the model"
    )
    _add_cases(chip)
    chip.add_argument("--json", type=Path, metavar="F", help="write the results to F as well")
    chip.set_defaults(command=_device)

    band = commands.add_parser(
        "sensitivity", help="what the uncertain numbers of the hardware do to the modelled times"
    )
    _add_cases(band)
    band.add_argument("--json", type=Path, metavar="F", help="write the effects to F as well")
    band.set_defaults(command=_sensitivity)

    golden = commands.add_parser("goldens", help="modelled times against those checked in")
    golden.add_argument(
        "--write", metavar="REASON", help="check in the times of now, and why they change"
    )
    golden.set_defaults(command=_goldens)

    validation = commands.add_parser("validate", help="the timing model against hardware")
    validation.add_argument("--json", type=Path, metavar="F", help="write the readings to F too")
    validation.add_argument(
        "--markdown", action="store_true", help="print only the summary the README shows"
    )
    validation.add_argument(
        "--device", type=Path, metavar="F", help="the model against the times in F of 'device'"
    )
    validation.set_defaults(command=_validate)


def _add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="operators, or FILE.py:NAME (default: all)")
    parser.add_argument("--shape", action="append", help="a named shape or sizes; may be repeated")
    parser.add_argument("--dtype", action="append", help="bf16 (default), fp16, fp32; repeatable")
    parser.add_argument("--target", action="append", help="hardware (default trn2); repeatable")


def _list(arguments: argparse.Namespace) -> int:
    found = entries_of(arguments.op)
    print(shapes_table({name: (e.op, default_shapes(e)) for name, e in found.items()}))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    works, jobs = list(named_work(arguments)), jobs_of(arguments)
    for option in ("json", "csv", "markdown"):
        if getattr(arguments, option) is not None:
            require_writable(getattr(arguments, option), f"--{option}")
    partial = partial_of(arguments.json)
    results = run_all(works, jobs, partial)
    print(results_table(results))
    if arguments.json is not None:
        write_json(arguments.json, "model", results)
    if arguments.csv is not None:
        write_text(arguments.csv, to_csv(results))
    if arguments.markdown is not None:
        write_text(arguments.markdown, to_markdown(results))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return 0 if all(result.correct for result in results) else FAILED


def _nkibench(arguments: argparse.Namespace) -> int:
    targets, jobs = arguments.target or ["trn2"], jobs_of(arguments)
    for target in targets:
        known_target(target)
    if arguments.json is not None:
        require_writable(arguments.json)
    partial = partial_of(arguments.json)
    results = run_all(nkibench_work(targets), jobs, partial)
    print(nkibench_table(results))
    if arguments.json is not None and partial is not None:
        write_json(arguments.json, "model", results)
        partial.unlink(missing_ok=True)
    return 0 if all(result.correct for result in results) else FAILED


def _peers(arguments: argparse.Namespace) -> int:
    # Calls of AWS's kernels are kernels: `nki` must be importable, which few commands need.
    from bench.peer_report import peers_markdown, peers_table
    from bench.peers import peer_work, run_peers

    known_target(arguments.target)
    checkouts = {"library": arguments.library, "sdk": arguments.sdk}
    works = peer_work(
        arguments.name, arguments.shape or [], arguments.target, checkouts, arguments.seconds
    )
    jobs = jobs_of(arguments)
    for option in ("json", "markdown"):
        if getattr(arguments, option) is not None:
            require_writable(getattr(arguments, option), f"--{option}")
    partial = partial_of(arguments.json)
    results = run_peers(works, jobs, partial)
    print(peers_table(results))
    if arguments.json is not None:
        write_json(arguments.json, "model", results)
    if arguments.markdown is not None:
        write_text(arguments.markdown, peers_markdown(results))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return 0 if all(result.ours["correct"] for result in results) else FAILED


def _tune(arguments: argparse.Namespace) -> int:
    works, jobs = list(named_work(arguments)), jobs_of(arguments)
    if arguments.json is not None:
        require_writable(arguments.json)
    partial = partial_of(arguments.json)
    results = tune_all(works, arguments.budget, jobs, partial)
    print(tune_table(results))
    if arguments.json is not None and partial is not None:
        write_json(arguments.json, "model", results)
        partial.unlink(missing_ok=True)
    if arguments.write:
        print("\n".join(f"wrote {path}" for path in write_tuned(results)))
    return FAILED if any(result.failure for result in results) else 0


def _report(arguments: argparse.Namespace) -> int:
    outputs = {"--output": arguments.output, "--png": arguments.png}
    if not any(outputs.values()):
        raise BenchError("report writes nothing: neither --output nor --png; name one of them")
    for option, path in outputs.items():
        if path is not None:
            require_writable(path, option)
    results = [result for path in arguments.results for result in read_results(path)]
    if arguments.output is not None:
        write_text(arguments.output, page_of(results))
    if arguments.png is not None:
        write_bytes(arguments.png, png_of(results))
    for path in filter(None, outputs.values()):
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    old, new = read_results(arguments.old), read_results(arguments.new)
    changes = compare(old, new, arguments.threshold)
    print(compare_table(changes, len(new)))
    return FAILED if any(change.bad for change in changes) else 0


def _env(arguments: argparse.Namespace) -> int:
    return print_environment(as_json=arguments.as_json)


def _host(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json)
    results: list[HostResult] = []
    parts: list[tuple[str, Callable[[], Iterator[HostResult]]]] = [
        ("instructions", measure_instructions),
        ("shapes only", measure_shapes_only),
        ("matmul against numpy", measure_matmul),
        ("growth", measure_growth),
    ]
    viz = arguments.triton_viz
    if viz is not None:
        parts.append(("triton-viz", lambda: measure_interpreters(viz)))
    for _, measured in progress(parts, lambda part: part[0]):
        results.extend(measured())
    print(host_table(results))
    if arguments.json is not None:
        write_json(arguments.json, "host", results)
    return FAILED if any(result.within is False for result in results) else 0


def _sensitivity(arguments: argparse.Namespace) -> int:
    works = list(named_work(arguments))
    if not arguments.shape:
        works = [w for w in works if w.shape == default_shapes(w.entry)[0]]
    if arguments.json is not None:
        require_writable(arguments.json)
    bands = [measure_band(w.entry, w.case, w.dtype, w.target) for w in progress(works, str)]
    print(sensitivity_table(bands))
    if arguments.json is not None:
        write_json(arguments.json, "model", bands)
    return 0


def _goldens(arguments: argparse.Namespace) -> int:
    found = dict(figures())
    if arguments.write is not None:
        write(found, arguments.write)
        print(f"{len(found)} modelled times written, with their reason")
        return 0
    lines = differences(found, read())
    print("\n".join(lines) or f"{len(found)} modelled times are as checked in")
    return FAILED if lines else 0


def _device(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        require_writable(arguments.json)
    device = neuron()
    works = list(named_work(arguments))
    results = measure_all(works, device)
    print(device_table(results))
    if arguments.json is not None:
        write_json(arguments.json, DEVICE, results)
    return 0 if all(result.correct for result in results) else FAILED


def _validate(arguments: argparse.Namespace) -> int:
    if arguments.device is not None:
        print(device_errors(read_device(arguments.device)))
        return 0
    if arguments.json is not None:
        require_writable(arguments.json)
    # Probes are kernels: `nki` must be importable, which only this command needs.
    from bench.validate import KIND, PARTS, broken, ladders, markdown, report

    readings = [
        reading for _, found in progress(PARTS, lambda part: part[0]) for reading in found()
    ]
    print(markdown(readings) if arguments.markdown else report(readings))
    if arguments.json is not None:
        write_json(arguments.json, KIND, [*readings, *ladders(readings)])
    return FAILED if broken(readings) else 0


def _embedded() -> int:
    """Run the command where the embedded nki is in force: only that one has a timing model."""
    if toolchain.current().kind == "embedded" or sys.argv[1:2] in (["env"], ["device"]):
        return main()
    command = [sys.executable, "-m", "bench", *sys.argv[1:]]
    environment = os.environ | {toolchain.ENV: "embedded"}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(_embedded())
