"""The operators `dispatch` and `combine`: contracts, limits, the choice of their config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.moe.combine import combine
from nki_kernels.kernels.moe.dispatch import DispatchConfig, dispatch
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.norm import another_config, field_problems, out_dtype_of

__all__ = ["COMBINE", "DISPATCH", "DispatchConfig"]

#: Integers that float32 counts exactly.
_EXACT = 2**24

#: Tiles of rows on their way: their latency of some microseconds is a tile or two.
_AHEAD = 4

_SLACK_BYTES = 512


def _table_bytes(axes: Axes, spec: CoreSpec) -> int:
    """Bytes per partition of ids, places and what they are made from: 10 values per choice.

    And of rows of E + 1 numbers: float32 counts, ranks and sums, and two times two triangles.
    """
    tiles = math.ceil(axes["T"] / spec.partitions)
    squares = 4 * 2 * spec.partitions + 3 * 4 * axes["K"] ** 2
    return tiles * axes["K"] * 4 * 10 + 8 * 4 * (axes["E"] + 1) + squares


def _dispatch_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    choices = axes["T"] * axes["K"]
    if choices >= _EXACT:
        reasons.append(f"T * K is {choices}; at most {_EXACT - 1} are counted exactly; split T")
    most = (spec.psum_banks - 1) * spec.moving_fmax - 1
    if axes["E"] > most:
        reasons.append(
            f"experts is {axes['E']}; PSUM counts at most {most} on {spec.name}; use fewer experts "
            "per call"
        )
    row = axes["H"] * as_dtype(dtype).itemsize
    need = _table_bytes(axes, spec) + row + _SLACK_BYTES
    if not reasons and need > spec.sbuf_usable_bytes:
        reasons.append(
            f"T = {axes['T']} with K = {axes['K']}, E = {axes['E']} and H = {axes['H']} need "
            f"{need} bytes per partition of SBUF; {spec.name} has {spec.sbuf_usable_bytes}; "
            "split the tokens"
        )
    return tuple(reasons)


def _ahead(room: int, row: int) -> int:
    return max(0, min(_AHEAD, room // row - 1))


def _dispatch_configure(axes: Axes, dtype: str, spec: CoreSpec) -> DispatchConfig:
    room = spec.sbuf_usable_bytes - _table_bytes(axes, spec) - _SLACK_BYTES
    ahead = _ahead(room, axes["H"] * as_dtype(dtype).itemsize)
    return DispatchConfig(ahead=ahead, hwdge=spec.generation >= 3)


def _combine_row(axes: Axes) -> int:
    """Bytes per partition of what lives beside the gathered rows: three float32 sums, tables."""
    return 3 * 4 * axes["H"] + 4 * 8 * axes["K"]


def _combine_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    row = axes["H"] * as_dtype(dtype).itemsize
    need = _combine_row(axes) + row + _SLACK_BYTES
    if need <= spec.sbuf_usable_bytes:
        return ()
    reason = (
        f"H is {axes['H']}; a row and its sums need {need} bytes per partition of SBUF; "
        f"{spec.name} has {spec.sbuf_usable_bytes}; split the columns"
    )
    return (reason,)


def _combine_configure(axes: Axes, dtype: str, spec: CoreSpec) -> DispatchConfig:
    room = spec.sbuf_usable_bytes - _combine_row(axes) - _SLACK_BYTES
    ahead = _ahead(room, axes["H"] * as_dtype(dtype).itemsize)
    return DispatchConfig(ahead=ahead, hwdge=spec.generation >= 3)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, DispatchConfig):
        return (another_config(config, "a DispatchConfig"),)
    return field_problems(config, {"ahead": 0}, spec)


def _dispatch_options(options: Options) -> tuple[str, ...]:
    experts = options.get("experts")
    whole = isinstance(experts, (int, np.integer)) and not isinstance(experts, bool)
    if experts is not None and whole and experts >= 1:
        return ()
    return (f"experts is {experts!r}; a positive int is needed; pass the number of experts",)


def _values(name: str, at: int) -> Any:
    def problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
        values = inputs[at]
        if not isinstance(values, np.ndarray) or np.abs(values.astype(np.int64)).max() < _EXACT:
            return ()
        worst = int(values.ravel()[np.abs(values.astype(np.int64)).argmax()])
        reason = (
            f"{name} has {worst}; float32 compares integers within +-{_EXACT - 1}; "
            "use a smaller id for absent ones, for example -1"
        )
        return (reason,)

    return problems


def _dispatch_flops(axes: Axes) -> int:
    return 0


def _combine_flops(axes: Axes) -> int:
    return 2 * axes["T"] * axes["K"] * axes["H"]


def _no_chain(axes: Axes, spec: CoreSpec) -> int:
    return 0


def _combine_chain(axes: Axes, spec: CoreSpec) -> int:
    """A product, and at most one addition per choice."""
    return 1 + axes["K"]


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Keep the row length and two tiles of tokens, the last as ragged as in full."""
    tile, tokens = spec.partitions, axes["T"]
    short = tokens if tokens <= 2 * tile else tile + (tokens % tile or tile)
    found = {**axes, "T": short}
    if "S" in axes:
        found["S"] = min(axes["S"], short * axes["K"])
    return found


def _dispatch_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    return (*inputs, int(options["experts"]), config)


def _combine_arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    return (*inputs, out_dtype_of(inputs, options), config)


_DTYPES = ("bfloat16", "float16", "float32")

DISPATCH = Operator(
    name="dispatch",
    summary="rows[slots[t, k]] = x[t], sorted by expert; offsets[e] = choices of experts 0 .. e",
    inputs=(Operand("x", ("T", "H")), Operand("indices", ("T", "K"), dtype="int32")),
    outputs=(
        Operand("rows", ("T*K", "H")),
        Operand("slots", ("T", "K"), dtype="int32"),
        Operand("offsets", ("E",), dtype="int32"),
    ),
    axis_order=("T", "H", "E", "K"),
    dtypes=_DTYPES,
    flops=_dispatch_flops,
    roundings=0,
    chain=_no_chain,
    configure=_dispatch_configure,
    reduced=_reduced,
    kernel=dispatch,
    arguments=_dispatch_arguments,
    limits=_dispatch_limits,
    option_problems=_dispatch_options,
    config_problems=_config_problems,
    value_problems=_values("indices", 1),
    option_axes={"E": "experts"},
)

COMBINE = Operator(
    name="combine",
    summary="y[t] = sum_k weights[t, k] * rows[slots[t, k]], absent slots left out",
    inputs=(
        Operand("rows", ("S", "H")),
        Operand("slots", ("T", "K"), dtype="int32"),
        Operand("weights", ("T", "K"), optional=True, dtype="float32"),
    ),
    outputs=(Operand("y", ("T", "H")),),
    axis_order=("S", "H", "T", "K"),
    dtypes=_DTYPES,
    flops=_combine_flops,
    roundings=1,
    chain=_combine_chain,
    configure=_combine_configure,
    reduced=_reduced,
    kernel=combine,
    arguments=_combine_arguments,
    limits=_combine_limits,
    config_problems=_config_problems,
)
