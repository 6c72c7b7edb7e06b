"""What one instruction of Vector, Scalar or GpSimd costs, alone.

The formulas are here and the numbers are in `nki_kernels.hardware`. A measured law of the operands
decides where there is one; elsewhere the engine's mode rule does, and the result is an estimate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from nki_kernels.hardware.laws import Match, Operand
from nki_kernels.hardware.spec import CoreSpec, Engine, GpSimdSpec, StreamSpec
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.trace import StreamWork

MEMO = 1 << 16


class Milestones(NamedTuple):
    """When an instruction lets go of what, in ns after its start.

    Attributes:
        issue: the engine takes the next instruction.
        read: the operands may be overwritten.
        result: the result may be used.
        estimated: no measured law covers it.
        fast: it ran in a Vector fast mode, which locks the SBUF port shared with GpSimd.
    """

    issue: float
    read: float
    result: float
    estimated: bool = False
    fast: bool = False


#: Instruction to (measured law, class of the mode rule). The class says how many cycles an element
#: costs on an engine where no law was measured.
_LAWS: dict[str, tuple[str, str]] = {
    "activation": ("activation", "one"),
    "activation_reduce": ("activation", "one"),
    "activate2": ("activation", "one"),
    "affine_select": ("affine_select", "one"),
    "bn_aggr": ("", "bn_aggr"),
    "bn_stats": ("", "one"),
    "dropout": ("", "one"),
    "exponential": ("", "exponential"),
    "iota": ("", "one"),
    "local_gather": ("", "one"),
    "max8": ("", "one"),
    "memset": ("memset", "memset"),
    "nc_find_index8": ("", "one"),
    "nc_match_replace8": ("", "one"),
    "nc_n_gather": ("", "one"),
    "nc_stream_shuffle": ("stream_shuffle", "one"),
    "nc_transpose": ("stream_transpose_32x32", "transpose"),
    "nonzero_with_count": ("", "one"),
    "quantize_mx": ("", "one"),
    "rand2": ("", "one"),
    "rand_get_state": ("", "one"),
    "rand_set_state": ("", "one"),
    "range_select": ("", "one"),
    "reciprocal": ("reciprocal", "reciprocal"),
    "rng": ("", "one"),
    "scalar_tensor_tensor": ("", "fused"),
    "select_reduce": ("", "one"),
    "sequence_bounds": ("", "one"),
    "set_rng_seed": ("", "one"),
    "tensor_copy": ("tensor_copy", "copy"),
    "tensor_copy_predicated": ("predicated_copy_scalar", "predicated"),
    "tensor_partition_reduce": ("", "one"),
    "tensor_reduce": ("tensor_reduce", "reduce"),
    "tensor_scalar": ("tensor_scalar", "copy"),
    "tensor_scalar_cumulative": ("", "scan"),
    "tensor_scalar_reduce": ("", "accumulate"),
    "tensor_tensor": ("tensor_tensor", "two"),
    "tensor_tensor_scan": ("tensor_tensor_scan", "scan"),
    "topk": ("", "topk"),
}  # fmt: skip

_TABLE_NAMES = {Engine.scalar: "ACT", Engine.vector: "DVE", Engine.gpsimd: "Pool"}

#: Activation functions every table contains.
COPIES = frozenset({"copy", "identity"})


class _Stream(NamedTuple):
    """Fixed and per-element part of a streaming instruction."""

    startup: float
    stream: float
    estimated: bool
    issue: float | None = None


@lru_cache(MEMO)
def stream_timing(work: StreamWork, engine: Engine, spec: CoreSpec) -> Milestones:
    """Return the moments of an instruction of Vector, Scalar or GpSimd.

    Formula: ``result = startup + stream``, ``read = stream + read latency``,
    ``issue = max(minimum, stream + gap)``; startup and slope from the measured law of these
    operands where there is one, else from the engine's mode rule.

    Raises:
        ValueError: the work record names no cost law, or the engine streams nothing.
    """
    part = _part(engine, spec)
    if work.law not in _LAWS:
        raise ValueError(
            f"cost law {work.law!r} of {work}: unknown; add it to _LAWS in {__name__}, known are "
            f"{', '.join(sorted(_LAWS))}"
        )
    cost = _measured(work, engine, spec) or _by_rule(work, engine, spec)
    dense = cost.stream
    cost = cost._replace(startup=cost.startup + _extras(work, engine, spec))
    source_slow = any(abs(step) > part.free_step_bytes for _, _, step in work.sources)
    slow = source_slow or abs(work.dst[2]) > part.free_step_bytes
    streaming = issuing = dense * (part.strided_factor if slow else 1.0)
    if slow and not source_slow and engine is Engine.scalar:
        # Measured: a strided destination delays the result like a source, the next start hardly.
        issuing = dense + work.n * spec.scalar.strided_dst_issue_cycles / part.clock_ghz
    least = part.dynamic_min_cycles if work.dynamic else part.min_issue_cycles
    issue = max(least / part.clock_ghz, issuing + part.gap_ns) + _folded(work, engine, spec)
    if cost.issue is not None:
        issue = cost.issue
    result = cost.startup + streaming
    if engine is Engine.scalar and work.reads_accumulator:
        issue, result = _read_accumulator(work, spec, issue, streaming)
    fast = engine is Engine.vector and _is_fast(work, dense, part)
    return Milestones(issue, streaming + part.read_ns, result, cost.estimated or slow, fast)


def _part(engine: Engine, spec: CoreSpec) -> StreamSpec:
    if engine is Engine.vector:
        return spec.vector
    if engine is Engine.scalar:
        return spec.scalar
    if engine is Engine.gpsimd:
        return spec.gpsimd
    raise ValueError(f"engine {engine.name}: no elementwise work; use vector, scalar or gpsimd")


def _is_fast(work: StreamWork, dense: float, part: StreamSpec) -> bool:
    """Return True for less than a cycle per element of an instruction that reads something."""
    return bool(work.sources) and dense * part.clock_ghz < work.n * part.one_input_cycles * 0.95


def _read_accumulator(
    work: StreamWork, spec: CoreSpec, issue: float, stream: float
) -> tuple[float, float]:
    """Return (issue, result) with the instruction that stores the accumulator after it."""
    part = spec.scalar
    output = Operand("float32", "sbuf")
    match = spec.op_laws.find(
        "act_read_accumulator", "ACT", 1, output=output, partitions=work.partitions
    )
    completion, interval = part.read_accumulator_ns, part.read_accumulator_issue_ns
    if match is not None:
        completion = match.law.startup_ns
        interval = match.law.issue_ns or interval
    start = max(issue, stream + part.accumulator_forward_ns)
    return start + interval, start + completion


def _keys(work: StreamWork) -> tuple[str, ...]:
    """Return the law names to try, the closest first."""
    key = _LAWS[work.law][0]
    if key == "activation" and (work.reduces or work.reads_accumulator):
        return ("activation+accumulate", key)
    return (key,)


def _function(work: StreamWork) -> str:
    # The reduction of a whole-axis sum is measured under the operator's name; a copy has two.
    return work.function or ("copy" if work.law == "activation" else "")


def _operand(triple: tuple[str, str, int]) -> Operand:
    """Return the law operand; steps up to the sector width that cost nothing count as 1."""
    dtype, memory, step = triple
    size = as_dtype(dtype).itemsize
    return Operand(dtype, memory, 2 if abs(step) == 2 * size else 1)


def _measured(work: StreamWork, engine: Engine, spec: CoreSpec) -> _Stream | None:
    """Return the cost by the measured law of these operands, if there is one."""
    if engine is Engine.vector and not _contiguous(work) and not _has_stride_law(work, spec):
        return None
    sources = tuple(_operand(s) for s in work.sources)
    if work.law == "tensor_tensor_scan" and len(set(sources)) == 1:
        # The table has one row for two sources of a kind.
        sources = sources[:1]
    match = _find(work, engine, spec, sources)
    if match is None:
        match = _find(work, engine, spec, tuple(s._replace(step=1) for s in sources))
    if match is None:
        return None
    law = match.law
    within = min(work.n, law.max_n or work.n)
    stream = law.per_element_ns * within
    if work.n > within:
        # SBUF laws are linear as far as anyone measured; PSUM laws stop at one bank, and their
        # slopes are fits over short rows.
        in_psum = any(s.memory == "psum" for s in sources)
        slope = _cycles(work, engine, spec) / _part(engine, spec).clock_ghz
        stream += (work.n - within) * (slope if in_psum else law.per_element_ns)
    vector_ns = _vector_ns(work, spec) if law.vector_ns is None else law.vector_ns
    extra = work.vectors - law.vectors_included if engine is Engine.scalar else 0
    if law.vectors_required:
        extra = max(0, extra)
    estimated = not (match.exact and law.contains(work.n))
    return _Stream(law.startup_ns + extra * vector_ns, stream, estimated, law.issue_ns)


def _vector_ns(work: StreamWork, spec: CoreSpec) -> float:
    """Return what Scalar pays for a [P, 1] operand beside the data."""
    table = _LAWS[work.law][0] == "activation" and _function(work) not in COPIES
    return spec.scalar.lut_vector_read_ns if table else spec.scalar.vector_read_ns


def _find(
    work: StreamWork, engine: Engine, spec: CoreSpec, sources: tuple[Operand, ...]
) -> Match | None:
    for key in _keys(work):
        match = spec.op_laws.find(
            key,
            _TABLE_NAMES[engine],
            work.n,
            sources=sources,
            output=_operand(work.dst)._replace(step=1),
            function=_function(work),
            partitions=work.partitions,
        )
        if match is not None:
            return match
    return None


def _has_stride_law(work: StreamWork, spec: CoreSpec) -> bool:
    """Return True where the non-contiguous form itself was measured (destination contiguous)."""
    if abs(work.dst[2]) != as_dtype(work.dst[0]).itemsize:
        return False
    sources = tuple(_operand(s) for s in work.sources)
    return (
        any(s.step == 2 for s in sources) and _find(work, Engine.vector, spec, sources) is not None
    )


def _contiguous(work: StreamWork) -> bool:
    """Return True unless a 2-byte or narrower operand of a Vector fast mode has gaps."""
    return all(
        abs(step) in (0, size) or size > 2
        for dtype, _, step in (*work.sources, work.dst)
        for size in (as_dtype(dtype).itemsize,)
    )


def _by_rule(work: StreamWork, engine: Engine, spec: CoreSpec) -> _Stream:
    """Return the cost by the engine's mode rule; an estimate."""
    part = _part(engine, spec)
    in_psum = any(memory == "psum" for _, memory, _ in work.sources)
    if not work.sources:
        startup = part.memset_startup_ns
    elif engine is Engine.scalar and _LAWS[work.law][0] == "activation":
        copies = _function(work) in COPIES
        sbuf = part.startup_ns if copies else spec.scalar.lut_startup_ns
        psum = part.psum_startup_ns if copies else spec.scalar.lut_psum_startup_ns
        startup = psum if in_psum else sbuf
    elif engine is Engine.vector and _LAWS[work.law][1] == "transpose":
        startup = spec.vector.transpose_startup_ns
    else:
        startup = part.psum_startup_ns if in_psum else part.startup_ns
    if engine is Engine.scalar:
        startup += work.vectors * _vector_ns(work, spec)
    return _Stream(startup, work.n * _cycles(work, engine, spec) / part.clock_ghz, True)


