"""Reference of `rope`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import Reference


def rope(
    x: npt.NDArray[Any],
    cos: npt.NDArray[Any],
    sin: npt.NDArray[Any],
    interleaved: bool = False,
    inverse: bool = False,
) -> Reference:
    """Rotate pairs of columns, in float64.

    y1 = x1 * cos - x2 * sin;  y2 = x2 * cos + x1 * sin;  magnitude: with absolute terms.

    As complex numbers: (y1 + i y2) = (x1 + i x2) * (cos + i sin), its conjugate when inverse. The
    gradient of a rotation is the inverse rotation.

    Args:
        x: [B, H, S, D].
        cos: [S, F] or [B, S, F].
        sin: likewise.
        interleaved: pair f is columns (2 f, 2 f + 1) instead of (f, F + f).
        inverse: rotate by the negative angle.

    Returns:
        value and magnitude [B, H, S, D]; columns from 2 F on are those of x.
    """
    value = np.array(x, dtype=np.float64)
    magnitude = np.abs(value)
    c, s = (np.asarray(a, dtype=np.float64) for a in (cos, sin))
    if c.ndim == 3:
        c, s = c[:, None], s[:, None]
    pairs = c.shape[-1]
    one, two = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        one, two = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    turned = (value[..., one] + 1j * value[..., two]) * (c + (-1j if inverse else 1j) * s)
    x1, x2 = magnitude[..., one].copy(), magnitude[..., two].copy()
    value[..., one], value[..., two] = turned.real, turned.imag
    magnitude[..., one] = x1 * np.abs(c) + x2 * np.abs(s)
    magnitude[..., two] = x2 * np.abs(c) + x1 * np.abs(s)
    return Reference(value, magnitude)
