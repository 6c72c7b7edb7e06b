"""Which bytes of a tile an access covers."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from nki_kernels.machine.dependencies import Box, box_of
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.trace import Access, Tile


@lru_cache(maxsize=4096)
def box(access: Access) -> Box:
    """Return the rows and byte columns around an access."""
    return box_of(access)


def overlap(a: Access, b: Access) -> bool:
    """Return True if two accesses of one tile share a byte."""
    if a == b:
        return True
    if a.tile is not b.tile or not box(a).meets(box(b)):
        return False
    grain = math.gcd(a.itemsize, b.itemsize)
    return bool(np.intersect1d(_grains(a, grain), _grains(b, grain)).size)


@lru_cache(maxsize=256)
def _grains(access: Access, grain: int) -> Array:
    """Return the numbers of the grains an access touches."""
    per = access.itemsize // grain
    found = np.arange(per) + access.offset * per
    for extent, stride in zip(access.shape, access.strides, strict=True):
        found = np.unique(np.add.outer(np.arange(extent) * (stride * per), found))
    return found


def describe(tile: Tile) -> str:
    """Return memory, name, shape and dtype of a tile, for messages."""
    return f"{tile.memory} tile {tile.name!r} {list(tile.shape)} {tile.dtype}"
