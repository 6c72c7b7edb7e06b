"""What a planted bug is, and the pieces its kernels are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import nki.isa as nisa
import nki.language as nl
import numpy as np

from nki_kernels.machine.options import CHECKS, Options

#: Every check at "error".
HOSTILE = Options(**dict.fromkeys(CHECKS, "error"), instruction_limit=50)


class Bug(NamedTuple):
    """A kernel with a mistake, its corrected twin, and the check that must see it.

    Attributes:
        name: what is wrong.
        check: the check that finds it.
        bug, twin: kernels of the same arguments.
        says: texts of the message.
        arrays: the arguments.
        stops: the mistake cannot be simulated past, so a level below "error" still ends the run
            (or leaves nothing to compare).
    """

    name: str
    check: str
    bug: Callable[..., Any]
    twin: Callable[..., Any]
    says: tuple[str, ...]
    arrays: tuple[Any, ...] = ()
    target: str = "trn2"
    lnc: int = 1
    stops: bool = False


def sb(*shape: int, dtype: Any = nl.float32, **more: Any) -> Any:
    """A tile in SBUF that nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.sbuf, **more)


def ps(*shape: int, dtype: Any = nl.float32, **more: Any) -> Any:
    """A tile in PSUM that nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.psum, **more)


def hbm(*shape: int, dtype: Any = nl.float32, **more: Any) -> Any:
    """An output that nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm, **more)


def filled(*shape: int, value: float = 1.0, dtype: Any = nl.float32, **more: Any) -> Any:
    """A tile in SBUF full of one value."""
    tile = sb(*shape, dtype=dtype, **more)
    nisa.memset(tile, value)
    return tile


def loaded(x: Any) -> Any:
    """A tile in SBUF with the values of an HBM tensor."""
    tile = sb(*x.shape, dtype=x.dtype)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def stored(tile: Any) -> Any:
    """An output with the values of a tile."""
    if tile.buffer is nl.psum:
        copy = sb(*tile.shape, dtype=tile.dtype)
        nisa.tensor_copy(copy, tile)
        tile = copy
    out = hbm(*tile.shape, dtype=tile.dtype)
    nisa.dma_copy(dst=out, src=tile)
    return out


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def pair(
    kernel: Callable[..., Any], bug: Any, twin: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two kernels that differ in one argument, passed first."""

    def wrong(*arrays: Any) -> Any:
        return kernel(bug, *arrays)

    def right(*arrays: Any) -> Any:
        return kernel(twin, *arrays)

    return wrong, right
