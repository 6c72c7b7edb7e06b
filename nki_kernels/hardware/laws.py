"""Measured cost laws of single instructions: the table, and the one rule that picks a row.

A law says: result usable at ``startup_ns + per_element_ns * n`` after the start, n elements per
partition, measured for n in [min_n, max_n]. The rows of trn2_op_laws.csv come from the isolated
hardware probes of the voyager-compiler project (see README.md).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

#: Short type names of the table, and the NKI types that cost the same.
_TYPES: dict[str, frozenset[str]] = {
    "fp32": frozenset({"float32", "tfloat32"}),
    "bf16": frozenset({"bfloat16", "float16"}),
    "int32": frozenset({"int32", "uint32"}),
    "uint8": frozenset({"uint8", "int8", "bool_"}),
    "u8": frozenset({"uint8", "bool_"}),
    "u16": frozenset({"uint16"}),
    "u32": frozenset({"uint32"}),
}

#: Operator names of the table that differ from NKI's.
_FUNCTIONS = {"mul": "multiply", "max": "maximum", "min": "minimum"}

#: Below this size the fits that reach down to n = 1 are the better ones (their startups are 6 to
#: 15 ns lower); above it the fits over the widest domain are.
SHORT_N = 64

#: A function without a row of its own runs through a table like this one does.
GENERIC_FUNCTION = "exp"

FULL_PARTITIONS = 128


class Operand(NamedTuple):
    """What a law depends on in an operand: type, memory and innermost step in elements."""

    dtype: str
    memory: str
    step: int = 1


@dataclass(frozen=True, slots=True)
class OpLaw:
    """One measured row.

    Attributes:
        key: the instruction.
        engine: "ACT", "DVE" or "Pool".
        functions: operators or functions it was measured with; empty means any.
        sources: allowed types per source; a single entry stands for all sources.
        source_memories: memory per source, "sbuf" or "psum".
        source_step: innermost source step in elements.
        outputs: allowed destination types; empty means any.
        output_memory: memory of the destination.
        startup_ns: time at n = 0.
        per_element_ns: slope.
        vector_ns: added per [P, 1] operand; None where it was not measured.
        vectors_included: such operands contained in `startup_ns`.
        vectors_required: the form without them was not measured.
        issue_ns: measured issue interval, where the table has one.
        min_n: smallest n measured.
        max_n: largest n measured.
        partitions: partition counts observed.
        source_file: file of the data set.
    """

    key: str
    engine: str
    functions: frozenset[str]
    sources: tuple[frozenset[str], ...]
    source_memories: tuple[str, ...]
    source_step: int
    outputs: frozenset[str]
    output_memory: str
    startup_ns: float
    per_element_ns: float
    vector_ns: float | None
    vectors_included: int
    vectors_required: bool
    issue_ns: float | None
    min_n: int
    max_n: int | None
    partitions: frozenset[int]
    source_file: str

    def contains(self, n: int) -> bool:
        """Return True if the law was measured at `n`."""
        return self.min_n <= n and (self.max_n is None or n <= self.max_n)

    def takes(self, sources: tuple[Operand, ...], output: Operand) -> bool:
        """Return True if the row was measured with operands like these."""
        if self.outputs and output.dtype not in self.outputs:
            return False
        if output.memory != self.output_memory or len(sources) != len(self.source_memories):
            return False
        types = self.sources * len(sources) if len(self.sources) == 1 else self.sources
        rows = zip(sources, types, self.source_memories, strict=True)
        return all(
            s.dtype in allowed and s.memory == memory and s.step == self.source_step
            for s, allowed, memory in rows
        )


NO_OPERAND = Operand("", "")


class Match(NamedTuple):
    """The row chosen for an instruction.

    `exact` is False where the operands were measured but this activation function was not.
    """

    law: OpLaw
    exact: bool


class LawTable:
    """Cost laws of one generation, in the order of their file."""

    def __init__(self, laws: Iterable[OpLaw]) -> None:
        self.laws = tuple(laws)
        self._by_key: dict[tuple[str, str], list[OpLaw]] = {}
        for law in self.laws:
            self._by_key.setdefault((law.key, law.engine), []).append(law)

    def __len__(self) -> int:
        return len(self.laws)

    def find(
        self,
        key: str,
        engine: str,
        n: int,
        *,
        sources: tuple[Operand, ...] = (),
        output: Operand = NO_OPERAND,
        function: str = "",
        partitions: int = FULL_PARTITIONS,
    ) -> Match | None:
        """Return the row that describes an instruction best, or None if no row fits its operands.

        The rule, in this order; what is left after the last step is decided by file order.

        1. Instruction, engine, types, memories and source step are those of the row.
        2. Rows measured with this function; if there are none, for activations the rows of `exp`
           (a function through a table costs what its table walk costs), else all rows but those
           for a special access pattern.
        3. Rows whose domain contains n; if there are none, the one that reaches closest to it.
        4. Rows observed on as many partitions; if there are none, on all 128; else any.
        5. Below n = 64 the narrowest domain (a short-n fit), from there the widest.
        """
        rows = [r for r in self._by_key.get((key, engine), ()) if r.takes(sources, output)]
        named = [r for r in rows if function in r.functions]
        through_table = key.startswith("activation")
        if named:
            rows = named
        elif through_table:
            rows = [r for r in rows if GENERIC_FUNCTION in r.functions]
        else:
            rows = [r for r in rows if not any("window" in f for f in r.functions)]
        if not rows:
            return None
        rows = [r for r in rows if r.contains(n)] or [min(rows, key=lambda r: _distance(r, n))]
        for count in (partitions, FULL_PARTITIONS):
            observed = [r for r in rows if count in r.partitions]
            if observed:
                rows = observed
                break
        choose = min if n < SHORT_N else max
        return Match(choose(rows, key=_width), bool(named) or not through_table)


def _distance(law: OpLaw, n: int) -> int:
    if n < law.min_n:
        return law.min_n - n
    return n - (law.max_n or n)


def _width(law: OpLaw) -> int:
    return (law.max_n or law.min_n) - law.min_n


def load_laws(filename: str) -> LawTable:
    """Read a law table shipped beside this module.

    Args:
        filename: a CSV file of this package; lines that begin with ``#`` are comments.
    """
    text = resources.files(__package__).joinpath(filename).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return LawTable(_law(row) for row in csv.DictReader(lines))


def _law(row: dict[str, str]) -> OpLaw:
    remark = row["extra"]
    memories = tuple(m.lower() for m in row["src_mem"].split("+") if m and m != "ACC")
    types = row["in_dtype"].removeprefix("pred ") if memories else ""
    issue = remark.split("issue ")[1].split()[0] if "issue " in remark else ""
    return OpLaw(
        key=row["key"],
        engine=row["engine"],
        functions=_names(row["function"]),
        sources=tuple(_types(t) for t in types.split("+") if t),
        source_memories=memories,
        source_step=2 if "stride 2" in remark else 1,
        outputs=_types(row["out_dtype"]),
        output_memory=row["dst_mem"].lower(),
        startup_ns=float(row["startup_ns"]),
        per_element_ns=float(row["per_elem_ns"]),
        vector_ns=float(row["bcast_read_ns"]) if row["bcast_read_ns"] else None,
        vectors_included=1 if "one broadcast" in remark else 0,
        vectors_required="exactly one" in remark,
        issue_ns=float(issue) if issue.isdigit() else None,
        min_n=int(row["min_n"]),
        max_n=int(row["max_n"]) if row["max_n"] else None,
        partitions=frozenset(int(p) for p in row["partitions_observed"].split("/") if p),
        source_file=row["source_file"],
    )


def _types(text: str) -> frozenset[str]:
    return frozenset().union(*(_TYPES[t] for t in text.split("/") if t))


def _names(text: str) -> frozenset[str]:
    return frozenset(_FUNCTIONS.get(f, f) for f in text.split("/") if f)
