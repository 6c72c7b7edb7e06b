"""The operators `rms_norm` and `layer_norm`: contracts, limits and the choice of their configs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.norm.layer_norm import LayerNormConfig, layer_norm
from nki_kernels.kernels.norm.rms_norm import RmsNormConfig, rms_norm
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["DEFAULT_EPS", "LAYER_NORM", "RMS_NORM", "LayerNormConfig", "RmsNormConfig"]

DEFAULT_EPS = {"rms_norm": 1e-6, "layer_norm": 1e-5}

#: Columns per instruction. The fixed 100 ns of an instruction are 2 % of 4096 columns; beyond that
#: a longer instruction only lengthens the tail of the last row tile.
_CHUNK = 4096

#: The shortest chunk worth its instructions: below, their fixed cost doubles the time.
_SHORT_CHUNK = 128

_FLOAT32_MAX = float(np.finfo(np.float32).max)

#: SBUF kept free for the small tiles: statistics, epsilon, alignment.
SLACK_BYTES = 2048

#: Room for the tiles of a chunk in layer_norm where row tiles overlap, as a multiple of their size:
#: two chunks are in the making, and what is free in pieces holds no chunk.
_IN_FLIGHT = 1.6

#: With chunks shorter than this, overlapping row tiles are slower than long chunks without (model).
_SHORTEST_OVERLAPPING = 1024

#: Shares of the columns: statistics on Vector (bn_stats), scaling on Scalar with the shift on
#: GpSimd, and both on GpSimd. Scanned at 4096 and 2880 columns of bf16 on trn2 (model,
#: unvalidated): at [4096, 4096] Vector, Scalar and GpSimd are then busy 235, 235 and 222 of 264 us.
#: They rest on GpSimd's assumed two-input rate.
_VECTOR_STATS_SHARE = 1 / 8
_POOL_SHIFT_SHARE, _POOL_SHIFT_BY_STATS = 1 / 16, 3 / 4
_POOL_SCALE_SHARE = 0.40

#: From this many bn_stats instructions on, a chunk's statistics come in whole ones: a short one
#: costs Vector as much again.
_WHOLE = 4

#: Rows shorter than this many bn_stats instructions leave all statistics to Vector: two Scalar
#: passes of 0.3 us start-up each would cost more.
_SHORT_ROW = 2

#: Rows of rms_norm share partitions up to one bn_stats instruction: beyond, the sums along a row
#: cost Vector more than instructions of their own (model: 91 against 95 us at [8192, 512], 131
#: against 104 at 768). More columns together only lengthen first and last tile (88 us at
#: [32768, 128], 94 with 4096).
_COLUMNS_TOGETHER = 2048

#: Shares of rows that share a partition: scaled on Scalar; multiplied by the weight on GpSimd.
#: Scanned at 128 to 512 columns on trn2 (model, unvalidated).
_SCALAR_ROWS, _POOL_ROWS = 0.6, 0.75

#: Bytes of a chunk per column and partition: rms_norm's result at its widest and scratch, and
#: beside them layer_norm's float32 intermediates.
_RMS_CHUNK_BYTES = 4 + 2
_LAYER_CHUNK_BYTES = 4 + 4 + 4 + 2


@dataclass(frozen=True, slots=True)
class Extra:
    """What a variant holds beside the rows and parameters of the plain norm.

    Attributes:
        sources: arrays that are loaded row by row.
        column: bytes per column of a row tile: a sum at its widest.
        shared: bytes per column that all row tiles share.
    """

    sources: int = 1
    column: int = 0
    shared: int = 0


PLAIN = Extra()
#: A residual, and the sum with it.
ADDED = Extra(sources=2, column=4)


def _rms_fit(
    axes: Axes, itemsize: int, spec: CoreSpec, extra: Extra = PLAIN
) -> tuple[int, int] | None:
    """Return (chunk, row tiles ahead): one ahead if it fits, then long chunks; or None."""
    least = min(axes["H"], _SHORT_CHUNK)
    for ahead in (1, 0):
        rows = (1 + ahead) * extra.sources * itemsize + extra.column
        column = itemsize + extra.shared + rows
        room = spec.sbuf_usable_bytes - SLACK_BYTES - column * axes["H"]
        chunk = min(axes["H"], _CHUNK)
        while chunk > least and chunk * _RMS_CHUNK_BYTES > room:
            chunk = max(chunk // 2, least)
        if chunk * _RMS_CHUNK_BYTES <= room:
            return chunk, ahead
    return None


def _layer_needed(
    size: int, itemsize: int, chunk: int, overlap: bool, spec: CoreSpec, extra: Extra
) -> float:
    """Bytes of a partition that rows, parameters, chunks in flight and statistics take.

    A row tile that overlaps with the next shares its space chunk by chunk, and loads are a chunk
    ahead of that.
    """
    width = min(chunk, size)
    loads = (2 if overlap else 0) * width * itemsize * extra.sources
    if extra.sources > 1:
        # Only the sum is held for the length of a row.
        rows = 2 * size * itemsize + size * extra.column + loads + 2 * width * itemsize
    else:
        rows = 3 * size * itemsize + loads
    # Triples of float32: one for Scalar's columns, two per bn_stats; the first rows have most.
    columns = max(math.ceil(width / 2), _stats_columns(size, width, spec))
    triples = 1 + 2 * math.ceil(columns / spec.bn_stats_fmax)
    sums = math.ceil(size / width) * 12 * triples * (3 if overlap else 2)
    return rows + (_IN_FLIGHT if overlap else 1.0) * width * _LAYER_CHUNK_BYTES + sums


def _layer_fit(
    size: int, itemsize: int, spec: CoreSpec, extra: Extra = PLAIN
) -> tuple[int, bool] | None:
    """Return (chunk, overlap): overlapping row tiles before long chunks; None if none fits."""
    room = spec.sbuf_usable_bytes - SLACK_BYTES
    for count in range(math.ceil(size / _CHUNK), math.ceil(size / _SHORTEST_OVERLAPPING) + 1):
        # Chunks of one length: a short last one would leave engines idle.
        chunk = math.ceil(size / count)
        if _layer_needed(size, itemsize, chunk, True, spec, extra) <= room:
            return chunk, True
    chunk = _CHUNK
    while chunk >= min(_SHORT_CHUNK, spec.bn_stats_fmax):
        if _layer_needed(size, itemsize, chunk, False, spec, extra) <= room:
            return min(chunk, size), False
        chunk //= 2
    return None


def _stats_columns(size: int, width: int, spec: CoreSpec) -> int:
    """Return how many columns of a chunk leave their statistics to Vector."""
    if size <= _SHORT_ROW * spec.bn_stats_fmax:
        return width
    if width < _WHOLE * spec.bn_stats_fmax:
        return round(width * _VECTOR_STATS_SHARE)
    pieces = math.ceil(width * _VECTOR_STATS_SHARE / spec.bn_stats_fmax)
    return min(width, pieces * spec.bn_stats_fmax)


def _too_long(axes: Axes, dtype: str, most: int, spec: CoreSpec) -> tuple[str, ...]:
    if axes["H"] <= most:
        return ()
    reason = (
        f"H is {axes['H']}; a row of {dtype} and its parameters must fit one partition of SBUF, at "
        f"most H = {most} on {spec.name}; split the row, or use a narrower dtype"
    )
    return (reason,)


def piece(chunk: int) -> int:
    """A quarter of a chunk, but no shorter than a chunk worth its instructions."""
    return min(chunk, max(_SHORT_CHUNK, -(-chunk // 4)))


def _longest(fits: Callable[[int], bool], spec: CoreSpec) -> int:
    sizes = range(1, spec.sbuf_usable_bytes + 1)
    return bisect.bisect_left(sizes, True, key=lambda size: not fits(size))


def rms_limits(axes: Axes, dtype: str, spec: CoreSpec, extra: Extra = PLAIN) -> tuple[str, ...]:
    itemsize = as_dtype(dtype).itemsize

    def fits(size: int) -> bool:
        return _rms_fit({"H": size}, itemsize, spec, extra) is not None

    return () if fits(axes["H"]) else _too_long(axes, dtype, _longest(fits, spec), spec)


def layer_limits(axes: Axes, dtype: str, spec: CoreSpec, extra: Extra = PLAIN) -> tuple[str, ...]:
    itemsize = as_dtype(dtype).itemsize

    def fits(size: int) -> bool:
        return _layer_fit(size, itemsize, spec, extra) is not None

    return () if fits(axes["H"]) else _too_long(axes, dtype, _longest(fits, spec), spec)


def rms_configure(axes: Axes, dtype: str, spec: CoreSpec, extra: Extra = PLAIN) -> RmsNormConfig:
    itemsize = as_dtype(dtype).itemsize
    # A row that does not fit is refused elsewhere; its config is asked for all the same.
    found = _rms_fit(axes, itemsize, spec, extra)
    chunk, ahead = found or (min(axes["H"], _SHORT_CHUNK), 0)
    together = _rows_together(axes["H"], itemsize, spec, extra)
    return RmsNormConfig(
        chunk=chunk,
        piece=piece(chunk),
        ahead=ahead,
        together=together,
        scalar=round(together * _SCALAR_ROWS),
        pool=round(together * _POOL_ROWS),
        hwdge=spec.generation >= 3,
    )


def _rows_together(size: int, itemsize: int, spec: CoreSpec, extra: Extra) -> int:
    """Return how many short rows share a partition; 0 for rows that do not."""
    if size > spec.bn_stats_fmax:
        return 0
    # Three tiles of x, two of each float32 intermediate, and two results at their widest.
    each = size * (3 * itemsize * extra.sources + 2 * (4 + 4 + 4 + extra.column))
    room = (spec.sbuf_usable_bytes - SLACK_BYTES - size * (itemsize + extra.shared)) // each
    together = min(_COLUMNS_TOGETHER // size, room)
    return together if together > 1 else 0


def layer_configure(
    axes: Axes, dtype: str, spec: CoreSpec, extra: Extra = PLAIN
) -> LayerNormConfig:
    size = axes["H"]
    found = _layer_fit(size, as_dtype(dtype).itemsize, spec, extra)
    chunk, overlap = found or (min(size, _SHORT_CHUNK), False)
    short = size <= _SHORT_ROW * spec.bn_stats_fmax
    stats = _stats_columns(size, chunk, spec)
    return LayerNormConfig(
        vector_stats=stats,
        # The fewer statistics Scalar has, the more it can scale.
        pool_shift=0 if short else int(chunk * _POOL_SHIFT_SHARE + stats * _POOL_SHIFT_BY_STATS),
        pool_scale=0 if short else int(chunk * _POOL_SCALE_SHARE),
        chunk=chunk,
        piece=piece(chunk),
        ahead=1 if overlap else 0,
        overlap=overlap,
        hwdge=spec.generation >= 3,
    )


def option_problems(options: Options) -> tuple[str, ...]:
    eps = options.get("eps")
    if eps is None:
        return ()
    if isinstance(eps, np.floating):
        eps = float(eps)  # float16 could not be compared with the largest float32
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if number and 0 <= eps <= _FLOAT32_MAX:
        return ()
    reason = (
        f"eps is {options['eps']!r}; a number of at least 0 that float32 can hold is needed; "
        f"pass for example {DEFAULT_EPS['rms_norm']}"
    )
    return (reason,)


def rms_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, RmsNormConfig):
        return (another_config(config, "an RmsNormConfig"),)
    short = {"together": 0, "scalar": 0, "pool": 0}
    wrong = field_problems(config, {"chunk": 1, "piece": 1, "ahead": 0, **short}, spec)
    if wrong or max(config.scalar, config.pool) <= config.together:
        return wrong
    reason = (
        f"config.scalar is {config.scalar} and config.pool {config.pool}; they count among the "
        f"config.together = {config.together} rows of a partition"
    )
    return (reason,)


def layer_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, LayerNormConfig):
        return (another_config(config, "a LayerNormConfig"),)
    columns = {"vector_stats": 0, "pool_shift": 0, "pool_scale": 0}
    least = {"chunk": 1, "piece": 1, "ahead": 0, **columns}
    return field_problems(config, least, spec)


def another_config(config: Any, wanted: str) -> str:
    """Return why a config of another kind is refused."""
    return f"config is {config!r}; {wanted} is needed; pass one, or None to choose it"


def field_problems(config: Any, least: dict[str, int], spec: CoreSpec) -> tuple[str, ...]:
    """Return what is wrong with the integers, by name and least value, and with `hwdge`."""
    reasons = []
    for name, smallest in least.items():
        value = getattr(config, name)
        if type(value) is not int or value < smallest:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {smallest}")
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge needs gen3; {spec.name} is gen{spec.generation}; set it to False"
        )
    return tuple(reasons)


def chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the float32 roundings a term of the statistics passes through, and those after them.

    A sum over H in order makes H - 1; the product, the mean's division, the merge of partial
    statistics (at most one per bn_stats chunk), rsqrt, and two operations with two operands each
    add fewer than 16 more per merged chunk pair.
    """
    return axes["H"] + 2 * math.ceil(axes["H"] / spec.bn_stats_fmax) + 16


