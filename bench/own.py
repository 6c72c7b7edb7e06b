"""A benchmark of the user's own kernel: ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.entries import Entry
from bench.record import BenchError
from nki_kernels.benchmark import Benchmark
from nki_kernels.machine.launch import Kernel

_HOW = (
    "write a subclass of nki_kernels.benchmark.Benchmark with its kernel, operands, shapes, "
    "reference and flops"
)


@dataclass(frozen=True, slots=True)
class OwnEntry(Entry):
    """A benchmark of the user's: its shapes come with it."""

    shapes: tuple[str, ...] = ()


def is_own(name: str) -> bool:
    """Tell whether an operator's name means a file of the user."""
    return ".py:" in name


@cache
def own_entry(name: str) -> OwnEntry:
    """Return the benchmark that ``FILE.py:NAME`` names: a Benchmark, or the kernel of one.

    Raises:
        BenchError: no such file or name, or nothing says how to check it.
        OptionError: the Benchmark is incomplete.
    """
    path, _, attribute = name.rpartition(":")
    found = _benchmark(path, attribute, _load(path))
    benchmark = found()
    return OwnEntry(
        benchmark.operator(),
        benchmark.reference,
        benchmark.make,
        shapes=benchmark.shapes,
    )


def _load(path: str) -> types.ModuleType:
    file = Path(path)
    if not file.is_file():
        raise BenchError(f"{path}: is not a file (looked in {Path.cwd()}); name a Python file")
    spec = importlib.util.spec_from_file_location(f"_benchmarked_{file.stem}", path)
    if spec is None or spec.loader is None:
        raise BenchError(f"{path}: is no Python file; name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Known by name, and its folder on the path, so that its own imports and pickling work.
    sys.modules[spec.name] = module
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def _benchmark(path: str, attribute: str, module: types.ModuleType) -> type[Benchmark]:
    here = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Benchmark) and value is not Benchmark
    }
    found: Any = vars(module).get(attribute)
    if attribute in here:
        return here[attribute]
    if found is None:
        kernels = [name for name, value in vars(module).items() if isinstance(value, Kernel)]
        raise BenchError(
            f"{path}: has no {attribute!r}; it has the benchmarks {', '.join(here) or '(none)'} "
            f"and the kernels {', '.join(kernels) or '(none)'}; name one of these"
        )
    of_it = [value for value in here.values() if value.kernel is found]
    if len(of_it) != 1:
        raise BenchError(
            f"{path}: {attribute!r} is the kernel of {len(of_it)} benchmarks, so nothing says how "
            f"to check it; {_HOW if not of_it else 'name the benchmark'}"
        )
    return of_it[0]
