"""The operator `group_norm`: contract, limits, the choice of its config, and the call."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.norm.group_norm import GroupNormConfig
from nki_kernels.kernels.norm.group_norm import group_norm as kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import norm
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["GROUP_NORM", "GroupNormConfig", "group_norm"]

Array = npt.NDArray[Any]

#: Elements per instruction: the fixed cost of an instruction is 2 % of so many.
_CHUNK = 4096

#: Share of the statistics on Vector; Scalar needs two passes, but Vector has the scaling as well.
_VECTOR_STATS_SHARE = 1 / 2


def _size(axes: Axes) -> int:
    """Return the elements of a group."""
    return axes["C"] // axes["G"] * axes["S"]


def _needed(axes: Axes, itemsize: int, chunk: int, overlap: bool, spec: CoreSpec) -> int:
    """Bytes of a partition: a group, chunks ahead, results at their widest, scratch, numbers."""
    size = _size(axes)
    width = min(chunk, size)
    held = (size + (2 * width if overlap else 0)) * itemsize
    triples = 1 + 2 * math.ceil(width * _VECTOR_STATS_SHARE / spec.bn_stats_fmax)
    sums = math.ceil(size / width) * 12 * triples * 2
    numbers = axes["C"] // axes["G"] * 2 * (2 * itemsize + 3 * 4)
    return held + width * (2 * 4 + 2) + sums + numbers


def _fit(axes: Axes, itemsize: int, spec: CoreSpec) -> tuple[int, bool] | None:
    """Return (chunk, overlap), or None where the group fits in no way."""
    room = spec.sbuf_usable_bytes - norm.SLACK_BYTES
    short = spec.bn_stats_fmax
    for chunk, overlap in ((_CHUNK, True), (_CHUNK // 2, True), (short, True), (short, False)):
        # With less to spare, chunks wait for room.
        if _needed(axes, itemsize, chunk, overlap, spec) * (1.1 if overlap else 1.0) <= room:
            return min(chunk, _size(axes)), overlap
    return None


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    channels, groups = axes["C"], axes["G"]
    if groups > channels or channels % groups:
        reason = f"C is {channels} and num_groups {groups}; channels must form equal groups; "
        return (reason + "choose a divisor of C",)
    itemsize = as_dtype(dtype).itemsize
    if _fit(axes, itemsize, spec) is not None:
        return ()

    def fits(positions: int) -> bool:
        return _fit({**axes, "S": positions}, itemsize, spec) is not None

    sizes = range(1, spec.sbuf_usable_bytes)
    most = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    reason = (
        f"S is {axes['S']}; a group of {dtype}, {channels // groups} channels of S positions, must "
        f"fit one partition of SBUF, at most S = {most} on {spec.name}; use more groups, or a "
        "narrower dtype"
    )
    return (reason,)


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> GroupNormConfig:
    # A group that does not fit is refused elsewhere; its config is asked for all the same.
    chunk, overlap = _fit(axes, as_dtype(dtype).itemsize, spec) or (spec.bn_stats_fmax, False)
    return GroupNormConfig(
        chunk=chunk,
        vector_stats=int(chunk * _VECTOR_STATS_SHARE),
        ahead=1 if overlap else 0,
        overlap=overlap,
        hwdge=spec.generation >= 3,
    )


def _option_problems(options: Options) -> tuple[str, ...]:
    groups = options.get("num_groups")
    if type(groups) is int and groups >= 1:
        return norm.option_problems(options)
    reason = f"num_groups is {groups!r}; an int of at least 1 is needed; pass for example 32"
    return (reason, *norm.option_problems(options))


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, GroupNormConfig):
        return (norm.another_config(config, "a GroupNormConfig"),)
    return norm.field_problems(config, {"chunk": 1, "vector_stats": 0, "ahead": 0}, spec)


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the float32 roundings as in layer_norm, of a row as long as a group."""
    return norm.chain({"H": _size(axes)}, spec)


def _flops(axes: Axes) -> int:
    return 8 * axes["N"] * axes["C"] * axes["S"]


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Keep the groups whole, and one batch more than fills the partitions."""
    return {**axes, "N": min(axes["N"], spec.partitions // axes["G"] + 1)}


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    eps = norm.eps_of("layer_norm", options)
    groups = options["num_groups"]
    return *inputs, groups, eps, norm.out_dtype_of(inputs, options), config


GROUP_NORM = Operator(
    name="group_norm",
    summary="y[n, c, s] = (x[n, c, s] - mean) / sqrt(var + eps) * weight[c] + bias[c], by group",
    inputs=(
        Operand("x", ("N", "C", "S")),
        Operand("weight", ("C",), optional=True),
        Operand("bias", ("C",), optional=True),
    ),
    outputs=(Operand("y", ("N", "C", "S")),),
    axis_order=("N", "C", "S", "G"),
    dtypes=norm.DTYPES,
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=kernel,
    arguments=_arguments,
    limits=_limits,
    option_problems=_option_problems,
    config_problems=_config_problems,
    option_axes={"G": "num_groups"},
)


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = norm.DEFAULT_EPS["layer_norm"],
    out_dtype: Any = None,
    config: GroupNormConfig | None = None,
    target: str | None = None,
) -> Array:
    """Normalise groups of channels to mean 0 and variance 1, as `torch.nn.functional.group_norm`.

    y[n, c, s] = (x[n, c, s] - mean) / sqrt(var + eps) * weight[c] + bias[c]

    mean and var are those over the channels of c's group and all positions of x[n]. Everything is
    float32 until the one rounding.

    Dimensions:
        N: batch, >= 1    C: channels    S: positions, the product of the axes behind C

    Args:
        x: [N, C, *], dense row-major, bfloat16 | float16 | float32.
        num_groups: a divisor of C; groups are neighbouring channels.
        weight: [C], dtype of x, or None for ones.
        bias: [C], dtype of x, or None for zeros.
        eps: added to the variance, >= 0.
        out_dtype: dtype of the result; None means the dtype of x.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `layer_norm`.

    Returns:
        A new array of the shape of x. A group with a NaN or an infinity is NaN.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, channels that do
            not form equal groups, or a group too large for SBUF.
        DtypeError: a dtype that is not supported, or two different ones.
        OptionError: a `num_groups` below 1, an `eps` that is negative or that float32 cannot hold.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.norm.group_norm`.

    Example:
        >>> import numpy as np
        >>> group_norm(np.array([[[3.0, 1], [3, 1], [5, 7], [5, 7]]], np.float32), 2, eps=0.0)
        array([[[ 1., -1.],
                [ 1., -1.],
                [-1.,  1.],
                [-1.,  1.]]], dtype=float32)
    """
    shape = getattr(x, "shape", ())
    options = {"num_groups": num_groups, "eps": eps, "out_dtype": out_dtype}
    flat = x
    if len(shape) >= 2 and len(shape) != 3 and x.flags.c_contiguous:
        flat = x.reshape(*shape[:2], math.prod(shape[2:]))
    run = GROUP_NORM.launch((flat, weight, bias), options, config=config, target=target)
    result: Array = run.result.reshape(shape)
    return result
