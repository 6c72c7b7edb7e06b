"""NKIObject: the base class of what kernels may carry besides tensors."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any


class NKIObject:
    """Base class of objects that NKI kernels may carry, dataclasses or not.

    As the published kernels rely on: an annotated field that is given no value is None, a plain
    class attribute is a field too, of a dataclass as well, and fields are passed by keyword.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        noted = dict(inspect.get_annotations(cls))
        for name, value in list(cls.__dict__.items()):
            if name not in noted and _is_field(name, value):
                noted[name] = "typing.Any"  # @dataclass, which runs after this, reads annotations
        cls.__annotations__ = noted
        for name, note in noted.items():
            if name not in cls.__dict__ and not str(note).startswith(("ClassVar", "typing.Class")):
                setattr(cls, name, None)

    def __init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__}() has no field {name!r}")
            setattr(self, name, value)
        if hasattr(self, "__post_init__"):
            self.__post_init__()


def _is_field(name: str, value: Any) -> bool:
    """True for a plain value in the body of a class: no method, property, class or container."""
    return not name.startswith("_") and (
        value is None or isinstance(value, (int, float, str, Enum))
    )
