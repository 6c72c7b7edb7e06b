"""``python -m bench device``: every kernel on a real NeuronCore, checked, then timed.

For those who have the chip: it verifies each case under the error rule (with the estimated error of
the activation functions beside it, where the kernel uses one), times it, and writes the times
beside the modelled ones to one JSON file that can be sent back; `python -m bench validate --device
FILE` reads it. Nobody has run it on hardware yet: what is tested is the path, against a stand-in of
the documented interface.

The time is wall clock of calls back to back on tensors that are on the device already, between two
synchronisations, after a first call that compiles: the dispatch of a call is in it where it is
longer than the kernel, so small kernels read too slow. The shortest of several rounds counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.check import kernel_hash
from bench.progress import progress
from bench.record import SCHEMA_VERSION, BenchError, git_sha
from bench.running import Work
from bench.table import render
from nki_kernels import toolchain
from nki_kernels.hardware import spec_for
from nki_kernels.hardware.device import ACTIVATION_ERROR
from nki_kernels.machine.timeline import MODEL_VERSION
from tests.tolerance import assert_close

#: The source of the records, for the JSON file.
KIND = "device"

_SEED = 20250101
_ROUNDS = 5
#: Calls of a round: enough to outlast the clock and one dispatch, few enough to finish.
_ROUND_S = 0.05
_CALLS = (3, 1000)

METHOD = "wall clock per call, back to back between synchronisations, shortest of the rounds"

_INSTALL = "pip install torch (see README)"


class Device(Protocol):
    """What is needed of a device: `nki_kernels.torch_ops.neuron` is the one that is real."""

    def software(self) -> Mapping[str, str]:
        """Return the versions of everything that compiles and runs kernels."""

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Return the array on the device."""

    def get(self, value: Any) -> npt.NDArray[Any]:
        """Return a value of the device as an array."""

    def call(self, name: str, inputs: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Run an operator's kernel; the result may not be there yet."""

    def synchronize(self) -> None:
        """Wait until everything that was called has finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResult:
    """One case on a device, beside the model.

    Attributes:
        correct: the comparison with the reference passed; nothing is timed otherwise.
        activation_error: the relative error per activation function that the bound allowed for;
            0 where the kernel uses none.
        device_us, median_us: shortest and median round, see `method`; None if not correct.
        modelled_us: by the timing model of `model_version`, kernel start and end included.
        software: versions.
    """

    op: str
    shape: str
    axes: Mapping[str, int]
    dtype: str
    target: str
    lnc: int
    correct: bool
    activation_error: float
    failure: str | None
    device_us: float | None
    median_us: float | None
    rounds: int
    calls: int
    modelled_us: float
    model_version: str
    software: Mapping[str, str]
    kernel_source_hash: str
    git_sha: str
    method: str = METHOD
    source: str = KIND
    schema_version: int = SCHEMA_VERSION


# -- the model, in a process where the embedded nki is in force ------------------------------------


def model_facts(work: Work) -> dict[str, Any]:
    """Return the modelled time of a case and whether its kernel uses activation functions."""
    from nki_kernels.machine.stream_costs import COPIES
    from nki_kernels.machine.trace import StreamWork

    op, axes = work.entry.op, work.case.axes
    inputs = work.entry.shapes_only(axes, work.dtype)
    run = op.launch(inputs, op.options_of(axes), target=work.target)
    functions = {
        event.work.function
        for event in run.trace.events
        if isinstance(event.work, StreamWork) and "act_table" in event.hidden_reads
    }
    return {"modelled_us": run.time().total_ns / 1e3, "activations": bool(functions - set(COPIES))}


def modelled(works: Sequence[Work]) -> list[dict[str, Any]]:
    """Return `model_facts` of every case, from a process of its own."""
    names = [dataclasses.astuple(work) for work in works]
    done = subprocess.run(
        [sys.executable, "-m", "bench.device"],
        input=json.dumps(names), capture_output=True, text=True, check=False,
        env=os.environ | {toolchain.ENV: "embedded"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"device: the timing model failed: {last}")
    facts: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return facts


# -- one case on the device ------------------------------------------------------------------------


def measure_device(
    work: Work, device: Device, facts: Mapping[str, Any], clock: Callable[[], float] = perf_counter
) -> DeviceResult:
    """Check a case on the device, then time it; a wrong one is not timed."""
    entry, case = work.entry, work.case
    op, axes = entry.op, case.axes
    options = op.options_of(axes)
    arrays = entry.inputs(op.input_shapes(axes), work.dtype, _SEED)
    inputs = [device.put(array) for array in arrays]
    allowance = ACTIVATION_ERROR if facts["activations"] else 0.0
    failure = _failure(work, device, arrays, inputs, options, allowance)
    rounds: list[float] = []
    calls = 0
    if failure is None:
        calls, rounds = _time(lambda: device.call(op.name, inputs, options), device, clock)
    return DeviceResult(
        op=op.name,
        shape=case.name,
        axes=dict(axes),
        dtype=work.dtype,
        target=work.target,
        lnc=1,
        correct=failure is None,
        activation_error=allowance,
        failure=failure,
        device_us=min(rounds) * 1e6 if rounds else None,
        median_us=statistics.median(rounds) * 1e6 if rounds else None,
        rounds=len(rounds),
        calls=calls,
        modelled_us=facts["modelled_us"],
        model_version=MODEL_VERSION,
        software=dict(device.software()),
        kernel_source_hash=kernel_hash(entry),
        git_sha=git_sha(),
    )


def _failure(
    work: Work,
    device: Device,
    arrays: Sequence[npt.NDArray[Any]],
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    allowance: float,
) -> str | None:
    """Return what the comparison with the reference finds, None if all is well."""
    op, axes = work.entry.op, work.case.axes
    found = device.call(op.name, inputs, options)
    device.synchronize()
    results = found if isinstance(found, tuple) else (found,)
    expected = work.entry.reference(*arrays, **options)
    expected = expected if len(op.outputs) > 1 else (expected,)
    chain = op.chain(axes, spec_for(work.target))
    if allowance:
        # The rule's growth is (1 + 2^-24)^chain - 1: so many roundings are worth the allowance.
        chain += math.ceil(math.log1p(allowance) / math.log1p(2.0**-24))
    for operand, result, (value, magnitude) in zip(op.outputs, results, expected, strict=True):
        got = device.get(result)
        try:
            assert_close(
                got, value, np.maximum(magnitude, np.abs(value)) if allowance else magnitude,
                op=op.name, case=f"{work.shape} {operand.name} on the device",
                roundings=op.roundings, chain=chain,
            )  # fmt: skip
        except AssertionError as failure:
            return str(failure)
    return None


def _time(
    call: Callable[[], Any], device: Device, clock: Callable[[], float]
) -> tuple[int, list[float]]:
    """Return calls per round, and each round's seconds per call."""

    def span(calls: int) -> float:
        device.synchronize()
        start = clock()
        for _ in range(calls):
            call()
        device.synchronize()
        return clock() - start

    once = span(1)
    least, most = _CALLS
    calls = max(least, min(most, math.ceil(_ROUND_S / once) if once > 0 else most))
    return calls, [span(calls) / calls for _ in range(_ROUNDS)]


def measure_all(works: Sequence[Work], device: Device) -> list[DeviceResult]:
    """Return every case's result; what a kernel raises on the device ends the run."""
    pairs = list(zip(works, modelled(works), strict=True))
    return [
        measure_device(work, device, facts)
        for work, facts in progress(pairs, lambda pair: str(pair[0]))
    ]


def neuron() -> Device:
    """Return the real device.

    Raises:
        BenchError: PyTorch, TorchNeuron, AWS's nki or the device is missing; every reason is given.
    """
    try:
        from nki_kernels.torch_ops import neuron as adapter
    except ImportError as error:
        raise BenchError(f"device: PyTorch cannot be imported ({error}); {_INSTALL}") from None
    missing = adapter.missing()
    if missing:
        raise BenchError("device: no NeuronCore can be used here: " + "; ".join(missing))
    return adapter.NeuronDevice()


# -- what comes back -------------------------------------------------------------------------------


def device_table(results: Sequence[DeviceResult]) -> str:
    """Return the results as text. No ratio between sources: `validate --device` is for that."""
    rows = [
        (
            r.op,
            r.shape,
            r.dtype,
            "ok" if r.correct else f"WRONG: {r.failure}",
            "" if r.device_us is None else f"{r.device_us:,.1f}",
            "" if r.median_us is None else f"{r.median_us:,.1f}",
            f"{r.modelled_us:,.1f}",
        )
        for r in results
    ]
    head = ("operator", "shape", "dtype", "check", "us (device)", "median", "us (model)")
    return "\n".join(render(rows, head, left=4))


def device_errors(results: Iterable[DeviceResult]) -> str:
    """Return the model's error against the device per case, and the median of its size."""
    timed = [(r, r.device_us) for r in results if r.device_us is not None]
    if not timed:
        raise BenchError("device: the file has no case that was right and timed")
    errors = [100.0 * (r.modelled_us - us) / us for r, us in timed]
    rows = [
        (r.op, r.shape, r.dtype, f"{us:,.1f}", f"{r.modelled_us:,.1f}", f"{error:+.1f}")
        for (r, us), error in zip(timed, errors, strict=True)
    ]
    head = ("operator", "shape", "dtype", "us (device)", "us (model)", "error %")
    middle = statistics.median(map(abs, errors))
    first = timed[0][0]
    versions = ", ".join(f"{name} {version}" for name, version in first.software.items())
    return "\n".join(
        [
            f"the model (version {first.model_version}) against {first.target} ({versions})",
            *render(rows, head, left=3),
            f"median size of the error: {middle:.1f} % of {len(timed)} cases; {METHOD}",
        ]
    )


def read_device(path: Path) -> list[DeviceResult]:
    """Read the results that `bench device --json` wrote.

    Raises:
        BenchError: no such file, not JSON, or not such results.
    """
    advice = "name a file of 'python -m bench device --json'"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise BenchError(f"{path}: is no JSON ({error}); {advice}") from None
    fields = {field.name for field in dataclasses.fields(DeviceResult)}
    records = document.get("results") if isinstance(document, dict) else None
    if not isinstance(records, list) or document.get("source") != KIND:
        raise BenchError(f"{path}: holds no figures of a device; {advice}")
    if any(not isinstance(r, dict) or set(r) != fields for r in records):
        raise BenchError(f"{path}: holds records of another version; measure again")
    return [DeviceResult(**record) for record in records]


if __name__ == "__main__":
    print(json.dumps([model_facts(Work(*fields)) for fields in json.loads(sys.stdin.read())]))
