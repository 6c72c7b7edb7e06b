"""What one would predict without a timing model: the roofline, and AWS's documented formulas.

Neither knows of dependencies, latencies or the start of a kernel. Clocks, peaks and rates are those
of the hardware description; the formulas are those NKI printed beside its instructions up to 2.26
and has removed since (they describe a steady stream of instructions, written for trn1's datapaths).
"""

from __future__ import annotations

import math

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.trace import DmaWork, Event, PeWork, StreamWork, Trace

_LEAST = 64
_GPSIMD_START = 150
_ACCUMULATOR = 64


def roofline_ns(trace: Trace) -> float:
    """Return max(FLOPs / peak of their dtype, HBM bytes / documented rate), in ns."""
    spec = trace.spec
    products = []
    moved = 0
    for event in trace:
        work = event.work
        if isinstance(work, PeWork) and work.mode == "matmul":
            products.append(2 * work.macs / (spec.peak_tflops(work.dtype) * 1e3))
        elif isinstance(work, DmaWork):
            moved += work.hbm_read_bytes + work.hbm_write_bytes
    # fsum: the same to the last bit under every Python (3.12 changed how sum adds floats).
    return max(math.fsum(products), moved / spec.hbm_bytes_per_ns)


def documented_ns(trace: Trace) -> float:
    """Return the documented formulas summed per engine, for the longest engine, in ns.

    A DMA occupies its queue for the documented time of a hardware descriptor engine, and all of
    them together the documented memory rate.
    """
    spec = trace.spec
    engines: dict[Engine, float] = {}
    queues: dict[Engine, float] = {}
    moved = 0
    for event in trace:
        work = event.work
        if isinstance(work, DmaWork):
            queues[work.queue] = queues.get(work.queue, 0.0) + spec.dma.hw_queue_ns
            moved += work.hbm_read_bytes + work.hbm_write_bytes
        else:
            engines[event.engine] = engines.get(event.engine, 0.0) + formula_ns(event, spec)
    return max((*engines.values(), *queues.values(), moved / spec.hbm_bytes_per_ns), default=0.0)


def formula_ns(event: Event, spec: CoreSpec) -> float:
    """Return the documented time of one compute instruction, in ns."""
    work = event.work
    if isinstance(work, PeWork):
        per_row = 4 if work.dtype == "float32" else 1
        return per_row * max(min(_LEAST, work.m), work.n) / spec.pe.clock_ghz
    if not isinstance(work, StreamWork):
        return 0.0
    part = {Engine.vector: spec.vector, Engine.scalar: spec.scalar}.get(event.engine)
    clock = spec.gpsimd.clock_ghz if part is None else part.clock_ghz
    return _cycles(work, event.engine) / clock


def _cycles(work: StreamWork, engine: Engine) -> float:
    n = work.n
    if engine is Engine.gpsimd:
        return _GPSIMD_START + n
    two_byte = all(as_dtype(d).itemsize == 2 for d, _, _ in (*work.sources, work.dst))
    psum = any(memory == "psum" for _, memory, _ in work.sources)
    per_element = {
        "reciprocal": 8.0,
        "tensor_tensor_scan": 2.0,
        "scalar_tensor_tensor": 2.0,
        "tensor_tensor": 1.0 if psum or two_byte else 2.0,
        "tensor_copy_predicated": 1.0 if psum or len(work.sources) < 2 else 2.0,
        "tensor_reduce": 0.5 if two_byte else 1.0,
        "memset": 0.5 if two_byte else 1.0,
        "bn_aggr": 13 / 3,
    }.get(work.law, 1.0)
    extra = _ACCUMULATOR if work.reduces or work.reads_accumulator else 0
    return max(_LEAST, per_element * n) + extra
