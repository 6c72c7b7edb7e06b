"""Loops and the launch grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nki_kernels.machine.core import Run, VirtualRegister, current
from nki_kernels.machine.errors import KernelError


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Alias of ``range`` (deprecated in NKI; independence of iterations is not checked)."""
    return range(start) if stop is None else range(start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Alias of ``range`` (deprecated in NKI)."""
    return affine_range(start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Alias of ``range`` (deprecated in NKI)."""
    return affine_range(start, stop, step)


def _bound(value: Any, what: str) -> int:
    if isinstance(value, VirtualRegister):
        return value.read()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise KernelError(f"nl.fori_loop: {what}={value!r}; it must be an int or a register")


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
        body_fun: gets the index as a register it may read but not write; returns None.
        step: a positive int.

    Tensors allocated in the body are new memory in every iteration here: what the last iteration
    left in them is poison, as nothing promises it.
    """
    run = current("nl.fori_loop")
    _callable(body_fun, "nl.fori_loop")
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 1:
        raise KernelError(f"nl.fori_loop: step={step!r}; it must be a positive int")

    def body(value: int) -> None:
        if body_fun(run.register(value, frozen=True)) is not None:
            raise KernelError(
                "nl.fori_loop: the body returned a value; it must return None: carry state in "
                "SBUF or HBM"
            )

    run.iterate(range(_bound(lower, "lower"), _bound(upper, "upper"), int(step)), body)


def while_loop(
    init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]
) -> None:
    """Run ``r = body_fun(r)`` on the device while r != 0, starting from ``r = init``."""
    run = current("nl.while_loop")
    _callable(body_fun, "nl.while_loop")
    if not isinstance(init, VirtualRegister):
        raise KernelError(f"nl.while_loop: init={init!r}; it must be a register")
    state = [init]

    def conditions() -> Any:
        while state[0].read() != 0:
            yield state[0]

    def body(register: VirtualRegister) -> None:
        following = body_fun(register)
        if not isinstance(following, VirtualRegister):
            raise KernelError(
                f"nl.while_loop: the body returned {following!r}; it must return the next "
                "condition register"
            )
        state[0] = following

    run.iterate(conditions(), body)


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
