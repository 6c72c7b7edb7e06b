"""PyTorch operators on the kernels: ``torch.ops.nki_kernels.*``, generated from the contracts.

Importing this package registers the ops. It needs the extra ``torch``; nothing else in the library
imports PyTorch.
"""

from __future__ import annotations

from nki_kernels.torch_ops.backends import BACKENDS, BackendError, Explanation, explain, use
from nki_kernels.torch_ops.counts import counters, reset_counters
from nki_kernels.torch_ops.registration import register
from nki_kernels.torch_ops.rows import ROWS

__all__ = [
    "BACKENDS",
    "BackendError",
    "Explanation",
    "counters",
    "explain",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "matmul",
    "reset_counters",
    "rms_norm",
    "rms_norm_backward",
    "use",
]

_FUNCTIONS = {name: register(row) for name, row in ROWS.items()}

matmul = _FUNCTIONS["matmul"]
linear = _FUNCTIONS["linear"]
linear_backward = _FUNCTIONS["linear_backward"]
rms_norm = _FUNCTIONS["rms_norm"]
layer_norm = _FUNCTIONS["layer_norm"]
rms_norm_backward = _FUNCTIONS["rms_norm_backward"]
layer_norm_backward = _FUNCTIONS["layer_norm_backward"]
