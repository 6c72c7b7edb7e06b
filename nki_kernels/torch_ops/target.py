"""The hardware generation in force, as the operators see it."""

from __future__ import annotations

from typing import Any

from nki_kernels.operators import contract

# The arrow from this room ends at `operators`, which does not export these two names yet.


def current_target() -> str:
    """Return the generation kernels are launched for: the environment's, or trn2."""
    name: str = contract.current_target()  # type: ignore[attr-defined]
    return name


def current_core() -> Any:
    """Return the `CoreSpec` of `current_target`."""
    return contract.spec_for(current_target())  # type: ignore[attr-defined]
