"""One call, made on the embedded machine and on the naive one; every byte of both compared.

A call names its operands by tiles and views of them. The tiles (`Base`) are filled with the same
bits on both sides, the instruction runs, and all tiles are compared as a whole: also what lies
around the views, which no instruction may touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
from hypothesis import strategies as st

from nki_kernels.hardware.origin import estimated
from nki_kernels.hardware.toy import TOY
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from tests.embedded.harness import HBM, HOSTS, PSUM, SBUF, back, same, tile
from tests.semantics import naive, naive_compute, naive_gen4, naive_moves
from tests.semantics.naive import Chosen, Machine, Tile
from tests.semantics.naive_moves import Rows

#: Importing these fills the table of twins.
TWIN_MODULES = (naive_compute, naive_gen4, naive_moves)
#: The toy core with the instructions of the fourth generation.
TOY4 = TOY.derive(name="toy4", generation=estimated(4, "invented"))
QUADRANT, CORE = 2, 4
PARTITIONS = 8


@dataclass(eq=False)
class Base:
    """A whole tile and the bits both machines start from."""

    bits: Any
    dtype: Any
    buffer: Any = SBUF


@dataclass(eq=False)
class Operand:
    """A view of a tile: slices, then an order of the free dimensions, then a broadcast."""

    base: Base
    key: tuple[slice, ...]
    order: tuple[int, ...] | None = None
    repeat: tuple[int, int] | None = None

    def of_tile(self, whole: Any) -> Any:
        """The view of an NkiTensor."""
        view = whole[self.key]
        if self.order is not None:
            view = view.permute(self.order)
        return view if self.repeat is None else view.broadcast(*self.repeat)

    def of_array(self, whole: Any) -> Any:
        """The view of the array beneath a naive tile."""
        view = whole[self.key]
        if self.order is not None:
            view = view.transpose(self.order)
        if self.repeat is not None:
            dim, size = self.repeat
            shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
            view = np.broadcast_to(view, shape)
        return view


@dataclass(eq=False)
class Indexed:
    """Rows of an HBM tensor at addresses known at run time: `.ap(pattern, offset, *_offset=)`.

    `index` holds one row number for each row (vector) or one number for all (scalar).
    """

    base: Base
    index: Operand
    pattern: list[list[int]]
    offset: int
    kind: str

    def of_tile(self, whole: Any, index: Any) -> Any:
        return whole.ap(self.pattern, offset=self.offset, **{f"{self.kind}_offset": index})

    def of_array(self, whole: Any, index: Any) -> Rows:
        scale = math.prod(whole.shape[1:])
        count, step = self.pattern[0][1], self.pattern[0][0]
        numbers = [int(x) for x in np.ascontiguousarray(index).reshape(-1)]
        if self.kind == "vector":
            starts = [self.offset + numbers[row] * scale for row in range(count)]
        else:
            starts = [self.offset + numbers[0] * scale + row * step for row in range(count)]
        free = [(step, number) for step, number in self.pattern[1:]]
        return Rows(whole.reshape(-1), str(self.base.dtype), starts, free)


@dataclass(eq=False)
class Indirect:
    """Columns of an operand by offsets known at run time: `.indirect(index, count)`."""

    operand: Operand
    index: Operand
    count: int

    @property
    def base(self) -> Base:
        return self.operand.base

    def of_tile(self, whole: Any, index: Any) -> Any:
        return self.operand.of_tile(whole).indirect(index, self.count)

    def of_array(self, whole: Any, index: Any) -> Chosen:
        dtype, start = str(self.base.dtype), self.operand.key[0].start or 0
        held = Tile(self.operand.of_array(whole), dtype, start)
        return Chosen(held, Tile(index, str(self.index.base.dtype)), self.count, CORE)


@dataclass
class Call:
    """An instruction's name and its arguments by name; tensors are Operands.

    An operator is written as its name in `OPERATORS`, an enum member as ("enum", member).
    """

    name: str
    arguments: dict[str, Any]
    #: Arguments the naive twin does not know (they do not change the result).
    only_embedded: dict[str, Any] = field(default_factory=dict)


OPERATORS = frozenset(
    {"op", "op0", "op1", "reduce_op", "cmp_op", "comp_op0", "comp_op1"}
)  # fmt: skip


def _bases(calls: Sequence[Call]) -> list[Base]:
    found: list[Base] = []
    for call in calls:
        for value in call.arguments.values():
            for one in value if isinstance(value, list) else [value]:
                held = [one.base] if isinstance(one, (Operand, Indexed, Indirect)) else []
                if isinstance(one, (Indexed, Indirect)):
                    held.append(one.index.base)
                found.extend(base for base in held if base not in found)
    return found


def embedded(calls: Sequence[Call], target: Any = "toy") -> list[Any]:
    """Run the calls in one kernel; return the bits of every tile afterwards."""
    bases = _bases(calls)

    def kernel(*inputs: Any) -> Any:
        tiles = {id(base): _placed(given, base) for given, base in zip(inputs, bases, strict=True)}

        def translated(name: str, value: Any) -> Any:
            if name == "srcs":
                return [translated("src", v) for v in value]
            if isinstance(value, (Indexed, Indirect)):
                index = value.index.of_tile(tiles[id(value.index.base)])
                return value.of_tile(tiles[id(value.base)], index)
            if isinstance(value, Operand):
                return value.of_tile(tiles[id(value.base)])
            if name in OPERATORS and value is not None:
                return getattr(nl, value)
            if name == "reduce_cmd":
                return nisa.reduce_cmd[value]
            if name == "perf_mode":
                return nisa.matmul_perf_mode[value]
            return value

        for call in calls:
            given = {**call.arguments, **call.only_embedded}
            getattr(nisa, call.name)(**{k: translated(k, v) for k, v in given.items()})
        return tuple(_returned(tiles[id(base)], base) for base in bases)

    # Both machines define what float32 makes of any number, valid or not; where several large
    # operands lie is not their subject.
    unchecked = Options(integers="off", domain="off", capacity="off")
    bits = tuple(b.bits for b in bases)
    return list(launch(kernel, bits, target=target, options=unchecked).outputs)


def _placed(given: Any, base: Base) -> Any:
    if base.buffer is HBM:
        copy = nl.ndarray(given.shape, base.dtype, buffer=HBM)
        nisa.dma_copy(dst=copy, src=given)
        return copy
    return tile(given, base.buffer, base.dtype)


def _returned(whole: Any, base: Base) -> Any:
    return whole if base.buffer is HBM else back(whole)


def naively(calls: Sequence[Call], *, toy: bool = True) -> list[Any]:
    """Run the twins, with the toy core's sizes or the real ones; return every tile's bits."""
    bases = _bases(calls)
    arrays = {id(base): base.bits.copy() for base in bases}
    machine = Machine(QUADRANT, CORE) if toy else Machine(32, 16)

    def translated(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (Operand, Indexed)):
            return [translated(v) for v in value]
        if isinstance(value, (Indexed, Indirect)):
            index = value.index.of_array(arrays[id(value.index.base)])
            return value.of_array(arrays[id(value.base)], index)
        if isinstance(value, Operand):
            start = value.key[0].start or 0
            return Tile(value.of_array(arrays[id(value.base)]), str(value.base.dtype), start)
        return value

    for call in calls:
        given = {k: translated(v) for k, v in call.arguments.items()}
        naive.TWINS[call.name](machine, **given)
    return [arrays[id(base)] for base in bases]


def agree(*calls: Call, target: Any = "toy", signed_zeros: bool = True) -> list[Any]:
    """Check that both machines leave the same bits in every tile; return the embedded's.

    Args:
        calls: made one after the other in one kernel.
        target: the core.
        signed_zeros: False where the documents leave the sign of a zero open (maximum of two).
    """
    got, want = embedded(calls, target), naively(calls, toy=target in ("toy", TOY4))
    for ours, theirs in zip(got, want, strict=True):
        if signed_zeros or ours.dtype.kind in "iu":
            same(ours, theirs)
        else:
            same(_plus_zero(ours), _plus_zero(theirs))
    return got


def _plus_zero(values: Any) -> Any:
    return np.where(values == 0, np.zeros_like(values), values)


# -- drawing operands ------------------------------------------------------------------------------


def filled(draw: Any, shape: tuple[int, ...], dtype: Any, most: int = 8) -> Any:
    """Bits of a tile: small multiples of 1/4 beside normal numbers; integers from their range.

    32-bit integers stay below 2^11 so that products are exact in float32: what is past that, other
    tests say.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed"))
    host = np.dtype(HOSTS[dtype])
    if host.kind in "iu":
        info = np.iinfo(host)
        low, high = max(info.min, -(2**11)), min(info.max, 2**11)
        return rng.integers(low, high, shape, endpoint=True).astype(host)
    plain = rng.integers(-4 * most, 4 * most, shape, endpoint=True) / 4
    values = np.where(rng.random(shape) < 0.5, plain, 2 * rng.standard_normal(shape))
    return np.clip(values, -most, most).astype(host)


