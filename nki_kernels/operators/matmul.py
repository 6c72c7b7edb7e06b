"""The operator `matmul`: C = A·B, its contract and the choice of its tuning config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.kernel import MatmulConfig, matmul
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["MATMUL", "MatmulConfig"]

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

#: PSUM banks PE transposes need: one being filled, one being evicted.
_TRANSPOSE_BANKS = 2


def _flops(axes: Axes) -> int:
    return 2 * axes["M"] * axes["N"] * axes["K"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the roundings one product a·b passes through.

    One for the product (exact for 2-byte inputs, rounded for float32), at most one per row of the
    contraction tile inside the array, one per tile added in PSUM.
    """
    depth = min(axes["K"], spec.partitions)
    return 1 + depth + math.ceil(axes["K"] / spec.partitions)


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> MatmulConfig:
    itemsize = as_dtype(dtype).itemsize
    transpose = "dma" if itemsize == 2 else "pe"
    wave_m, wave_n = _wave(axes, itemsize, transpose, spec)
    a_bytes = wave_m * spec.stationary_fmax * itemsize
    b_bytes = wave_n * spec.moving_fmax * itemsize
    waves_n = math.ceil(axes["N"] / (wave_n * spec.moving_fmax))
    held = a_bytes * math.ceil(axes["K"] / spec.partitions)
    # A transposing slice exists twice for a while: as rows and transposed.
    slice_bytes = b_bytes + (2 * a_bytes if transpose == "pe" else a_bytes)
    room = int(spec.sbuf_usable_bytes * _FLIGHT_SHARE) // slice_bytes
    return MatmulConfig(
        wave_m=wave_m,
        wave_n=wave_n,
        prefetch=max(1, min(_MAX_PREFETCH, room)),
        tail=_TAIL,
        hold_a=waves_n > 1 and held <= int(spec.sbuf_usable_bytes * _HELD_SHARE),
        transpose=transpose,
        hwdge=spec.generation >= 3,
        evict_scalar=spec.generation >= 3,
    )


def _wave(axes: Axes, itemsize: int, transpose: str, spec: CoreSpec) -> tuple[int, int]:
    """Return the row and column tiles of a wave: as many banks as useful, fewest loaded columns."""
    tiles_m = math.ceil(axes["M"] / spec.stationary_fmax)
    tiles_n = math.ceil(axes["N"] / spec.moving_fmax)
    banks = spec.psum_banks
    limit_m = tiles_m
    if transpose == "pe":
        banks -= _TRANSPOSE_BANKS
        limit_m = min(tiles_m, _transposed_tiles(itemsize, spec))
    shapes = [
        (m, n)
        for m in range(1, min(limit_m, banks) + 1)
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


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, MatmulConfig):
        return (f"config is {config!r}; a MatmulConfig is needed; pass one, or None to choose it",)
    reasons = []
    for name, least in (("wave_m", 1), ("wave_n", 1), ("prefetch", 1), ("tail", 0)):
        value = getattr(config, name)
        if type(value) is not int or value < least:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {least}")
    if config.transpose not in ("dma", "pe"):
        reasons.append(f"config.transpose is {config.transpose!r}; allowed are 'dma' and 'pe'")
    if not reasons:
        reasons += _hardware_problems(config, as_dtype(dtype).itemsize, spec)
    return tuple(reasons)


def _hardware_problems(config: MatmulConfig, itemsize: int, spec: CoreSpec) -> list[str]:
    reasons = []
    by_pe = config.transpose == "pe"
    banks = spec.psum_banks - (_TRANSPOSE_BANKS if by_pe else 0)
    if config.wave_m * config.wave_n > banks:
        reasons.append(
            f"config.wave_m * config.wave_n is {config.wave_m * config.wave_n}; {spec.name} has "
            f"{banks} PSUM banks for accumulators with transpose={config.transpose!r}; make the "
            "wave smaller"
        )
    if by_pe and config.wave_m > _transposed_tiles(itemsize, spec):
        reasons.append(
            f"config.wave_m is {config.wave_m}; a transposed slice of {itemsize}-byte elements "
            f"must fit one PSUM bank, at most {_transposed_tiles(itemsize, spec)} row tiles on "
            f"{spec.name}; make the wave lower"
        )
    if not by_pe and itemsize != 2:
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


def _transposed_tiles(itemsize: int, spec: CoreSpec) -> int:
    """Row tiles whose transposed slice fits one PSUM bank (gen2 widens it to float32)."""
    width = 4 if spec.generation == 2 else itemsize
    return spec.psum_bank_bytes // (spec.stationary_fmax * width)


def _reduced(axes: Axes, config: MatmulConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two waves per axis and one slice more than the tail, the last as ragged as in full."""
    blocks = {
        "M": config.wave_m * spec.stationary_fmax,
        "N": config.wave_n * spec.moving_fmax,
        "K": (config.tail + 1) * spec.partitions,
    }
    return {letter: _two_blocks(axes[letter], block) for letter, block in blocks.items()}


def _two_blocks(size: int, block: int) -> int:
    return size if size <= 2 * block else block + (size % block or block)


def _arguments(inputs: Sequence[Any], options: Options, config: MatmulConfig) -> tuple[Any, ...]:
    a, b = inputs
    return a, b, str(as_dtype(options.get("out_dtype") or a.dtype)), config


MATMUL = Operator(
    name="matmul",
    summary="c[m, n] = sum_k a[m, k] * b[k, n], accumulated in float32",
    inputs=(Operand("a", ("M", "K")), Operand("b", ("K", "N"))),
    outputs=(Operand("c", ("M", "N")),),
    axis_order=("M", "N", "K"),
    dtypes=("bfloat16", "float16", "float32"),
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=matmul,
    arguments=_arguments,
    config_problems=_config_problems,
)
