"""Annotations for kernel parameters: ``nt.tensor[128, 512]`` states an expected shape."""

from __future__ import annotations

from typing import Any


class TensorAnnotation:
    """An expected shape; checked against the argument at launch."""

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        self.shape = shape

    def __getitem__(self, shape: Any) -> TensorAnnotation:
        """Return the annotation for `shape`, an int or a tuple of ints."""
        return TensorAnnotation(tuple(shape) if isinstance(shape, tuple) else (shape,))

    def __repr__(self) -> str:
        return "nt.tensor" if self.shape is None else f"nt.tensor{list(self.shape)}"


tensor = TensorAnnotation()

__all__ = ["tensor"]
