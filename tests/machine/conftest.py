"""Test modules here import `nki` by name, as a kernel does."""

from __future__ import annotations

import pytest

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)


@pytest.fixture
def toy(monkeypatch):
    """Calls go to the toy core, and nothing of the caller's environment leaks in."""
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "toy")
    for name in ("NKI_PRECISE_FP", "NEURON_LOGICAL_NC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
