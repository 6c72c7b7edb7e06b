"""Every op as a function. The types are in `functions.pyi`, written from the same table."""

from __future__ import annotations

from nki_kernels.torch_ops.registration import register
from nki_kernels.torch_ops.rows import ROWS

__all__ = list(ROWS)

globals().update({name: register(row) for name, row in ROWS.items()})
