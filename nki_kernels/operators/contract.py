"""What an operator promises, stated once: operands, dtypes, limits, work and bytes.

Errors, Hypothesis strategies, benchmark metrics and (later) torch fakes read an `Operator`; nothing
restates it. The contract has two parts:

* `Operator.output_shapes` is pure arithmetic on shapes, so it also works on symbolic sizes;
* `Operator.problems` looks at real arrays at launch and returns every reason, in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from nki_kernels.hardware import spec_for
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import (
    ConfigError,
    DtypeError,
    NkiKernelsError,
    OptionError,
    ShapeError,
)
from nki_kernels.machine.launch import Launch, current_target, launch
from nki_kernels.machine.options import default_options

#: Sizes of the axes of one problem, by the letters of the contract ("M", "N", "K", ...).
Axes: TypeAlias = Mapping[str, int]

#: Arguments of the mathematics beside the arrays (output dtype, epsilon, causal ...).
Options: TypeAlias = Mapping[str, Any]


class ArrayLike(Protocol):
    """What a contract reads of an argument: a NumPy array, or a shape-only stand-in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""

    @property
    def dtype(self) -> Any:
        """Anything `nki_kernels.machine.dtypes.as_dtype` accepts."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One array of the contract: its name and the letter of each axis, outermost first.

    An axis of an output may be a product, "T*K".
    An optional operand may be None; then no work and no bytes belong to it. An operand with a
    `dtype` has that one and no other (indices, statistics); the others share one.
    """

    name: str
    axes: tuple[str, ...]
    optional: bool = False
    dtype: str | None = None

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(self.axes)}]"


def _no_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return ()


def _any_options(options: Options) -> tuple[str, ...]:
    return ()


