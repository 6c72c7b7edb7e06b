"""Matrix products, one operator per way of storing A and B, and the choice of their config.

`matmul` and, with a batch axis in front of all operands, `bmm` take A [M, K] and B [K, N]. The
suffixes _nt, _tn and _tt (BLAS's letters for A and B) say which operand is stored transposed. They
share one kernel, and `nki_kernels.ops.matmul` chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.epilogue import Epilogue
from nki_kernels.kernels.matmul.kernel import Layout, MatmulConfig, matmul
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["MATMULS", "MatmulConfig"]

#: Shares of SBUF: transposed slices of A kept across waves, and slices in flight. The rest holds
#: output rows and leaves the placement room to rotate.
_HELD_SHARE = 0.4
_FLIGHT_SHARE = 0.35

#: Slices in flight beyond which nothing more hides: 8 cover 14 us of Tensor engine, several times
#: the 2 us latency of a DMA.
_MAX_PREFETCH = 8

#: Slices run tile by tile at the end of a wave. With two, the first accumulator is done
#: 7 * 2 * 217 ns = 3 us before the last, longer than two evictions take.
_TAIL = 2

#: Matmuls of one pass of the device loop: with loads and evictions a program of two passes stays
#: near 100,000 instructions.
_PASS_MATMULS = 45_000

#: PSUM banks PE transposes need: one being filled, one being evicted.
_TRANSPOSE_BANKS = 2

#: The suffix of an operator by (transpose_a, transpose_b).
_SUFFIXES = {
    (False, False): "", (False, True): "_nt", (True, False): "_tn", (True, True): "_tt",
}  # fmt: skip


def flops(axes: Axes) -> int:
    """Return the useful operations of a product, of all batches."""
    return 2 * axes.get("B", 1) * axes["M"] * axes["N"] * axes["K"]


def chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the roundings one product a·b passes through.

    One for the product (exact for 2-byte inputs, rounded for float32), at most one per row of the
    contraction tile inside the array, one per tile added in PSUM.
    """
    depth = min(axes["K"], spec.partitions)
    return 1 + depth + math.ceil(axes["K"] / spec.partitions)


def configure(
    layout: Layout, axes: Axes, dtype: str, spec: CoreSpec, tail: int = _TAIL
) -> MatmulConfig:
    """Choose the config of a product for the way its operands are stored."""
    itemsize = as_dtype(dtype).itemsize
    transpose = "dma" if itemsize == 2 else "pe"
    by_pe = transpose == "pe" and _transposes(layout)
    wave_m, wave_n = _wave(layout, axes, by_pe, spec)
    a_bytes = wave_m * spec.stationary_fmax * itemsize
    b_bytes = wave_n * spec.moving_fmax * itemsize
    waves_n = math.ceil(axes["N"] / (wave_n * spec.moving_fmax))
    held = a_bytes * math.ceil(axes["K"] / spec.partitions)
    # A transposing slice exists twice for a while: as rows and transposed.
    twice = transpose == "pe"
    slice_bytes = b_bytes * (1 + (twice and layout.transpose_b))
    slice_bytes += a_bytes * (1 + (twice and not layout.transpose_a))
    room = int(spec.sbuf_usable_bytes * _FLIGHT_SHARE) // slice_bytes
    return MatmulConfig(
        wave_m=wave_m,
        wave_n=wave_n,
        prefetch=max(1, min(_MAX_PREFETCH, room)),
        # One row tile is bound by its loads: PE must not keep work for after the last of them.
        tail=tail if wave_m > 1 else min(tail, _TAIL),
        hold_a=waves_n > 1 and held <= int(spec.sbuf_usable_bytes * _HELD_SHARE),
        transpose=transpose,
        hwdge=spec.generation >= 3,
        evict_scalar=spec.generation >= 3,
        rows=_pass_rows(axes, wave_m, spec),
    )


