"""Normalization over the last axis."""

from __future__ import annotations

from nki_kernels.kernels.norm.group_norm import GroupNormConfig, group_norm
from nki_kernels.kernels.norm.layer_norm import LayerNormConfig, add_layer_norm, layer_norm
from nki_kernels.kernels.norm.layer_norm_backward import (
    LayerNormBackwardConfig,
    layer_norm_backward,
)
from nki_kernels.kernels.norm.rms_norm import (
    RmsNormConfig,
    add_rms_norm,
    rms_norm,
    rms_norm_cast,
)
from nki_kernels.kernels.norm.rms_norm_backward import RmsNormBackwardConfig, rms_norm_backward

__all__ = [
    "GroupNormConfig",
    "LayerNormBackwardConfig",
    "LayerNormConfig",
    "RmsNormBackwardConfig",
    "RmsNormConfig",
    "add_layer_norm",
    "add_rms_norm",
    "group_norm",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_cast",
]
