"""Normalization over the last axis."""

from __future__ import annotations

from nki_kernels.kernels.norm.layer_norm import LayerNormConfig, layer_norm
from nki_kernels.kernels.norm.rms_norm import RmsNormConfig, rms_norm

__all__ = ["LayerNormConfig", "RmsNormConfig", "layer_norm", "rms_norm"]
