"""Pseudo random numbers: rng, rand2, dropout, set_rng_seed, rand_set_state, rand_get_state.

The contract is statistical: the device's sequences are not public. Each engine has one generator,
owned by the run (`machine/generators.py`): GpSimd one XORWOW state a lane, Vector four. A run that
seeds nothing starts from a fixed seed, so runs repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.alu import NumberOrVector, is_number, per_partition

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.core import Run, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.generators import WORDS, Xorwow
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import (
    COMPUTE,
    BufferIs,
    DtypeIn,
    Operands,
    PerPartition,
    Rule,
    SameDtype,
    SameExtent,
)
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import StreamWork

_ON_CHIP = ("sbuf", "psum")
_WHOLE = (
    dtypes.int8, dtypes.int16, dtypes.int32, dtypes.uint8, dtypes.uint16, dtypes.uint32,
)  # fmt: skip
_RAND2 = (
    dtypes.float8_e4m3, dtypes.float8_e5m2, dtypes.float16, dtypes.bfloat16, dtypes.float32,
    dtypes.tfloat32, *_WHOLE,
)  # fmt: skip
#: States of a lane (nki.isa.rand_set_state: 6 words on GpSimd, 24 on Vector).
STATES = {Engine.gpsimd: 1, Engine.vector: 4}


def generator(run: Run, engine: Engine) -> Xorwow:
    """Return the run's generator of an engine, made on first use."""
    found = run.generators.get(engine)
    if found is None:
        key = (run.core, engine.value)
        found = run.generators[engine] = Xorwow(run.spec.partitions, STATES[engine], key)
    return found


def _words(run: Run, engine: Engine, dst: NkiTensor) -> Array:
    """Return 32 random bits for each element of dst, in its shape."""
    drawn = generator(run, engine).draw(dst.start_partition, dst.shape[0], dst.free_size)
    return drawn.reshape(dst.shape)


def _uniform(words: Array) -> Array:
    """Return float32 in [0, 1): the upper 24 bits, each a multiple of 2**-24."""
    result: Array = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return result


def _state(engine: Engine) -> str:
    return f"{engine.name}_random"


def _advances(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (_state(ops.engine),), (_state(ops.engine),)


def _sets(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), (_state(ops.engine),)


def _tells(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (_state(ops.engine),), ()


def _taking(law: str) -> Callable[[Operands], StreamWork]:
    """Cost of an instruction that reads seeds and writes no tensor."""

    def build(ops: Operands) -> StreamWork:
        seeds = ops["src_seeds"]
        shape = work.operand(seeds)
        return StreamWork(law, "", seeds.free_size, seeds.shape[0], (shape,), shape)

    return build


@dataclass(frozen=True)
class _Generation(Rule):
    """GpSimd generates from gen3 on; Vector's state can be set and read from `vector` on."""

    vector: int

    def since(self) -> int:
        """Return the first generation on which one of the two engines has it."""
        return min(3, self.vector)

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        needed = 3 if ops.engine is Engine.gpsimd else self.vector
        if ops.spec.generation >= needed:
            return None
        return (
            f"{ops.opcode} on the {ops.engine.name} engine of {ops.spec.name}; it needs "
            f"gen{needed}: use another engine, or another target"
        )

    def __str__(self) -> str:
        return f"GpSimd from gen3, Vector from gen{self.vector}"


@instruction(
    engines=(Engine.vector, Engine.gpsimd),
    reads=(),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), DtypeIn("dst", _WHOLE), _Generation(vector=2)),
    cost=work.stream("rng"),
    hidden=_advances,
    source="nki.isa.rng; cost: N cycles (no published formula)",
)
def rng(
    ctx: Context, dst: NkiTensor, engine: Engine = Engine.vector, name: str | None = None
) -> None:
    """dst[p, f] = the low bits, as many as dst has, of 32 random bits of lane p.

    Lanes are numbered by partition of the tile.
    """
    target = dst.mem.array(dst.region, dst.dtype.host)
    bits = np.dtype(f"u{dst.dtype.itemsize}")
    np.copyto(target, _words(ctx.run, ctx.engine, dst).astype(bits).view(dst.dtype.host))


@dataclass(frozen=True)
class _Range(Rule):
    """From gen4; numbers with min < max."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 4

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        if ops.spec.generation < self.since():
            return f"rand2 on {ops.spec.name}; it needs gen4: use nisa.rng and scale its bits"
        low, high = ops["min"], ops["max"]
        if is_number(low) and is_number(high) and not low < high:
            return f"min={low!r} and max={high!r}; min must be smaller: swap them"
        return None

    def __str__(self) -> str:
        return "gen4; `min` smaller than `max`"


@instruction(
    engines=(Engine.vector,),
    reads=("min", "max"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        DtypeIn("dst", _RAND2),
        PerPartition("min", "dst"),
        PerPartition("max", "dst"),
        NumberOrVector("min", float32=True),
        NumberOrVector("max", float32=True),
        _Range(),
    ),
    cost=work.stream("rand2", vectors=("min", "max")),
    hidden=_advances,
    source="nki.isa.rand2; cost: N cycles (no published formula)",
)
def rand2(ctx: Context, dst: NkiTensor, min: Any, max: Any, name: str | None = None) -> None:
    """dst[p, f] = min[p] + u * (max[p] - min[p]), u uniform in [0, 1), in float32, one rounding.

    u is a multiple of 2**-24. A result that rounds past max is max. min < max is not
    checked for tiles; the documents leave anything else open.
    """
    run = ctx.run
    low = per_partition(min, dst.ndim, run, "a")
    high = per_partition(max, dst.ndim, run, "b")
    values = low + _uniform(_words(run, ctx.engine, dst)) * (high - low)
    write_values(dst, np.minimum(values, high))


@dataclass(frozen=True)
class _Probability(Rule):
    """`prob` a number from 0 to 1, or a [P, 1] float tile; float32 for integer data."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        prob, data = ops["prob"], ops["data"]
        if isinstance(prob, NkiTensor):
            if data.dtype.is_integer and prob.dtype != dtypes.float32:
                return f"prob is {prob.dtype} for {data.dtype} data; it must be float32"
            if not prob.dtype.is_float:
                return f"prob is {prob.dtype}; it must be a float type"
        elif not is_number(prob) or not 0 <= prob <= 1:
            return f"prob={prob!r}; it must be a number from 0 to 1 or a float [P, 1] tile"
        return None

    def __str__(self) -> str:
        return "`prob` 0 to 1, or a float [P, 1] tile (float32 for integer data)"


