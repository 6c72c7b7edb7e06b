"""Feed-forward layers."""

from __future__ import annotations

from nki_kernels.kernels.mlp.gated import GatedMlpConfig, gated_mlp
from nki_kernels.kernels.mlp.gated_backward import GatedMlpBackwardConfig, gated_mlp_backward

__all__ = ["GatedMlpBackwardConfig", "GatedMlpConfig", "gated_mlp", "gated_mlp_backward"]
