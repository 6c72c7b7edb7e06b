"""Hand-tuned NKI kernels for AWS Trainium, and the CPU implementation of NKI that runs them.

Importing this package decides which ``nki`` package is in force (see ``toolchain.py``): after
``import nki_kernels``, ``import nki`` works. It imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nki_kernels import toolchain
from nki_kernels._version import __version__

if TYPE_CHECKING:
    from nki_kernels.machine.tensor import Abstract
    from nki_kernels.profiler import Profile, profile

__all__ = ["Abstract", "Profile", "__version__", "profile", "toolchain"]

toolchain.activate()


def __dir__() -> list[str]:
    """List the public names, those that load on first use included."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Load the profiler on first use: deciding the toolchain must stay cheap."""
    if name == "Abstract":
        from nki_kernels.machine.tensor import Abstract

        return Abstract
    if name in ("Profile", "profile"):
        from nki_kernels import profiler

        return getattr(profiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
