"""Annotations for kernel parameters: ``nt.tensor[128, 512]`` states an expected shape."""

from __future__ import annotations

from typing import Any

from nki_kernels.machine.errors import ShapeError
from nki_kernels.machine.layout import is_int


class TensorAnnotation:
    """An expected shape; checked against the argument at launch. Without a shape any will do."""

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        self.shape = shape

    def __getitem__(self, shape: Any) -> TensorAnnotation:
        """Return the annotation for `shape`, an int or a tuple of ints.

        Raises:
            ShapeError: anything else.
        """
        extents = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        if not extents or not all(is_int(n) and n > 0 for n in extents):
            raise ShapeError(
                f"nt.tensor[{shape!r}]: a shape is one or more positive ints: write "
                "nt.tensor[128, 512], or nt.tensor for any shape"
            )
        return TensorAnnotation(extents)

    def __repr__(self) -> str:
        return "nt.tensor" if self.shape is None else f"nt.tensor{list(self.shape)}"


tensor = TensorAnnotation()

__all__ = ["tensor"]
