"""A lint rule: a function from a kernel file to its violations, with its severity and source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from nki_kernels.lint.source import Source

Violation = tuple[ast.AST, str]


class Severity(Enum):
    """How much a finding weighs.

    `error`: no frontend takes it, or the tracer (the default since NKI 0.7) does not. `info`: the
    parser frontend (the default up to 0.6) does not, or a release announced its removal.
    """

    error = "error"
    info = "info"


@dataclass(frozen=True, order=True)
class Finding:
    """One violation; `column` counts from 1, as editors do."""

    path: str
    line: int
    column: int
    rule: str
    severity: str
    message: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}:{self.column}"
        return f"{place}: {self.severity} [{self.rule}] {self.message}"


@dataclass(frozen=True)
class Rule:
    """A named check.

    Attributes:
        name: what a finding shows in brackets.
        severity: see `Severity`.
        source: the public document that states the rule.
        check: yields the offending node and the message for each violation of a file.
    """

    name: str
    severity: Severity
    source: str
    check: Callable[[Source], Iterator[Violation]]


RULES: dict[str, Rule] = {}


def rule(
    severity: Severity, source: str
) -> Callable[[Callable[[Source], Iterator[Violation]]], Callable[[Source], Iterator[Violation]]]:
    """Register a check under its own name, underscores shown as dashes."""

    def register(
        check: Callable[[Source], Iterator[Violation]],
    ) -> Callable[[Source], Iterator[Violation]]:
        name = check.__name__.replace("_", "-")
        RULES[name] = Rule(name, severity, source, check)
        return check

    return register


def findings(source: Source) -> list[Finding]:
    """Apply every rule; the findings in the order of the file."""
    found = {
        Finding(
            source.path, getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1,
            one.name, one.severity.value, message,
        )
        for one in RULES.values()
        for node, message in one.check(source)
    }  # fmt: skip
    return sorted(found)
