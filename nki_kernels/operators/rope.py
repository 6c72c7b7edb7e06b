"""The operator `rope`: rotary position embedding; `rope_batched` has angles per batch entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.rope import RopeConfig
from nki_kernels.kernels.attention.rope import rope as rope_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["ROPES", "RopeConfig", "rope"]

DTYPES = ("bfloat16", "float16", "float32")

#: Bytes of one head's rows that a partition holds. 4 KiB would do for the descriptors; longer tiles
#: pay the gaps between instructions less often (32 heads of 4096 x 128: 312 us, now 299).
_PARTITION_BYTES = 8192

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
        kernel=rope_kernel,
        arguments=_arguments,
        limits=_limits,
        option_problems=option_problems,
        config_problems=_config_problems,
    )


#: By whether the angles differ between the entries of a batch.
ROPES: dict[bool, Operator] = {batched: _operator(batched) for batched in (False, True)}


def rope(
    x: npt.NDArray[Any],
    cos: npt.NDArray[Any],
    sin: npt.NDArray[Any],
    *,
    interleaved: bool = False,
    inverse: bool = False,
    config: RopeConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Rotary position embedding: rotate pairs of columns by the angle of their row.

    y1 = x1 * cos - x2 * sin;  y2 = x2 * cos + x1 * sin

    In float32, rounded once. Pair f is columns (f, F + f); columns from 2 F on (partial rotation)
    are passed on. The gradient is the inverse rotation: `rope(dy, cos, sin, inverse=True)`.

    Dimensions:
        B, H, S: batch, heads, rows, >= 1    D: row length    F: pairs, 1 <= F <= D / 2

    Args:
        x: [B, H, S, D], dense row-major, bfloat16 | float16 | float32.
        cos: [S, F] float32, or [B, S, F] where the sequences of a batch differ in position.
        sin: likewise.
        interleaved: pair f is columns (2 f, 2 f + 1) instead.
        inverse: rotate by the negative angle.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        [B, H, S, D], a new array of the dtype of `x`.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, more than D / 2
            pairs, or a D too large for SBUF.
        DtypeError: a dtype that is not supported.
        OptionError: an `interleaved` or `inverse` that is no truth value.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.attention.rope`.

    Example:
        >>> import numpy as np
        >>> x = np.array([1, 2], np.float32).reshape(1, 1, 1, 2)
        >>> rope(x, np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))
        array([[[[-2.,  1.]]]], dtype=float32)
    """
    op = ROPES[getattr(cos, "ndim", 2) == 3]
    options = {"interleaved": interleaved, "inverse": inverse}
    run = op.launch((x, cos, sin), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
