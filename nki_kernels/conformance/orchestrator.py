"""What AWS's tests hand a kernel to: here it is launched on the embedded NKI and compared."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nki_kernels.conformance.compare import difference
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.launch import Launch, jit, launch
from nki_kernels.machine.options import NkiWarning, Options, only
from nki_kernels.machine.ranks import launch_ranks
from nki_kernels.machine.tensor import NkiTensor

ALIAS = ".must_alias_input"


class TooLarge(Exception):
    """The arrays of a case exceed the limit of the run."""


class Mismatch(AssertionError):
    """A kernel ran and its output is not the reference's."""


class Orchestrator:
    """Stands for the class of that name in AWS's ``test.utils.test_orchestrator``.

    Attributes:
        record: what happened, for the report: "lnc", "target", "stage", "worst", "norm".
    """

    def __init__(self, limit: int, target: str | None = None) -> None:
        self.limit = limit
        self.target = target
        self.record: dict[str, Any] = {"stage": "inputs"}
        #: AWS's mode of a run; some tests look whether it is one on hardware.
        self.trace_mode: Any = None

    def execute(self, kernel_args: Any) -> None:
        """Launch ``kernel_args.kernel_func``, on as many ranks as asked for, and compare.

        Raises:
            TooLarge: more bytes of inputs and outputs than the limit.
            Mismatch: an output differs.
        """
        compiler = kernel_args.compiler_input
        target = self.target or compiler.platform_target.get_compile_target()
        self.record |= {"lnc": compiler.logical_nc_config, "target": target}
        inference = getattr(kernel_args, "inference_args", None)
        ranks = range(getattr(inference, "collective_ranks", 1))
        given = [_of_rank(kernel_args.kernel_input, rank) for rank in ranks]
        outputs = self._expected_outputs(kernel_args.validation_args)
        everything = [list(g.values()) for g in given] + len(ranks) * [list(outputs.values())]
        size = sum(a.nbytes for a in _arrays(everything))
        self.record["bytes"] = size
        if size > self.limit:
            raise TooLarge(f"{size / 2**20:.0f} MiB of inputs and outputs")
        self.record["stage"] = "launch"
        runs = self._launch(kernel_args.kernel_func, given, target, compiler.logical_nc_config)
        instructions = sum(len(run.trace.events) for run in runs)
        self.record |= {"stage": "compare", "instructions": instructions}
        for rank, run in zip(ranks, runs, strict=True):
            results = [r for r in _flat(run.result) if isinstance(r, np.ndarray)]
            self._compare(results, kernel_args.validation_args, rank)
        if self.record["stage"] == "compare":
            self.record["stage"] = "done"

    def _launch(
        self, kernel: Any, given: list[dict[str, Any]], target: str, lnc: int
    ) -> list[Launch]:
        """Launch; where the test expects an error, the checks' first one is it."""
        harness = sys.modules.get("test.utils.ranged_test_harness")
        if harness is not None and harness.is_in_negative_test_context():
            return _launched(jit(kernel)[lnc], _arguments(given), target)

        def found(finding: str) -> None:
            self.record["finding"] = finding

        return launch_judged(kernel, lambda: _arguments(given), target, lnc, found)

    def get_test_artifact_output_path(self) -> str:
        """No artifacts are written."""
        return ""

    @staticmethod
    def _expected_outputs(validation: Any) -> dict[str, Any]:
        golden: Any = None if validation is None else validation.golden_output
        if hasattr(golden, "output_ndarray"):
            return dict(golden.output_ndarray)
        if hasattr(golden, "for_rank"):
            return dict(golden.for_rank(0))
        return {k: v.output_ndarray for k, v in (golden or {}).items()}

    def _compare(self, results: list[Array], validation: Any, rank: int) -> None:
        golden: Any = None if validation is None else validation.golden_output
        names = list(getattr(golden, "output_ndarray", None) or ())
        if hasattr(golden, "golden"):
            golden = golden.golden
        elif hasattr(golden, "for_rank"):
            golden = golden.for_rank(rank)
        if golden is None:
            self.record["stage"] = "no reference"
            return
        outputs = _named(results, names, golden)
        worst, norm, problems = 0.0, 0.0, []
        for name, want in golden.items():
            got = outputs[name]
            if hasattr(want, "validator"):
                if not want.validator(logfile=io.StringIO()).validate(got):
                    problems.append(f"{name}: refused by the test's own validator")
                continue
            found = difference(
                name, got, np.asarray(want),
                validation.relative_accuracy, validation.absolute_accuracy,
            )  # fmt: skip
            worst, norm = max(worst, found.worst), max(norm, found.norm)
            problems += [found.problem] if found.problem else []
        self.record["worst"] = max(worst, self.record.get("worst", 0.0))
        self.record["norm"] = max(norm, self.record.get("norm", 0.0))
        if problems:
            raise Mismatch(f"rank {rank}: " * (rank > 0) + "; ".join(problems))


