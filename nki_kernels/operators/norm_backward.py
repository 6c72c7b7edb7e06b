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

#: With chunks shorter than this, overlapping row tiles are slower than long chunks without (model).
_SHORTEST_OVERLAPPING = 1024

#: Room for the tiles of a chunk where row tiles overlap, as a multiple of their size. With less,
#: layer_norm's engines wait for memory: at 16384 columns it is faster without overlap (model).
_RMS_BETWEEN_ROWS, _LAYER_BETWEEN_ROWS = 1.25, 2.0

#: Shares of a chunk's columns: products on GpSimd; statistics on Vector (model, unvalidated).
_RMS_POOL_SHARE = 25 / 32
_LAYER_POOL_SHARE = 15 / 16
#: Without overlap Vector has nothing else to do while GpSimd works.
_ALONE_POOL_SHARE = 1 / 2
_VECTOR_STATS_SHARE = 3 / 4


def _blocks(columns: int, spec: CoreSpec) -> int:
    """Round up to whole blocks of the column sums, at least one."""
    return max(1, math.ceil(columns / spec.stationary_fmax)) * spec.stationary_fmax


#: The share of SBUF that tiles can take, by the bytes of an element: where 2-byte chunks lie
#: between float32 ones, the gaps between them hold nothing.
_PACKED = {2: 0.95, 4: 0.98}


def _needed(
    axes: Axes, itemsize: int, layer: bool, overlap: bool, chunk: int, ahead: int, spec: CoreSpec
) -> float:
    """Bytes of a partition that rows, the weight and the chunks in flight take.

    layer_norm keeps g in float32 and not dy. A row tile that overlaps with the next shares its
    space chunk by chunk, but for x, which two hold from the statistics on.
    """
    size, width = axes["H"], min(chunk, axes["H"])
    each = _LAYER_CHUNK_BYTES if layer else _RMS_CHUNK_BYTES
    held = max(4, itemsize) if layer else itemsize
    rows = (2 if overlap else 1) * size * itemsize + size * held
    loads = 2 * (ahead + 1) * width * itemsize
    share = (_LAYER_BETWEEN_ROWS if layer else _RMS_BETWEEN_ROWS) if overlap else 1.0
    # Float32 per chunk: two row tiles' sums and, of layer_norm, three row tiles' triples.
    sums = math.ceil(size / width) * 4 * (2 * 2 + 3 * 3 if layer else 2 * 2)
    # The column sums themselves, a column per block and parameter.
    sums += math.ceil(size / spec.stationary_fmax) * 4 * (2 if layer else 1)
    return size * itemsize + rows + share * (loads + width * each) + sums


def _fit(axes: Axes, itemsize: int, layer: bool, spec: CoreSpec) -> tuple[int, int, bool]:
    """Return (chunk, chunks ahead, overlap): overlapping row tiles before long chunks."""
    room = spec.sbuf_usable_bytes * _PACKED[itemsize] - norm.SLACK_BYTES
    least = spec.stationary_fmax
    longest = _LAYER_CHUNK if layer else _RMS_CHUNK
    for overlap in (True, False):
        count = math.ceil(axes["H"] / longest)
        while True:
            # Chunks of one length: a short last one would leave engines idle.
            chunk = _blocks(math.ceil(axes["H"] / count), spec)
            if _needed(axes, itemsize, layer, overlap, chunk, 1, spec) <= room:
                return chunk, 1, overlap
            if chunk <= (_SHORTEST_OVERLAPPING if overlap else least):
                break
            count += 1
    return least, 0, False


def _limits(layer: bool, axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    itemsize, block = as_dtype(dtype).itemsize, spec.stationary_fmax
    room = spec.sbuf_usable_bytes * _PACKED[itemsize] - norm.SLACK_BYTES

    def fits(size: int) -> bool:
        return _needed({"H": size}, itemsize, layer, False, block, 0, spec) <= room

    # The column sums of a row tile take one bank of PSUM, a column per block and parameter.
    most = block * (spec.psum_bank_bytes // (8 if layer else 4))
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
        pool=int(width * (_LAYER_POOL_SHARE if overlap else _ALONE_POOL_SHARE)),
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
