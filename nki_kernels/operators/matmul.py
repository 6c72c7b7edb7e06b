"""The operator `matmul`: C = A·B, its contract and the choice of its tuning config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

#: Share of SBUF the operand panels may take; the rest holds output tiles and prefetched slices.
_PANEL_SHARE = 0.75


class MatmulConfig(NamedTuple):
    """Tuning of the matmul kernel. No field changes a result. A tuple of plain values: NKI-safe.

    Attributes:
        block_m: rows of A whose transpose stays in SBUF while B streams past.
        block_n: columns of B that stay in SBUF together.
        block_k: contraction length held in SBUF at once (K when the panels fit).
        transpose: how A reaches its transposed layout: "dma" (2-byte dtypes) or "pe".
    """

    block_m: int
    block_n: int
    block_k: int
    transpose: str


def _flops(axes: Axes) -> int:
    return 2 * axes["M"] * axes["N"] * axes["K"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the roundings one product a·b passes through.

    One for the product (exact for 2-byte inputs, rounded for float32), at most one per row of the
    contraction tile inside the array, one per tile added in PSUM, one for a block added in SBUF.
    """
    depth = min(axes["K"], spec.partitions)
    return 1 + depth + math.ceil(axes["K"] / spec.partitions) + 1


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> MatmulConfig:
    itemsize = as_dtype(dtype).itemsize
    tile_m, tile_n, tile_k = spec.stationary_fmax, spec.moving_fmax, spec.partitions
    m = _round_up(axes["M"], tile_m)
    n = _round_up(axes["N"], tile_n)
    k = _round_up(axes["K"], tile_k)
    budget = int(spec.sbuf_usable_bytes * _PANEL_SHARE)
    # One contraction row of a panel sits in one partition: extent · K/partitions bytes each.
    block_k = k
    while block_k > tile_k and (tile_m + tile_n) * (block_k // tile_k) * itemsize > budget:
        block_k = _round_up(block_k // 2, tile_k)
    columns = budget // (block_k // tile_k * itemsize)
    block_n = min(n, max(tile_n, columns // 2 // tile_n * tile_n))
    block_m = min(m, max(tile_m, (columns - block_n) // tile_m * tile_m))
    return MatmulConfig(block_m, block_n, block_k, "dma" if itemsize == 2 else "pe")


def _round_up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _reduced(axes: Axes, config: MatmulConfig) -> dict[str, int]:
    """Keep two blocks per axis, the second as ragged as the last block of the full problem."""
    blocks = {"M": config.block_m, "N": config.block_n, "K": config.block_k}
    return {letter: _two_blocks(axes[letter], block) for letter, block in blocks.items()}


def _two_blocks(size: int, block: int) -> int:
    return size if size <= 2 * block else block + (size % block or block)


def _kernel() -> Any:
    from nki_kernels.kernels.matmul.kernel import matmul

    return matmul


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
    kernel=_kernel,
    arguments=_arguments,
)
