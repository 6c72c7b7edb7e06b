"""The operator `rope`: rotary position embedding; `rope_batched` has angles per batch entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.rope import RopeConfig, rope
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["ROPES", "RopeConfig"]

DTYPES = ("bfloat16", "float16", "float32")

#: Bytes of one head's rows that a partition holds: descriptors of 4 KiB run at 92 % and more.
_PARTITION_BYTES = 4096

#: The share of the rows that GpSimd takes: its float32 rate is 0.6 of Vector's (model).
_POOL_SHARE = 3 / 8

#: Bytes per column and partition of a tile in work: the row itself and four float32 products, each
#: of half a row, twice (one for each engine's turn), and the angles, which two spans may hold.
_WORK_BYTES = 4 * 2 * 2 + 4 * 2


def _bytes(axes: Axes, itemsize: int, ahead: int) -> int:
    """Bytes of a partition that one row per partition takes, with `ahead` loads."""
    return axes["D"] * (itemsize * (ahead + 3) + _WORK_BYTES)


def _rows(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Rows per partition of the row form, and all rows of a head in the form by heads."""
    if axes["S"] < spec.partitions:
        return axes["S"]
    wanted = max(1, _PARTITION_BYTES // (axes["D"] * itemsize))
    fitting = spec.sbuf_usable_bytes // _bytes(axes, itemsize, 1)
    return max(1, min(wanted, fitting, axes["S"] // spec.partitions))


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> RopeConfig:
    itemsize = as_dtype(dtype).itemsize
    rows = _rows(axes, itemsize, spec)
    ahead = 2 if rows * _bytes(axes, itemsize, 2) <= spec.sbuf_usable_bytes else 0
    pool = round(rows * _POOL_SHARE)
    return RopeConfig(rows=rows, pool=pool, ahead=ahead, hwdge=spec.generation >= 3)


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if 2 * axes["F"] > axes["D"]:
        reasons.append(
            f"F is {axes['F']}, {2 * axes['F']} columns in pairs, and D is {axes['D']}; at most "
            f"F = D / 2 = {axes['D'] // 2} pairs are in a row; cut cos and sin"
        )
    itemsize = as_dtype(dtype).itemsize
    rows = _rows(axes, itemsize, spec)
    if rows * _bytes(axes, itemsize, 0) > spec.sbuf_usable_bytes:
        most = spec.sbuf_usable_bytes // (rows * _bytes({"D": 1}, itemsize, 0))
        reasons.append(
            f"D is {axes['D']}; {rows} rows of {dtype} must fit one partition of SBUF, at most "
            f"D = {most} on {spec.name} at this S; split the columns that are not rotated off"
        )
    return tuple(reasons)


def option_problems(options: Options) -> tuple[str, ...]:
    """Return why `interleaved` or `inverse` is no truth value."""
    return tuple(
        f"{name} is {options[name]!r}; True or False is needed; pass one of them"
        for name in ("interleaved", "inverse")
        if not isinstance(options.get(name, False), bool)
    )


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, RopeConfig):
        return (f"config is a {type(config).__name__}; a RopeConfig is needed; pass one, or None",)
    reasons = [
        f"config.{name} is {getattr(config, name)}; at least {least} is needed; raise it"
        for name, least in (("rows", 1), ("pool", 0), ("ahead", 0))
        if getattr(config, name) < least
    ]
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge is True; {spec.name} has no hardware descriptor engine; set it False"
        )
    return tuple(reasons)


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    interleaved, inverse = options.get("interleaved", False), options.get("inverse", False)
    return *inputs, interleaved, inverse, config


def _flops(axes: Axes) -> int:
    return 6 * axes["B"] * axes["H"] * axes["S"] * axes["F"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """A product and a sum."""
    return 2


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Two batches, three heads, and the rows of a whole tile and its ragged rest."""
    tile = spec.partitions * config.rows
    rows = axes["S"] if axes["S"] <= tile else tile + axes["S"] % tile
    return {**axes, "B": min(axes["B"], 2), "H": min(axes["H"], 3), "S": rows}


def _operator(batched: bool) -> Operator:
    letters = ("B", "S", "F") if batched else ("S", "F")
    return Operator(
        name="rope_batched" if batched else "rope",
        summary="y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin on pairs of columns",
        inputs=(
            Operand("x", ("B", "H", "S", "D")),
            Operand("cos", letters, dtype="float32"),
            Operand("sin", letters, dtype="float32"),
        ),
        outputs=(Operand("y", ("B", "H", "S", "D")),),
        axis_order=("B", "H", "S", "D", "F"),
        dtypes=DTYPES,
        flops=_flops,
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=_reduced,
        kernel=rope,
        arguments=_arguments,
        limits=_limits,
        option_problems=option_problems,
        config_problems=_config_problems,
    )


#: By whether the angles differ between the entries of a batch.
ROPES: dict[bool, Operator] = {batched: _operator(batched) for batched in (False, True)}
