"""Hand-tuned NKI kernels for AWS Trainium, and the CPU implementation of NKI that runs them.

Importing this package decides which ``nki`` package is in force (see ``toolchain.py``): after
``import nki_kernels``, ``import nki`` works. It imports no torch.
"""

from __future__ import annotations

from nki_kernels import toolchain
from nki_kernels._version import __version__

__all__ = ["__version__", "toolchain"]

toolchain.activate()
