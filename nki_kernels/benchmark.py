"""The base class of a benchmark of your own kernel, for ``python -m bench run my.py:Name``.

A benchmark says what an operator of this library says: operands by axis letter, the reference, the
work. The command then checks the kernel against the reference under the library's error rule, and
models its time, exactly as it does for the library's own::

    class Add(Benchmark):
        kernel = add                    # decorated with nki.jit
        inputs = ("x[N, H]", "y[N, H]")
        outputs = ("out[N, H]",)
        shapes = ("4096x2048",)

        def reference(self, x, y):
            x, y = x.astype(np.float64), y.astype(np.float64)
            return x + y, abs(x) + abs(y)

        def flops(self, axes):
            return axes["N"] * axes["H"]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import OptionError
from nki_kernels.machine.launch import Kernel
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

_OPERAND = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*)\s*(?::\s*(?P<dtype>\w+)\s*)?\[(?P<axes>[^\]]*)\]\s*"
)
_FORM = "'name[A, B, ...]', or 'name: dtype[A, B, ...]' for an operand of its own dtype"


@dataclass(frozen=True, slots=True)
class NoConfig:
    """The config of a kernel that has none."""


class Benchmark:
    """One kernel to check and to time.

    Attributes:
        kernel: the `@nki.jit` kernel; it takes the inputs, or what `arguments` returns.
        inputs: input arrays as "name[A, B]", outermost axis first; "name: int32[A]" has its own
            dtype, all others share the one that is timed.
        outputs: output arrays; every letter occurs in an input.
        shapes: what is timed when no shape is named: sizes by axis, in the order in which the
            inputs name the axes first, such as "4096x2048".
        dtypes: dtypes that may be asked for; the first one is timed by default.
        roundings: roundings to the output dtype on the way to one output element.
    """

    kernel: ClassVar[Any] = None
    inputs: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ()
    shapes: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    roundings: ClassVar[int] = 1

    def reference(self, *inputs: Any) -> Any:
        """Return (value, sum of absolute terms) per output, float64; a tuple of them for several.

        The sum of absolute terms bounds what float32 additions may lose: for y = a*b + c it is
        abs(a*b) + abs(c).
        """
        raise OptionError(f"benchmark {type(self).__name__}: reference is not defined; write it")

    def flops(self, axes: Axes) -> int:
        """Return the useful floating-point operations of a problem (a multiply-add counts 2)."""
        raise OptionError(f"benchmark {type(self).__name__}: flops is not defined; write it")

    def chain(self, axes: Axes) -> int:
        """Return how many float32 roundings any one term of an output element passes through."""
        return 1

    def make(
        self, shapes: Sequence[tuple[int, ...]], dtype: str, seed: int
    ) -> tuple[npt.NDArray[Any], ...]:
        """Return fresh inputs: standard normal values, zeros for operands of their own dtype."""
        rng = np.random.default_rng(seed)
        return tuple(
            np.zeros(shape, as_dtype(operand.dtype).host)
            if operand.dtype
            else rng.standard_normal(shape, np.float32).astype(as_dtype(dtype).host)
            for operand, shape in zip(self.operator().inputs, shapes, strict=True)
        )

    def configure(self, axes: Axes, dtype: str, spec: CoreSpec) -> Any:
        """Return the tuning config (a frozen dataclass) for a problem; by default none."""
        return NoConfig()

    def arguments(self, inputs: Sequence[Any], config: Any) -> tuple[Any, ...]:
        """Return the kernel's positional arguments; by default the inputs."""
        return tuple(inputs)

    def reduced(self, axes: Axes, config: Any, spec: CoreSpec) -> Axes:
        """Return a smaller problem that takes the same code path, to check a large one at."""
        return axes

    @classmethod
    def problems(cls) -> list[str]:
        """Return what the class does not say, in words; empty when it is complete."""
        reasons = []
        if not isinstance(cls.kernel, Kernel):
            reasons.append(
                f"kernel is {cls.kernel!r}; name a function that is decorated with nki.jit"
            )
        for name in ("inputs", "outputs", "shapes", "dtypes"):
            value = getattr(cls, name)
            if not isinstance(value, tuple) or not value:
                reasons.append(f"{name} is {value!r}; a tuple of one or more texts is needed")
        for name in ("inputs", "outputs"):
            for text in getattr(cls, name) or ():
                if not _OPERAND.fullmatch(str(text)):
                    reasons.append(f"{name} has {text!r}; allowed is {_FORM}")
        for name in ("reference", "flops"):
            if getattr(cls, name) is getattr(Benchmark, name):
                reasons.append(f"{name} is not defined; write this method")
        return reasons

    def operator(self) -> Operator:
        """Return the contract that the class spells out.

        Raises:
            OptionError: everything that is missing or misspelt.
        """
        name = type(self).__name__
        reasons = self.problems()
        inputs, outputs = (
            tuple(_operand(text) for text in texts if _OPERAND.fullmatch(str(text)))
            for texts in (self.inputs, self.outputs)
        )
        order = tuple(dict.fromkeys(letter for operand in inputs for letter in operand.axes))
        unknown = {letter for out in outputs for letter in out.axes} - set(order)
        if unknown:
            reasons.append(
                f"outputs have the axes {', '.join(sorted(unknown))}, which no input has; inputs "
                f"have {', '.join(order)}; name one of these"
            )
        if reasons:
            raise OptionError(f"benchmark {name}: " + "; and ".join(reasons))
        return Operator(
            name=name,
            summary=(type(self).__doc__ or name).strip().splitlines()[0],
            inputs=inputs,
            outputs=outputs,
            axis_order=order,
            dtypes=self.dtypes,
            flops=self.flops,
            roundings=self.roundings,
            chain=lambda axes, spec: self.chain(axes),
            configure=self.configure,
            reduced=self.reduced,
            kernel=self.kernel,
            arguments=self._arguments,
        )

    def _arguments(self, inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
        return self.arguments(inputs, config)


def _operand(text: str) -> Operand:
    match = _OPERAND.fullmatch(text)
    if match is None:
        raise OptionError(f"benchmark: operand {text!r}; allowed is {_FORM}")
    axes = tuple(part.strip() for part in match["axes"].split(",") if part.strip())
    return Operand(match["name"], axes, dtype=match["dtype"])
