"""Feed-forward layers."""

from __future__ import annotations

from nki_kernels.kernels.mlp.gated import GatedMlpConfig, gated_mlp

__all__ = ["GatedMlpConfig", "gated_mlp"]
