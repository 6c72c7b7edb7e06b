"""NKIObject: the base class of what kernels may carry besides tensors."""

from __future__ import annotations

import inspect
from typing import Any


class NKIObject:
    """Base class of objects that NKI kernels may carry, dataclasses or not.

    As the published kernels rely on: an annotated field that is given no value is None, a plain
    class attribute is a field too, and fields are passed by keyword.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, note in inspect.get_annotations(cls).items():
            if name not in cls.__dict__ and not str(note).startswith(("ClassVar", "typing.Class")):
                setattr(cls, name, None)

    def __init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__}() has no field {name!r}")
            setattr(self, name, value)
        if hasattr(self, "__post_init__"):
            self.__post_init__()
