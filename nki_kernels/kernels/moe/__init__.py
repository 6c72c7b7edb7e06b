"""Kernels of the mixture of experts: routing, dispatch, experts, combine, grouped products."""

from __future__ import annotations