def _named(results: list[Array], names: list[str], golden: dict[str, Any]) -> dict[str, Array]:
    """The results by the names of their references.

    A test declares its outputs in the order in which the kernel returns them, and may have
    references for some of them only.
    """
    if not (len(names) == len(results) and set(golden) <= set(names)):
        names = list(golden)
    if len(results) < len(names):
        raise Mismatch(f"{len(results)} outputs, the reference has {len(names)}")
    return dict(zip(names, results, strict=False))


def launch_judged(
    kernel: Any,
    arguments: Callable[[], list[dict[str, Any]]],
    target: str,
    lnc: int,
    found: Callable[[str], None],
) -> list[Launch]:
    """Launch with every check on; after a finding, once more with the checks silent.

    What the checks find in AWS's kernels is for a reader to judge; whether the values are right is
    known in either case.

    Args:
        kernel: the kernel, jitted or not.
        arguments: makes its arguments by name, a mapping per rank; called for each launch, as a
            kernel may write them.
        target: hardware generation.
        lnc: cores.
        found: told what the checks say, if they say something.

    Returns:
        The launch of each rank.
    """
    bracketed = jit(kernel)[lnc]  # with its bracket, the grid that nl.program_ndim() reports
    try:
        return _launched(bracketed, arguments(), target)
    except NkiKernelsError as error:
        found(f"{type(error).__name__}: {error}")
    with _lenient() as options:
        return _launched(bracketed, arguments(), target, options)


def _launched(
    kernel: Any, given: list[dict[str, Any]], target: str, options: Options | None = None
) -> list[Launch]:
    if len(given) > 1:
        return launch_ranks(kernel, len(given) * [()], given, target=target, options=options)
    return [launch(kernel, (), given[0], target=target, options=options)]


def _of_rank(given: Any, rank: int) -> dict[str, Any]:
    """What a kernel is given on a rank: the same everywhere, unless the test makes it by rank."""
    if hasattr(given, "for_rank"):
        given = given.for_rank(rank)
    return {} if given is None else dict(given)


@contextlib.contextmanager
def _lenient() -> Iterator[Options]:
    """No check but those on addresses, silent, and a tile true in a condition, as any object is.

    A check that is off costs nothing, one that warns at every instruction minutes. Addresses are
    given by the checks on them, and a timeline waits for reused ones. AWS's kernels ask
    ``if tensor:`` for whether they were given one.
    """
    kept = NkiTensor.__bool__
    NkiTensor.__bool__ = lambda self: True  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NkiWarning)
            yield only("capacity", "alias", level="warn")
    finally:
        NkiTensor.__bool__ = kept  # type: ignore[method-assign]


def _arguments(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies: a kernel may write its inputs, and the reference is computed from them later."""
    return [{n.removesuffix(ALIAS): _copied(v) for n, v in named.items()} for named in given]


def _copied(value: Any) -> Any:
    """The value with every array in it replaced by a copy."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    return value


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _arrays(value: Any) -> list[Array]:
    """Every array in nested lists, tuples and objects of the library."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (list, tuple)):
        return [a for v in value for a in _arrays(v)]
    return []
