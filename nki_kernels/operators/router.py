"""The operator `router`: its contract and the choice of its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.moe.router import RouterConfig, Routing, router
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.norm import another_config, field_problems

__all__ = ["DEFAULTS", "MOST_K", "ROUTER", "RouterConfig"]

MOST_K = 32

#: Rows of E float32 in PSUM: logits of two tiles, and the counts; one bank is left for transposes.
_BANKS_PER_ROW = 3

#: Arguments of the mathematics that have a default.
DEFAULTS: dict[str, Any] = {
    "score": "softmax",
    "score_first": True,
    "renormalize": False,
    "scale": 1.0,
    "groups": 1,
    "top_groups": None,
    "group_score": "max",
}

#: Tiles of tokens per block: 512 tokens make the transposing loads long enough for their fixed
#: cost, and two blocks of H = 8192 still fit.
_MOST_TILES = 4

#: SBUF for two blocks of x^T beside the weight; the rest holds rows of logits.
_ROWS_OF_LOGITS = 10
_SLACK_BYTES = 512


def _slices(axes: Axes, spec: CoreSpec) -> int:
    return math.ceil(axes["H"] / spec.partitions)


def _room(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Bytes per partition for x^T: what the weight and the rows of logits leave."""
    weight = _slices(axes, spec) * axes["E"] * itemsize
    return spec.sbuf_usable_bytes - _SLACK_BYTES - weight - _ROWS_OF_LOGITS * 4 * axes["E"]


