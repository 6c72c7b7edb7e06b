"""Which backend runs a call, who asked for it, and every reason why it cannot.

| backend | runs |
|---|---|
| neuron | the kernel on a NeuronCore; the default for tensors on neuron |
| simulator | the kernel on the embedded NKI, on this CPU |
| torch | the formula in plain PyTorch; the default for all other tensors, and for float64 |

A backend asked for by name runs, or the call raises with all reasons: nothing falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.torch_ops.arrays import as_seen
from nki_kernels.torch_ops.row import Inputs, Options, Row, Tensors
from nki_kernels.torch_ops.rows import ROWS
from nki_kernels.torch_ops.target import current_target

SIMULATOR_ENV = "NKI_SIMULATOR"
#: Device type of TorchNeuron's tensors (it renames PrivateUse1).
NEURON_DEVICE = "neuron"


class Backend(Protocol):
    """What a backend's module holds."""

    #: True if it runs the NKI kernel, which takes dense tensors within the operator's limits.
    IS_KERNEL: bool

    def reasons(self, row: Row, inputs: Inputs, options: Options) -> list[str]:
        """Return why it cannot run here."""

    def run(self, row: Row, inputs: Inputs, options: Options) -> Tensors:
        """Run it."""


# Loaded by name when first needed: nothing but this table knows `neuron.py`.
_MODULES = {
    "neuron": "nki_kernels.torch_ops.neuron",
    "simulator": "nki_kernels.torch_ops.simulator",
    "torch": "nki_kernels.torch_ops.plain",
}
BACKENDS = tuple(_MODULES)

_used: ContextVar[str | None] = ContextVar("nki_kernels_backend", default=None)


class BackendError(NkiKernelsError, RuntimeError):
    """A backend was asked for and cannot run this call; the message lists every reason."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and in words why it is this one."""

    backend: str
    why: str


_CPU = Choice("torch", "the default for tensors on cpu")


@functools.cache
def backend_module(name: str) -> Backend:
    """Return the module of a backend."""
    return cast(Backend, importlib.import_module(_MODULES[name]))


def requested(backend: str | None = None) -> Choice | None:
    """Return what was asked for by name: the argument, else `use`, else NKI_SIMULATOR.

    Raises:
        ValueError: an unknown name, or an unknown value of NKI_SIMULATOR.
    """
    if backend is not None:
        return Choice(_known(backend, "argument backend="), "asked for by the argument backend=")
    used = _used.get()
    if used is not None:
        return Choice(used, f"asked for by use({used!r})")
    switch = os.environ.get(SIMULATOR_ENV, "")
    if switch not in ("", "0", "1"):
        raise ValueError(
            f"{SIMULATOR_ENV} is {switch!r}; allowed are 1 (kernels run on the simulator) and 0; "
            "set one of these or unset it"
        )
    return Choice("simulator", f"asked for by {SIMULATOR_ENV}=1") if switch == "1" else None