def rms_flops(axes: Axes) -> int:
    return 4 * axes["N"] * axes["H"]


def layer_flops(axes: Axes) -> int:
    return 8 * axes["N"] * axes["H"]


def reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Keep the row length, and two row tiles, the last as ragged as in full."""
    tile = spec.partitions
    rows = axes["N"]
    return {"N": rows if rows <= 2 * tile else tile + (rows % tile or tile), "H": axes["H"]}


def eps_of(op: str, options: Options) -> float:
    value = options.get("eps")
    return DEFAULT_EPS[op] if value is None else float(value)


def out_dtype_of(inputs: Sequence[Any], options: Options) -> str:
    return str(as_dtype(options.get("out_dtype") or inputs[0].dtype))


def _rms_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    x, weight = inputs
    return x, weight, eps_of("rms_norm", options), out_dtype_of(inputs, options), config


def _layer_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    x, weight, bias = inputs
    return x, weight, bias, eps_of("layer_norm", options), out_dtype_of(inputs, options), config


X = Operand("x", ("N", "H"))
WEIGHT = Operand("weight", ("H",), optional=True)
BIAS = Operand("bias", ("H",), optional=True)
Y = (Operand("y", ("N", "H")),)
DTYPES = ("bfloat16", "float16", "float32")

RMS_NORM = Operator(
    name="rms_norm",
    summary="y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h]",
    inputs=(X, WEIGHT),
    outputs=Y,
    axis_order=("N", "H"),
    dtypes=DTYPES,
    flops=rms_flops,
    roundings=1,
    chain=chain,
    configure=rms_configure,
    reduced=reduced,
    kernel=rms_norm,
    arguments=_rms_arguments,
    limits=rms_limits,
    option_problems=option_problems,
    config_problems=rms_config_problems,
)

LAYER_NORM = Operator(
    name="layer_norm",
    summary="y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h]",
    inputs=(X, WEIGHT, BIAS),
    outputs=Y,
    axis_order=("N", "H"),
    dtypes=DTYPES,
    flops=layer_flops,
    roundings=1,
    chain=chain,
    configure=layer_configure,
    reduced=reduced,
    kernel=layer_norm,
    arguments=_layer_arguments,
    limits=layer_limits,
    option_problems=option_problems,
    config_problems=layer_config_problems,
)
