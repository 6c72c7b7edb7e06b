"""Normalization over the last axis."""

from __future__ import annotations

from nki_kernels.kernels.norm.layer_norm import LayerNormConfig, layer_norm
from nki_kernels.kernels.norm.layer_norm_backward import (
    LayerNormBackwardConfig,
    layer_norm_backward,
)
from nki_kernels.kernels.norm.rms_norm import RmsNormConfig, rms_norm
from nki_kernels.kernels.norm.rms_norm_backward import RmsNormBackwardConfig, rms_norm_backward

__all__ = [
    "LayerNormBackwardConfig",
    "LayerNormConfig",
    "RmsNormBackwardConfig",
    "RmsNormConfig",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
