"""Every switch of a run in one frozen object, and the table of checks it sets the level of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from nki_kernels.machine.errors import OptionError

Level: TypeAlias = Literal["error", "warn", "off"]
LEVELS: tuple[Level, ...] = ("error", "warn", "off")

#: When a check looks: at each distinct call, at each execution, or at the finished trace.
Stage: TypeAlias = Literal["call", "run", "trace"]


class NkiWarning(UserWarning):
    """A check at level "warn"."""


class Check(NamedTuple):
    """What one check finds.

    Attributes:
        stage: when it looks: "call" once per operand signature, "run" at each execution, "trace"
            when the kernel is done.
        finds: the mistake.
        values: True if it needs values, so that a launch with shapes only cannot find it.
        source: the document with the rule.
    """

    stage: Stage
    finds: str
    source: str
    values: bool = False


_ARCH = "architecture guide of trn1/inf2"
_MATMUL = "nki.isa.nc_matmul; " + _ARCH + ", PSUM accumulation"

CHECKS: dict[str, Check] = {
    "operands": Check(
        "call", "an operand of a shape, dtype or value the instruction does not take", "nki.isa"
    ),
    "buffer": Check(
        "call",
        "an operand in a memory the engine cannot reach (PSUM from GpSimd or a DMA, HBM from an "
        "engine), or too many operands in PSUM",
        "nki.isa; " + _ARCH,
    ),
    "start_partition": Check(
        "call",
        "a compute operand that starts at a partition its size does not allow",
        _ARCH + ", data access",
    ),
    "access_pattern": Check(
        "call",
        "a free dimension longer than uint16, a step beyond int16, or a partition stride",
        _ARCH + ", data access",
    ),
    "dma_dtype": Check(
        "call", "a DMA that would have to convert where it moves bits", "nki.isa.dma_copy"
    ),
    "psum_bank": Check(
        "call", "a Tensor engine result across PSUM banks (gen2, gen3)", "nki.isa.nc_matmul"
    ),
    "bounds": Check(
        "run",
        "a run-time address outside its tensor in a DMA without oob_mode.skip (views outside "
        "their tensor are errors at every level)",
        "nki.isa.dma_copy",
        values=True,
    ),
    "uninitialized": Check("run", "a read of memory that nothing wrote", "nki.language.ndarray"),
    "accumulation": Check(
        "run",
        "accumulate=True where no matmul of the tile wrote; accumulate=None inside a device loop "
        "on an outer tile; accumulate=None that adds to sums already read",
        _MATMUL,
    ),
    "domain": Check(
        "run",
        "activation inputs outside the valid range of the function",
        "nki.api.shared, supported activation functions",
        values=True,
    ),
    "integers": Check(
        "run",
        "32-bit integers that float32 arithmetic does not keep (beyond 2^24)",
        "nki.isa, data types of the engines",
        values=True,
    ),
    "outputs": Check(
        "trace",
        "a returned tensor with elements nothing wrote, or a kernel that wrote shared HBM, none of "
        "its arguments, and returns nothing",
        "NKI guide",
    ),
    "capacity": Check("trace", "live tiles that exceed SBUF or PSUM", _ARCH),
    "alias": Check(
        "trace",
        "a read of bytes that another tile at the same fixed address overwrote",
        "nki.language.ndarray, address",
    ),
    "interleave": Check(
        "trace",
        "an accumulation group that continues after another one began in its PSUM bank, on the "
        "same partitions",
        _MATMUL,
    ),
    "independent": Check(
        "trace",
        "iterations of an nl.affine_range that pass data on, or write the same HBM elements",
        "matrix multiplication tutorial, nl.affine_range",
    ),
    "names": Check("trace", "two tensors of one name", "NKI guide, tensor names"),
    "instruction_count": Check(
        "trace",
        "a program of more instructions than `Options.instruction_limit`",
        "deep dive on dynamic loops: unrolled loops can dramatically increase compile time",
    ),
    "lnc_race": Check(
        "trace",
        "two cores that touch shared HBM, one of them writing, with nothing that orders them",
        "LNC guide",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a run checks, and how: hostile by default.

    Each field of the name of a check (`CHECKS` says what it finds) is its level: "error" raises,
    "warn" issues an `NkiWarning` and goes on, "off" does not look.

    Attributes:
        instruction_limit: unrolled instructions of one core above which `instruction_count`
            speaks. No document gives a limit; users report half-hour compilations.
        precise_fp: keep 16- and 8-bit floats rounded; False holds them as float32, which separates
            an algorithm's error from rounding (`NKI_PRECISE_FP`).
        unknown_trips: iterations of an nl.fori_loop whose end comes from a tile without values;
            None raises. For kernels timed from shapes whose loop repairs what is rarely wrong.
    """

    operands: Level = "error"
    buffer: Level = "error"
    start_partition: Level = "error"
    access_pattern: Level = "error"
    dma_dtype: Level = "error"
    psum_bank: Level = "error"
    bounds: Level = "error"
    uninitialized: Level = "error"
    accumulation: Level = "error"
    domain: Level = "error"
    integers: Level = "error"
    outputs: Level = "error"
    capacity: Level = "error"
    alias: Level = "error"
    interleave: Level = "error"
    independent: Level = "error"
    names: Level = "error"
    instruction_count: Level = "warn"
    lnc_race: Level = "error"
    instruction_limit: int = 100_000
    precise_fp: bool = True
    unknown_trips: int | None = None

    def __post_init__(self) -> None:
        for name in CHECKS:
            value = getattr(self, name)
            if value not in LEVELS:
                raise ValueError(f"Options: {name}={value!r}; allowed are {', '.join(LEVELS)}")
        limit = self.instruction_limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"Options: instruction_limit={limit!r}; it must be a positive int")
        trips = self.unknown_trips
        if trips is not None and (type(trips) is not int or trips < 0):
            raise ValueError(
                f"Options: unknown_trips={trips!r}; it must be None or an int of at least 0"
            )

    def level(self, check: str) -> Level:
        """Return the level of a check by name."""
        found: Level = getattr(self, check)
        return found


def only(*checks: str, level: Level = "error") -> Options:
    """Return options with the named checks at `level` and every other one off.

    Raises:
        ValueError: a name that is no check.
    """
    unknown = [name for name in checks if name not in CHECKS]
    if unknown:
        raise ValueError(f"only: no check {', '.join(unknown)}; checks are {', '.join(CHECKS)}")
    levels: dict[str, Any] = {name: level if name in checks else "off" for name in CHECKS}
    return Options(**levels)


def default_options() -> Options:
    """Return the options the environment asks for (`NKI_PRECISE_FP`)."""
    raw = os.environ.get("NKI_PRECISE_FP", "1")
    if raw not in ("0", "1"):
        raise OptionError(
            f"options: NKI_PRECISE_FP is {raw!r}; allowed: 0, 1; set one of these or unset it"
        )
    return Options(precise_fp=raw == "1")
