"""Consistency: every measured instruction law, run as an instruction of a real kernel.

This proves nothing about whole kernels. It shows that the way from a kernel's call over operand
signatures to the table gives back what the table says, and where two fits of the table differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import nki
import nki.isa as nisa
import nki.language as nl

from bench.validate.reading import Reading
from bench.validate.run import TARGET, Timed
from nki_kernels.hardware import spec_for
from nki_kernels.hardware.laws import FULL_PARTITIONS, OpLaw

LIMIT_PERCENT = 1.0
SOURCE = "VOY trn2_op_laws.csv"
_WINDOW = 3

_ENGINES = {"ACT": nisa.engine.scalar, "DVE": nisa.engine.vector, "Pool": nisa.engine.gpsimd}
_BUFFERS = {"sbuf": nl.sbuf, "psum": nl.psum}
_ORDER = ("float32", "bfloat16", "int32", "uint8", "uint16", "uint32")

#: The table's names for instructions, and NKI's.
_OPCODES = {
    "activation+accumulate": "activation",
    "act_read_accumulator": "activation",
    "predicated_copy_scalar": "tensor_copy_predicated",
    "stream_shuffle": "nc_stream_shuffle",
    "stream_transpose_32x32": "nc_transpose",
}
#: ... and operators; any of these for an instruction measured with all of them.
_OPERATORS = {"identity": nl.copy, "mul imm": nl.multiply, "mul-add": nl.multiply, "": nl.add}


class Probe(NamedTuple):
    """One instruction to time: the law, its size, and one choice among its operands."""

    law: OpLaw
    n: int
    function: str
    partitions: int

    @property
    def windowed(self) -> bool:
        """Whether the source is an overlapping window."""
        return "window" in self.function


@nki.jit
def instruction(probe: Probe) -> None:
    """Run the probed instruction twice: the first loads tables and masks."""
    law = probe.law
    operands = [_tile(probe, *pair) for pair in zip(*_sources(law), strict=True)]
    out = (probe.partitions, _outputs(probe))
    dst = nl.ndarray(out, dtype=_one(law.outputs), buffer=_BUFFERS[law.output_memory or "sbuf"])
    vector = nl.ndarray((probe.partitions, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=vector, value=1.0)
    for _ in range(2):
        _issue(probe, dst, operands, vector)


def _sources(law: OpLaw) -> tuple[list[str], list[str]]:
    types = law.sources * len(law.source_memories) if len(law.sources) == 1 else law.sources
    return [_one(t) for t in types], list(law.source_memories)


def _one(types: frozenset[str]) -> str:
    """Return one of the types that cost the same."""
    return next((name for name in _ORDER if name in types), "float32")


def _outputs(probe: Probe) -> int:
    if probe.windowed:
        return math.prod(_window(probe.n))
    return 1 if probe.law.key == "tensor_reduce" else probe.n


def _window(n: int) -> tuple[int, int]:
    """Return rows and columns of the outputs whose windows read n elements."""
    outputs = n // _WINDOW**2
    rows = max(r for r in range(1, math.isqrt(outputs) + 1) if outputs % r == 0)
    return rows, outputs // rows


def _tile(probe: Probe, dtype: str, memory: str) -> Any:
    """Return an initialised source operand with the probed step between elements."""
    step = probe.law.source_step
    partitions = probe.partitions
    width = probe.n * step
    if probe.windowed:
        rows, columns = (size + _WINDOW - 1 for size in _window(probe.n))
        width = rows * columns
    tile = nl.ndarray((partitions, width), dtype=dtype, buffer=_BUFFERS[memory])
    nisa.memset(dst=tile, value=1)
    if probe.windowed:
        out_rows, out_columns = _window(probe.n)
        return tile.ap(
            [[width, partitions], [columns, out_rows], [1, out_columns], [columns, 3], [1, 3]]
        )
    return tile[:, ::step]


def _issue(probe: Probe, dst: Any, operands: list[Any], vector: Any) -> None:
    law = probe.law
    engine = _ENGINES[law.engine]
    name = probe.function.split()[0] if probe.windowed else probe.function
    op = _OPERATORS.get(name) or getattr(nl, {"max": "maximum"}.get(name, name), None)
    if law.key.startswith("activation"):
        bias = vector if law.vectors_included else None
        command = nisa.reduce_cmd.reset_reduce if "accumulate" in law.key else nisa.reduce_cmd.idle
        add = nl.add if "accumulate" in law.key else None
        nisa.activation(dst, op, operands[0], bias=bias, reduce_op=add, reduce_cmd=command)
    elif law.key == "act_read_accumulator":
        data = nl.ndarray((probe.partitions, 64), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=data, value=1.0)
        command = nisa.reduce_cmd.reset_reduce
        nisa.activation(data, nl.exp, data, reduce_op=nl.add, reduce_res=dst, reduce_cmd=command)
    elif law.key == "tensor_copy":
        nisa.tensor_copy(dst, operands[0], engine=engine)
    elif law.key == "tensor_tensor":
        nisa.tensor_tensor(dst, operands[0], operands[1], op, engine=engine)
    elif law.key == "tensor_scalar":
        nisa.tensor_scalar(dst, operands[0], op, 2.0, engine=engine)
    elif law.key == "tensor_reduce":
        if probe.windowed:
            rows, columns = _window(probe.n)
            nisa.tensor_reduce(
                dst.reshape((probe.partitions, rows, columns)), op, operands[0], axis=(3, 4)
            )
        else:
            nisa.tensor_reduce(dst, op, operands[0], axis=1)
    elif law.key == "tensor_tensor_scan":
        nisa.tensor_tensor_scan(dst, operands[0], operands[0], 0.0, nl.multiply, nl.add)
    elif law.key == "predicated_copy_scalar":
        nisa.memset(dst=dst, value=0.0)
        nisa.tensor_copy_predicated(dst, 1.0, operands[0])
    elif law.key == "register_move":
        nisa.register_move(nisa.register_alloc(0), 1)
    else:
        _issue_fixed(probe, dst, operands)


def _issue_fixed(probe: Probe, dst: Any, operands: list[Any]) -> None:
    """Issue the instructions that take neither operator nor engine."""
    key = probe.law.key
    if key == "reciprocal":
        nisa.reciprocal(dst, operands[0])
    elif key == "memset":
        nisa.memset(dst=dst, value=1, engine=nisa.engine.vector)
    elif key == "stream_shuffle":
        nisa.nc_stream_shuffle(dst, operands[0], list(range(32)))
    elif key == "stream_transpose_32x32":
        nisa.nc_transpose(dst, operands[0], engine=nisa.engine.vector)
    elif key == "affine_select":
        nisa.affine_select(dst, [[1, probe.n]], 1, operands[0], 0.0, cmp_op=nl.greater_equal)
    else:
        raise ValueError(f"law {key!r}: no probe; add its instruction to {__name__}")


def _sizes(law: OpLaw) -> list[int]:
    """Return the ends of the measured domain and its geometric middle."""
    high = law.max_n or law.min_n
    if any("window" in f for f in law.functions):
        return [law.min_n, high]
    return sorted({law.min_n, math.isqrt(law.min_n * high), high})


def law_readings() -> Iterator[Reading]:
    """Yield one reading per law and function: the size in its domain where the model is worst."""
    for law in spec_for(TARGET).op_laws.laws:
        partitions = FULL_PARTITIONS
        if law.partitions and FULL_PARTITIONS not in law.partitions:
            partitions = max(law.partitions)
        for function in sorted(law.functions) or [""]:
            probes = [Probe(law, n, function, partitions) for n in _sizes(law)]
            yield max((_reading(probe) for probe in probes), key=lambda r: abs(r.error_percent))


def _reading(probe: Probe) -> Reading:
    law = probe.law
    run = Timed(instruction, probe)
    opcode = _OPCODES.get(law.key, law.key)
    event = run.find(opcode)[-1]
    modelled = run.completion(event)
    measured = law.startup_ns + law.per_element_ns * probe.n
    scalar = spec_for(TARGET).scalar
    if law.key == "act_read_accumulator":
        # One call runs the activation and the read; the read starts when the sum is forwarded.
        modelled -= 64 / scalar.clock_ghz + scalar.accumulator_forward_ns
    if law.key == "stream_shuffle":
        # The law is the shuffle's; the call loads its mask as well.
        modelled -= spec_for(TARGET).vector.mask_load_ns
    types, memories = _sources(law)
    operands = "+".join(f"{t} {m}" for t, m in zip(types, memories, strict=True))
    return Reading(
        part="laws",
        id=law.key,
        what=f"{law.engine} {probe.function} {operands} to {_one(law.outputs)} "
        f"{law.output_memory} n={probe.n} P={probe.partitions}",
        unit="ns",
        measured=measured,
        source=f"{SOURCE}, {law.source_file}",
        modelled=modelled,
        use="parameter",
        limit_percent=LIMIT_PERCENT,
        cause=_cause(probe),
    )


def _cause(probe: Probe) -> str:
    """Return why the model may answer with another row than this one."""
    law = probe.law
    if probe.windowed:
        return "the operand signature does not tell a window; the plain tensor_reduce row answers"
    rows = spec_for(TARGET).op_laws.laws
    twins = [r for r in rows if r is not law and (r.key, r.engine) == (law.key, law.engine)]
    if any(_same_operands(twin, law) and twin.contains(probe.n) for twin in twins):
        return "two published fits of these operands overlap; the model answers with the other"
    return ""


def _same_operands(a: OpLaw, b: OpLaw) -> bool:
    memories = (a.source_memories, a.output_memory) == (b.source_memories, b.output_memory)
    sources = all(x & y for x, y in zip(a.sources, b.sources, strict=False))
    functions = not a.functions or bool(a.functions & b.functions)
    return memories and sources and functions and bool(a.outputs & b.outputs)
