"""What a kernel costs, what limits it and what to change first. `profile` is the entry point."""

from __future__ import annotations

from nki_kernels.profiler.advice import Advice
from nki_kernels.profiler.diff import Diff, diff
from nki_kernels.profiler.session import Profile, profile

__all__ = ["Advice", "Diff", "Profile", "diff", "profile"]
