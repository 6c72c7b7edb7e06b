"""Tests here run kernels on the toy core, with no backend asked for and all counts at zero."""

from __future__ import annotations

import pytest

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    pytest.importorskip("torch")
    from nki_kernels.torch_ops import reset_counters

    monkeypatch.delenv("NKI_SIMULATOR", raising=False)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "toy")
    reset_counters()
