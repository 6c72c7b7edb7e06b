"""The operator `grouped_matmul`: its contract and the choice of its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.moe.grouped import GroupedConfig, grouped_matmul
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.norm import another_config, field_problems, out_dtype_of

__all__ = ["GROUPED_MATMUL", "GroupedConfig"]

#: The passes of a group are counted in float32, with a factor of 4 to spare.
_MOST_ROWS = 2**22

#: Row tiles per pass of the device loop at most: 512 rows keep PE busy for longer than the loop's
#: barrier takes, and the last pass of a group is half empty on average.
_MOST_TILES = 4

#: Columns of a panel at most, in banks of PSUM.
_MOST_BANKS = 4

_SLACK_BYTES = 512


def _slices(axes: Axes, spec: CoreSpec) -> int:
    return math.ceil(axes["K"] / spec.partitions)


def _row_bytes(axes: Axes, itemsize: int, block: int, spec: CoreSpec) -> int:
    """Bytes per partition of a block of rows: this panel's and the next one's, and turned."""
    return block * (2 * axes["K"] + _slices(axes, spec) * spec.partitions) * itemsize


def _room(axes: Axes, itemsize: int, block: int, spec: CoreSpec) -> int:
    bounds = 4 * 5 * (axes["G"] + 1) + 4 * 8 * _MOST_TILES
    rows = _row_bytes(axes, itemsize, block, spec)
    return spec.sbuf_usable_bytes - _SLACK_BYTES - bounds - rows


def _column_bytes(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Bytes per partition of a column: two panels of weights, two results at their widest."""
    return 2 * _slices(axes, spec) * itemsize + 2 * 4


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["M"] >= _MOST_ROWS:
        reasons.append(f"M is {axes['M']}; at most {_MOST_ROWS - 1} rows are counted; split them")
    itemsize = as_dtype(dtype).itemsize
    least = min(axes["N"], spec.moving_fmax // 4)
    need, room = least * _column_bytes(axes, itemsize, spec), _room(axes, itemsize, 1, spec)
    if need > room:
        reasons.append(
            f"K is {axes['K']} with N = {axes['N']} and G = {axes['G']}; a tile of rows and "
            f"{least} columns of two panels of weights must fit SBUF of {spec.name} ({need} bytes "
            f"per partition where {max(room, 0)} are left); split K, N or the groups"
        )
    return tuple(reasons)


def _width(axes: Axes, itemsize: int, block: int, spec: CoreSpec) -> int:
    """Return the columns of a panel for a block of rows, 0 where none fits."""
    fitting = _room(axes, itemsize, block, spec) // _column_bytes(axes, itemsize, spec)
    most = min(axes["N"], fitting, _MOST_BANKS * spec.moving_fmax)
    # Equal panels instead of full ones and a thin last one.
    return math.ceil(axes["N"] / math.ceil(axes["N"] / most)) if most > 0 else 0


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> GroupedConfig:
    """Weigh the barriers of many short passes against the padding of the last, half empty one."""
    itemsize = as_dtype(dtype).itemsize

    def cost(block: int) -> float:
        rows = block * spec.partitions
        passes = axes["M"] / rows + axes["G"] / 2
        panels = math.ceil(axes["N"] / _width(axes, itemsize, block, spec))
        product = 2 * rows * axes["K"] * axes["N"] / (spec.peak_tflops(dtype) * 1e3)
        return passes * (panels * spec.sync.loop_iteration_ns + product)

    blocks = [1 << power for power in range(_MOST_TILES.bit_length())]
    fitting = [block for block in blocks if _width(axes, itemsize, block, spec) > 0]
    block = min(fitting, key=cost)
    width = _width(axes, itemsize, block, spec)
    return GroupedConfig(block=block, width=width, hwdge=spec.generation >= 3)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, GroupedConfig):
        return (another_config(config, "a GroupedConfig"),)
    reasons = list(field_problems(config, {"block": 1, "width": 1}, spec))
    if not reasons and config.block & (config.block - 1):
        reasons.append(f"config.block is {config.block}; it must be a power of two")
    return tuple(reasons)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    offsets = inputs[2]
    if not isinstance(offsets, np.ndarray):
        return ()
    rows = inputs[0].shape[0]
    reasons = []
    steps = np.diff(offsets.astype(np.int64), prepend=0)
    if (steps < 0).any():
        at = int((steps < 0).argmax())
        before = 0 if at == 0 else int(offsets[at - 1])
        reasons.append(
            f"offsets[{at}] is {int(offsets[at])} after {before}; ends of consecutive groups do "
            "not decrease; pass np.cumsum(counts)"
        )
    if offsets.max() > rows:
        reasons.append(
            f"offsets reach {int(offsets.max())}; a has M = {rows} rows; end the last group there "
            "or before"
        )
    return tuple(reasons)


def _flops(axes: Axes) -> int:
    return 2 * axes["M"] * axes["K"] * axes["N"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """One for the product, one per row of the array, one per slice added in PSUM."""
    return 1 + min(axes["K"], spec.partitions) + _slices(axes, spec)


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Keep two groups, two panels, three slices, and two passes of one group."""

    def two(size: int, block: int) -> int:
        return size if size <= 2 * block else block + (size % block or block)

    return {
        "M": two(axes["M"], config.block * spec.partitions),
        "K": two(axes["K"], 2 * spec.partitions),
        "N": two(axes["N"], config.width),
        "G": min(axes["G"], 2),
    }


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    return (*inputs, out_dtype_of(inputs, options), config)


GROUPED_MATMUL = Operator(
    name="grouped_matmul",
    summary="c[m, n] = sum_k a[m, k] * b[g, k, n] for offsets[g - 1] <= m < offsets[g]",
    inputs=(
        Operand("a", ("M", "K")),
        Operand("b", ("G", "K", "N")),
        Operand("offsets", ("G",), dtype="int32"),
    ),
    outputs=(Operand("c", ("M", "N")),),
    axis_order=("M", "N", "K", "G"),
    dtypes=("bfloat16", "float16", "float32"),
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=grouped_matmul,
    arguments=_arguments,
    limits=_limits,
    config_problems=_config_problems,
    value_problems=_value_problems,
)
