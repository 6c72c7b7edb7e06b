"""The gated MLP: its contract and the choice of its config.

`gated_mlp` takes the weights as PyTorch stores them; `gated_mlp_kn` takes each with its contraction
outermost, which streams faster when few tokens leave nothing but the weights to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.mlp import gated
from nki_kernels.kernels.mlp.gated import GatedMlpConfig
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.linear import ACTIVATIONS, EPILOGUE_ROUNDINGS

__all__ = ["GATED_MLP", "GATED_MLP_KN", "GatedMlpConfig", "gated_mlp"]

#: Shares of SBUF: x and the hidden features of a block, and slices in flight. With few tokens the
#: slices are wide and the block is small.
_BLOCK_SHARE = 0.7
_FLIGHT_SHARE = 0.15
_STREAM_SHARE = 0.4

#: Slices in flight beyond which nothing more hides (see operators/matmul.py).
_MAX_PREFETCH = 8

#: Slices run tile by tile at the end of a wave: an eviction takes 0.6 us, 3 slices.
_TAIL = 4

#: Matmuls of one pass of the device loop: with loads and evictions a program of two passes and a
#: rest stays near 100,000 instructions.
_PASS_MATMULS = 45_000

#: PSUM banks PE transposes need.
_TRANSPOSE_BANKS = 2


def _flops(axes: Axes) -> int:
    return 6 * axes["T"] * axes["H"] * axes["I"]


def _as_products(axes: Axes) -> tuple[Axes, Axes]:
    t, h, i = axes["T"], axes["H"], axes["I"]
    return {"M": t, "N": i, "K": h}, {"M": t, "N": h, "K": i}


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The longer of the two sums; those of the hidden features reach the result through theirs."""
    longest = max(products.chain(part, spec) for part in _as_products(axes))
    return longest + EPILOGUE_ROUNDINGS


