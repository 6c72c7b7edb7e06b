"""Calls that are made later, inside a kernel: tables of rules hold them as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nki.isa as nisa
import nki.language as nl

from tests.embedded.harness import hbm, ps, sb

#: Where every call of `of` is made: what an error names.
SITE = __file__


def S(*shape: int, dtype: Any = nl.float32) -> Callable[[], Any]:
    """A tile in SBUF."""
    return lambda: sb(*shape, dtype=dtype)


def P(*shape: int, dtype: Any = nl.float32) -> Callable[[], Any]:
    """A tile in PSUM."""
    return lambda: ps(*shape, dtype=dtype)


def H(*shape: int, dtype: Any = nl.float32) -> Callable[[], Any]:
    """A tensor in HBM."""
    return lambda: hbm(*shape, dtype=dtype)


def made(value: Any) -> Any:
    """The tile that a function of this module stands for, or the value itself."""
    return value() if callable(value) and not hasattr(value, "nki_op") else value


def of(name: str, *usual: Any) -> Callable[..., Callable[[], Any]]:
    """``of(name, *usual)(*operands, **options)`` is a call of that instruction.

    `usual` fills the places after the operands given.
    """
    instruction = getattr(nisa, name)

    def operands_of(*operands: Any, **options: Any) -> Callable[[], Any]:
        given = (*operands, *usual[len(operands) :])
        return lambda: instruction(
            *[made(v) for v in given], **{k: made(v) for k, v in options.items()}
        )

    return operands_of
