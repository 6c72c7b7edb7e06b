"""Benchmarks of the kernels: ``python -m bench`` from a clone."""

from __future__ import annotations

import sys

try:
    import nki_kernels  # noqa: F401  (puts the embedded nki on the path, for `bench.host`)
except ImportError as error:
    # While Python looks for the module after -m, argv[0] is "-m": a command, not an import.
    if sys.argv[0] != "-m":
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
