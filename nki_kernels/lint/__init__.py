"""The linter: what a kernel's source says that NKI's frontends will refuse, without running it."""

from __future__ import annotations

from nki_kernels.lint.command import lint_paths, lint_source, run_lint
from nki_kernels.lint.rule import RULES, Finding, Severity

__all__ = ["RULES", "Finding", "Severity", "lint_paths", "lint_source", "run_lint"]
