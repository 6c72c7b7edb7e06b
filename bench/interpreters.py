"""The embedded NKI against the bare NKI interpreter of triton-viz, on that project's own examples.

Its interpreter computes and checks nothing; ours runs with every check. The checkout is the user's
(Deep-Learning-Profiling-Tools/triton-viz), read and never changed. Each side has a process of its
own, since that interpreter replaces the functions of `nki`; the two take turns.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import ml_dtypes
import nki
import numpy as np

from bench.host import HostResult
from bench.record import BenchError
from nki_kernels.machine.launch import launch

#: Ours may take as long as theirs.
LIMIT = 1.0

_PACKAGES = ("", "utils", "core", "core/simulation")
_EXAMPLES = "examples/nki_beta2"
_TURNS = 3
_CALLS = {"matmul 512^3 bfloat16": 40, "tiled attention S=2048 float32": 4}

Runner = Callable[..., object]


def measure_interpreters(checkout: Path) -> Iterator[HostResult]:
    """Yield both sides' times and their ratio per example, the best call of all turns.

    Raises:
        BenchError: the checkout lacks the interpreter or the examples, or a side failed.
    """
    for part in ("triton_viz/core/simulation/nki_beta2.py", f"{_EXAMPLES}/matmul.py"):
        if not (checkout / part).is_file():
            raise BenchError(
                f"{checkout}: no {part} there; name a checkout of "
                "Deep-Learning-Profiling-Tools/triton-viz"
            )
    best: dict[tuple[str, str], float] = {}
    for _ in range(_TURNS):
        for side in ("theirs", "ours"):
            for name, seconds in _turn(side, checkout).items():
                best[side, name] = min(seconds, best.get((side, name), seconds))
    for name in _CALLS:
        ours, theirs = best["ours", name], best["theirs", name]
        yield HostResult(name=f"{name}, all checks", value=ours * 1e3, unit="ms")
        yield HostResult(name=f"{name}, triton-viz", value=theirs * 1e3, unit="ms")
        ratio = ours / theirs
        yield HostResult(
            name=f"{name}, over triton-viz",
            value=ratio,
            unit="x",
            limit=LIMIT,
            within=ratio <= LIMIT,
        )


def _turn(side: str, checkout: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.interpreters", side, str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"{checkout}: {side} failed: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _theirs(checkout: Path) -> Runner:
    """Return a caller of triton-viz's interpreter; its viewer and its dependencies stay out."""
    for part in _PACKAGES:
        package = types.ModuleType(".".join(("triton_viz", *part.split("/"))).rstrip("."))
        package.__path__ = [str(checkout / "triton_viz" / part)]
        sys.modules[package.__name__] = package
    interpreter = importlib.import_module("triton_viz.core.simulation.nki_beta2")
    interpreter.nki_patch_lang()

    def run(kernel: Any, args: tuple[Any, ...]) -> object:
        return interpreter.NKIBeta2InterpretedFunction(kernel).run(*args, grid=(1,))

    return run


def _ours(checkout: Path) -> Runner:
    return lambda kernel, args: launch(nki.jit(kernel), args, {}, target="trn2")


def _example(checkout: Path, name: str) -> Any:
    path = checkout / _EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BenchError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cases(checkout: Path) -> Iterator[tuple[str, Any, tuple[Any, ...], Any]]:
    """Yield (name, kernel, arguments with the output array, expected output) per example."""
    values = np.random.default_rng(0).standard_normal
    a, b = (values((512, 512)).astype(ml_dtypes.bfloat16) for _ in range(2))
    product = a.astype(np.float32).T @ b.astype(np.float32)
    kernel = _example(checkout, "matmul").matmul_kernel
    yield "matmul 512^3 bfloat16", kernel, (a, b, np.zeros((512, 512), np.float32)), product
    s, d = 2048, 128
    q, k, v = (values((1, 1, s, d)).astype(np.float32) for _ in range(3))
    scores = q[0, 0].astype(np.float64) @ k[0, 0].T / np.sqrt(d)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    attended = (weights / weights.sum(1, keepdims=True) @ v[0, 0])[None, None]
    sizes = (1, 1, 1, 1, s, s, d, d)
    kernel = _example(checkout, "tiled_attention").tiled_attention_kernel
    yield "tiled attention S=2048 float32", kernel, (q, k, v, np.zeros_like(q), *sizes), attended


def _measure(side: str, checkout: Path) -> dict[str, float]:
    run = {"theirs": _theirs, "ours": _ours}[side](checkout)
    best: dict[str, float] = {}
    for name, kernel, args, expected in _cases(checkout):
        times = []
        for _ in range(_CALLS[name]):
            start = perf_counter()
            run(kernel, args)
            times.append(perf_counter() - start)
        output = [a for a in args if isinstance(a, np.ndarray)][-1]
        # Sums of at most 2048 float32 terms, each off by one rounding at the most.
        bound = 2048 * np.finfo(np.float32).eps * np.abs(expected).max()
        if not np.abs(output - expected).max() <= bound:
            raise BenchError(f"{name}: {side} computed something else")
        best[name] = min(times)
    return best


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]))))
