"""A second machine, deliberately naive: Python loops over single elements.

It is written from the documents (the formulas of the nki.isa pages and the release notes' words on
rounding) and shares nothing with the embedded NKI but NumPy and ml_dtypes as stores of bits. It
checks no rule: its callers make legal calls only. An instruction's twin has its name and its
operands; `TWINS` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

HOSTS: dict[str, Any] = {
    "float32": np.float32, "tfloat32": np.float32, "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16, "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e5m2": ml_dtypes.float8_e5m2, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8, "int16": np.int16, "int32": np.int32,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
}  # fmt: skip

TWINS: dict[str, Callable[..., None]] = {}


def twin(function: Callable[..., None]) -> Callable[..., None]:
    """Register the twin of the instruction of the same name."""
    TWINS[function.__name__] = function
    return function


def single(x: float) -> float:
    """The nearest float32, ties to even. One rounding of a float64 sum or product is exact."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def is_integer(dtype: str) -> bool:
    return np.dtype(HOSTS[dtype]).kind in "iu"


def rounded(x: float, dtype: str) -> Any:
    """One element of `dtype`: through float32; integers to the nearest even, saturating."""
    host = np.dtype(HOSTS[dtype])
    x = single(x)
    if host.kind not in "iu":
        with np.errstate(over="ignore"):
            return np.float32(x).astype(host)
    info = np.iinfo(host)
    if math.isnan(x):
        return host.type(0)
    if math.isinf(x):
        return host.type(info.max if x > 0 else info.min)
    return host.type(min(max(round(x), info.min), info.max))


class Tile:
    """An operand: elements at (partition, position in the flattened free dimensions)."""

    def __init__(self, array: Any, dtype: str, start: int = 0) -> None:
        self.array, self.dtype, self.start = array, dtype, start
        self.partitions = array.shape[0]
        self.free = math.prod(array.shape[1:])

    def place(self, p: int, i: int) -> tuple[int, ...]:
        """The index of free position i, last dimension fastest."""
        place = []
        for extent in reversed(self.array.shape[1:]):
            i, at = divmod(i, extent)
            place.append(at)
        return (p, *reversed(place))

    def raw(self, p: int, i: int) -> Any:
        return self.array[self.place(p, i)]

    def put_raw(self, p: int, i: int, bits: Any) -> None:
        self.array[self.place(p, i)] = bits

    def value(self, p: int, i: int) -> float:
        """The element widened to float32."""
        return single(float(self.raw(p, i)))

    def put(self, p: int, i: int, x: float) -> None:
        """Round once and write."""
        self.put_raw(p, i, rounded(x, self.dtype))

    def row(self, p: int) -> list[float]:
        return [self.value(p, i) for i in range(self.free)]


class Chosen(Tile):
    """Columns of a tile by run-time offsets: column i lies at element i of its group's list.

    A group of neighbouring partitions holds its list partition by partition within a column.
    """

    def __init__(self, base: Tile, index: Tile, columns: int, group: int) -> None:
        super().__init__(base.array, base.dtype, base.start)
        self.index, self.free, self.group = index, columns, group

    def place(self, p: int, i: int) -> tuple[int, ...]:
        first = p - p % self.group
        offset = int(self.index.raw(first + i % self.group, i // self.group))
        return super().place(p, offset)


@dataclass
class Machine:
    """What outlives an instruction, and the sizes of the core."""

    quadrant: int
    core_partitions: int
    vector: dict[int, float] = field(default_factory=dict)
    scalar: dict[int, float] = field(default_factory=dict)
    #: Elements a matmul has written: (base, address).
    groups: set[tuple[int, ...]] = field(default_factory=set)


# -- operators -------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "maximum": lambda x, y: x if x > y else y,
    "minimum": lambda x, y: x if x < y else y,
    "abs_max": lambda x, y: x if abs(x) > abs(y) else y,
    "abs_min": lambda x, y: x if abs(x) < abs(y) else y,
    "equal": lambda x, y: float(x == y),
    "not_equal": lambda x, y: float(x != y),
    "less": lambda x, y: float(x < y),
    "less_equal": lambda x, y: float(x <= y),
    "greater": lambda x, y: float(x > y),
    "greater_equal": lambda x, y: float(x >= y),
    "logical_and": lambda x, y: float(x != 0 and y != 0),
    "logical_or": lambda x, y: float(x != 0 or y != 0),
    "logical_xor": lambda x, y: float((x != 0) != (y != 0)),
}
UNARY: dict[str, Callable[[float], float]] = {
    "abs": abs,
    "square": lambda x: x * x,
    "relu": lambda x: x if x > 0 else 0.0,
    "reciprocal": lambda x: 1.0 / x if x else math.copysign(math.inf, x),
}
BITS: dict[str, Callable[[int, int], int]] = {
    "bitwise_and": lambda x, y: x & y,
    "bitwise_or": lambda x, y: x | y,
    "bitwise_xor": lambda x, y: x ^ y,
    "left_shift": lambda x, y: x << y,
    "right_shift": lambda x, y: x >> y,
    "invert": lambda x, _: ~x,
}


def arith(op: str, x: float, y: float = 0.0) -> float:
    """An arithmetic operator on float32 values, rounded to float32."""
    return single(UNARY[op](x) if op in UNARY else BINARY[op](x, y))


def bits(op: str, x: Any, y: Any, dtype: str) -> Any:
    """A bit operator on the unsigned reading of two integers of one width."""
    host = np.dtype(HOSTS[dtype])
    width = 8 * host.itemsize
    result = BITS[op](int(x) % 2**width, int(y) % 2**width) % 2**width
    if host.kind == "i" and result >= 2 ** (width - 1):
        result -= 2**width
    return host.type(result)


def ordered(x: Any, y: Any, reverse: bool) -> tuple[Any, Any]:
    return (y, x) if reverse else (x, y)


def at(operand: Any, p: int) -> float:
    """The operand of partition p: a number as float32, the element of a [P, 1] tile; None is 0."""
    if operand is None:
        return 0.0
    return operand.value(p, 0) if isinstance(operand, Tile) else single(float(operand))


def fold(op: str, start: float, elements: list[float]) -> float:
    """start op e0 op e1 ..., each step rounded to float32."""
    for x in elements:
        start = arith(op, start, x)
    return start


IDENTITY = {
    "add": 0.0, "subtract": 0.0, "multiply": 1.0, "maximum": -math.inf, "minimum": math.inf,
}  # fmt: skip


def accumulate(
    registers: dict[int, float],
    data: Tile,
    rows: list[list[float]],
    op: str,
    command: str,
    init: Any = None,
) -> list[float]:
    """Apply an accumulator command to the registers of data's partitions; return them."""
    for p in range(data.partitions):
        lane = data.start + p
        if command in ("reset", "reset_reduce"):
            registers[lane] = IDENTITY[op]
        elif command == "load_reduce":
            registers[lane] = at(init, p)
        if command in ("reduce", "reset_reduce", "load_reduce"):
            registers[lane] = fold(op, registers[lane], rows[p])
    return [registers.get(data.start + p, 0.0) for p in range(data.partitions)]


def store_lanes(result: Tile | None, lanes: list[float], negate: bool = False) -> None:
    if result is not None:
        for p, lane in enumerate(lanes):
            result.put(p, 0, -lane if negate else lane)


def write_rows(dst: Tile, rows: list[list[float]]) -> None:
    for p, row in enumerate(rows):
        for i, x in enumerate(row):
            dst.put(p, i, x)
