"""The only home of hardware numbers: one `CoreSpec` per NeuronCore generation, and a toy one."""

from __future__ import annotations

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.hardware.toy import TOY
from nki_kernels.hardware.trn1 import TRN1
from nki_kernels.hardware.trn2 import TRN2
from nki_kernels.hardware.trn3 import TRN3

__all__ = ["TARGETS", "TOY", "TRN1", "TRN2", "TRN3", "CoreSpec", "Engine", "spec_for"]

#: Every name a target may be given by.
TARGETS: dict[str, CoreSpec] = {
    "trn1": TRN1,
    "inf2": TRN1,
    "gen2": TRN1,
    "trn2": TRN2,
    "gen3": TRN2,
    "trn3": TRN3,
    "gen4": TRN3,
    "toy": TOY,
}


def spec_for(target: str) -> CoreSpec:
    """Return the spec of a target by name.

    Raises:
        ValueError: the name is not one of `TARGETS`.
    """
    spec = TARGETS.get(target)
    if spec is None:
        raise ValueError(f"target {target!r}: unknown; allowed are {', '.join(TARGETS)}")
    return spec
