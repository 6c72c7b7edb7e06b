"""What a kernel costs, and which engine limits it. `profile` is the entry point."""

from __future__ import annotations

from nki_kernels.profiler.summary import Profile, profile

__all__ = ["Profile", "profile"]