@instruction(
    engines=(Engine.vector,),
    reads=("data", "prob"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data"),
        SameDtype("dst", "data"),
        PerPartition("prob", "data"),
        _Probability(),
    ),
    cost=work.stream("dropout", data=("data",), vectors=("prob",)),
    hidden=_advances,
    source="nki.isa.dropout; cost: max(64, N) cycles (NKI 2.26)",
)
def dropout(
    ctx: Context, dst: NkiTensor, data: NkiTensor, prob: Any, name: str | None = None
) -> None:
    """dst[p, f] = 0 with probability prob[p], else data[p, f] bit for bit.

    What is kept is not scaled up (the documents mention no scaling). An element is dropped where
    u < prob, u uniform in [0, 1): prob 0 keeps all, 1 drops all.
    """
    run = ctx.run
    drops = _uniform(_words(run, ctx.engine, data)) < per_partition(prob, data.ndim, run, "a")
    source, target = data.mem.bits(data.region), dst.mem.bits(dst.region)
    kept = np.where(drops, source.dtype.type(0), source)
    np.copyto(target, kept.reshape(target.shape))


@dataclass(frozen=True)
class _Seed(Rule):
    """One 32-bit element."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        seeds = ops["src_seeds"]
        if seeds.shape == (1, 1) and seeds.dtype.itemsize == 4:
            return None
        return (
            f"src_seeds {list(seeds.shape)} {seeds.dtype}; it must be one 32-bit element [1, 1]: "
            "slice it"
        )

    def __str__(self) -> str:
        return "`src_seeds` [1, 1] of 32 bits"


@instruction(
    engines=(Engine.vector,),
    reads=("src_seeds",),
    writes=(),
    rules=(*COMPUTE, _Seed()),
    cost=_taking("set_rng_seed"),
    hidden=_sets,
    source="nki.isa.set_rng_seed; cost: one element (no published formula)",
)
def set_rng_seed(ctx: Context, src_seeds: NkiTensor, name: str | None = None) -> None:
    """Seed every lane of Vector's generator from 32 bits: equal seeds repeat what follows."""
    generator(ctx.run, ctx.engine).seed([int(src_seeds.mem.bits(src_seeds.region)[0, 0])])


@dataclass(frozen=True)
class _Words(Rule):
    """A 2-D uint32 tile with the words of a lane in each partition."""

    operand: str

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        view = ops[self.operand]
        count = STATES[ops.engine] * WORDS
        if view.ndim == 2 and view.shape[1] == count and view.dtype == dtypes.uint32:
            return None
        return (
            f"{self.operand} {list(view.shape)} {view.dtype}; the {ops.engine.name} engine has "
            f"{count} words of state a lane: use uint32 [P, {count}]"
        )

    def __str__(self) -> str:
        return f"`{self.operand}` uint32 [P, 6] on GpSimd, [P, 24] on Vector"


@instruction(
    engines=(Engine.gpsimd, Engine.vector),
    reads=("src_seeds",),
    writes=(),
    rules=(*COMPUTE, BufferIs("src_seeds", "sbuf"), _Generation(vector=4), _Words("src_seeds")),
    cost=_taking("rand_set_state"),
    hidden=_sets,
    source="nki.isa.rand_set_state; cost: N cycles (no published formula)",
)
def rand_set_state(
    ctx: Context,
    src_seeds: NkiTensor,
    engine: Engine = Engine.gpsimd,
    name: str | None = None,
) -> None:
    """State of lane p = src_seeds[p, :], word for word: x, y, z, w, v, d of each XORWOW state.

    Words are taken as they are: pass mixed ones, or what rand_get_state gave. Other lanes keep
    their state.
    """
    values = src_seeds.mem.array(src_seeds.region, np.uint32)
    first = src_seeds.start_partition
    lanes = generator(ctx.run, ctx.engine).state[first : first + src_seeds.shape[0]]
    np.copyto(lanes, values.reshape(lanes.shape))


@instruction(
    engines=(Engine.gpsimd, Engine.vector),
    reads=(),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), _Generation(vector=4), _Words("dst")),
    cost=work.stream("rand_get_state"),
    hidden=_tells,
    source="nki.isa.rand_get_state; cost: N cycles (no published formula)",
)
def rand_get_state(
    ctx: Context, dst: NkiTensor, engine: Engine = Engine.gpsimd, name: str | None = None
) -> None:
    """dst[p, :] = state of lane p; rand_set_state with it continues the sequence from here."""
    first = dst.start_partition
    lanes = generator(ctx.run, ctx.engine).state[first : first + dst.shape[0]]
    target = dst.mem.array(dst.region, np.uint32)
    np.copyto(target, lanes.reshape(target.shape))