def _tile_bytes(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Bytes per partition of x^T for one tile of tokens; rows come on top where PE transposes."""
    turned = _slices(axes, spec) * spec.partitions * itemsize
    return turned if itemsize == 2 else turned + axes["H"] * itemsize


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    most = (spec.psum_banks - 1) // _BANKS_PER_ROW * spec.moving_fmax
    if axes["E"] > most:
        reasons.append(
            f"E is {axes['E']}; PSUM holds the logits of at most {most} experts on {spec.name}; "
            "route over parts of the experts, each by a call of its own"
        )
    if axes["K"] > axes["E"]:
        reasons.append(f"top_k is {axes['K']} of E = {axes['E']} experts; choose at most E")
    itemsize = as_dtype(dtype).itemsize
    need, room = 2 * _tile_bytes(axes, itemsize, spec), _room(axes, itemsize, spec)
    if not reasons and need > room:
        reasons.append(
            f"H is {axes['H']} with E = {axes['E']}; the weight and two tiles of x^T must fit SBUF "
            f"({need} bytes per partition of the {max(room, 0)} that the weight leaves on "
            f"{spec.name}); use fewer experts per call, or a narrower dtype"
        )
    return tuple(reasons)


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> RouterConfig:
    itemsize = as_dtype(dtype).itemsize
    fitting = _room(axes, itemsize, spec) // (2 * _tile_bytes(axes, itemsize, spec))
    tiles = math.ceil(axes["T"] / spec.partitions)
    return RouterConfig(
        block=max(1, min(_MOST_TILES, fitting, tiles)),
        transpose="dma" if itemsize == 2 else "pe",
        hwdge=spec.generation >= 3,
    )


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, RouterConfig):
        return (another_config(config, "a RouterConfig"),)
    reasons = list(field_problems(config, {"block": 1}, spec))
    if config.transpose not in ("dma", "pe"):
        reasons.append(f"config.transpose is {config.transpose!r}; allowed are 'dma' and 'pe'")
    elif config.transpose == "dma" and as_dtype(dtype).itemsize != 2:
        reasons.append(f"config.transpose is 'dma' for {dtype}; a DMA turns 2-byte types; use 'pe'")
    return tuple(reasons)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _option_problems(options: Options) -> tuple[str, ...]:
    given = {**DEFAULTS, **options}
    reasons = []
    top_k = given.get("top_k")
    if top_k is None or not _whole(top_k) or not 1 <= top_k <= MOST_K:
        reasons.append(f"top_k is {top_k!r}; allowed are 1 to {MOST_K}; choose one of them")
    for name, allowed in (("score", ("softmax", "sigmoid")), ("group_score", ("max", "top2"))):
        if given[name] not in allowed:
            reasons.append(f"{name} is {given[name]!r}; allowed are {', '.join(allowed)}")
    for name in ("score_first", "renormalize"):
        if not isinstance(given[name], (bool, np.bool_)):
            reasons.append(f"{name} is {given[name]!r}; allowed are True and False")
    scale = given["scale"]
    number = isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        reasons.append(f"scale is {scale!r}; a finite number is needed; pass for example 1.0")
    groups, top_groups = given["groups"], given["top_groups"]
    if not _whole(groups) or groups < 1:
        reasons.append(f"groups is {groups!r}; a positive int is needed; pass 1 for no groups")
    elif top_groups is not None and not (_whole(top_groups) and 1 <= top_groups <= groups):
        reasons.append(
            f"top_groups is {top_groups!r}; allowed are 1 to groups = {groups}, or None for all"
        )
    return tuple(reasons)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    """What sizes and options say together, and a selection bias that is NaN."""
    given = {**DEFAULTS, **options}
    experts, groups = inputs[1].shape[1], given["groups"]
    top_groups = groups if given["top_groups"] is None else given["top_groups"]
    reasons = []
    if experts % groups:
        reasons.append(f"groups is {groups} for E = {experts} experts; it must divide E")
    elif top_groups < groups:
        size = experts // groups
        if given["top_k"] > top_groups * size:
            reasons.append(
                f"top_k is {given['top_k']}; top_groups = {top_groups} groups of {size} hold "
                f"{top_groups * size} experts; choose fewer, or from more groups"
            )
        if given["group_score"] == "top2" and size < 2:
            reasons.append("group_score is top2 for groups of 1 expert; use max")
    bias = inputs[3]
    if isinstance(bias, np.ndarray) and np.isnan(bias).any():
        reasons.append(
            f"selection_bias[{int(np.isnan(bias).argmax())}] is NaN, which has no rank; "
            "pass numbers, or -inf for an expert that is never to be chosen before others"
        )
    return tuple(reasons)


def _flops(axes: Axes) -> int:
    return 2 * axes["T"] * axes["H"] * axes["E"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """Bound the roundings of a term of a logit, and those of sums and quotients of scores.

    A product in the array and in PSUM: 1 + depth + slices. The sum over experts, the exponential,
    its shifted argument, reciprocal and two products: E + 16.
    """
    depth = min(axes["H"], spec.partitions)
    return 1 + depth + _slices(axes, spec) + axes["E"] + 16


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    block = config.block * spec.partitions
    tokens = axes["T"]
    short = tokens if tokens <= 2 * block else block + (tokens % block or block)
    return {**axes, "T": short}


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    given = {**DEFAULTS, **options}
    groups = int(given["groups"])
    routing = Routing(
        top_k=int(given["top_k"]),
        score=given["score"],
        score_first=bool(given["score_first"]),
        renormalize=bool(given["renormalize"]),
        scale=float(given["scale"]),
        groups=groups,
        top_groups=groups if given["top_groups"] is None else int(given["top_groups"]),
        group_score=given["group_score"],
    )
    return (*inputs, routing, config)


ROUTER = Operator(
    name="router",
    summary="the top_k experts of each token by x @ weight + bias, their weights, and counts",
    inputs=(
        Operand("x", ("T", "H")),
        Operand("weight", ("H", "E")),
        Operand("bias", ("E",), optional=True),
        Operand("selection_bias", ("E",), optional=True, dtype="float32"),
    ),
    outputs=(
        Operand("indices", ("T", "K"), dtype="int32"),
        Operand("weights", ("T", "K"), dtype="float32"),
        Operand("counts", ("E",), dtype="int32"),
    ),
    axis_order=("T", "H", "E", "K"),
    dtypes=("bfloat16", "float16", "float32"),
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=router,
    arguments=_arguments,
    limits=_limits,
    option_problems=_option_problems,
    config_problems=_config_problems,
    value_problems=_value_problems,
    option_axes={"K": "top_k"},
)
