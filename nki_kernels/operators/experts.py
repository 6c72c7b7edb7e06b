"""The operator `experts`: its contract and the choice of its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.moe.experts import ExpertForm, ExpertsConfig, experts
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.linear import ACTIVATIONS
from nki_kernels.operators.norm import another_config, field_problems, out_dtype_of

__all__ = ["DEFAULTS", "EXPERTS", "ExpertsConfig"]

#: Arguments of the mathematics that have a default.
DEFAULTS: dict[str, Any] = {
    "activation": "silu",
    "interleaved": False,
    "limit": None,
    "alpha": 1.702,
}

#: Tokens of which every active expert sees all: one tile of rows.
_EXACT = 2**24

#: The part of a token's number that is a tile must be exact in bfloat16.
_MOST_TILES = 256

#: Row tiles of a block at most: 512 rows move more weights' worth of PE time than DMA needs.
_MOST = 4

#: Time of a body of several blocks, against the barrier of its loop and what drains around it.
_BODY_NS = 600e3
_MOST_BLOCKS = 12

#: Slices run accumulator by accumulator at the end of a wave: an eviction takes three slices.
_TAIL = 4

#: Weights on their way at most, bytes per partition.
_MOST_FLIGHT = 96 * 1024

#: Share of the DMA bandwidth that rows of 1 KiB reach.
_DMA_SHARE = 0.9


def _fan(axes: Axes) -> int:
    return 2 if axes["F"] == 2 * axes["I"] else 1


def _tiles(axes: Axes, spec: CoreSpec) -> int:
    """Row tiles of sorted rows at most."""
    choices = axes["T"] * axes["K"]
    more = min(axes["E"], choices) * (spec.partitions - 1)
    return max(1, (choices + more) // spec.partitions)


def _schedule_bytes(axes: Axes, spec: CoreSpec) -> int:
    """Bytes per partition of what the schedule keeps while blocks run: places, order, lists."""
    choices = axes["T"] * axes["K"]
    columns = math.ceil(axes["T"] / spec.partitions) * axes["K"]
    listed = _most(axes, spec) * (min(axes["E"], choices) + _MOST_BLOCKS + spec.partitions)
    listed += choices // spec.partitions
    counts = 4 * 4 * (axes["E"] + 1)
    return 4 * (columns + _tiles(axes, spec)) + 8 * listed + counts


def _making_bytes(axes: Axes, spec: CoreSpec) -> int:
    """Bytes per partition while the schedule is made: tables per choice and expert, one-hots."""
    columns = math.ceil(axes["T"] / spec.partitions) * axes["K"]
    per_expert = 4 * 24 * (axes["E"] + 1)
    ones = 2 * 2 * axes["K"] * (3 * spec.partitions + _tiles(axes, spec))
    squares = 8 * spec.partitions + 12 * axes["K"] ** 2
    return 4 * 10 * columns + per_expert + ones + squares + 4 * _tiles(axes, spec)


def _block_bytes(axes: Axes, itemsize: int, most: int, spec: CoreSpec, several: bool) -> int:
    """Bytes per partition of a block beside its weights.

    x^T and the hidden features turned, and the rows of the next block where a body has `several`
    (else x^T comes and goes before the features are there); of two waves the features, biases
    and what they are made from.
    """
    h, i, p = axes["H"], axes["I"], spec.partitions
    slices, features = math.ceil(h / p) * p, math.ceil(i / p) * p
    rows = h + slices + features if several else max(h + slices, slices + features)
    wave = spec.psum_banks * spec.moving_fmax
    return most * itemsize * rows + wave * itemsize * 2 + 12 * spec.moving_fmax * 4


def _flight(axes: Axes, dtype: str, most: int, spec: CoreSpec) -> int:
    """Bytes per partition that are left for weights."""
    itemsize = as_dtype(dtype).itemsize
    several = any(len(body) > 1 for body in bodies(axes, dtype, most, spec))
    room = spec.sbuf_usable_bytes - _slack(spec) - _schedule_bytes(axes, spec)
    return room - _block_bytes(axes, itemsize, most, spec, several)


def _slack(spec: CoreSpec) -> int:
    return spec.sbuf_usable_bytes // 64


def _most(axes: Axes, spec: CoreSpec) -> int:
    """Row tiles of a block at most: a bank for each accumulator of each."""
    tokens = math.ceil(axes["T"] * axes["K"] / axes["E"] / spec.partitions)
    return max(1, min(_MOST, spec.psum_banks // 2, 2 * tokens))


def _slice_bytes(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Bytes per partition of the widest slice of weights."""
    return spec.psum_banks * spec.moving_fmax * itemsize


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    choices = axes["T"] * axes["K"]
    if axes["F"] not in (axes["I"], 2 * axes["I"]):
        reasons.append(
            f"F is {axes['F']} with I = {axes['I']}; up has 2 I columns (gate and up) or I"
        )
    most_tokens = _MOST_TILES * spec.partitions
    if axes["T"] > most_tokens:
        reasons.append(f"T is {axes['T']}; at most {most_tokens} are sorted; split the tokens")
    if choices + axes["E"] * spec.partitions >= _EXACT:
        reasons.append(f"T * K is {choices}; fewer than {_EXACT} rows are counted; split T")
    most = (spec.psum_banks - 1) * spec.moving_fmax - 1
    if axes["E"] > most or _tiles(axes, spec) > most:
        reasons.append(
            f"E is {axes['E']} with T * K = {choices}; PSUM counts at most {most} experts and row "
            f"tiles on {spec.name}; split the tokens or the experts"
        )
    if reasons:
        return tuple(reasons)
    itemsize = as_dtype(dtype).itemsize
    if axes["T"] <= spec.partitions:
        need = _few_bytes(axes, itemsize, spec) + 2 * _slice_bytes(axes, itemsize, spec)
        return _too_large(axes, dtype, need + _slack(spec) - spec.sbuf_usable_bytes, spec)
    need = 2 * _slice_bytes(axes, itemsize, spec) - _flight(axes, dtype, 1, spec)
    making = _making_bytes(axes, spec) + _slack(spec) - spec.sbuf_usable_bytes
    combine = 4 * axes["H"] * 4 + _schedule_bytes(axes, spec) - spec.sbuf_usable_bytes
    return _too_large(axes, dtype, max(need, making, combine), spec)


