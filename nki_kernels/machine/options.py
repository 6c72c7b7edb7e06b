"""Every switch of a run in one frozen object, hostile by default."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["error", "warn", "off"]
LEVELS: tuple[Level, ...] = ("error", "warn", "off")


class NkiWarning(UserWarning):
    """A check at level "warn"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a run checks, and how.

    Attributes:
        operands: documented operand rules of each instruction.
        start_partition: compute operands start at a quadrant that can hold them.
        psum_bank: a matmul destination stays inside one PSUM bank (gen2, gen3).
        uninitialized: reads of memory nothing wrote.
        outputs: every element of a returned tensor was written.
        capacity: live tiles fit SBUF and PSUM.
        alias: no read meets bytes last written through another tile at the same fixed address.
        precise_fp: keep 16- and 8-bit floats rounded; False holds them as float32, which separates
            an algorithm's error from rounding (`NKI_PRECISE_FP`).
    """

    operands: Level = "error"
    start_partition: Level = "error"
    psum_bank: Level = "error"
    uninitialized: Level = "error"
    outputs: Level = "error"
    capacity: Level = "error"
    alias: Level = "error"
    precise_fp: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "precise_fp" and value not in LEVELS:
                raise ValueError(f"Options: {f.name}={value!r}; allowed are {', '.join(LEVELS)}")

    def level(self, check: str) -> Level:
        """Return the level of a check by name."""
        found: Level = getattr(self, check)
        return found


def default_options() -> Options:
    """Return the options the environment asks for (`NKI_PRECISE_FP`)."""
    raw = os.environ.get("NKI_PRECISE_FP", "1")
    if raw not in ("0", "1"):
        raise ValueError(f"NKI_PRECISE_FP={raw!r}; allowed are 0 and 1")
    return Options(precise_fp=raw == "1")
