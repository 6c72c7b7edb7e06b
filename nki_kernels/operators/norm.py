"""The operators `rms_norm` and `layer_norm`: contracts, limits and the choice of their configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

#: Room for the tiles of a chunk that are alive with the row tiles of layer_norm, as a multiple of
#: their size: they lie between row tiles, and what is free in pieces holds no row. With 1, one row
#: length in ten between 12,000 and 26,000 did not fit; with 1.5, none of 3,500 on three cores.
_BETWEEN_ROWS = 1.5

#: Shares of the columns: statistics on Vector (bn_stats), scaling on Scalar with the shift on
#: GpSimd, and both on GpSimd. Scanned in steps of 1/32 at [4096, 4096] bf16 on trn2 (model,
#: unvalidated): with these Vector, Scalar and GpSimd are busy 241, 232 and 220 of 267 us. They rest
#: on GpSimd's assumed two-input rate.
_VECTOR_STATS_SHARE = 1 / 8
_POOL_SHIFT_SHARE = 0.15
_POOL_SCALE_SHARE = 0.40

#: Rows shorter than this many bn_stats instructions leave all statistics to Vector: two Scalar
#: passes of 0.3 us start-up each would cost more.
_SHORT_ROW = 2


def _chunk_bytes(chunk: int, middles: int) -> int:
    """Bytes of a chunk per partition: result at its widest, float32 intermediates, scratch."""
    return chunk * (4 + 4 * middles + 2)


def _fit(
    axes: Axes, itemsize: int, vectors: int, middles: int, extra: int, spec: CoreSpec
) -> tuple[int, int]:
    """Return (chunk, extra row tiles): as many of `extra` row tiles as fit, then long chunks."""
    least = min(axes["H"], _SHORT_CHUNK)
    for more in range(extra, -1, -1):
        room = spec.sbuf_usable_bytes - SLACK_BYTES - (1 + vectors + more) * axes["H"] * itemsize
        share = _BETWEEN_ROWS if middles and more else 1
        chunk = min(axes["H"], _CHUNK)
        while chunk > least and share * _chunk_bytes(chunk, middles) > room:
            chunk = max(chunk // 2, least)
        if share * _chunk_bytes(chunk, middles) <= room:
            return chunk, more
    return least, 0


def _limits(vectors: int, middles: int, axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    itemsize = as_dtype(dtype).itemsize
    row, column = (1 + vectors) * itemsize, _chunk_bytes(1, middles)
    room = spec.sbuf_usable_bytes - SLACK_BYTES
    # Rows shorter than a short chunk are one chunk, longer ones need one.
    most = max(min(_SHORT_CHUNK, room // (row + column)), (room - _SHORT_CHUNK * column) // row)
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


def _rms_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return _limits(1, 0, axes, dtype, spec)


def _layer_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return _limits(2, 2, axes, dtype, spec)


def _rms_configure(axes: Axes, dtype: str, spec: CoreSpec) -> RmsNormConfig:
    chunk, ahead = _fit(axes, as_dtype(dtype).itemsize, 1, 0, 1, spec)
    return RmsNormConfig(chunk=chunk, piece=piece(chunk), ahead=ahead, hwdge=spec.generation >= 3)


def _layer_configure(axes: Axes, dtype: str, spec: CoreSpec) -> LayerNormConfig:
    chunk, more = _fit(axes, as_dtype(dtype).itemsize, 2, 2, 2, spec)
    size, step = axes["H"], spec.bn_stats_fmax
    if size <= _SHORT_ROW * step:
        stats, shift, scale = size, 0, 0
    else:
        stats = round(size * _VECTOR_STATS_SHARE / step) * step
        shift, scale = int(size * _POOL_SHIFT_SHARE), int(size * _POOL_SCALE_SHARE)
    return LayerNormConfig(
        vector_stats=stats,
        pool_shift=shift,
        pool_scale=scale,
        chunk=chunk,
        piece=piece(chunk),
        ahead=max(0, more - 1),
        lag=min(1, more),
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


def _rms_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, RmsNormConfig):
        return (another_config(config, "an RmsNormConfig"),)
    return field_problems(config, {"chunk": 1, "piece": 1, "ahead": 0}, spec)


def _layer_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, LayerNormConfig):
        return (another_config(config, "a LayerNormConfig"),)
    columns = {"vector_stats": 0, "pool_shift": 0, "pool_scale": 0}
    least = {"chunk": 1, "piece": 1, "ahead": 0, **columns}
    return field_problems(config, least, spec, switches=("lag",))


def another_config(config: Any, wanted: str) -> str:
    """Return why a config of another kind is refused."""
    return f"config is {config!r}; {wanted} is needed; pass one, or None to choose it"


def field_problems(
    config: Any, least: dict[str, int], spec: CoreSpec, switches: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return what is wrong with the integers, by name and least value, and with `hwdge`.

    `switches` are 0 or 1.
    """
    reasons = []
    for name, smallest in least.items():
        value = getattr(config, name)
        if type(value) is not int or value < smallest:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {smallest}")
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge needs gen3; {spec.name} is gen{spec.generation}; set it to False"
        )
    for name in switches:
        value = getattr(config, name)
        if type(value) is not int or value not in (0, 1):
            reasons.append(f"config.{name} is {value!r}; allowed are 0 and 1")
    return tuple(reasons)


def chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the float32 roundings a term of the statistics passes through, and those after them.

    A sum over H in order makes H - 1; the product, the mean's division, the merge of partial
    statistics (at most one per bn_stats chunk), rsqrt, and two operations with two operands each
    add fewer than 16 more per merged chunk pair.
    """
    return axes["H"] + 2 * math.ceil(axes["H"] / spec.bn_stats_fmax) + 16


def _rms_flops(axes: Axes) -> int:
    return 4 * axes["N"] * axes["H"]


def _layer_flops(axes: Axes) -> int:
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
_BIAS = Operand("bias", ("H",), optional=True)
_Y = (Operand("y", ("N", "H")),)
DTYPES = ("bfloat16", "float16", "float32")

RMS_NORM = Operator(
    name="rms_norm",
    summary="y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h]",
    inputs=(X, WEIGHT),
    outputs=_Y,
    axis_order=("N", "H"),
    dtypes=DTYPES,
    flops=_rms_flops,
    roundings=1,
    chain=chain,
    configure=_rms_configure,
    reduced=reduced,
    kernel=rms_norm,
    arguments=_rms_arguments,
    limits=_rms_limits,
    option_problems=option_problems,
    config_problems=_rms_config_problems,
)

LAYER_NORM = Operator(
    name="layer_norm",
    summary="y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h]",
    inputs=(X, WEIGHT, _BIAS),
    outputs=_Y,
    axis_order=("N", "H"),
    dtypes=DTYPES,
    flops=_layer_flops,
    roundings=1,
    chain=chain,
    configure=_layer_configure,
    reduced=reduced,
    kernel=layer_norm,
    arguments=_layer_arguments,
    limits=_layer_limits,
    option_problems=option_problems,
    config_problems=_layer_config_problems,
)
