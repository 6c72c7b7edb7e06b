"""AWS's kernel library on the embedded NKI, against the library's own references and tests."""

from __future__ import annotations

from nki_kernels.conformance.command import run_conformance

__all__ = ["run_conformance"]