def start_of(draw: Any, rows: int) -> int:
    """A partition at which `rows` partitions of the toy core may start."""
    step = 2 if rows <= 2 else 4 if rows <= 4 else PARTITIONS
    return draw(st.sampled_from(range(0, PARTITIONS - rows + 1, step)), label="start partition")


def factors(draw: Any, count: int, most: int = 3) -> tuple[int, ...]:
    """Free dimensions whose product is `count`."""
    shape = []
    for _ in range(draw(st.integers(0, most - 1), label="more dimensions")):
        first = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        shape.append(first)
        count //= first
    return (*shape, count)


def operand(
    draw: Any,
    rows: int,
    free: int | tuple[int, ...],
    dtype: Any,
    buffer: Any = SBUF,
    *,
    most: int = 8,
    dims: int = 3,
    start: int | None = None,
    written: bool = False,
) -> Operand:
    """A view of `rows` partitions and `free` elements somewhere in a larger tile.

    A count is factored into dimensions, sliced with steps, perhaps permuted; an operand that is
    not `written` may repeat one element along its last dimension.
    """
    shape = free if isinstance(free, tuple) else factors(draw, free, dims)
    first = start_of(draw, rows) if start is None else start
    repeat = None
    if not written and shape[-1] > 1 and draw(st.integers(0, 4), label="broadcast") == 0:
        repeat = (len(shape), shape[-1])
        shape = (*shape[:-1], 1)
    order = None
    if len(shape) > 1 and repeat is None and draw(st.booleans(), label="permuted"):
        inner = draw(st.permutations(range(len(shape))))
        order = (0, *(1 + i for i in inner))
        # The tile's dimensions are those of the view before the permutation.
        shape = tuple(shape[inner.index(i)] for i in range(len(shape)))
    steps = [draw(st.integers(1, 2)) for _ in shape] if buffer is not PSUM else [1] * len(shape)
    starts = [draw(st.integers(0, 1)) for _ in shape] if buffer is not PSUM else [0] * len(shape)
    extents = [s + step * n for s, step, n in zip(starts, steps, shape, strict=True)]
    key = (
        slice(first, first + rows),
        *(slice(s, s + step * (n - 1) + 1, step) for s, step, n in zip(starts, steps, shape,
                                                                       strict=True)),
    )  # fmt: skip
    whole = (min(PARTITIONS, first + rows + draw(st.integers(0, 1))), *extents)
    return Operand(Base(filled(draw, whole, dtype, most), dtype, buffer), key, order, repeat)


def vector(draw: Any, rows: int, dtype: Any = nl.float32, *, written: bool = False) -> Operand:
    """A [P, 1] operand."""
    return operand(draw, rows, 1, dtype, written=written)