def _extras(work: StreamWork, engine: Engine, spec: CoreSpec) -> float:
    """Return what an instruction pays once beside its stream."""
    if engine is not Engine.vector:
        return 0.0
    part = spec.vector
    extra = 0.0
    if work.law == "tensor_tensor_scan" and work.vectors:
        extra += part.scan_seed_ns
    if work.law == "nc_stream_shuffle":
        extra += part.mask_load_ns
    return extra + _folded(work, engine, spec)


def _folded(work: StreamWork, engine: Engine, spec: CoreSpec) -> float:
    """Return what Vector adds, to interval and result, for a reduction folded into the stream."""
    if engine is Engine.vector and (_LAWS[work.law][1] == "accumulate" or work.reduces):
        return spec.vector.accumulate_cycles / spec.vector.clock_ghz
    return 0.0


def _cycles(work: StreamWork, engine: Engine, spec: CoreSpec) -> float:
    """Return cycles per element by the mode rule of the engine."""
    kind = _LAWS[work.law][1]
    sizes = [as_dtype(dtype).itemsize for dtype, _, _ in (*work.sources, work.dst)]
    part = _part(engine, spec)
    if engine is Engine.vector:
        return _vector_cycles(work, kind, sizes, spec)
    if isinstance(part, GpSimdSpec):
        if kind == "topk":
            return part.topk_cycles
        if work.function == "rsqrt":
            return part.rsqrt_cycles
        if len(work.sources) > 1:
            return part.two_input_2byte_cycles if max(sizes) <= 2 else part.two_input_cycles
    elif kind == "copy" and max(sizes) <= 2:
        return spec.scalar.fast_2byte_cycles
    return part.one_input_cycles


