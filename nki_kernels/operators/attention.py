"""The operator `attention`: contract, the rule of who attends whom, the choice of its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.forward import AttentionConfig, attention
from nki_kernels.kernels.attention.plan import AttentionRule
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import DtypeError
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = [
    "ALIGNMENTS",
    "ATTENTION",
    "CAUSAL_ATTENTION",
    "MASKED_ATTENTION",
    "WINDOW_ATTENTION",
    "AttentionConfig",
    "mask_bits",
]

ALIGNMENTS = ("top-left", "bottom-right")

#: Shares of SBUF: K and V of a head that stay for all its queries (the next head's come beside
#: them), and one load of K and V. The rest holds exponentials, queries and results.
_RESIDENT_SHARE = 0.35
_CHUNK_SHARE = 1 / 16

#: Key tiles per load: 256 KiB of K and V each. Short heads share a load, since each costs its
#: queue 0.6 us; with 16 the first scores come late (S 512, 32 heads: 113 us against 86).
_CHUNK = 8

#: Groups between exponentials and products, and between loads and scores. PE is in order: with a
#: lag of 1 it waits for Scalar (68 % at 16384 causal), with 2 for GpSimd's masks in short rows.
#: Short heads need loads four heads ahead (S 512: 91 us with 8, 86 with 12).
_LAG, _AHEAD = 3, 12

#: Share of the shares below and of the head start that a mask or a bias leaves.
_PLANES_LEAVE = 0.5

#: Groups capped together, and their share of SBUF.
_BATCH, _BATCH_SHARE = 16, 0.25

#: Share of SBUF for what is loaded ahead.
_AHEAD_SHARE = 0.5

#: Output tiles of a section. Its logarithms cost Scalar two changes of function, 2.6 us, against
#: 64 * 4 us of work; its sums take 4 KiB per partition.
_SECTION_SHARE = 1 / 50

_MOST_DEPTH = 512


def _flops(causal: bool, axes: Axes) -> int:
    """Count both products; causal counts half."""
    pairs = axes["M"] * axes["N"]
    whole = 2 * axes["B"] * axes["H"] * pairs * (axes["D"] + axes["E"])
    return whole // 2 if causal else whole


def _window_flops(axes: Axes) -> int:
    """Count the pairs of a causal window exactly."""
    rows, window = min(axes["M"], axes["N"]), min(axes["W"], axes["N"])
    short = min(rows, window)
    pairs = short * (short + 1) // 2 + (rows - short) * window
    for row in range(axes["N"], min(axes["M"], axes["N"] + window - 1)):
        pairs += axes["N"] + window - 1 - row
    return 2 * axes["B"] * axes["H"] * pairs * (axes["D"] + axes["E"])


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The reference's magnitude counts roundings itself: those of a score weigh differently."""
    return 1


def _output_banks(spec: CoreSpec) -> int:
    return spec.moving_fmax // spec.stationary_fmax


