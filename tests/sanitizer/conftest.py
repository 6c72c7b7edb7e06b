"""Test modules here import `nki` by name, as a kernel does."""

from __future__ import annotations

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)
