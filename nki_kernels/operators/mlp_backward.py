"""The gradients of the gated MLP: contract and choice of config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.kernel import Layout, MatmulConfig
from nki_kernels.kernels.mlp import GatedMlpBackwardConfig
from nki_kernels.kernels.mlp import gated_mlp_backward as gated_mlp_backward_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.linear import EPILOGUE_ROUNDINGS
from nki_kernels.operators.mlp import activation_problems

__all__ = ["MLP_BACKWARDS", "GatedMlpBackwardConfig", "gated_mlp_backward"]

#: Slices run tile by tile at the end of a wave: an eviction takes two passes of Vector, 1.3 us.
_TAIL = 8

#: Share of SBUF for the slices of x and dy that are held over the waves of a block of rows.
_HELD_SHARE = 0.4

#: The four kinds of products, by field of the config.
_LAYOUTS = {
    "hidden": Layout(transpose_b=True),
    "dx": Layout(),
    "dweight": Layout(transpose_a=True),
    "ddown": Layout(transpose_a=True),
}


#: Six programs, of which the first has three products, share what one product may have: passes of
#: the device loop are that much shorter.
_SHARES = {"hidden": 18, "dx": 6, "dweight": 6, "ddown": 6}


def _as_products(axes: Axes) -> dict[str, dict[str, int]]:
    t, h, i = axes["T"], axes["H"], axes["I"]
    return {
        "hidden": {"M": t, "N": i, "K": h},
        "dx": {"M": t, "N": h, "K": i},
        "dweight": {"M": i, "N": h, "K": t},
        "ddown": {"M": h, "N": i, "K": t},
    }


def _flops(axes: Axes) -> int:
    """Six products; x·gateᵀ and x·upᵀ, formed again, are not counted as useful."""
    return 12 * axes["T"] * axes["H"] * axes["I"]


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The longest sum, and the two halves of dx; those of the features reach it through theirs."""
    longest = max(products.chain(part, spec) for part in _as_products(axes).values())
    return longest + EPILOGUE_ROUNDINGS


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> GatedMlpBackwardConfig:
    parts = _as_products(axes)
    found = {}
    for name, layout in _LAYOUTS.items():
        part = products.configure(layout, parts[name], dtype, spec, tail=_TAIL)
        wave = part.wave_m * spec.stationary_fmax
        share = max(1, part.rows // (_SHARES[name] * wave))
        found[name] = dataclasses.replace(part, rows=wave * share)
    return GatedMlpBackwardConfig(
        **{**found, "hidden": _hidden(found["hidden"], axes, dtype, spec)}
    )


def _hidden(base: MatmulConfig, axes: Axes, dtype: str, spec: CoreSpec) -> MatmulConfig:
    """Hold the slices of both x and dy where they fit; float32 features take the rest of SBUF."""
    width = base.wave_m * spec.stationary_fmax * as_dtype(dtype).itemsize
    held = 2 * width * math.ceil(axes["H"] / spec.partitions)
    hold = held <= int(spec.sbuf_usable_bytes * _HELD_SHARE)
    # Half the slices in flight: four float32 tiles of each bank are alive.
    return dataclasses.replace(base, hold_a=hold, prefetch=max(1, base.prefetch // 2))


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, GatedMlpBackwardConfig):
        return (f"config is {config!r}; a GatedMlpBackwardConfig is needed; pass one, or None",)
    return tuple(
        f"{name}: {reason}"
        for name, layout in _LAYOUTS.items()
        for reason in products.config_problems(layout, getattr(config, name), dtype, spec)
    )


def _reduced(axes: Axes, config: GatedMlpBackwardConfig, spec: CoreSpec) -> dict[str, int]:
    """Each axis appears in several products; the largest of its reduced sizes serves all."""
    letters = {
        "hidden": {"M": "T", "N": "I", "K": "H"},
        "dx": {"M": "T", "N": "H", "K": "I"},
        "dweight": {"M": "I", "N": "H", "K": "T"},
        "ddown": {"M": "H", "N": "I", "K": "T"},
    }
    sizes = {"T": 1, "H": 1, "I": 1}
    for name, part in _as_products(axes).items():
        small = products.reduced(part, getattr(config, name), spec)
        for letter, axis in letters[name].items():
            sizes[axis] = max(sizes[axis], small[letter])
    return sizes


def _arguments(
    inputs: Sequence[Any], options: Options, config: GatedMlpBackwardConfig
) -> tuple[Any, ...]:
    operands = (*inputs, None, None)[:7]
    out_dtype = str(as_dtype(options.get("out_dtype") or inputs[0].dtype))
    return *operands, options.get("activation", "silu"), out_dtype, config


def _operator(kept: bool) -> Operator:
    saved = (Operand("x_gate", ("T", "I")), Operand("x_up", ("T", "I")))
    formula = "gradients of y = (activation(x·gateᵀ) * (x·upᵀ))·downᵀ"
    return Operator(
        name="gated_mlp_backward_kept" if kept else "gated_mlp_backward",
        summary=formula + (", from x_gate = x·gateᵀ and x_up = x·upᵀ" if kept else ""),
        inputs=(
            Operand("dy", ("T", "H")),
            Operand("x", ("T", "H")),
            Operand("gate", ("I", "H")),
            Operand("up", ("I", "H")),
            Operand("down", ("H", "I")),
            *(saved if kept else ()),
        ),
        outputs=(
            Operand("dx", ("T", "H")),
            Operand("dgate", ("I", "H")),
            Operand("dup", ("I", "H")),
            Operand("ddown", ("H", "I")),
        ),
        axis_order=("T", "H", "I"),
        dtypes=("bfloat16", "float16", "float32"),
        flops=_flops,
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=_reduced,
        kernel=gated_mlp_backward_kernel,
        arguments=_arguments,
        option_problems=activation_problems,
        config_problems=_config_problems,
    )


#: By whether the caller kept x·gateᵀ and x·upᵀ.
MLP_BACKWARDS: dict[bool, Operator] = {kept: _operator(kept) for kept in (False, True)}


def gated_mlp_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    x_gate: npt.NDArray[Any] | None = None,
    x_up: npt.NDArray[Any] | None = None,
    *,
    activation: str = "silu",
    out_dtype: Any = None,
    config: GatedMlpBackwardConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Gradients of `gated_mlp`, all in one kernel.

    With a = x·gateᵀ, b = x·upᵀ, e = dy·down, f the activation and f' its slope:
    h = f(a) * b, da = e * b * f'(a), db = e * f(a), each rounded once, to the dtype of `x`;
    dx = da·gate + db·up;  dgate = daᵀ·x;  dup = dbᵀ·x;  ddown = dyᵀ·h

    a and b are formed again from x, unless the caller kept them: then two products of eight are
    spared. Sums are float32.

    Dimensions:
        T: tokens, >= 1        H: width, >= 1        I: hidden features, >= 1

    Args:
        dy: [T, H], dense row-major, bfloat16 | float16 | float32.
        x: [T, H], dtype of `dy`.
        gate: [I, H], likewise, as `torch.nn.Linear` stores it.
        up: likewise.
        down: [H, I], likewise.
        x_gate: [T, I], likewise, a as the forward pass had it, or None.
        x_up: [T, I], likewise, b; both or none.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu", whose slope at 0 is 0.
        out_dtype: dtype of the results, one of the same three; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; see `nki_kernels.ops.matmul`.

    Returns:
        dx [T, H], dgate [I, H], dup [I, H], ddown [H, I], new arrays of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array.
        DtypeError: a dtype that is not supported, or different ones; one of x_gate and x_up alone.
        OptionError: an unknown activation.
        ConfigError: a `config` that cannot run on the target or with the dtype.

    Source: the kernel is `nki_kernels.kernels.mlp.gated_backward`.

    Example:
        >>> import numpy as np
        >>> one = np.ones((1, 1), np.float32)
        >>> [part.item() for part in gated_mlp_backward(one, one, 2 * one, 3 * one, one,
        ...                                             activation="relu")]
        [12.0, 3.0, 2.0, 6.0]
    """
    options = {"activation": activation, "out_dtype": out_dtype}
    kept = x_gate is not None or x_up is not None
    inputs = (dy, x, gate, up, down, *((x_gate, x_up) if kept else ()))
    run = MLP_BACKWARDS[kept].launch(inputs, options, config=config, target=target)
    dx, dgate, dup, ddown = run.result
    return dx, dgate, dup, ddown
