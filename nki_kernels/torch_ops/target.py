"""The hardware generation in force, as the operators see it."""

from __future__ import annotations

from nki_kernels.hardware import spec_for
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.launch import current_target

__all__ = ["current_core", "current_target"]


def current_core() -> CoreSpec:
    """Return the `CoreSpec` of `current_target`."""
    return spec_for(current_target())