def _known(name: str, where: str) -> str:
    if name not in _MODULES:
        raise ValueError(
            f"{where} is {name!r}; allowed are {', '.join(BACKENDS)}; choose one of them"
        )
    return name


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Ask for a backend within a ``with`` block.

    The innermost block counts, and the argument backend= goes before it. It holds for the thread
    (and the asyncio task) that entered it. A graph of `torch.compile` reads it when it runs; inside
    a compiled function the block breaks the graph.

    Args:
        backend: "neuron", "simulator" or "torch".

    Raises:
        ValueError: another name.
    """
    token = _used.set(_known(backend, "use: backend"))
    try:
        yield
    finally:
        _used.reset(token)


def choose(row: Row, inputs: Inputs, backend: str | None) -> Choice:
    """Return the backend of a call: the one asked for, or the default of the first tensor."""
    asked = requested(backend)
    if asked is not None:
        return asked
    first = next(x for x in inputs if x is not None)
    if first.is_cpu:
        return _CPU
    device = first.device.type
    if device != NEURON_DEVICE:
        return Choice("torch", f"the default for tensors on {device}")
    if first.dtype == torch.float64:
        return Choice("torch", "float64, which no NeuronCore computes")
    return Choice("neuron", f"the default for tensors on {device}")


def reasons(name: str, row: Row, inputs: Inputs, options: Options) -> list[str]:
    """Return every reason why a backend cannot run a call, in words; empty when it can."""
    module = backend_module(name)
    found = module.reasons(row, inputs, options)
    if module.IS_KERNEL and not is_empty(inputs):
        found += row.op.problems(as_seen(row, inputs), options, current_target())
    return found


def is_empty(inputs: Inputs) -> bool:
    """Tell whether an input has no elements, so that there is nothing for a kernel to do."""
    return any(x is not None and x.numel() == 0 for x in inputs)


def strided(row: Row, inputs: Inputs) -> list[str]:
    """Return the names of the inputs that must be copied before a kernel takes them."""
    return [name for name, value in row.present(inputs) if not value.is_contiguous()]


def failure(row: Row, inputs: Inputs, choice: Choice, found: list[str]) -> BackendError:
    """Return the error that lists the reasons."""
    listed = "".join(f"\n  - {reason}" for reason in found)
    noun = "reason" if len(found) == 1 else "reasons"
    return BackendError(
        f"{_call(row, inputs)}: backend {choice.backend!r}, {choice.why}, cannot run this call: "
        f"{len(found)} {noun}{listed}\nremove them, or ask for another backend "
        f"({', '.join(BACKENDS)}); nothing was run in its place"
    )


def _call(row: Row, inputs: Inputs) -> str:
    shown = ", ".join(
        "None" if x is None else f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        for x in inputs
    )
    return f"{row.op.name}({shown})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What would run for a call, and why.

    Attributes:
        call: the op with dtypes and shapes.
        backend: what would run, or would raise if `reasons[backend]` is not empty.
        why: who asked for it, or which default it is.
        reasons: for each backend every reason why it cannot run the call; empty where it can.
        copies: strided inputs that would be copied first.
        empty: an input has no elements: no backend would run.
    """

    call: str
    backend: str
    why: str
    reasons: Mapping[str, tuple[str, ...]]
    copies: tuple[str, ...]
    empty: bool

    @property
    def runs(self) -> bool:
        """True if the call would not raise."""
        return not self.reasons[self.backend]

    def __str__(self) -> str:
        verb = "runs on" if self.runs else "raises: cannot run on"
        lines = [self.call, f"  {verb} {self.backend}: {self.why}"]
        if self.empty:
            lines.append("  an input is empty: the result is made without a kernel")
        if self.copies:
            lines.append(f"  copies first, being strided: {', '.join(self.copies)}")
        for name, found in self.reasons.items():
            lines += [f"  {name:<10} no: {reason}" for reason in found] or [f"  {name:<10} yes"]
        return "\n".join(lines)


def explain(
    op: Any, *inputs: torch.Tensor | None, backend: str | None = None, **options: Any
) -> Explanation:
    """Say what the call would run and why, without running it.

    Args:
        op: the name of an op, or its function: ``explain(matmul, a, b)``.
        inputs: the tensors of the call, by position or by keyword; values are not read.
        backend: as in the call.
        options: as in the call.

    Raises:
        ValueError: an unknown op or backend, or not as many tensors as the op takes.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    row = ROWS.get(name)
    if row is None:
        raise ValueError(f"explain: op is {name!r}; allowed are {', '.join(ROWS)}; choose one")
    bound = _bind(row, inputs, options)
    choice = choose(row, bound, backend)
    kernel = backend_module(choice.backend).IS_KERNEL
    return Explanation(
        call=_call(row, bound),
        backend=choice.backend,
        why=choice.why,
        reasons={b: tuple(reasons(b, row, bound, options)) for b in BACKENDS},
        copies=tuple(strided(row, bound)) if kernel and not is_empty(bound) else (),
        empty=is_empty(bound),
    )


def _bind(row: Row, inputs: Inputs, options: dict[str, Any]) -> Inputs:
    """Return one input per operand, taking those given by keyword out of `options`."""
    by_name = row.op.inputs[len(inputs) :]
    bound = (*inputs, *(options.pop(operand.name, None) for operand in by_name))
    lacks = [
        operand.name
        for operand, value in zip(row.op.inputs, bound, strict=False)
        if value is None and not operand.optional
    ]
    if lacks or len(bound) > len(row.op.inputs):
        what = f"no {' and no '.join(lacks)}" if lacks else f"{len(bound)} tensors"
        wanted = ", ".join(map(str, row.op.inputs))
        raise ValueError(f"explain: {row.op.name} is given {what}; it takes {wanted}; pass these")
    return bound