def _tokens_that_fit(axes: Axes, dtype: str, spec: CoreSpec) -> int:
    """Return how many tokens' x and hidden features fit, at most a moving operand's columns."""
    slices = math.ceil(axes["H"] / spec.partitions) + math.ceil(axes["I"] / spec.partitions)
    room = int(spec.sbuf_usable_bytes * _BLOCK_SHARE)
    return min(spec.moving_fmax, room // (slices * as_dtype(dtype).itemsize))


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    # With few tokens the hidden features lie in SBUF with tokens on partitions, too.
    slices = math.ceil(axes["H"] / spec.partitions) + math.ceil(axes["I"] / spec.partitions)
    need = (slices + axes["I"]) * as_dtype(dtype).itemsize
    room = int(spec.sbuf_usable_bytes * _BLOCK_SHARE)
    if need <= room:
        return ()
    reason = (
        f"H and I are {axes['H']} and {axes['I']}; one token's x and hidden features of {dtype} "
        f"take {need} bytes of a partition, at most {room} on {spec.name}; split I over calls and "
        "add the results, or use a narrower dtype"
    )
    return (reason,)


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> GatedMlpConfig:
    itemsize = as_dtype(dtype).itemsize
    transpose = "dma" if itemsize == 2 else "pe"
    banks = spec.psum_banks - (_TRANSPOSE_BANKS if transpose == "pe" else 0)
    tokens = _block(axes["T"], _tokens_that_fit(axes, dtype, spec), spec.stationary_fmax)
    flip = tokens <= spec.stationary_fmax
    tile = spec.moving_fmax if flip else spec.partitions
    wave_up = _even(math.ceil(axes["I"] / tile), banks)
    rows = math.ceil(tokens / spec.stationary_fmax)
    wave_down = _even(math.ceil(axes["H"] / spec.moving_fmax), banks // rows)
    slice_bytes = max(wave_up * tile, wave_down * spec.moving_fmax) * itemsize
    # A slice that PE transposes exists twice for a while.
    slice_bytes *= 2 if transpose == "pe" else 1
    room = int(spec.sbuf_usable_bytes * (_STREAM_SHARE if flip else _FLIGHT_SHARE)) // slice_bytes
    return GatedMlpConfig(
        tokens=tokens,
        blocks=_blocks(axes, tokens, spec),
        flip=flip,
        wave_up=wave_up,
        wave_down=wave_down,
        prefetch=max(1, min(_MAX_PREFETCH, room)),
        tail=1 if flip else _TAIL,
        transpose=transpose,
        hwdge=spec.generation >= 3,
        evict_scalar=spec.generation >= 3,
    )


def _blocks(axes: Axes, tokens: int, spec: CoreSpec) -> int:
    """Return the blocks of a pass of the device loop, from the matmuls of one block."""
    h, i = (math.ceil(axes[letter] / spec.partitions) for letter in "HI")
    rows = math.ceil(tokens / spec.stationary_fmax)
    matmuls = 2 * h * i + rows * i * math.ceil(axes["H"] / spec.moving_fmax)
    return max(1, _PASS_MATMULS // matmuls)


def _even(tiles: int, most: int) -> int:
    """Return the tiles of a wave: equal waves instead of full ones and a thin last one."""
    return math.ceil(tiles / math.ceil(tiles / most))


def _block(tokens: int, most: int, tile: int) -> int:
    """Return the tokens of a block: equal blocks, whole row tiles where there are several."""
    if most > tile:
        most -= most % tile
    block = math.ceil(tokens / math.ceil(tokens / most))
    return block if block <= tile else min(most, math.ceil(block / tile) * tile)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, GatedMlpConfig):
        return (f"config is {config!r}; a GatedMlpConfig is needed; pass one, or None",)
    least = {"tokens": 1, "blocks": 1, "wave_up": 1, "wave_down": 1, "prefetch": 1, "tail": 0}
    reasons = [
        f"config.{name} is {getattr(config, name)!r}; it must be an int of at least {bound}"
        for name, bound in least.items()
        if type(getattr(config, name)) is not int or getattr(config, name) < bound
    ]
    if config.transpose not in ("dma", "pe"):
        reasons.append(f"config.transpose is {config.transpose!r}; allowed are 'dma' and 'pe'")
    return tuple(reasons or _hardware_problems(config, as_dtype(dtype).itemsize, spec))


def _hardware_problems(config: GatedMlpConfig, itemsize: int, spec: CoreSpec) -> list[str]:
    reasons = []
    banks = spec.psum_banks - (_TRANSPOSE_BANKS if config.transpose == "pe" else 0)
    side, most = (
        ("stationary", spec.stationary_fmax) if config.flip else ("moving", spec.moving_fmax)
    )
    if config.tokens > most:
        reasons.append(
            f"config.tokens is {config.tokens} with flip={config.flip}; a {side} operand has at "
            f"most {most} columns on {spec.name}; make the block smaller"
        )
    rows = math.ceil(config.tokens / spec.stationary_fmax)
    for name, tiles in (("wave_up", config.wave_up), ("wave_down", rows * config.wave_down)):
        if tiles > banks:
            reasons.append(
                f"config.{name} needs {tiles} accumulators; {spec.name} has {banks} PSUM banks "
                f"for them with transpose={config.transpose!r}; make the wave smaller"
            )
    if config.transpose == "dma" and itemsize != 2:
        reasons.append(
            f"config.transpose is 'dma' for {itemsize}-byte elements; a DMA transposes matmul "
            "operands of 2 bytes; use 'pe'"
        )
    if spec.generation < 3 and (config.hwdge or config.evict_scalar):
        reasons.append(
            f"config.hwdge and config.evict_scalar need gen3; {spec.name} is gen{spec.generation}; "
            "set both to False"
        )
    return reasons


def _reduced(axes: Axes, config: GatedMlpConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two blocks of tokens, two waves of features and of columns, edges as ragged."""
    blocks = {
        "T": config.tokens,
        "H": config.wave_down * spec.moving_fmax,
        "I": config.wave_up * (spec.moving_fmax if config.flip else spec.partitions),
    }
    return {letter: products.two_blocks(axes[letter], block) for letter, block in blocks.items()}


def activation_problems(options: Options) -> tuple[str, ...]:
    """Return why the activation of a gated layer is none, in words."""
    activation = options.get("activation", "silu")
    if activation in ACTIVATIONS:
        return ()
    return (f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}; choose one",)


def _arguments(
    transposed: bool, inputs: Sequence[Any], options: Options, config: GatedMlpConfig
) -> tuple[Any, ...]:
    x, gate, up, down = inputs
    out_dtype = str(as_dtype(options.get("out_dtype") or x.dtype))
    activation = options.get("activation", "silu")
    return x, gate, up, down, transposed, activation, out_dtype, config


def _operator(name: str, transposed: bool) -> Operator:
    up = products.stored("HI", transposed)
    down = products.stored("IH", transposed)
    return Operator(
        name=name,
        summary="y = (activation(x·gate) * (x·up))·down",
        inputs=(
            Operand("x", ("T", "H")),
            Operand("gate", up),
            Operand("up", up),
            Operand("down", down),
        ),
        outputs=(Operand("y", ("T", "H")),),
        axis_order=("T", "H", "I"),
        dtypes=("bfloat16", "float16", "float32"),
        flops=_flops,
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=_reduced,
        kernel=gated.gated_mlp,
        arguments=partial(_arguments, transposed),
        limits=_limits,
        option_problems=activation_problems,
        config_problems=_config_problems,
    )


GATED_MLP = _operator("gated_mlp", True)
GATED_MLP_KN = _operator("gated_mlp_kn", False)


def gated_mlp(
    x: npt.NDArray[Any],
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    *,
    activation: str = "silu",
    transpose_weights: bool = True,
    out_dtype: Any = None,
    config: GatedMlpConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Gated feed-forward layer (SwiGLU, GeGLU) in one kernel.

    y = (activation(x·gateᵀ) * (x·upᵀ))·downᵀ

    Sums, activation and product are float32; the hidden features are rounded once, to the dtype of
    `x`, and never leave the chip.

    Dimensions:
        T: tokens, >= 1        H: width, >= 1        I: hidden features, >= 1 (see Raises)

    Args:
        x: [T, H], dense row-major, bfloat16 | float16 | float32.
        gate: [I, H], dtype of `x`, as `torch.nn.Linear` stores it.
        up: likewise.
        down: [H, I], likewise.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
        transpose_weights: False if `gate` and `up` are stored [H, I] and `down` [I, H], which is
            faster for few tokens: 98 instead of 89 % of the memory's bandwidth (modelled, trn2).
        out_dtype: dtype of the result, one of the same three; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; see `nki_kernels.ops.matmul`.

    Returns:
        [T, H], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, or an I too large
            for SBUF; the message says how large.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: an unknown activation.
        ConfigError: a `config` that cannot run on the target or with the dtype.

    Source: the kernel is `nki_kernels.kernels.mlp.gated`.

    Example:
        >>> import numpy as np
        >>> one = np.ones((2, 2), np.float32)
        >>> gated_mlp(one, one, one, one, activation="relu")
        array([[8., 8.],
               [8., 8.]], dtype=float32)
    """
    op = GATED_MLP if transpose_weights else GATED_MLP_KN
    options = {"activation": activation, "out_dtype": out_dtype}
    run = op.launch((x, gate, up, down), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
