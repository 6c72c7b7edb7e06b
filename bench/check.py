"""Correctness first: every timed variant is compared with the reference under the error rule.

At full size when the reference is affordable, in the same run that is timed. Otherwise at a reduced
shape under the same config, so the same kernel source takes the same code path; such a verdict is
remembered under a hash of every source file it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.entries import Entry
from bench.record import ROOT
from nki_kernels.hardware import spec_for
from nki_kernels.machine.options import default_options
from nki_kernels.operators.contract import Axes
from tests.tolerance import assert_close

#: FLOPs up to which the reference runs at full size: 2048^3 takes it about a second.
AFFORDABLE_FLOPS = 2 * 2048**3

_SEED = 20250101


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one check. `run` is the launch at full size, when there was one."""

    correct: bool
    checked_at: str
    cached: bool = False
    failure: str | None = None
    run: Any = None


def check(entry: Entry, axes: Axes, dtype: str, config: Any, target: str, *, full: bool) -> Verdict:
    """Compare the kernel with the reference.

    Args:
        entry: the operator.
        axes: sizes of the problem that is to be timed.
        dtype: input and output dtype.
        config: the config that is to be timed.
        target: hardware generation.
        full: check at full size whatever it costs.
    """
    reduced = dict(axes) if full else reduced_axes(entry, axes, config, target)
    if reduced == dict(axes):
        failure, run = _compare(entry, axes, dtype, config, target)
        return Verdict(failure is None, "full", failure=failure, run=run)
    label = "x".join(str(reduced[letter]) for letter in entry.op.axis_order)
    note = _note(entry, reduced, dtype, config, target)
    # What a user's kernel imports is not known, so its verdicts are not kept.
    if _ours(entry) and _remembered(note):
        return Verdict(True, label, cached=True)
    failure, _ = _compare(entry, reduced, dtype, config, target)
    if failure is None and _ours(entry):
        _remember(note, label)
    return Verdict(failure is None, label, failure=failure)


def reduced_axes(entry: Entry, axes: Axes, config: Any, target: str) -> dict[str, int]:
    """Return the sizes to check at: `axes` when affordable, else the operator's reduced ones."""
    if entry.op.flops(axes) <= AFFORDABLE_FLOPS:
        return dict(axes)
    return dict(entry.op.reduced(axes, config, spec_for(target)))


def _compare(
    entry: Entry, axes: Axes, dtype: str, config: Any, target: str
) -> tuple[str | None, Any]:
    op = entry.op
    inputs = entry.inputs(op.input_shapes(axes), dtype, _SEED)
    options = op.options_of(axes)
    run = op.launch(inputs, options, config=config, target=target)
    found = entry.reference(*inputs, **options)
    several = len(op.outputs) > 1
    results, references = (run.result, found) if several else ((run.result,), (found,))
    case = "x".join(str(axes[letter]) for letter in op.axis_order)
    for operand, result, (value, magnitude) in zip(op.outputs, results, references, strict=True):
        label = f"{case} {operand.name}" if several else case
        try:
            assert_close(
                result, value, magnitude, op=op.name, case=label,
                roundings=op.roundings, chain=op.chain(axes, spec_for(target)),
            )  # fmt: skip
        except AssertionError as failure:
            return str(failure), run
    return None, run


# -- hashes and memory -----------------------------------------------------------------------------


@cache
def source_hash(*folders: str) -> str:
    """Return a SHA-256 over the names and bytes of the sources in folders (or files) here."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted([ROOT / folder, *(ROOT / folder).rglob("*")]):
            if path.suffix in (".py", ".csv", ".json") and path.is_file():
                name = path.relative_to(ROOT).as_posix()
                data = path.read_bytes()
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def kernel_hash(entry: Entry) -> str:
    """Return the hash of the sources in the folder of the kernel; of its file, for a user's."""
    if not _ours(entry):
        file = Path(entry.op.kernel.func.__code__.co_filename)
        return hashlib.sha256(file.read_bytes()).hexdigest()
    room, _, _ = entry.op.kernel.__module__.rpartition(".")
    return source_hash(room.replace(".", "/"))


def _ours(entry: Entry) -> bool:
    return str(entry.op.kernel.__module__).startswith("nki_kernels.")


def cache_folder() -> Path:
    """Return where verdicts are kept: NKI_KERNELS_CACHE, or the user's cache folder."""
    named = os.environ.get("NKI_KERNELS_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nki-kernels"


def _note(entry: Entry, axes: Mapping[str, int], dtype: str, config: Any, target: str) -> Path:
    sources = source_hash("nki_kernels", "reference", "bench", "tests/tolerance.py")
    versions = [np.__version__, version("ml_dtypes"), platform.python_version()]
    options = repr(default_options())
    facts = [entry.op.name, sorted(axes.items()), dtype, repr(config), target, options]
    facts += [sources, *versions]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return cache_folder() / "checks" / f"{key}.json"


def _remembered(note: Path) -> bool:
    try:
        return json.loads(note.read_text("utf-8")).get("correct") is True
    except (OSError, ValueError, AttributeError):
        return False  # never checked, or unreadable: check again


def _remember(note: Path, label: str) -> None:
    temporary = note.with_suffix(f".{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"correct": True, "checked_at": label}), "utf-8")
        temporary.replace(note)
    except OSError:
        pass  # a cache that cannot be written costs a second check, nothing else
