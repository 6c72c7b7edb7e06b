"""Kernels of the mixture of experts: routing, dispatch and combine, grouped products."""

from __future__ import annotations
