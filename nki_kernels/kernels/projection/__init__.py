"""Projections fused with what stands before and behind them in a transformer block."""

from __future__ import annotations

from nki_kernels.kernels.projection.norm_linear import norm_linear
from nki_kernels.kernels.projection.qkv import qkv_projection
from nki_kernels.kernels.projection.stream import ProjectionConfig

__all__ = ["ProjectionConfig", "norm_linear", "qkv_projection"]
