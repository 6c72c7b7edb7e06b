"""Matrix multiplication."""

from __future__ import annotations

from nki_kernels.kernels.matmul.epilogue import Epilogue
from nki_kernels.kernels.matmul.kernel import Layout, MatmulConfig, matmul

__all__ = ["Epilogue", "Layout", "MatmulConfig", "matmul"]