def _shared_banks(depth: int, spec: CoreSpec) -> int:
    """Return the PSUM banks of a block's output where its tiles share them."""
    count = spec.moving_fmax // spec.stationary_fmax
    share = count
    while spec.moving_fmax // share <= depth and share > 1:
        share //= 2
    return count // share


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> AttentionConfig:
    itemsize = as_dtype(dtype).itemsize
    slices = math.ceil(axes["D"] / spec.partitions)
    tile = (spec.partitions * slices + axes["E"] + 1) * itemsize
    # A mask, its form as an operand, and a bias, for a block of queries.
    plane = spec.moving_fmax * (3 * ("P" in axes) + itemsize * ("R" in axes))
    widest = max(tile, plane)
    chunk = max(1, min(_CHUNK, int(spec.sbuf_usable_bytes * _CHUNK_SHARE) // widest))
    keys = math.ceil(axes["N"] / spec.partitions) * tile
    # A block of queries may be a single group, with loads of its own.
    head = (math.ceil(axes["M"] / spec.partitions) + math.ceil(axes["N"] / spec.partitions)) * tile
    blocks = math.ceil(axes["M"] / spec.moving_fmax)
    room = int(spec.sbuf_usable_bytes * _AHEAD_SHARE * blocks) // head
    # What a mask or a bias needs of SBUF comes from everything else.
    left = _PLANES_LEAVE if plane else 1.0
    group = 4 * spec.moving_fmax * max(1, (spec.psum_banks - _output_banks(spec)) // 2)
    section = max(1, int(spec.sbuf_usable_bytes * _SECTION_SHARE) // 8)
    return AttentionConfig(
        banks=max(1, (spec.psum_banks - _output_banks(spec)) // 2),
        whole=max(1, (spec.psum_banks - _shared_banks(axes["E"], spec)) // 2),
        join=2,
        lag=_LAG,
        batch=max(1, min(_BATCH, int(spec.sbuf_usable_bytes * _BATCH_SHARE * left) // group)),
        ahead=int(min(_AHEAD, room) * left),
        chunk=chunk,
        resident=keys <= int(spec.sbuf_usable_bytes * _RESIDENT_SHARE * left),
        fill=axes["D"] % spec.partitions != 0,
        section=section,
        hwdge=spec.generation >= 3,
    )


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["H"] % axes["G"]:
        reasons.append(
            f"{axes['H']} query heads share {axes['G']} key heads; the first must be a multiple of "
            "the second; repeat or drop heads"
        )
    # An output row and its sum take whole banks, as many as an output tile may have.
    most = min(_MOST_DEPTH, _output_banks(spec) * spec.psum_bank_bytes // 4 - 1)
    if axes["E"] > most:
        reasons.append(
            f"the head size of v is {axes['E']}; at most {most} on {spec.name}; split v along its "
            "last axis"
        )
    if axes["D"] > _MOST_DEPTH:
        reasons.append(
            f"the head size of q and k is {axes['D']}; at most {_MOST_DEPTH}; sum the scores of "
            "parts of it elsewhere and pass them as bias"
        )
    return tuple(reasons)


def _option_problems(options: Options) -> tuple[str, ...]:
    reasons = []
    scale = options.get("scale")
    if scale is not None and not _finite(scale):
        reasons.append(f"scale is {scale!r}; a finite number or None is needed; pass D ** -0.5")
    cap = options.get("softcap")
    if cap is not None and not (_finite(cap) and cap > 0):
        reasons.append(f"softcap is {cap!r}; a finite number above 0 or None is needed; pass 50.0")
    window = options.get("window")
    if window is not None and (isinstance(window, bool) or not _is_int(window) or window < 1):
        reasons.append(f"window is {window!r}; an int of at least 1 or None is needed; pass 128")
    align = options.get("align", ALIGNMENTS[0])
    if align not in ALIGNMENTS:
        reasons.append(f"align is {align!r}; allowed are {', '.join(ALIGNMENTS)}; pass one of them")
    slopes = options.get("slopes")
    if slopes is not None and not _are_finite(slopes):
        reasons.append(
            f"slopes is {slopes!r}; one finite number per query head or None is needed; pass a "
            "sequence of float"
        )
    return tuple(reasons)


def _are_finite(values: Any) -> bool:
    listed = isinstance(values, (list, tuple, np.ndarray)) and len(values) > 0
    return listed and all(_finite(value) for value in values)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    slopes, heads = options.get("slopes"), inputs[0].shape[1]
    if slopes is None or len(slopes) == heads:
        return ()
    return (f"slopes has {len(slopes)} entries; one per query head, {heads}; give them all",)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer))


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and math.isfinite(np.float32(value))


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, AttentionConfig):
        return (
            f"config is {config!r}; an AttentionConfig is needed; pass one, or None to choose it",
        )
    reasons = []
    counts = ("banks", "whole", "join", "batch", "chunk", "section")
    for name, least in (*((name, 1) for name in counts), ("lag", 0), ("ahead", 0)):
        value = getattr(config, name)
        if type(value) is not int or value < least:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {least}")
    room = spec.psum_banks - _output_banks(spec)
    for name in ("banks", "whole"):
        value = getattr(config, name)
        if type(value) is int and value > room:
            reasons.append(
                f"config.{name} is {value}; {spec.name} has {room} PSUM banks beside those of "
                "the output; take fewer"
            )
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge needs gen3; {spec.name} is gen{spec.generation}; set it to False"
        )
    return tuple(reasons)


def _reduced(axes: Axes, config: AttentionConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two key heads of one batch, and two blocks of queries and keys as ragged as in full."""
    heads = min(axes["G"], 2)
    block = spec.moving_fmax
    small = {letter: _two_blocks(axes[letter], block) for letter in ("M", "N")}
    group = axes["H"] // axes["G"]
    return {**axes, "B": 1, "H": heads * group, "G": heads, **small}


def _two_blocks(size: int, block: int) -> int:
    return size if size <= 2 * block else block + (size % block or block)


def rule_of(axes: Axes, options: Options, causal: bool) -> AttentionRule:
    """Return who attends whom, and how scores are made, from the public options."""
    window = options.get("window")
    left = None if window is None else int(window) - 1
    bottom = options.get("align", ALIGNMENTS[0]) == "bottom-right"
    scale = options.get("scale")
    return AttentionRule(
        scale=float(axes["D"] ** -0.5 if scale is None else scale),
        left=left,
        right=0 if options.get("causal", causal) else left,
        offset=axes["N"] - axes["M"] if bottom else 0,
        softcap=float(options.get("softcap") or 0.0),
        slopes=_slopes(options),
        longest=options.get("max_seqlen"),
    )


def _slopes(options: Options) -> tuple[float, ...] | None:
    slopes = options.get("slopes")
    return None if slopes is None else tuple(float(np.float32(slope)) for slope in slopes)


def _arguments(
    causal: bool, inputs: Sequence[Any], options: Options, config: AttentionConfig
) -> tuple[Any, ...]:
    q, k, v = inputs[:3]
    sinks, mask, bias = inputs[3:] or (None, None, None)
    axes = {"D": q.shape[3], "M": q.shape[2], "N": k.shape[2]}
    out_dtype = str(as_dtype(options.get("out_dtype") or q.dtype))
    return q, k, v, sinks, mask, bias, rule_of(axes, options, causal), out_dtype, config


_QKV = (
    Operand("q", ("B", "H", "M", "D")),
    Operand("k", ("B", "G", "N", "D")),
    Operand("v", ("B", "G", "N", "E")),
)
_EXTRAS = (
    Operand("sinks", ("H",), optional=True, dtype="float32"),
    Operand("mask", ("P", "Q", "M", "N"), optional=True, dtype="uint8"),
    Operand("bias", ("R", "S", "M", "N"), optional=True),
)


def _masked_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = list(_limits(axes, dtype, spec))
    for name, batch, head in (("mask", "P", "Q"), ("bias", "R", "S")):
        for letter, size in ((batch, "B"), (head, "H")):
            if axes.get(letter, 1) not in (1, axes[size]):
                reasons.append(
                    f"{name} has {axes[letter]} along {size}; allowed are 1 and {axes[size]}; "
                    "broadcast it"
                )
    return tuple(reasons)


def _operator(name: str, causal: bool, extras: bool = False) -> Operator:
    return Operator(
        name=name,
        summary="out[i] = sum_j softmax_j(scale * q[i].k[j]) * v[j]; lse[i] = log sum_j exp",
        inputs=_QKV + (_EXTRAS if extras else ()),
        outputs=(
            Operand("out", ("B", "H", "M", "E")),
            Operand("lse", ("B", "H", "M"), dtype="float32"),
        ),
        axis_order=("B", "H", "G", "M", "N", "D", "E"),
        dtypes=("bfloat16", "float16", "float32"),
        flops=partial(_flops, causal),
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=_reduced,
        kernel=attention,
        arguments=partial(_arguments, causal),
        limits=_masked_limits if extras else _limits,
        option_problems=_option_problems,
        value_problems=_value_problems,
        config_problems=_config_problems,
        unknown_trips=0,
    )


#: Without bounds, or with those of the options; and with causal as the default.
ATTENTION = _operator("attention", causal=False)
CAUSAL_ATTENTION = _operator("causal_attention", causal=True)

#: A causal window whose length is an axis, for benchmarks.
WINDOW_ATTENTION = replace(
    CAUSAL_ATTENTION,
    name="window_attention",
    flops=_window_flops,
    axis_order=(*CAUSAL_ATTENTION.axis_order, "W"),
    option_axes={"W": "window"},
)

#: With sinks, a mask and a bias.
MASKED_ATTENTION = _operator("attention", causal=False, extras=True)


def mask_bits(mask: Any) -> Any:
    """Return a bool mask as the kernel's uint8, without a copy; None for None.

    Raises:
        DtypeError: a mask of another dtype.
    """
    if mask is None:
        return None
    if mask.dtype != np.bool_:
        raise DtypeError(
            f"attention: mask has dtype {mask.dtype}; it must be bool, True to attend; write "
            "mask != 0, or pass what is added to the scores as bias"
        )
    return mask.view(np.uint8)