def _any_config(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    return ()


def _any_values(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    return ()


def _no_option_axes() -> dict[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One public operation: its contract, the choice of its config, and how its kernel is called.

    Attributes:
        name: the public name (`nki_kernels.ops.<name>`).
        summary: one line with the formula.
        inputs: the input arrays; the first is of the dtype that all without their own share.
        outputs: the output arrays; every letter occurs in an input or in `option_axes`.
        axis_order: the order in which a free-form shape such as "2048x512x4096" lists the axes.
        dtypes: dtypes the inputs and the outputs may have.
        flops: useful floating-point operations of a problem (a multiply-add counts 2).
        roundings: roundings to the output dtype on the way to one output element.
        chain: upper bound on the float32 roundings that any one term of an output element's sum
            passes through, given how the hardware and the kernel add (see `tests/tolerance.py`).
        configure: the tuning config for axes, dtype and core; never changes the mathematics.
        reduced: a smaller problem that takes the same code path under the same config.
        kernel: the `@nki.jit` kernel.
        arguments: positional kernel arguments from inputs, options and config.
        limits: reasons why real sizes cannot run on a core, beyond the operand rules; sentences.
        option_problems: reasons why an argument beside the arrays is wrong; `out_dtype` is checked
            for every operator.
        config_problems: reasons why a config given by hand cannot run for a dtype on a core.
        value_problems: reasons why the values of valid arrays are wrong (offsets that decrease);
            shape-only stand-ins are not asked.
        unknown_trips: `Options.unknown_trips` of a launch: for kernels whose device loops, which
            values alone decide, usually do not run.
        out_dtypes: dtypes the outputs may have, the first by default; None means `dtypes`, and that
            of the inputs.
        option_axes: letters whose size an option gives, with the option's name ({"K": "top_k"}).
    """

    name: str
    summary: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    axis_order: tuple[str, ...]
    dtypes: tuple[str, ...]
    flops: Callable[[Axes], int]
    roundings: int
    chain: Callable[[Axes, CoreSpec], int]
    configure: Callable[[Axes, str, CoreSpec], Any]
    reduced: Callable[[Axes, Any, CoreSpec], Axes]
    kernel: Any
    arguments: Callable[[Sequence[Any], Options, Any], tuple[Any, ...]]
    limits: Callable[[Axes, str, CoreSpec], tuple[str, ...]] = _no_limits
    option_problems: Callable[[Options], tuple[str, ...]] = _any_options
    config_problems: Callable[[Any, str, CoreSpec], tuple[str, ...]] = _any_config
    value_problems: Callable[[Sequence[Any], Options], tuple[str, ...]] = _any_values
    out_dtypes: tuple[str, ...] | None = None
    option_axes: Mapping[str, str] = field(default_factory=_no_option_axes)
    unknown_trips: int | None = None

    def axes(self, *shapes: Sequence[int] | None, options: Options | None = None) -> dict[str, int]:
        """Return the size of each axis, read from the first input that has it, or its option.

        No sizes are compared, so symbolic sizes pass; `problems` finds the contradictions. An
        optional operand that is absent has the shape None.

        Raises:
            ShapeError: wrong number of shapes, or a shape of the wrong rank.
        """
        wrong = _rank_problems(self, shapes)
        if wrong:
            raise ShapeError(_message(self, shapes, wrong))
        found: dict[str, int] = {}
        for operand, shape in _given(self, shapes):
            for letter, size in zip(operand.axes, shape, strict=True):
                found.setdefault(letter, size)
        for letter, option in self.option_axes.items():
            if options is not None and option in options:
                found.setdefault(letter, options[option])
        return found

    def options_of(self, axes: Axes) -> dict[str, int]:
        """Return the options that give the problem `axes` its sizes beyond those of the inputs."""
        return {option: axes[letter] for letter, option in self.option_axes.items()}

    def output_shapes(
        self, *shapes: Sequence[int] | None, options: Options | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each output for the given input shapes; safe for symbolic sizes."""
        sizes = self.axes(*shapes, options=options)
        return tuple(tuple(_size(sizes, letter) for letter in out.axes) for out in self.outputs)

    def input_shapes(self, axes: Axes) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each input of the problem `axes`."""
        return tuple(tuple(axes[letter] for letter in operand.axes) for operand in self.inputs)

    def problems(self, inputs: Sequence[Any], options: Options, target: str) -> list[str]:
        """Return every reason why the arrays cannot be launched, in words; empty when they can.

        Args:
            inputs: one array per operand of `self.inputs`; a shape-only stand-in is fine.
            options: arguments beside the arrays.
            target: hardware generation, for the limits of real sizes.
        """
        return [reason for _, reason in self._reasons(inputs, options, target)]

    def check(self, inputs: Sequence[Any], options: Options, target: str) -> None:
        """Raise one error that lists all `problems`.

        Raises:
            ShapeError: a shape, a layout or a size is wrong, whatever else is.
            DtypeError: else, a dtype is wrong.
            OptionError: else, an argument beside the arrays is.
        """
        found = self._reasons(inputs, options, target)
        for error in (ShapeError, DtypeError, OptionError):
            if any(kind is error for kind, _ in found):
                raise error(_message(self, inputs, [reason for _, reason in found]))

    def min_bytes(self, axes: Axes, dtype: str, out_dtype: str | None = None) -> int:
        """Return the compulsory HBM traffic in bytes: each input read and output written once."""

        def moved(operands: Sequence[Operand], shared: str) -> int:
            return sum(
                math.prod(_size(axes, letter) for letter in operand.axes)
                * as_dtype(operand.dtype or shared).itemsize
                for operand in operands
            )

        usual = dtype if self.out_dtypes is None else self.out_dtypes[0]
        return moved(self.inputs, dtype) + moved(self.outputs, out_dtype or usual)

    def roofline_ns(self, axes: Axes, dtype: str, spec: CoreSpec) -> float:
        """Return the time in ns that neither peak FLOP rate nor HBM bandwidth can go below.

        max(flops / peak(dtype), min_bytes / bandwidth), with the peak of the input dtype.
        """
        compute = self.flops(axes) / (spec.peak_tflops(dtype) * 1e3)
        return max(compute, self.min_bytes(axes, dtype) / spec.hbm_bytes_per_ns)

    def launch(
        self,
        inputs: Sequence[Any],
        options: Options,
        *,
        config: Any = None,
        target: str | None = None,
    ) -> Launch:
        """Check the arrays, choose a config, and run the kernel on one core.

        Args:
            inputs: NumPy arrays, or shape-only `nki_kernels.machine.tensor.Abstract` values.
            options: arguments beside the arrays.
            config: the tuning config; None lets `configure` choose.
            target: hardware generation; None means the one in force.

        Returns:
            Outputs, trace, and the modelled time on demand.

        Raises:
            ShapeError, DtypeError, OptionError: see `check`.
            ConfigError: a config given by hand that cannot run.
        """
        target = target or current_target()
        self.check(inputs, options, target)
        dtype, spec = as_dtype(inputs[0].dtype), spec_for(target)
        if config is None:
            axes = self.axes(*shapes_of(inputs), options=options)
            config = self.configure(axes, dtype, spec)
        else:
            wrong = self.config_problems(config, dtype, spec)
            if wrong:
                raise ConfigError(_message(self, inputs, wrong))
        arguments = self.arguments(inputs, options, config)
        checks = replace(default_options(), unknown_trips=self.unknown_trips)
        return launch(self.kernel, arguments, target=target, lnc=1, options=checks)

    def _reasons(
        self, inputs: Sequence[Any], options: Options, target: str
    ) -> list[tuple[type[NkiKernelsError], str]]:
        unusable = _unusable(self, inputs)
        if unusable:
            return [(DtypeError, reason) for reason in unusable]
        dtypes = _dtype_problems(self, inputs, options)
        shapes = _rank_problems(self, shapes_of(inputs)) or _size_problems(self, inputs)
        shapes += _layout_problems(self, inputs)
        options_wrong = self.option_problems(options)
        if not dtypes and not shapes and not (self.option_axes and options_wrong):
            axes = self.axes(*shapes_of(inputs), options=options)
            shapes += self.limits(axes, as_dtype(inputs[0].dtype), spec_for(target))
        wrong = [(OptionError, reason) for reason in options_wrong]
        if not dtypes and not shapes and not wrong:
            wrong = [(OptionError, reason) for reason in self.value_problems(inputs, options)]
        return [
            *((DtypeError, reason) for reason in dtypes),
            *((ShapeError, reason) for reason in shapes),
            *wrong,
        ]


def _size(axes: Axes, letters: str) -> int:
    """Return the size of an axis, or of a product of axes; one size is not multiplied."""
    first, *others = letters.split("*")
    size = axes[first]
    for letter in others:
        size = size * axes[letter]
    return size


def shapes_of(inputs: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    """Return the shape of each input; None for an absent optional one."""
    return tuple(None if x is None else x.shape for x in inputs)


def _given(op: Operator, values: Sequence[Any]) -> list[tuple[Operand, Any]]:
    """Pair the operands with what was passed for them, leaving out absent optional ones."""
    return [
        (operand, value)
        for operand, value in zip(op.inputs, values, strict=True)
        if value is not None or not operand.optional
    ]


def _message(op: Operator, inputs: Sequence[Any], reasons: Sequence[str]) -> str:
    head = f"{op.name}({', '.join(_describe(x) for x in inputs)}): "
    if len(reasons) == 1:
        return head + reasons[0]
    return head + f"{len(reasons)} problems\n" + "\n".join(f"  - {reason}" for reason in reasons)


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", value if isinstance(value, tuple) else None)
    if shape is None:
        return type(value).__name__
    dims = f"[{', '.join(map(str, shape))}]"
    return f"{value.dtype}{dims}" if hasattr(value, "dtype") else dims


def _unusable(op: Operator, inputs: Sequence[Any]) -> list[str]:
    return [
        f"{operand.name} is a {type(value).__name__}; a NumPy array is needed; "
        f"pass np.asarray({operand.name}, dtype=...)"
        for operand, value in _given(op, inputs)
        if not (hasattr(value, "shape") and hasattr(value, "dtype"))
    ]


def _dtype_problems(op: Operator, inputs: Sequence[ArrayLike], options: Options) -> list[str]:
    reasons = []
    allowed = ", ".join(op.dtypes)
    shared = []
    for operand, value in _given(op, inputs):
        if operand.dtype is not None:
            if not _is_dtype(value.dtype, operand.dtype):
                reasons.append(
                    f"{operand.name} has dtype {value.dtype}; it must be {operand.dtype}; "
                    f"cast it with {operand.name}.astype('{operand.dtype}')"
                )
            continue
        shared.append((operand, value))
        if not supports(op, value.dtype):
            reasons.append(
                f"{operand.name} has dtype {value.dtype}; allowed are {allowed}; "
                f"cast it, for example {operand.name}.astype('{op.dtypes[-1]}')"
            )
    if len({str(value.dtype) for _, value in shared}) > 1 and not reasons:
        listed = ", ".join(f"{operand.name} {value.dtype}" for operand, value in shared)
        reasons.append(f"dtypes differ: {listed}; all inputs must have one dtype; cast one")
    wanted = options.get("out_dtype")
    kinds = op.out_dtypes or op.dtypes
    if wanted is not None and not _is_dtype(wanted, *kinds):
        allowed = ", ".join(kinds)
        reasons.append(f"out_dtype is {wanted}; allowed are {allowed}; choose one of them")
    return reasons


def supports(op: Operator, dtype: Any) -> bool:
    """Tell whether `dtype` (a name, NumPy dtype or nl dtype) is one of the operator's dtypes."""
    return _is_dtype(dtype, *op.dtypes)


def _is_dtype(dtype: Any, *allowed: str) -> bool:
    try:
        return str(as_dtype(dtype)) in allowed
    except DtypeError:
        return False


def _rank_problems(op: Operator, shapes: Sequence[Sequence[int] | None]) -> list[str]:
    if len(shapes) != len(op.inputs):
        wanted = ", ".join(map(str, op.inputs))
        return [f"{len(shapes)} inputs; {len(op.inputs)} are needed: {wanted}; pass them all"]
    return [
        f"{operand.name} has {len(shape)} dimensions, shape {list(shape)}; "
        f"{len(operand.axes)} are needed: {operand}; reshape it"
        for operand, shape in _given(op, shapes)
        if len(shape) != len(operand.axes)
    ]


def _size_problems(op: Operator, inputs: Sequence[ArrayLike]) -> list[str]:
    reasons = []
    first: dict[str, tuple[Operand, int, list[int]]] = {}
    for operand, value in _given(op, inputs):
        shape = list(value.shape)
        if 0 in shape:
            reasons.append(
                f"{operand} = {shape} has a zero-size axis; every axis must be at least 1; "
                "handle the empty case before the call"
            )
        for letter, size in zip(operand.axes, shape, strict=True):
            other, seen, other_shape = first.setdefault(letter, (operand, size, shape))
            if seen != size:
                reasons.append(
                    f"{letter} is {seen} in {other} = {other_shape} but {size} in {operand} = "
                    f"{shape}; the two must be equal; transpose or slice one of them"
                )
    return reasons


def _layout_problems(op: Operator, inputs: Sequence[Any]) -> list[str]:
    reasons = []
    for operand, value in _given(op, inputs):
        flags = getattr(value, "flags", None)
        if flags is not None and not flags.c_contiguous:
            reasons.append(
                f"{operand.name} is strided, {list(value.strides)} bytes for shape "
                f"{list(value.shape)}; a kernel takes dense row-major arrays; "
                f"pass np.ascontiguousarray({operand.name})"
            )
    return reasons
