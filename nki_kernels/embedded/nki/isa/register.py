"""Registers of the engine sequencers. They carry loop bounds and run-time addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from nki_kernels.machine import dtypes
from nki_kernels.machine.core import Run, VirtualRegister, current
from nki_kernels.machine.errors import DtypeError, RuleViolation, ShapeError
from nki_kernels.machine.memory import uninitialized
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import ControlWork, where


def register_alloc(x: Any = None) -> VirtualRegister:
    """Return a new 32-bit register: uninitialised, holding the int `x`, or loaded from a tile.

    Source: nki.isa.register_alloc (the tile form is from the 0.2 notes; accepted, avoid it).
    """
    run = current("nisa.register_alloc")
    if isinstance(x, NkiTensor):
        register = run.register()
        register_load(register, x)
        return register
    if x is not None and not isinstance(x, (int, np.integer)):
        raise RuleViolation(f"nisa.register_alloc: x={x!r}; it must be None or an int")
    return run.register(None if x is None else wrap(int(x)))


def register_move(dst: VirtualRegister, src: Any) -> None:
    """dst = src, an int or another register."""
    run = current("nisa.register_move")
    _writable(dst, "nisa.register_move")
    if isinstance(src, VirtualRegister):
        dst.value, dst.abstract = src.value, src.abstract
        reads: tuple[str, ...] = (f"register:{src.number}",)
    elif isinstance(src, (int, np.integer)):
        dst.value, dst.abstract = wrap(int(src)), False
        reads = ()
    else:
        raise RuleViolation(f"nisa.register_move: src={src!r}; it must be an int or a register")
    run.control(
        "register_move", ControlWork("register_move"),
        hidden_reads=reads, hidden_writes=(f"register:{dst.number}",),
    )  # fmt: skip


def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    """dst = the single element of `src` (HBM or SBUF, at most 32 bits; float bits are kept raw)."""
    run = current("nisa.register_load")
    _writable(dst, "nisa.register_load")
    load(run, "register_load", dst, src)


def load(run: Run, opcode: str, dst: VirtualRegister, src: NkiTensor) -> None:
    """Put the single element of `src` into a register, and record it."""
    what = f"nisa.{opcode}"
    _element(src, run, what, "src")
    access, src = src.access, src.resolved(f"{what} src")
    if not src.mem.is_written(src.region):
        raise uninitialized(what, "src", src, where(run.kernel_site()))
    if src.mem.abstract:
        dst.value, dst.abstract = None, True
    else:
        raw = src.numpy().reshape(-1)
        bits = raw[0] if src.dtype.is_integer else raw.view(np.int32)[0]
        dst.value, dst.abstract = wrap(int(bits)), False
    run.control(
        opcode, ControlWork("register_load"),
        reads=(access,), hidden_writes=(f"register:{dst.number}",),
    )  # fmt: skip


def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    """The single element of `dst` (HBM or SBUF) = src, bit for bit, as register_load reads it.

    Narrow integers take the low bits (undocumented).
    """
    run = current("nisa.register_store")
    if not isinstance(src, VirtualRegister):
        raise RuleViolation(
            f"nisa.register_store: src={src!r}; it must come from nisa.register_alloc"
        )
    store(run, "register_store", dst, src)


def store(run: Run, opcode: str, dst: NkiTensor, src: VirtualRegister) -> None:
    """Put a register into the single element of `dst`, and record it."""
    what = f"nisa.{opcode}"
    _element(dst, run, what, "dst")
    access, dst = dst.access, dst.resolved(f"{what} dst")
    mem = dst.mem
    mem.touch()
    if src.abstract or (mem.abstract and not mem.covers(dst.region)):
        mem.lose_values()
    else:
        mem.abstract = False
        size = dst.dtype.itemsize
        low = np.full(dst.shape, src.read() % 2 ** (8 * size), f"u{size}")
        mem.array(dst.region, low.dtype)[...] = low != 0 if dst.dtype == dtypes.bool_ else low
    mem.mark(dst.region)
    run.control(
        opcode, ControlWork("register_store"),
        writes=(access,), hidden_reads=(f"register:{src.number}",),
    )  # fmt: skip


def wrap(value: int) -> int:
    """Return the low 32 bits as a signed int."""
    return (value + 2**31) % 2**32 - 2**31


def _writable(register: VirtualRegister, what: str) -> None:
    if not isinstance(register, VirtualRegister):
        raise RuleViolation(f"{what}: dst={register!r}; it must come from nisa.register_alloc")
    if register.frozen:
        raise RuleViolation(
            f"{what}: register {register.number} is the index of a device loop or an "
            "NkiScalar and cannot be written; copy it with register_move"
        )


def _element(view: NkiTensor, run: Run, what: str, operand: str) -> None:
    if not isinstance(view, NkiTensor) or view.size != 1:
        raise ShapeError(f"{what}: {operand}={view!r}; it must be a tensor of one element")
    if view.mem.tile.memory == "psum":
        raise RuleViolation(
            f"{what}: {operand} is in PSUM; registers reach HBM and SBUF: copy it to SBUF"
        )
    if view.dtype.itemsize > 4 or view.dtype.kind == "packed":
        raise DtypeError(
            f"{what}: {operand} is {view.dtype}; it must have at most 32 bits, unpacked"
        )
    if not view.dtype.is_integer and view.dtype.itemsize != 4:
        raise DtypeError(f"{what}: {operand} is {view.dtype}; floats must be 32 bits wide")
