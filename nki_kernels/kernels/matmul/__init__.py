"""Matrix multiplication."""

from __future__ import annotations

from nki_kernels.kernels.matmul.kernel import MatmulConfig, matmul

__all__ = ["MatmulConfig", "matmul"]
