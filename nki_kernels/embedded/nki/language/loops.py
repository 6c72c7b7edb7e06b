"""Loops, the launch grid, and the order of instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from nki.isa.scalar import new_scalar
from nki.language.affine import AffineRange

from nki_kernels.machine.core import Run, VirtualRegister, current
from nki_kernels.machine.errors import KernelError

#: How many nl.no_reorder blocks the running code stands in.
_ORDERED: ContextVar[int] = ContextVar("nki_no_reorder", default=0)


def affine_range(start: int, stop: int | None = None, step: int = 1) -> AffineRange:
    """A ``range`` whose iterations are declared independent (deprecated in NKI).

    NKI 0.6 runs it as ``range``. The check `independent` says where iterations do depend on each
    other, so that the declaration stays true for compilers that use it.
    """
    return AffineRange(_range(start, stop, step))


def _range(start: int, stop: int | None, step: int) -> range:
    return range(start) if stop is None else range(start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Alias of ``range`` (deprecated in NKI)."""
    return _range(start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Alias of ``range`` (deprecated in NKI)."""
    return _range(start, stop, step)


@contextmanager
def no_reorder() -> Iterator[None]:
    """Keep the instructions of a ``with`` block, and of what it calls, in program order.

    They execute in program order here in any case, and each engine's queue keeps it in the timing
    model; the waits between engines that the real compiler inserts are not modelled. Device loops
    cannot stand in the block; a block may stand in the body of one.
    """
    current("nl.no_reorder")
    outside = _ORDERED.set(_ORDERED.get() + 1)
    try:
        yield
    finally:
        _ORDERED.reset(outside)


def _device_loop(what: str) -> Run:
    run = current(what)
    if _ORDERED.get():
        raise KernelError(
            f"{what} inside nl.no_reorder; a device loop cannot be ordered as a whole: put the "
            "no_reorder block into the loop's body, or use range()"
        )
    return run


def _step(step: Any, what: str) -> int:
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 1:
        raise KernelError(f"{what}: step={step!r}; it must be a positive int")
    return int(step)


def _bound(value: Any, what: str) -> int:
    if isinstance(value, VirtualRegister):
        return value.read()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise KernelError(f"{what}={value!r}; it must be an int or a register")


def _callable(body: Any, what: str) -> None:
    if not callable(body):
        raise KernelError(
            f"{what}: body_fun={body!r}; it must be a function of one register: define it and pass "
            "it uncalled"
        )


def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[VirtualRegister], object], step: int = 1
) -> None:
    """Run ``body_fun(i)`` on the device for i in range(lower, upper, step).

    Args:
        lower: the first index, an int or a register.
        upper: the end, not included, an int or a register.
        body_fun: gets the index as a register it may read but not write, an NkiScalar unless a
            bound is a register; returns None.
        step: a positive int.

    Tensors allocated in the body are new memory in every iteration here: what the last iteration
    left in them is poison, as nothing promises it.
    """
    run = _device_loop("nl.fori_loop")
    _callable(body_fun, "nl.fori_loop")
    stride = _step(step, "nl.fori_loop")
    first = _bound(lower, "nl.fori_loop: lower")
    trips = run.options.unknown_trips
    if trips is not None and isinstance(upper, VirtualRegister) and upper.abstract:
        end = first + trips * stride
    else:
        end = _bound(upper, "nl.fori_loop: upper")
    # A register among the bounds makes the index one; otherwise it is a scalar (NKI 0.7).
    plain = any(type(bound) is VirtualRegister for bound in (lower, upper))
    for value in run.iterations(range(first, end, stride)):
        index = run.register(value, frozen=True) if plain else new_scalar(run, value)
        if body_fun(index) is not None:
            raise KernelError(
                "nl.fori_loop: the body returned a value; it must return None: carry state in "
                "SBUF or HBM"
            )


def while_loop(
    init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]
) -> None:
    """Run ``r = body_fun(r)`` on the device while r != 0, starting from ``r = init``."""
    run = _device_loop("nl.while_loop")
    _callable(body_fun, "nl.while_loop")
    if not isinstance(init, VirtualRegister):
        raise KernelError(f"nl.while_loop: init={init!r}; it must be a register")
    register = init

    def conditions() -> Iterator[VirtualRegister]:
        while register.read() != 0:
            yield register

    for condition in run.iterations(conditions()):
        following = body_fun(condition)
        if not isinstance(following, VirtualRegister):
            raise KernelError(
                f"nl.while_loop: the body returned {following!r}; it must return the next "
                "condition register"
            )
        register = following


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """Return an iterator over a device loop's index, a register that can be read but not written.

    Deprecated: only the parser frontend of NKI 0.6 runs it, and 0.7's tracer does not; write
    `nl.fori_loop`. Bounds are ints or registers, the step a positive int.
    """
    run = _device_loop("nl.dynamic_range")
    stride = _step(step, "nl.dynamic_range")
    first = 0 if stop is None else _bound(start, "nl.dynamic_range: start")
    end = _bound(start if stop is None else stop, "nl.dynamic_range: stop")
    return (run.register(i, frozen=True) for i in run.iterations(range(first, end, stride)))


def _axis(axis: int, what: str) -> Run:
    run = current(what)
    if axis != 0:
        raise KernelError(f"{what}: axis {axis}; grids have one axis, 0")
    return run


def program_id(axis: int = 0) -> int:
    """Return this core's number in the launch (0 without a grid)."""
    return _axis(axis, "nl.program_id").core


def num_programs(axes: int = 0) -> int:
    """Return the number of cores in the launch (1 without a grid)."""
    return _axis(axes, "nl.num_programs").lnc


def program_ndim() -> int:
    """Return 1 for a launch with a bracket, else 0."""
    return int(current("nl.program_ndim").gridded)
