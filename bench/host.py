"""Speed of the embedded NKI itself, in wall time of this machine (source "host").

Each with its limit: the cost of one instruction; 100,000 of them from shapes only; a whole matmul,
values and timing, against NumPy's float32 product in the same run.
"""

from __future__ import annotations

import importlib.util
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import SimpleNamespace
from typing import Any, TypeAlias

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

from bench.entries import ENTRIES
from bench.record import SCHEMA_VERSION
from bench.table import render
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from nki_kernels.machine.tensor import Abstract

#: The promises: microseconds per instruction, and times NumPy's float32 product.
INSTRUCTION_LIMIT_US = 20.0
MATMUL_LIMIT = 4.0
#: ... at least so many thousand instructions traced a second, and seconds for 100,000 of them.
TRACE_RATE = 30.0
SHAPES_LIMIT_S = 8.0

_TARGET = "trn2"
_CALLS = 2000
_REPEATS = 3

#: Tiles of one run by name: `a`, `b` in SBUF, `p` in PSUM, `h` in HBM, `i` an int32 in SBUF.
Tiles: TypeAlias = Any
Call: TypeAlias = Callable[[Tiles], object]

# One call per instruction with 1x1 operands, sliced from larger tiles on every call.
_CALLS_BY_FAMILY: Mapping[str, Mapping[str, Call]] = {
    "matmul": {
        "nc_matmul": lambda t: nisa.nc_matmul(
            t.p[0:1, 0:1], t.a[0:1, 0:1], t.b[0:1, 0:1], accumulate=False
        ),
        "nc_transpose": lambda t: nisa.nc_transpose(t.p[0:1, 0:1], t.a[0:1, 0:1]),
    },
    "activation": {
        "activation": lambda t: nisa.activation(t.b[0:1, 0:1], nl.exp, t.a[0:1, 0:1]),
    },
    "elementwise": {
        "tensor_copy": lambda t: nisa.tensor_copy(t.b[0:1, 0:1], t.a[0:1, 0:1]),
        "memset": lambda t: nisa.memset(t.b[0:1, 0:1], 0.0),
        "tensor_tensor": lambda t: nisa.tensor_tensor(
            t.b[0:1, 0:1], t.a[0:1, 0:1], t.a[0:1, 1:2], nl.add
        ),
        "tensor_scalar": lambda t: nisa.tensor_scalar(
            t.b[0:1, 0:1], t.a[0:1, 0:1], nl.multiply, 2.0
        ),
    },
    "dma": {
        "dma_copy": lambda t: nisa.dma_copy(t.b[0:1, 0:1], t.h[0:1, 0:1]),
    },
    "select": {
        "iota": lambda t: nisa.iota(t.i[0:1, 0:1], [[1, 1]]),
    },
    "register": {
        "register_load": lambda t: nisa.register_load(t.register, t.i[0:1, 0:1]),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResult:
    """One measured figure.

    Attributes:
        name: the instruction, or what a summary stands for.
        family: the family of the instruction; None for a summary.
        value, unit: the figure.
        limit: what it must stay under; None where only a summary is limited.
        within: the figure keeps its limit.
    """

    name: str
    family: str | None = None
    value: float
    unit: str
    limit: float | None = None
    within: bool | None = None
    source: str = "host"
    schema_version: int = SCHEMA_VERSION


def measure_instructions(calls: int = _CALLS) -> Iterator[HostResult]:
    """Yield the cost of each instruction, then the median over the families' medians."""
    medians = []
    for family, table in _CALLS_BY_FAMILY.items():
        costs = {name: instruction_us(call, calls) for name, call in table.items()}
        for name, cost in costs.items():
            yield HostResult(name=name, family=family, value=cost, unit="us")
        medians.append(statistics.median(costs.values()))
    what = "instruction, median over families"
    yield _limited(what, statistics.median(medians), "us", INSTRUCTION_LIMIT_US)


def _limited(name: str, value: float, unit: str, limit: float) -> HostResult:
    return HostResult(name=name, value=value, unit=unit, limit=limit, within=value < limit)


def instruction_us(call: Call, calls: int) -> float:
    """Return the wall time of one call in microseconds, all checks on: median of the repeats."""
    spans: list[float] = []

    def kernel(x: Any) -> Any:
        tiles = _tiles(x)
        call(tiles)  # the first call of a signature is judged, the others remember the verdict
        for _ in range(_REPEATS):
            start = perf_counter()
            for _ in range(calls):
                call(tiles)
            spans.append(perf_counter() - start)
        result = nl.ndarray((1, 1), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(result, tiles.a[0:1, 0:1])
        return result

    launch(nki.jit(kernel), (np.ones((4, 4), np.float32),), {}, target=_TARGET, options=Options())
    return statistics.median(spans) / calls * 1e6


def _tiles(x: Any) -> Tiles:
    shape = (4, 4)
    a, b = (nl.ndarray(shape, nl.float32, buffer=nl.sbuf) for _ in range(2))
    p = nl.ndarray(shape, nl.float32, buffer=nl.psum)
    i = nl.ndarray(shape, nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(a, x)
    nisa.dma_copy(b, x)
    nisa.memset(i, 0)
    return SimpleNamespace(a=a, b=b, p=p, i=i, h=x, register=nisa.register_alloc(0))


@nki.jit
def _many(x: Any, rounds: int) -> Any:
    """Ten instructions a round on three engines, four buffers in turn."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tiles = [nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf) for _ in range(4)]
    for index in range(rounds):
        tile = tiles[index % len(tiles)]
        nisa.dma_copy(dst=tile, src=x)
        for _ in range(7):
            nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
        nisa.activation(tile, nl.exp, tile)
        nisa.dma_copy(dst=out, src=tile)
    return out


def measure_shapes_only(rounds: int = 10_000) -> Iterator[HostResult]:
    """Yield the rate of tracing from shapes, and tracing plus timing of 100,000 instructions.

    A quarter of the size first: the cost per instruction shows whether it grows with the trace.
    """
    data = Abstract((128, 512), "bfloat16")
    for size in (rounds // 4, rounds):
        start = perf_counter()
        run = launch(_many, (data, size), {}, target=_TARGET)
        traced = perf_counter() - start
        run.time()
        whole = perf_counter() - start
        count = len(run.trace)
        what = f"shapes only, {count:,} instructions"
        yield HostResult(
            name=f"{what}, traced and timed, each", value=whole / count * 1e6, unit="us"
        )
    rate = count / traced / 1e3
    yield HostResult(
        name=f"{what}, traced per second",
        value=rate,
        unit="thousand",
        limit=TRACE_RATE,
        within=rate >= TRACE_RATE,
    )
    yield _limited(f"{what}, traced and timed", whole, "s", SHAPES_LIMIT_S)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield HostResult(name="peak memory of the process so far", value=peak, unit="MB")


def measure_matmul(size: int = 2048, repeats: int = _REPEATS) -> Iterator[HostResult]:
    """Yield the time of the bf16 matmul, of NumPy's float32 product, and their ratio.

    Ours is values and timeline.
    """
    what = f"{size}x{size}x{size}"
    best, base, torch = _beside_others("matmul", dict.fromkeys("MNK", size), repeats)
    yield HostResult(name=f"matmul {what} bf16, values and timing", value=best, unit="s")
    yield HostResult(name=f"numpy float32 a @ b, {what}", value=base, unit="s")
    if torch is not None:
        yield HostResult(name=f"torch float32 a @ b, {what}", value=torch, unit="s")
    yield _limited("matmul over numpy", best / base, "x", MATMUL_LIMIT)


def measure_growth() -> Iterator[HostResult]:
    """Yield ours, NumPy and PyTorch for the same mathematics at sizes that double."""
    sizes: dict[str, list[dict[str, int]]] = {
        "matmul": [dict.fromkeys("MNK", n) for n in (256, 512, 1024)],
        "rms_norm": [{"N": n, "H": 2048} for n in (256, 1024, 4096)],
    }
    for op, cases in sizes.items():
        for axes in cases:
            ours, numpy, torch = _beside_others(op, axes, _REPEATS)
            what = f"{op} {'x'.join(map(str, axes.values()))}"
            yield HostResult(name=f"{what} bf16", value=ours * 1e3, unit="ms")
            yield HostResult(name=f"{what} float32, numpy", value=numpy * 1e3, unit="ms")
            if torch is not None:
                yield HostResult(name=f"{what} float32, torch", value=torch * 1e3, unit="ms")


def _beside_others(
    op_name: str, axes: Mapping[str, int], repeats: int
) -> tuple[float, float, float | None]:
    """Return medians in seconds of ours (values and timeline), NumPy's and PyTorch's, or None.

    They take turns, so that all meet the same machine.
    """
    entry = ENTRIES[op_name]
    inputs = entry.inputs(entry.op.input_shapes(axes), "bfloat16", 0)
    wide = [x.astype(np.float32) for x in inputs]
    runs: list[Callable[[], object]] = [
        lambda: entry.op.launch(inputs, entry.op.options_of(axes), target=_TARGET).time(),
        lambda: _IN_NUMPY[op_name](*wide),
    ]
    if importlib.util.find_spec("torch") is not None:
        import torch

        tensors = [torch.from_numpy(x) for x in wide]
        runs.append(lambda: _IN_TORCH[op_name](torch, *tensors))
    spans: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, span in zip(runs, spans, strict=True):
            start = perf_counter()
            run()
            span.append(perf_counter() - start)
    medians = [statistics.median(span) for span in spans]
    return medians[0], medians[1], medians[2] if len(medians) > 2 else None


_IN_NUMPY: Mapping[str, Callable[..., Any]] = {
    "matmul": lambda a, b: a @ b,
    "rms_norm": lambda x, w: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * w,
}
_IN_TORCH: Mapping[str, Callable[..., Any]] = {
    "matmul": lambda torch, a, b: a @ b,
    "rms_norm": lambda torch, x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6),
}


def host_table(results: list[HostResult]) -> str:
    """Return the figures as text."""
    rows = [
        (
            r.name,
            r.family or "",
            f"{r.value:.3g}",
            r.unit,
            "" if r.limit is None else f"{r.limit:g}",
            "" if r.within is None else "yes" if r.within else "NO",
        )
        for r in results
    ]
    lines = render(rows, ("measured", "family", "value", "unit", "limit", "within"), left=2)
    return "\n".join(["embedded NKI on this machine (host)", *lines])
