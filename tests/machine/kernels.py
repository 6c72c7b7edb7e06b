"""Run a few lines inside a kernel on the toy core, and look at what they made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options


def inside(body: Callable[..., Any], *arrays: Any, target: str = "toy", **keywords: Any) -> Any:
    """Return what ``body(*hbm_tensors)`` returns; the kernel itself returns nothing."""
    results = []

    def kernel(*inputs: Any) -> None:
        results.append(body(*inputs))

    keywords.setdefault("options", Options(outputs="off"))  # what it writes to HBM is looked at
    launch(kernel, arrays, target=target, **keywords)
    return results[0]


def refused(
    body: Callable[..., Any],
    error: type[NkiKernelsError],
    *says: str,
    arrays: tuple[Any, ...] = (),
    **keywords: Any,
) -> str:
    """Check that the body raises `error` with every text of `says`; return the message."""
    with pytest.raises(error) as caught:
        inside(body, *arrays, **keywords)
    message = str(caught.value)
    for text in says:
        assert text in message, f"{text!r} not in {message!r}"
    return message


def sbuf(*shape: int, dtype: Any = nl.float32) -> Any:
    """A tile nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.sbuf)


def psum(*shape: int, dtype: Any = nl.float32) -> Any:
    """A PSUM tile nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.psum)


def hbm(*shape: int, dtype: Any = nl.float32) -> Any:
    """An output tensor nothing wrote."""
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def loaded(source: Any) -> Any:
    """An SBUF tile with the values of an HBM tensor."""
    tile = nl.ndarray(source.shape, source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source)
    return tile


def stored(tile: Any) -> Any:
    """An output tensor with the values of an SBUF tile."""
    result = nl.ndarray(tile.shape, tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=result, src=tile)
    return result


def counted(*shape: int, dtype: Any = np.float32) -> Any:
    """0, 1, 2, ... in row-major order."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@nki.jit
def double(x: Any) -> Any:
    """Return 2 x."""
    tile = loaded(x)
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    return stored(tile)