def _pass_rows(axes: Axes, wave_m: int, spec: CoreSpec) -> int:
    """Return the rows of a pass of the device loop: whole waves, from the matmuls of one."""
    tiles = math.ceil(axes["N"] / spec.moving_fmax) * math.ceil(axes["K"] / spec.partitions)
    return wave_m * spec.stationary_fmax * max(1, _PASS_MATMULS // (wave_m * tiles))


def _wave(layout: Layout, axes: Axes, by_pe: bool, spec: CoreSpec) -> tuple[int, int]:
    """Return the row and column tiles of a wave: as many banks as useful, fewest loaded columns."""
    tiles_m = math.ceil(axes["M"] / spec.stationary_fmax)
    tiles_n = math.ceil(axes["N"] / spec.moving_fmax)
    banks = spec.psum_banks - (_TRANSPOSE_BANKS if by_pe else 0)
    # A slice of A that PE transposes fills one bank: a higher wave's A is not held at K = 4096, and
    # transposing it for every wave takes float32 4096^3 from 7223 to 8451 us. With B flipped as
    # well it is the other way round: B is transposed once per wave of rows.
    low = by_pe and not layout.transpose_b
    highest = spec.moving_fmax // spec.stationary_fmax if low else banks
    shapes = [
        (m, n)
        for m in range(1, min(tiles_m, banks, highest) + 1)
        for n in range(1, min(tiles_n, banks // m) + 1)
    ]
    m, n = min(
        shapes,
        key=lambda s: (-s[0] * s[1], s[0] * spec.stationary_fmax + s[1] * spec.moving_fmax),
    )
    # Equal waves instead of full ones and a thin last one, which would be bound by its loads.
    return (
        math.ceil(tiles_m / math.ceil(tiles_m / m)),
        math.ceil(tiles_n / math.ceil(tiles_n / n)),
    )


def config_problems(layout: Layout, config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    """Return why a MatmulConfig cannot run."""
    if not isinstance(config, MatmulConfig):
        return (f"config is {config!r}; a MatmulConfig is needed; pass one, or None to choose it",)
    reasons = []
    for name, least in (("wave_m", 1), ("wave_n", 1), ("prefetch", 1), ("tail", 0), ("rows", 0)):
        value = getattr(config, name)
        if type(value) is not int or value < least:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {least}")
    if config.transpose not in ("dma", "pe"):
        reasons.append(f"config.transpose is {config.transpose!r}; allowed are 'dma' and 'pe'")
    if not reasons:
        reasons += _hardware_problems(layout, config, as_dtype(dtype).itemsize, spec)
    return tuple(reasons)


def _transposes(layout: Layout) -> bool:
    """Tell whether an operand must be transposed on the way in."""
    return layout.transpose_b or not layout.transpose_a


def _hardware_problems(
    layout: Layout, config: MatmulConfig, itemsize: int, spec: CoreSpec
) -> list[str]:
    reasons = []
    by_pe = _transposes(layout) and config.transpose == "pe"
    banks = spec.psum_banks - (_TRANSPOSE_BANKS if by_pe else 0)
    if config.wave_m * config.wave_n > banks:
        reasons.append(
            f"config.wave_m * config.wave_n is {config.wave_m * config.wave_n}; {spec.name} has "
            f"{banks} PSUM banks for accumulators with transpose={config.transpose!r}; make the "
            "wave smaller"
        )
    if _transposes(layout) and not by_pe and itemsize != 2:
        reasons.append(
            f"config.transpose is 'dma' for {itemsize}-byte elements; a DMA transposes matmul "
            "operands of 2 bytes; use 'pe'"
        )
    if spec.generation < 3 and (config.hwdge or config.evict_scalar):
        reasons.append(
            f"config.hwdge and config.evict_scalar need gen3; {spec.name} is gen{spec.generation}; "
            "set both to False"
        )
    return reasons


def reduced(axes: Axes, config: MatmulConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two batches, two waves per axis and one slice more than the tail, edges as ragged."""
    blocks = {
        "M": config.wave_m * spec.stationary_fmax,
        "N": config.wave_n * spec.moving_fmax,
        "K": (config.tail + 1) * spec.partitions,
    }
    sizes = {letter: two_blocks(axes[letter], block) for letter, block in blocks.items()}
    return sizes | ({"B": min(2, axes["B"])} if "B" in axes else {})


def two_blocks(size: int, block: int) -> int:
    """Return `size`, or one block and what is left of the last one."""
    return size if size <= 2 * block else block + (size % block or block)


def _arguments(
    layout: Layout, inputs: Sequence[Any], options: Options, config: MatmulConfig
) -> tuple[Any, ...]:
    a, b = inputs
    epilogue = Epilogue(str(as_dtype(options.get("out_dtype") or a.dtype)))
    return a, b, None, None, layout, epilogue, config


def stored(letters: str, transposed: bool) -> tuple[str, ...]:
    """Return the axes of an operand, swapped when it is stored transposed."""
    return tuple(reversed(letters)) if transposed else tuple(letters)


def _operator(name: str, layout: Layout, batch: tuple[str, ...]) -> Operator:
    a = batch + stored("MK", layout.transpose_a)
    b = batch + stored("KN", layout.transpose_b)
    left, right, total = (", ".join(x).lower() for x in (a, b, (*batch, "M", "N")))
    return Operator(
        name=name,
        summary=f"c[{total}] = sum_k a[{left}] * b[{right}], accumulated in float32",
        inputs=(Operand("a", a), Operand("b", b)),
        outputs=(Operand("c", (*batch, "M", "N")),),
        axis_order=(*batch, "M", "N", "K"),
        dtypes=("bfloat16", "float16", "float32"),
        flops=flops,
        roundings=1,
        chain=chain,
        configure=partial(configure, layout),
        reduced=reduced,
        kernel=matmul,
        arguments=partial(_arguments, layout),
        config_problems=partial(config_problems, layout),
    )


#: Every product by (batched, transpose_a, transpose_b).
MATMULS: dict[tuple[bool, bool, bool], Operator] = {
    (batched, transpose_a, transpose_b): _operator(
        ("bmm" if batched else "matmul") + _SUFFIXES[transpose_a, transpose_b],
        Layout(transpose_a, transpose_b),
        ("B",) if batched else (),
    )
    for batched in (False, True)
    for transpose_a, transpose_b in _SUFFIXES
}
