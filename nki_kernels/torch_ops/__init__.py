"""PyTorch operators on the kernels: ``torch.ops.nki_kernels.*``, generated from the contracts.

Importing this package registers the ops. It needs the extra ``torch``; nothing else in the library
imports PyTorch.
"""

from __future__ import annotations

from nki_kernels.torch_ops import functions
from nki_kernels.torch_ops.backends import BACKENDS, BackendError, Explanation, explain, use
from nki_kernels.torch_ops.counts import counters, reset_counters
from nki_kernels.torch_ops.functions import *  # noqa: F403
from nki_kernels.torch_ops.patching import Patch, patch

__all__ = [  # noqa: PLE0604
    "BACKENDS",
    "BackendError",
    "Explanation",
    "Patch",
    "counters",
    "explain",
    "patch",
    "reset_counters",
    "use",
    *functions.__all__,
]
