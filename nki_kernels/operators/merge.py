"""The operator `merge_attention`: two attentions over different keys become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.merge import MergeConfig
from nki_kernels.kernels.attention.merge import merge_attention as merge_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["MERGE_ATTENTION", "MergeConfig", "merge_attention"]

DTYPES = ("bfloat16", "float16", "float32")

#: Bytes of neighbouring rows that a partition holds: descriptors of 2 KiB run at 92 %.
_PARTITION_BYTES = 2048

#: Rows of a partition whose logarithms are taken at once: Scalar's two changes of function, 2.6 us,
#: against a hundred and more of rows.
_SECTION = 512


def _row_bytes(axes: Axes, itemsize: int, ahead: int) -> int:
    """Bytes of a partition that a row takes: a and b, those ahead, a float32 product, a result."""
    return axes["E"] * (itemsize * (2 * (ahead + 2) + 2) + 2 * 4)


def _room(spec: CoreSpec) -> int:
    """Bytes of a partition beside the seven float32 columns of two sections."""
    return spec.sbuf_usable_bytes * 9 // 10 - 2 * 7 * 4 * _section(spec)


def _section(spec: CoreSpec) -> int:
    return min(_SECTION, max(1, spec.sbuf_usable_bytes // 256))


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> MergeConfig:
    itemsize = as_dtype(dtype).itemsize
    wanted = max(1, _PARTITION_BYTES // (axes["E"] * itemsize))
    ahead = 2 if _row_bytes(axes, itemsize, 2) <= _room(spec) else 0
    rows = max(1, min(wanted, _room(spec) // _row_bytes(axes, itemsize, ahead)))
    return MergeConfig(_section(spec), rows, ahead, spec.generation >= 3)


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    needed = _row_bytes(axes, as_dtype(dtype).itemsize, 0)
    if needed <= _room(spec):
        return ()
    reason = (
        f"a row of E = {axes['E']} takes {needed} bytes of a partition, {spec.name} has "
        f"{_room(spec)}; split the rows along E"
    )
    return (reason,)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, MergeConfig):
        return (f"config is a {type(config).__name__}; a MergeConfig is needed; pass one, or None",)
    reasons = [
        f"config.{name} is {getattr(config, name)!r}; an int from {least} on is needed; raise it"
        for name, least in (("section", 1), ("rows", 1), ("ahead", 0))
        if type(getattr(config, name)) is not int or getattr(config, name) < least
    ]
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge is True; {spec.name} has no hardware descriptor engine; set it False"
        )
    return tuple(reasons)


def _no_options(options: Options) -> tuple[str, ...]:
    return ()


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    return *inputs, config


def _flops(axes: Axes) -> int:
    return 3 * axes["B"] * axes["H"] * axes["T"] * axes["E"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Exponential, sum, reciprocal, two products, a sum."""
    return 8


def _reduced(axes: Axes, config: MergeConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep a whole section of one head, and what is ragged behind it."""
    whole = spec.partitions * config.rows
    rows = axes["T"] if axes["T"] <= whole else whole + axes["T"] % whole
    return {**axes, "B": 1, "H": 1, "T": rows}


_OUT, _LSE = ("B", "H", "T", "E"), ("B", "H", "T")

MERGE_ATTENTION = Operator(
    name="merge_attention",
    summary="out = e^(la - l) a + e^(lb - l) b, l = log(e^la + e^lb), by row",
    inputs=(
        Operand("out_a", _OUT),
        Operand("lse_a", _LSE, dtype="float32"),
        Operand("out_b", _OUT),
        Operand("lse_b", _LSE, dtype="float32"),
    ),
    outputs=(Operand("out", _OUT), Operand("lse", _LSE, dtype="float32")),
    axis_order=_OUT,
    dtypes=DTYPES,
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=merge_kernel,
    arguments=_arguments,
    limits=_limits,
    option_problems=_no_options,
    config_problems=_config_problems,
)


def merge_attention(
    out_a: npt.NDArray[Any],
    lse_a: npt.NDArray[Any],
    out_b: npt.NDArray[Any],
    lse_b: npt.NDArray[Any],
    *,
    config: MergeConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Merge the attentions of the same queries over two sets of keys into that over both.

    l = log(e^lse_a + e^lse_b);  out = e^(lse_a - l) * out_a + e^(lse_b - l) * out_b

    What parallel contexts need, whose keys lie on several cores, and a cache that is attended in
    parts. A sink must be counted in one part only. One core gains nothing by cutting its own
    cache: `attention_decode` already reads it at the rate of the memory.

    Dimensions:
        B, H, T: sequences, heads, queries    E: head size of the values

    Args:
        out_a: [B, H, T, E], bfloat16 | float16 | float32.
        lse_a: [B, H, T] float32, finite, or -inf where nothing was attended.
        out_b: [B, H, T, E], dtype of `out_a`.
        lse_b: [B, H, T] float32, likewise.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        out [B, H, T, E], dtype of `out_a`, rounded once, and lse [B, H, T] float32: 0 and -inf
        where neither part attended anything.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, an E too large.
        DtypeError: a dtype that is not supported.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.attention.merge`.

    Example:
        >>> import numpy as np
        >>> ones, logs = np.ones((1, 1, 1, 2), np.float32), np.zeros((1, 1, 1), np.float32)
        >>> merge_attention(ones, logs, 3 * ones, logs)[0]
        array([[[[2., 2.]]]], dtype=float32)
    """
    inputs = (out_a, lse_a, out_b, lse_b)
    out, lse = MERGE_ATTENTION.launch(inputs, {}, config=config, target=target).result
    return out, lse
