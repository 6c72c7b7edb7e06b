"""CoreSpec: every number of one NeuronCore generation, each with its origin. (Skeleton.)"""

from __future__ import annotations

import enum


class Engine(enum.IntEnum):
    """The engines of a NeuronCore, numbered as in ``nki.isa.engine``."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class CoreSpec:
    """Skeleton."""
