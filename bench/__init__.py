"""Benchmarks of the kernels: ``python -m bench list | run | host`` from a clone."""

from __future__ import annotations

import nki_kernels  # noqa: F401  (puts the embedded nki on the path, for `bench.host`)
