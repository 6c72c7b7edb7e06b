"""nl.affine_range: a range that records its iterations, which it declares independent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nki_kernels.machine import core
from nki_kernels.machine.trace import DeclaredLoop


class AffineRange(Sequence[int]):
    """A ``range`` in everything but that a loop over it is noted in the trace of the run."""

    def __init__(self, values: range) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __eq__(self, other: object) -> bool:
        return self._values == (other._values if isinstance(other, AffineRange) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"nl.affine_{self._values!r}"

    def __iter__(self) -> Iterator[int]:
        run = core._CURRENT.get()
        if run is None:
            yield from self._values
            return
        trace = run.trace
        loop = DeclaredLoop(run.kernel_site(), run.core, len(trace.tiles), [], 0)
        trace.declared.append(loop)
        try:
            for value in self._values:
                loop.starts.append(len(trace.events))
                yield value
        finally:
            loop.end = len(trace.events)
