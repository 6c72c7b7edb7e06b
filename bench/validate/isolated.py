"""C.3: isolated probes of one instruction or one handoff (voyager-compiler, trn2, neuronx-cc 2.22).

Kernels are written anew in the current API from the published description of each probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl

from bench.validate.reading import Reading, Use
from bench.validate.run import TARGET, Timed
from nki_kernels.hardware import spec_for
from nki_kernels.machine.tensor import Abstract

LIMIT_PERCENT = 5.0
#: The published figures are rounded to 1 us and carry dependency waits only (issue 5).
CHAIN_LIMIT_PERCENT = 15.0
SOURCE = "VOY isolated probes"
_STEPS = 16
_READ_OFF: Use = "parameter"
_HELD_OUT: Use = "held out"
#: Long enough for the Tensor engine's power limit to be released.
_STREAM = 60
#: The isolated fit of a DMA: (dispatch, constant, slope, notify), bytes at 368 B/ns.
_DMA_FITS = {"load": (751.0, 293.0, 1.3046, 314.5), "store": (565.5, 162.0, 0.9628, 355.0)}


def _tile(rows: int, columns: int, dtype: Any = nl.float32, buffer: Any = nl.sbuf) -> Any:
    return nl.ndarray((rows, columns), dtype=dtype, buffer=buffer)


def _filled(rows: int, columns: int, dtype: Any = nl.float32) -> Any:
    tile = _tile(rows, columns, dtype)
    nisa.memset(dst=tile, value=1.0)
    return tile


@nki.jit
def dependent(opcode: str, n: int) -> None:
    """Sixteen instructions, each on the result of the one before."""
    x = _filled(128, n)
    for _ in range(_STEPS):
        if opcode == "tensor_copy":
            nisa.tensor_copy(x, x, engine=nisa.engine.scalar)
        elif opcode == "tensor_tensor":
            nisa.tensor_tensor(x, x, x, nl.maximum)
        else:
            nisa.tensor_scalar(x, x, nl.multiply, 1.0)


@nki.jit
def scan(n: int, seeded: bool) -> None:
    """A multiply-add scan, its seed a number or a tile."""
    x, y, seed = _filled(128, n), _tile(128, n), _filled(128, 1)
    nisa.tensor_tensor_scan(y, x, x, seed if seeded else 0.0, nl.multiply, nl.add)


@nki.jit
def exp_sum(n: int, read: bool, rows: int = 128) -> None:
    """Exponential with a row sum; the second one finds its table loaded."""
    x, y, total = _filled(rows, n), _tile(rows, n), _tile(rows, 1)
    command = nisa.reduce_cmd.reset_reduce
    for _ in range(2):
        into = total if read else None
        nisa.activation(y, nl.exp, x, reduce_op=nl.add, reduce_res=into, reduce_cmd=command)


@nki.jit
def matmuls(dtype: Any, k: int, n: int, step: int, count: int) -> None:
    """A stream of matmuls with 128 stationary columns into one accumulator."""
    weights, moving = _filled(k, 128, dtype), _filled(k, n * step, dtype)
    out = _tile(128, n, nl.float32, nl.psum)
    for i in range(count):
        nisa.nc_matmul(out, weights, moving[:, ::step], accumulate=i > 0)


@nki.jit
def transposes(count: int) -> None:
    """Independent 128 x 128 float32 transposes on the Tensor engine."""
    data = _filled(128, 128)
    for _ in range(count):
        out = _tile(128, 128, nl.float32, nl.psum)
        nisa.nc_transpose(out, data, engine=nisa.engine.tensor)


@nki.jit
def move(x: Any) -> Any:
    """One load and one store."""
    tile = _tile(x.shape[0], x.shape[1], x.dtype)
    nisa.dma_copy(dst=tile, src=x)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


@nki.jit
def fusion(kind: str, fused: bool, a: Any, b: Any, c: Any) -> Any:
    """V10: 32 dependent steps, each one instruction or the two it replaces."""
    rows, columns = a.shape
    x, z, y, v = (_tile(rows, w) for w in (columns, columns, columns, 1))
    for tile, source in ((x, a), (y, b), (v, c)):
        nisa.dma_copy(dst=tile, src=source)
    between = _tile(rows, columns)
    psum = _tile(rows, columns, nl.float32, nl.psum)
    scalar = nisa.engine.scalar
    for _ in range(32):
        if kind == "psum add":
            nisa.tensor_copy(psum, x, engine=scalar)
            if not fused:
                nisa.tensor_copy(between, psum, engine=scalar)
            nisa.tensor_tensor(z, psum if fused else between, y, nl.add)
        elif kind == "rms scale" and fused:
            nisa.scalar_tensor_tensor(z, x, nl.multiply, v, nl.multiply, y)
        elif kind == "rms scale":
            nisa.tensor_scalar(between, x, nl.multiply, v)
            nisa.tensor_tensor(z, between, y, nl.multiply)
        elif fused:
            nisa.activation(z, nl.rsqrt, x, bias=v, scale=1 / 1024)
        else:
            nisa.tensor_scalar(between, x, nl.multiply, 1 / 1024, op1=nl.add, operand1=v)
            nisa.activation(z, nl.rsqrt, between)
        x, z = z, x
    out = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out


def _probe(
    name: str,
    what: str,
    measured: float,
    modelled: float,
    *,
    documented: float | None = None,
    use: Use = "parameter",
    cause: str = "",
) -> Reading:
    return Reading(
        part="probes",
        id=name,
        what=what,
        unit="ns",
        measured=measured,
        source=SOURCE,
        modelled=modelled,
        documented=documented,
        use=use,
        limit_percent=LIMIT_PERCENT,
        cause=cause,
    )


def probe_readings() -> Iterator[Reading]:
    """Yield the readings of V09a to V09g and of the fusion pairs V10."""
    yield from _stream_probes()
    yield from _tensor_probes()
    yield from _dma_probes()
    yield from _fusion_pairs()


def _stream_probes() -> Iterator[Reading]:
    clock, scalar = spec_for(TARGET).vector.clock_ghz, spec_for(TARGET).scalar.clock_ghz
    for n, measured in ((128, 297.0), (512, 617.0), (2048, 1897.0), (8192, 7017.0)):
        run = Timed(dependent, "tensor_copy", n)
        event = run.find("tensor_copy")[-1]
        what = f"dependent ACT copy fp32 n={n}"
        yield _probe("V09a", what, measured, run.completion(event), documented=n / scalar)
    for opcode, startup, slope, cycles in (
        ("tensor_tensor", 158.7, 1.0417, 2),
        ("tensor_scalar", 160.3, 0.5208, 1),
    ):
        for n in (128, 8192):
            run = Timed(dependent, opcode, n)
            found = run.completion(run.find(opcode)[-1])
            what = f"dependent DVE {opcode} fp32 n={n}"
            yield _probe("V09b", what, startup + slope * n, found, documented=cycles * n / clock)
    for n, seeded, measured in (
        (64, False, 291.0),
        (256, False, 691.0),
        (1024, False, 2291.0),
        (2048, False, 4424.0),
        (256, True, 751.0),
        (1024, True, 2351.0),
    ):
        run = Timed(scan, n, seeded)
        found = run.completion(run.find("tensor_tensor_scan")[-1])
        what = f"DVE scan fp32 n={n}, {'tile' if seeded else 'number'} seed"
        yield _probe("V09c", what, measured, found, documented=2 * n / clock)
    for n, measured in ((64, 348.0), (256, 491.0), (1024, 1148.0), (2048, 2001.0)):
        run = Timed(exp_sum, n, False)
        found = run.completion(run.find("activation")[-1])
        what = f"ACT exp with sum n={n}"
        yield _probe("V09d", what, measured, found, documented=(n + 64) / scalar)
    few = Timed(exp_sum, 256, False, 32)
    found = few.completion(few.find("activation")[-1])
    yield _probe("V09d", "ACT exp with sum n=256, 32 partitions", 504.0, found, use="held out")
    forwarded = 256 / scalar + spec_for(TARGET).scalar.accumulator_forward_ns
    for rows, measured, use in ((128, 279.0, _READ_OFF), (32, 290.0, _HELD_OUT)):
        run = Timed(exp_sum, 256, True, rows)
        found = run.completion(run.find("activation")[-1]) - forwarded
        what = f"ACT read of the accumulator, {rows} partitions"
        yield _probe("V09d", what, measured, found, use=use)


def _tensor_probes() -> Iterator[Reading]:
    pe = spec_for(TARGET).pe
    for name, k, n, step, interval, completion in (
        ("V09e", 128, 128, 1, 223.0, 496.0),
        ("V09e", 128, 128, 16, 437.0, None),
        ("V09e", 128, 512, 1, 860.0, 1460.0),
        ("V09f", 64, 512, 1, 1707.0, 2765.0),
    ):
        run = Timed(matmuls, nl.float32, k, n, step, _STREAM)
        events = run.find("nc_matmul")
        what = f"fp32 matmul K={k} n={n} stride {step}"
        docs = 4 * n / pe.clock_ghz
        yield _probe(name, f"{what}, interval", interval, run.spacing(events), documented=docs)
        if completion is not None:
            # Counted from the first weight load, which issues half a feed before the stream.
            found = run.completion(events[-1]) + run.spacing(events) / pe.fp32_passes
            yield _probe(name, f"{what}, completion", completion, found, use="partly")
    for k, dtype, n, measured in (
        (128, nl.float32, 128, 803.5),
        (128, nl.float32, 512, 2088.0),
        (64, nl.float32, 512, 2077.0),
        (128, nl.bfloat16, 128, 309.0),
        (128, nl.bfloat16, 512, 627.0),
    ):
        run = Timed(matmuls, dtype, k, n, 1, 1)
        found = run.completion(run.find("nc_matmul")[0])
        kind = "bf16" if dtype == nl.bfloat16 else "fp32"
        name = "V09f" if k == 64 else "V09e"
        yield _probe(name, f"{kind} matmul K={k} n={n}, isolated completion", measured, found)
    run = Timed(transposes, _STREAM)
    events = run.find("nc_transpose")
    # Eight banks and no reader: nothing holds a transpose back but the array.
    what = "fp32 PE transpose, interval"
    yield _probe("A.2", what, 168.0, run.spacing(events), documented=4 * 128 / pe.clock_ghz)
    yield _probe(
        "A.2",
        "fp32 PE transpose, completion in a stream",
        377.0,
        run.completion(events[-1]),
        use="held out",
        cause="interval and drain are modelled; the probe counts from a weight load before them",
    )


def _dma_probes() -> Iterator[Reading]:
    for dtype, n in ((nl.float32, 128), (nl.bfloat16, 128), (nl.float32, 512)):
        kind = "bf16" if dtype == nl.bfloat16 else "fp32"
        nbytes = 128 * n * (2 if kind == "bf16" else 4)
        events = Timed(move, Abstract((128, n), str(dtype)))
        rate = spec_for(TARGET).hbm_bytes_per_ns
        for name, event in zip(("load", "store"), events.find("dma_copy"), strict=True):
            dispatch, constant, slope, notify = _DMA_FITS[name]
            measured = dispatch + constant + slope * nbytes / rate + notify
            found = events.completion(event)
            what = f"{name} [128, {n}] {kind}, trigger to semaphore"
            yield _probe("V09g", what, measured, found, documented=nbytes / rate)


def _fusion_pairs() -> Iterator[Reading]:
    for kind, n, separate, fused in (
        ("psum add", 128, 42.0, 33.0),
        ("psum add", 512, 76.0, 57.0),
        ("rms scale", 128, 34.0, 26.0),
        ("rms scale", 1024, 82.0, 59.0),
        ("scale rsqrt", 1, 37.0, 30.0),
        ("scale rsqrt", 128, 37.0, 28.0),
    ):
        data, vector = Abstract((128, n), "float32"), Abstract((128, 1), "float32")
        runs = {form: Timed(fusion, kind, form, data, data, vector) for form in (False, True)}
        rsqrt = kind == "scale rsqrt"
        for form, measured in ((False, separate), (True, fused)):
            name = f"{kind} n={n} {'fused' if form else 'separate'}"
            cause = _ONE_COLUMN if rsqrt and n == 1 else ""
            yield _chain(name, measured, runs[form], runs[form], cause)
        yield _chain(f"{kind} n={n} saved", separate - fused, runs[False], runs[True])


_ONE_COLUMN = (
    "hardware needs as long for n=1 as for n=128: about 6 us beside the chain, in both forms. "
    "4-byte DMA rows and a shortest stream (64 elements) are what n=1 has and the model lacks"
)


def _chain(what: str, measured: float, run: Timed, other: Timed, cause: str = "") -> Reading:
    saved = run is not other
    figures = [
        (getattr(run, f) - (getattr(other, f) if saved else 0.0)) / 1e3
        for f in ("total", "roofline", "documented")
    ]
    return Reading(
        part="kernels",
        id="V10",
        what=what,
        unit="us",
        measured=measured,
        source="VOY fusion probes, p50, 1 us steps",
        modelled=figures[0],
        roofline=None if saved else figures[1],
        documented=figures[2],
        use="partly",
        ladder="" if saved else "V10 fusion pairs",
        limit_percent=CHAIN_LIMIT_PERCENT,
        cause=cause,
    )
