"""The embedded NKI: the published `nki` package, executed, checked and timed on a CPU.

Importable as ``nki`` after ``import nki_kernels`` (see nki_kernels/toolchain.py). Names, parameters
and meanings are those of NKI 0.6.0; where the documents leave a gap, the docstring states the
choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nki import collectives, isa, language, typing
from nki._absent import absent

from nki_kernels.machine.launch import Kernel, jit, simulate

__version__ = "0.6.0+embedded"
__all__ = ["Kernel", "collectives", "isa", "jit", "language", "simulate", "typing"]

if not TYPE_CHECKING:
    __getattr__ = absent(__name__, __all__)
