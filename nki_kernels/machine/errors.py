"""The errors a user can meet. Message: where, what is with values, what is allowed, what to do."""

from __future__ import annotations


class NkiKernelsError(Exception):
    """Base of every error this package raises for a mistake of the caller or the kernel."""


class RuleViolation(NkiKernelsError, AssertionError):
    """An instruction, view or allocation that a documented hardware rule forbids.

    Also an ``AssertionError``: the documented simulator raises those, and callers catch them.
    """


class ShapeError(RuleViolation, ValueError):
    """Shapes that do not fit each other or the hardware."""


class DtypeError(RuleViolation, TypeError):
    """A data type that is not supported where it is used."""


class OutOfBounds(RuleViolation, IndexError):
    """An index or address outside its tensor."""


class DoesNotFit(NkiKernelsError, MemoryError):
    """The live tiles of a kernel exceed SBUF or PSUM."""


class UninitializedRead(NkiKernelsError):
    """A read of memory that no instruction wrote."""


class AbstractValue(NkiKernelsError, TypeError):
    """Control flow or a conversion needs the values of a tile that only has a shape."""


class KernelError(NkiKernelsError):
    """A kernel that breaks a language rule: output not in HBM, result not returned, and so on."""


class ConfigError(NkiKernelsError, ValueError):
    """A tuning config that cannot run on the core or with the dtype it is used for."""


class OptionError(NkiKernelsError, ValueError):
    """An argument beside the arrays (epsilon ...) with a value it cannot have."""


class ToolchainError(NkiKernelsError, ImportError):
    """The ``nki`` package that was asked for is missing, broken or a placeholder."""