def _vector_cycles(work: StreamWork, kind: str, sizes: list[int], spec: CoreSpec) -> float:
    part = spec.vector
    in_psum = "psum" in {memory for _, memory, _ in (*work.sources, work.dst)}
    two_byte = all(size == 2 for size in sizes)
    single = {
        "memset": part.memset_cycles,
        "reciprocal": part.reciprocal_cycles,
        "scan": part.scan_cycles,
        "fused": part.fused_two_input_cycles,
        "reduce": part.reduce_2byte_cycles if two_byte else part.reduce_cycles,
        "bn_aggr": part.bn_aggr_cycles,
        "exponential": part.exponential_cycles,
    }.get(kind)
    if single is not None:
        return single
    if kind == "copy" and work.sources:
        return _copy_cycles(work, sizes, in_psum, spec)
    if kind == "predicated":
        return part.psum_two_input_cycles if in_psum else part.predicated_cycles
    if kind == "two" and len(work.sources) > 1:
        if any(memory == "psum" for _, memory, _ in work.sources):
            return part.psum_two_input_cycles
        if two_byte and not in_psum and _contiguous(work):
            return part.two_input_2byte_cycles
        return part.two_input_cycles
    return part.one_input_cycles


def _copy_cycles(work: StreamWork, sizes: list[int], in_psum: bool, spec: CoreSpec) -> float:
    """Return cycles per element of tensor_copy and tensor_scalar on Vector.

    Fast modes as documented for 2-byte types and as measured for 4-byte sources; the hardware
    finds them by itself.
    """
    part = spec.vector
    source, output = sizes[0], sizes[-1]
    both_2byte = source == output == 2
    if in_psum:
        one_side = (work.sources[0][1] == "psum") != (work.dst[1] == "psum")
        fast = both_2byte and one_side and _contiguous(work)
        return part.copy_2byte_psum_cycles if fast else part.copy_psum_cycles
    if source >= 4:
        return part.copy_4byte_cycles
    if output >= 4:
        return part.copy_widening_cycles
    if not both_2byte:
        return part.copy_narrow_cycles
    return part.copy_2byte_cycles if _contiguous(work) else part.copy_2byte_strided_cycles
