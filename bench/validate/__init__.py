"""``python -m bench validate``: the timing model against published measurements.

Only here do figures of the model and of hardware stand in one table. Parameters of the model come
from isolated probes and documents; nothing is fitted to a whole kernel, and what misses stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.validate.isolated import probe_readings
from bench.validate.law_probes import law_readings
from bench.validate.published import (
    addition_readings,
    gemm_readings,
    pool_readings,
    transfer_readings,
    tutorial_readings,
)
from bench.validate.reading import Ladder, Reading, ladders
from bench.validate.report import markdown, report
from bench.validate.trn1 import trn1_readings

__all__ = ["KIND", "PARTS", "Ladder", "Reading", "broken", "ladders", "markdown", "report"]

#: The source of the records, for the JSON file.
KIND = "model against hardware (published)"

#: What the command runs, in order: (label, readings).
PARTS: tuple[tuple[str, Callable[[], Iterator[Reading]]], ...] = (
    ("instruction laws", law_readings),
    ("isolated probes", probe_readings),
    ("DMA examples", transfer_readings),
    ("max pooling", pool_readings),
    ("small GEMMs", gemm_readings),
    ("vector addition", addition_readings),
    ("tutorial matmuls", tutorial_readings),
    ("tutorials on trn1", trn1_readings),
)


def broken(readings: list[Reading]) -> bool:
    """Return True if a law is not reproduced and nobody knows why: the code is wrong then.

    A miss against hardware is a finding, not a failure.
    """
    return any(r.part == "laws" and r.missed and not r.cause for r in readings)
