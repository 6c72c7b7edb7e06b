"""The operators `rms_norm_backward` and `layer_norm_backward`: contracts, limits and configs.

Their inputs are dy, x and weight; statistics are computed anew from x, and the bias has no part in
any gradient. All gradients are formed, whether wanted or not: dx needs the same products.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.norm.layer_norm_backward import (
    LayerNormBackwardConfig,
    layer_norm_backward,
)
from nki_kernels.kernels.norm.rms_norm_backward import RmsNormBackwardConfig, rms_norm_backward
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import norm
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = [
    "LAYER_NORM_BACKWARD",
    "RMS_NORM_BACKWARD",
    "LayerNormBackwardConfig",
    "RmsNormBackwardConfig",
]

#: Columns per instruction: long ones save fixed costs, where the float32 tiles of a chunk in flight
#: fit; layer_norm has more of them.
_RMS_CHUNK = 4096
_LAYER_CHUNK = 2048

#: Bytes per column and partition of the tiles of a chunk, dx at its widest: products, weighted
#: products, scratch, the parts of dx, and the statistics' scratch.
_RMS_CHUNK_BYTES = 4 + 4 + 2 + 4 + 4 + 2
_LAYER_CHUNK_BYTES = 4 + 4 + 4 + 2 + 2 + 4 + 4 + 2 + 2

#: Room for the tiles of a chunk between rows, as a multiple of their size; see `norm`.
_BETWEEN_ROWS = 1.25

#: Shares of a chunk's columns: products on GpSimd; statistics on Vector (model, unvalidated).
_RMS_POOL_SHARE = 25 / 32
_LAYER_POOL_SHARE = 15 / 16
_VECTOR_STATS_SHARE = 3 / 4


def _blocks(columns: int, spec: CoreSpec) -> int:
    """Round up to whole blocks of the column sums, at least one."""
    return max(1, math.ceil(columns / spec.stationary_fmax)) * spec.stationary_fmax


def _room(spec: CoreSpec) -> int:
    """Bytes of a partition for rows and chunks; a few hundredths are lost in gaps between them."""
    return spec.sbuf_usable_bytes * 97 // 100 - norm.SLACK_BYTES


def _needed(axes: Axes, itemsize: int, layer: bool, overlap: bool, chunk: int, ahead: int) -> float:
    """Bytes of a partition that rows, the weight and the chunks in flight take.

    layer_norm keeps g in float32 and not dy. A row tile that overlaps with the next shares its
    space chunk by chunk, but for x, which two hold from the statistics on.
    """
    size, width = axes["H"], min(chunk, axes["H"])
    each = _LAYER_CHUNK_BYTES if layer else _RMS_CHUNK_BYTES
    held = max(4, itemsize) if layer else itemsize
    rows = (2 if overlap else 1) * size * itemsize + size * held
    loads = 2 * (ahead + 1) * width * itemsize
    share = _BETWEEN_ROWS if overlap else 1
    # Float32 per chunk: two row tiles' sums and, of layer_norm, three row tiles' triples.
    sums = math.ceil(size / width) * 4 * (2 * 2 + 3 * 3 if layer else 2 * 2)
    return size * itemsize + rows + share * (loads + width * each) + sums


def _fit(axes: Axes, itemsize: int, layer: bool, spec: CoreSpec) -> tuple[int, int, bool]:
    """Return (chunk, chunks ahead, overlap): overlapping row tiles before long chunks."""
    room, least = _room(spec), spec.stationary_fmax
    longest = _LAYER_CHUNK if layer else _RMS_CHUNK
    for overlap in (True, False):
        count = math.ceil(axes["H"] / longest)
        while True:
            # Chunks of one length: a short last one would leave engines idle.
            chunk = _blocks(math.ceil(axes["H"] / count), spec)
            if _needed(axes, itemsize, layer, overlap, chunk, 1) <= room:
                return chunk, 1, overlap
            if chunk == least:
                break
            count += 1
    return least, 0, False


def _limits(layer: bool, axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    itemsize, block = as_dtype(dtype).itemsize, spec.stationary_fmax
    room = _room(spec)

    def fits(size: int) -> bool:
        return _needed({"H": size}, itemsize, layer, False, block, 0) <= room

    # The column sums of a parameter take one bank of PSUM, a column per block.
    most = block * (spec.psum_bank_bytes // 4)
    most = bisect.bisect_left(range(1, most + 1), True, key=lambda size: not fits(size))
    if axes["H"] <= most:
        return ()
    reason = (
        f"H is {axes['H']}; a row of {dtype} of x and dy and the weight must fit one partition of "
        f"SBUF, at most H = {most} on {spec.name}; split the row, or use a narrower dtype"
    )
    return (reason,)


def _rms_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return _limits(False, axes, dtype, spec)


def _layer_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return _limits(True, axes, dtype, spec)


def _rms_configure(axes: Axes, dtype: str, spec: CoreSpec) -> RmsNormBackwardConfig:
    chunk, ahead, overlap = _fit(axes, as_dtype(dtype).itemsize, False, spec)
    return RmsNormBackwardConfig(
        chunk=chunk,
        pool=int(min(chunk, axes["H"]) * _RMS_POOL_SHARE),
        ahead=ahead,
        overlap=overlap,
        hwdge=spec.generation >= 3,
    )


def _layer_configure(axes: Axes, dtype: str, spec: CoreSpec) -> LayerNormBackwardConfig:
    chunk, ahead, overlap = _fit(axes, as_dtype(dtype).itemsize, True, spec)
    width = min(chunk, axes["H"])
    return LayerNormBackwardConfig(
        chunk=chunk,
        pool=int(width * _LAYER_POOL_SHARE),
        vector_stats=int(width * _VECTOR_STATS_SHARE),
        ahead=ahead,
        overlap=overlap,
        hwdge=spec.generation >= 3,
    )


_FIELDS = {"chunk": 1, "pool": 0, "ahead": 0}


def _rms_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, RmsNormBackwardConfig):
        return (norm.another_config(config, "an RmsNormBackwardConfig"),)
    return norm.field_problems(config, _FIELDS, spec)


def _layer_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, LayerNormBackwardConfig):
        return (norm.another_config(config, "a LayerNormBackwardConfig"),)
    least = {**_FIELDS, "vector_stats": 0}
    return norm.field_problems(config, least, spec)


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the float32 roundings of a term: along the row, then along the rows.

    Along a row as in the forward pass; over rows PE adds one tile in some order and one tile after
    the other.
    """
    tiles = math.ceil(axes["N"] / spec.partitions)
    return norm.chain(axes, spec) + min(axes["N"], spec.partitions) + tiles


