"""PyTorch's modules, with its constructors and state-dict keys, computed by the ops."""

from __future__ import annotations

from torch import Tensor, nn

from nki_kernels.torch_ops import functional

__all__ = ["GroupNorm", "LayerNorm", "Linear", "RMSNorm"]


class Linear(nn.Linear):
    """`torch.nn.Linear` by the op `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input·weightᵀ + bias."""
        return functional.linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` by the op `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` by the op `group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` by the op `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