def _too_large(axes: Axes, dtype: str, excess: int, spec: CoreSpec) -> tuple[str, ...]:
    if excess <= 0:
        return ()
    reason = (
        f"T = {axes['T']}, K = {axes['K']}, E = {axes['E']}, H = {axes['H']}, I = {axes['I']} "
        f"of {dtype} need {excess} bytes per partition of SBUF more than {spec.name} has; split "
        "the tokens, or the features of the experts"
    )
    return (reason,)


def _row_tile_ns(axes: Axes, dtype: str, spec: CoreSpec) -> float:
    """PE's time for one row tile."""
    flops = 2 * spec.partitions * axes["H"] * (axes["F"] + axes["I"])
    return flops / (spec.peak_tflops(dtype) * 1e3)


def _weights_ns(axes: Axes, itemsize: int, spec: CoreSpec) -> float:
    """DMA's time for the weights of an expert."""
    moved = axes["H"] * (axes["F"] + axes["I"]) * itemsize
    return moved / (_DMA_SHARE * spec.hbm_bytes_per_ns)


def bodies(axes: Axes, dtype: str, most: int, spec: CoreSpec) -> tuple[tuple[int, ...], ...]:
    """Choose the bodies of the device loops: mixtures of heavy and light blocks, then single ones.

    A light block waits for its weights, a heavy one leaves DMA idle: as many light ones follow a
    heavy one as its surplus of PE time pays for.
    """
    tile, weights = _row_tile_ns(axes, dtype, spec), _weights_ns(axes, 2, spec)
    singles = tuple((size,) for size in range(most, 0, -1))
    found: list[tuple[int, ...]] = []
    if most > 1 and tile < weights < most * tile < _BODY_NS / 2:
        light = max(1, min(4, round((most * tile - weights) / (weights - tile))))
        unit = (most, *(1,) * light)
        length = most * tile + light * tile
        found.append(unit * max(1, min(_MOST_BLOCKS // len(unit), round(_BODY_NS / length))))
        found.append(unit)
    for size in range(most, 0, -1):
        times = min(_MOST_BLOCKS, round(_BODY_NS / max(size * tile, weights)))
        # A shorter body takes most of what a long one leaves.
        found += [(size,) * count for count in (times, times // 3) if count > 1]
    return tuple(dict.fromkeys((*found, *singles)))


def _few_bytes(axes: Axes, itemsize: int, spec: CoreSpec) -> int:
    """Bytes per partition beside the weights where every expert sees all tokens.

    Rows, turned, their total and result; features turned; per expert and token a few tables; of two
    waves the features, biases and what they are made from.
    """
    h, i, p, e = axes["H"], axes["I"], spec.partitions, axes["E"]
    turned = (math.ceil(h / p) + math.ceil(i / p)) * axes["T"] * itemsize
    tables = 4 * 8 * e + 4 * 6 * e + 8 * (e + _MOST_BLOCKS + p)
    wave = spec.psum_banks * spec.moving_fmax
    return h * (itemsize + 8) + turned + tables + wave * itemsize * 2 + 12 * spec.moving_fmax * 4


def _few(axes: Axes, dtype: str, spec: CoreSpec) -> ExpertsConfig:
    """Return the config for at most a tile of tokens: bodies of experts, and all room for weights.

    Half as many weights on their way as there is room for: those at work take as much again.
    """
    itemsize = as_dtype(dtype).itemsize
    times = min(_MOST_BLOCKS, axes["E"], round(_BODY_NS / 2 / _weights_ns(axes, itemsize, spec)))
    counts = [count for count in (times, times // 3) if count > 1] + [1]
    room = spec.sbuf_usable_bytes - _slack(spec) - _few_bytes(axes, itemsize, spec)
    return ExpertsConfig(
        dtype=dtype,
        itemsize=itemsize,
        most=1,
        bodies=tuple((1,) * count for count in dict.fromkeys(counts)),
        banks=spec.psum_banks,
        tail=1,
        carry=False,
        flight=(max(1, min(_MOST_FLIGHT, room)),),
        ahead=0,
        hwdge=spec.generation >= 3,
    )


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> ExpertsConfig:
    if axes["T"] <= spec.partitions:
        return _few(axes, dtype, spec)
    itemsize = as_dtype(dtype).itemsize
    banks = spec.psum_banks
    most = _most(axes, spec)
    while most > 1 and _flight(axes, dtype, most, spec) < 1.5 * _slice_bytes(axes, itemsize, spec):
        most -= 1
    held = 2 * most * axes["H"] * itemsize
    # Carried rows take the place of weights where these have plenty.
    carry = _flight(axes, dtype, most, spec) >= held + 3 * _slice_bytes(axes, itemsize, spec)
    several = any(len(body) > 1 for body in bodies(axes, dtype, most, spec))
    full = _block_bytes(axes, itemsize, most, spec, several)
    room = _flight(axes, dtype, most, spec) - (held if carry else 0) + full
    flights = [
        room - _block_bytes(axes, itemsize, size, spec, several) for size in range(1, most + 1)
    ]
    row = axes["H"] * itemsize
    room = spec.sbuf_usable_bytes - _schedule_bytes(axes, spec) - 4 * 4 * axes["H"]
    return ExpertsConfig(
        dtype=dtype,
        itemsize=itemsize,
        most=most,
        bodies=bodies(axes, dtype, most, spec),
        banks=banks,
        tail=_TAIL,
        carry=carry,
        flight=tuple(max(1, min(_MOST_FLIGHT, flight)) for flight in flights),
        ahead=max(0, min(4, room // row - 1)),
        hwdge=spec.generation >= 3,
    )


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, ExpertsConfig):
        return (another_config(config, "an ExpertsConfig"),)
    least = {"most": 1, "banks": 1, "tail": 0, "ahead": 0}
    reasons = list(field_problems(config, least, spec))
    if reasons:
        return tuple(reasons)
    if config.dtype != dtype or config.itemsize != as_dtype(dtype).itemsize:
        reasons.append(f"config.dtype is {config.dtype} of {config.itemsize} bytes for {dtype}")
    if config.banks > spec.psum_banks or 2 * config.most > config.banks:
        reasons.append(
            f"config.banks is {config.banks} with most = {config.most}; {spec.name} has "
            f"{spec.psum_banks} banks, and a block needs two for each of its row tiles"
        )
    if len(config.flight) != config.most or min(config.flight) < 1:
        reasons.append(
            f"config.flight is {config.flight}; it needs a positive int for each of the "
            f"{config.most} classes of blocks"
        )
    singles = tuple((size,) for size in range(config.most, 0, -1))
    known = all(body and all(1 <= s <= config.most for s in body) for body in config.bodies)
    if not known or set(singles) - set(config.bodies):
        reasons.append(
            f"config.bodies is {config.bodies}; each lists classes 1 to most = {config.most}, and "
            "a single block of every class must be among them"
        )
    return tuple(reasons)


def _option_problems(options: Options) -> tuple[str, ...]:
    given = {**DEFAULTS, **options}
    reasons = []
    if given["activation"] not in ACTIVATIONS:
        reasons.append(
            f"activation is {given['activation']!r}; allowed are {', '.join(ACTIVATIONS)}"
        )
    if not isinstance(given["interleaved"], (bool, np.bool_)):
        reasons.append(f"interleaved is {given['interleaved']!r}; allowed are True and False")
    for name in ("limit", "alpha"):
        value = given[name]
        number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
        if value is None and name == "limit":
            continue
        if not number or not math.isfinite(value) or value <= 0:
            reasons.append(f"{name} is {value!r}; a positive finite number is needed")
    return tuple(reasons)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    reasons = []
    given = {**DEFAULTS, **options}
    columns, inner = inputs[3].shape[2], inputs[4].shape[1]
    if columns == inner and (given["interleaved"] or given["limit"] is not None):
        reasons.append(
            f"up has {columns} columns for I = {inner}, no gate; interleaved and limit belong to "
            "gate and up; leave them out"
        )
    indices = inputs[1]
    if isinstance(indices, np.ndarray):
        wide = np.abs(indices.astype(np.int64))
        if wide.max() >= _EXACT:
            worst = int(indices.ravel()[wide.argmax()])
            reasons.append(
                f"indices has {worst}; float32 compares integers within +-{_EXACT - 1}; use a "
                "smaller id for absent ones, for example -1"
            )
    return tuple(reasons)


def _flops(axes: Axes) -> int:
    return 2 * axes["T"] * axes["K"] * axes["H"] * (axes["F"] + axes["I"])


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The longer of the two sums, the activation, a bias, and the sum over choices."""

    def sums(depth: int) -> int:
        return 1 + min(depth, spec.partitions) + math.ceil(depth / spec.partitions)

    return max(sums(axes["H"]), sums(axes["I"])) + 20 + 1 + axes["K"]


def _reduced(axes: Axes, config: Any, spec: CoreSpec) -> dict[str, int]:
    """Keep two slices and tiles of everything, edges as ragged; few experts."""

    def two(size: int, block: int) -> int:
        return size if size <= 2 * block else block + (size % block or block)

    inner = two(axes["I"], spec.partitions)
    return {
        "T": two(axes["T"], spec.partitions),
        "H": two(axes["H"], spec.partitions),
        "I": inner,
        "F": _fan(axes) * inner,
        "E": min(axes["E"], max(4, axes["K"])),
        "K": axes["K"],
    }


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    given = {**DEFAULTS, **options}
    form = ExpertForm(
        activation=given["activation"],
        gated=inputs[3].shape[2] == 2 * inputs[4].shape[1],
        interleaved=bool(given["interleaved"]),
        limit=None if given["limit"] is None else float(given["limit"]),
        alpha=float(given["alpha"]),
    )
    return (*inputs, form, out_dtype_of(inputs, options), config)


EXPERTS = Operator(
    name="experts",
    summary="y[t] = sum_k scores[t, k] * down(f(up(x[t]))) of expert indices[t, k]",
    inputs=(
        Operand("x", ("T", "H")),
        Operand("indices", ("T", "K"), dtype="int32"),
        Operand("scores", ("T", "K"), dtype="float32"),
        Operand("up", ("E", "H", "F")),
        Operand("down", ("E", "I", "H")),
        Operand("up_bias", ("E", "F"), optional=True),
        Operand("down_bias", ("E", "H"), optional=True),
    ),
    outputs=(Operand("y", ("T", "H")),),
    axis_order=("T", "H", "I", "F", "E", "K"),
    dtypes=("bfloat16", "float16", "float32"),
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=experts,
    arguments=_arguments,
    limits=_limits,
    option_problems=_option_problems,
    config_problems=_config_problems,
    value_problems=_value_problems,
)