def _rms_flops(axes: Axes) -> int:
    return 10 * axes["N"] * axes["H"]


def _layer_flops(axes: Axes) -> int:
    return 16 * axes["N"] * axes["H"]


def _rms_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    eps = norm.eps_of("rms_norm", options)
    return *inputs, eps, norm.out_dtype_of(inputs, options), config


def _layer_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    eps = norm.eps_of("layer_norm", options)
    return *inputs, eps, norm.out_dtype_of(inputs, options), config


_INPUTS = (Operand("dy", ("N", "H")), norm.X, norm.WEIGHT)
_DX, _DWEIGHT, _DBIAS = (
    Operand("dx", ("N", "H")),
    Operand("dweight", ("H",)),
    Operand("dbias", ("H",)),
)

RMS_NORM_BACKWARD = Operator(
    name="rms_norm_backward",
    summary="dx, dweight of rms_norm: dx = r * (g - n * mean_h(g * n)), dweight = sum_n(dy * n)",
    inputs=_INPUTS,
    outputs=(_DX, _DWEIGHT),
    axis_order=("N", "H"),
    dtypes=norm.DTYPES,
    flops=_rms_flops,
    roundings=1,
    chain=_chain,
    configure=_rms_configure,
    reduced=norm.reduced,
    kernel=rms_norm_backward,
    arguments=_rms_arguments,
    limits=_rms_limits,
    option_problems=norm.option_problems,
    config_problems=_rms_config_problems,
)

LAYER_NORM_BACKWARD = Operator(
    name="layer_norm_backward",
    summary="dx, dweight, dbias of layer_norm: dx = r * (g - mean_h(g) - n * mean_h(g * n))",
    inputs=_INPUTS,
    outputs=(_DX, _DWEIGHT, _DBIAS),
    axis_order=("N", "H"),
    dtypes=norm.DTYPES,
    flops=_layer_flops,
    roundings=1,
    chain=_chain,
    configure=_layer_configure,
    reduced=norm.reduced,
    kernel=layer_norm_backward,
    arguments=_layer_arguments,
    limits=_layer_limits,
    option_problems=norm.option_problems,
    config_problems=_layer_config_problems,
)
