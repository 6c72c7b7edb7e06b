"""What an allocation may be: its shape, its address, its size."""

from __future__ import annotations

from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.dtypes import DType
from nki_kernels.machine.errors import DoesNotFit, RuleViolation, ShapeError
from nki_kernels.machine.layout import MAX_DIMS, is_int
from nki_kernels.machine.tensor import MemoryRegion
from nki_kernels.machine.trace import Site, where


def extents_of(shape: Any, buffer: MemoryRegion, spec: CoreSpec) -> tuple[int, ...]:
    """Return the extents of a tensor; raises ShapeError for a shape that none can have."""
    if not isinstance(shape, (tuple, list)) or not all(is_int(n) for n in shape):
        raise ShapeError(
            f"nl.ndarray: shape={shape!r}; it must be a tuple of positive integers: compute "
            "sizes with // and int()"
        )
    extents = tuple(int(n) for n in shape)
    on_chip = buffer is MemoryRegion.sbuf or buffer is MemoryRegion.psum
    # In HBM a tensor may have more, for views with fewer: published kernels have six.
    most = MAX_DIMS if on_chip else len(extents)
    if not 1 <= len(extents) <= most or min(extents) < 1:
        raise ShapeError(
            f"nl.ndarray: shape {list(extents)}; allowed are 1 to {MAX_DIMS} dimensions "
            "(more in HBM) of size >= 1"
        )
    if on_chip and extents == (1,):
        return (1, 1)  # the documents write registers' (1, 1) tiles this way as well
    if on_chip and len(extents) < 2:
        raise ShapeError(
            f"nl.ndarray: shape {list(extents)} in {buffer.value}; a tile has a partition and "
            "at least one free dimension: write (n, 1) or (1, n)"
        )
    if on_chip and extents[0] > spec.partitions:
        raise ShapeError(
            f"nl.ndarray: shape {list(extents)} in {buffer.value}; dimension 0 is the "
            f"partition and holds at most {spec.partitions} on {spec.name}: split it "
            "into tiles of nl.tile_size.pmax"
        )
    return extents


def fits(
    spec: CoreSpec,
    extents: tuple[int, ...],
    kind: DType,
    buffer: MemoryRegion,
    row_bytes: int,
    address: tuple[int, int] | None,
    site: Site,
) -> None:
    """Judge one tile against its memory.

    Raises:
        DoesNotFit: it is larger than its memory.
        RuleViolation: an address outside the memory, or inside a PSUM bank.
    """
    psum = buffer is MemoryRegion.psum
    limit = spec.psum_banks * spec.psum_bank_bytes if psum else spec.sbuf_usable_bytes
    start, offset = (0, 0) if address is None else address

    def what() -> str:
        # Resolving a line costs more than the allocation, so only an error does it.
        return f"nl.ndarray at {where(site)}: {list(extents)} {kind} in {buffer.value}"

    if address is not None and (start < 0 or offset < 0 or start + extents[0] > spec.partitions):
        raise RuleViolation(
            f"{what()}: address=({start}, {offset}) puts {extents[0]} partitions outside 0 to "
            f"{spec.partitions - 1}; the address is (start partition, bytes in the partition)"
        )
    if psum and offset % spec.psum_bank_bytes:
        raise RuleViolation(
            f"{what()}: address=({start}, {offset}) is inside a PSUM bank; byte offsets are "
            f"multiples of {spec.psum_bank_bytes}"
        )
    if offset + row_bytes > limit:
        raise DoesNotFit(
            f"{what()}: {row_bytes} bytes per partition at offset {offset}; {buffer.value} has "
            f"{limit} bytes per partition on {spec.name}: use smaller tiles"
        )
