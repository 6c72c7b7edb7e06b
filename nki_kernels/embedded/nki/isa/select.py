"""Pattern generation on GpSimd: iota."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.core import VirtualRegister
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import COMPUTE, BufferIs, Operands, Rule
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where


@dataclass(frozen=True)
class _Pattern(Rule):
    """Up to four [step, count] pairs whose counts multiply to the elements per partition."""

    def problem(self, ops: Operands) -> str | None:
        pattern, dst = ops["pattern"], ops["dst"]
        pairs = isinstance(pattern, tuple) and all(
            isinstance(p, tuple)
            and len(p) == 2
            and all(isinstance(v, (int, np.integer)) for v in p)
            for p in pattern
        )
        if not pairs or not 1 <= len(pattern) <= 4:
            return f"pattern {pattern!r}; it must be 1 to 4 pairs [step, count] of ints"
        count = math.prod(n for _, n in pattern)
        if min(n for _, n in pattern) < 1 or count != dst.free_size:
            return (
                f"pattern {[list(p) for p in pattern]} makes {count} values, dst {list(dst.shape)} "
                f"holds {dst.free_size} per partition; the counts must multiply to that"
            )
        if not all(-(2**31) <= step < 2**31 for step, _ in pattern):
            return f"pattern {[list(p) for p in pattern]}; steps are integers of 32 bits"
        for name in ("offset", "channel_multiplier"):
            value = ops[name]
            if not isinstance(value, (int, np.integer, VirtualRegister)):
                return f"{name}={value!r}; it must be an int (offset also a register)"
        return None

    def __str__(self) -> str:
        return "`pattern` 1 to 4 pairs [step, count]; counts multiply to N"


def affine(
    partitions: int, pattern: Sequence[Sequence[int]], offset: int, channel_multiplier: int
) -> Array:
    """Return int32 [P, N]: offset + p * channel_multiplier + sum(index * step), wrapping."""
    total = np.int64(offset) + np.arange(partitions, dtype=np.int64)[:, None] * int(
        channel_multiplier
    )
    line = np.zeros(1, np.int64)
    for step, count in pattern:
        line = (line[:, None] + np.arange(count, dtype=np.int64) * int(step)).reshape(-1)
    wrapped: Array = (total + line[None, :]).astype(np.int32)
    return wrapped


@instruction(
    engines=(Engine.gpsimd,),
    reads=(),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", "sbuf", remedy="GpSimd reaches SBUF only"), _Pattern()),
    cost=work.stream("iota"),
    lists=("pattern",),
    unkeyed=("offset", "channel_multiplier"),
    source="nki.isa.iota; cost: 150 + N cycles (NKI 2.26)",
)
def iota(
    ctx: Context,
    dst: NkiTensor,
    pattern: Any,
    offset: Any = 0,
    channel_multiplier: int = 0,
    name: str | None = None,
) -> None:
    """dst[p, w, z, y, x] = offset + p*multiplier + w*step_w + z*step_z + y*step_y + x*step_x.

    `multiplier` is channel_multiplier. 32-bit integer arithmetic, then one cast to dst. p counts
    from 0 in the view of dst (the documents leave open whether it counts physical partitions).
    """
    start = offset.read() if isinstance(offset, VirtualRegister) else int(offset)
    # Here and not in a rule: verdicts are not remembered by the values of these two.
    for operand, value in (("offset", start), ("channel_multiplier", channel_multiplier)):
        if not -(2**31) <= value < 2**31:
            raise RuleViolation(
                f"nisa.iota at {where(ctx.run.kernel_site())}: {operand}={value}; it must fit 32 "
                "bits, -2147483648 to 2147483647: write the wrapped value"
            )
    values = affine(dst.shape[0], pattern, start, channel_multiplier)
    target = dst.mem.array(dst.region, dst.dtype.host)
    dtypes.store(target, values.reshape(target.shape))
