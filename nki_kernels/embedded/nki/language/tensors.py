"""Allocation, memory regions, tile sizes, inspection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nki import isa

from nki_kernels.hardware import spec_for
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine import core
from nki_kernels.machine.core import current
from nki_kernels.machine.dtypes import uint8
from nki_kernels.machine.errors import RuleViolation, ShapeError
from nki_kernels.machine.launch import current_target
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import DynamicSlice, MemoryRegion, NKIObject, NkiTensor

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
hbm = private_hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm


class ndarray(NkiTensor):
    """An unwritten tensor: ``nl.ndarray(shape, dtype, buffer=nl.sbuf, name='', address=None)``.

    A class, because published kernels use it in annotations; calling it returns an `NkiTensor`.
    `address` is (start partition, byte offset in the partition).
    """

    def __new__(  # type: ignore[misc]
        cls,
        shape: Any,
        dtype: Any,
        buffer: MemoryRegion = sbuf,
        name: str = "",
        address: tuple[int, int] | None = None,
    ) -> NkiTensor:
        """Allocate; raises as `Run.allocate` does."""
        return current("nl.ndarray").allocate(shape, dtype, buffer, name, address)


def ds(start: int, size: int) -> DynamicSlice:
    """Return the index ``start : start + size``."""
    return DynamicSlice(start, size)


def is_hbm(buffer: MemoryRegion) -> bool:
    """True for private and shared HBM."""
    return buffer in (private_hbm, shared_hbm)


def is_sbuf(buffer: MemoryRegion) -> bool:
    """True for SBUF."""
    return buffer is sbuf


def is_psum(buffer: MemoryRegion) -> bool:
    """True for PSUM."""
    return buffer is psum


def is_on_chip(buffer: MemoryRegion) -> bool:
    """True for SBUF and PSUM."""
    return buffer is sbuf or buffer is psum


def full(
    shape: Any, fill_value: float, dtype: Any, buffer: MemoryRegion = sbuf, name: str = ""
) -> NkiTensor:
    """Return a new tensor filled with `fill_value` (HBM: through an SBUF tile, block by block)."""
    run = current("nl.full")
    result = run.allocate(shape, dtype, buffer, name)
    by_blocks(result, lambda tile: isa.memset(dst=tile, value=fill_value), once=True)
    return result


def by_blocks(result: NkiTensor, fill: Callable[[NkiTensor], object], once: bool) -> None:
    """Fill a new tensor by a function that fills a tile on chip.

    HBM is filled through an SBUF tile, as many rows at a time as there are partitions; `once` says
    that one filled tile serves every block.
    """
    if result.on_chip:
        fill(result)
        return
    run = current("nl.full")
    flat = result.reshape((-1, result.shape[-1])) if result.ndim > 1 else result.reshape((1, -1))
    rows = min(flat.shape[0], run.spec.partitions)
    tile = None
    for start in range(0, flat.shape[0], rows):
        stop = min(start + rows, flat.shape[0])
        if tile is None or not once:
            tile = run.allocate((rows, flat.shape[1]), result.dtype, sbuf)
            fill(tile)
        isa.dma_copy(dst=flat[start:stop], src=tile[0 : stop - start])


def zeros(shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """Return a new tensor of zeros."""
    return full(shape, 0, dtype, buffer, name)


def ones(shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """Return a new tensor of ones."""
    return full(shape, 1, dtype, buffer, name)


#: Orders of nisa.dma_transpose, the instruction that empty_like's transpose_axes prepares.
_TRANSPOSES = ((1, 0), (2, 1, 0), (3, 1, 2, 0))


def empty_like(
    x: NkiTensor,
    dtype: Any = None,
    buffer: MemoryRegion | None = None,
    name: str = "",
    *,
    transpose_axes: tuple[int, ...] | None = None,
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """Return an unwritten tensor of x's shape; dtype and buffer default to x's.

    Args:
        x: a tensor.
        dtype: of the result.
        buffer: of the result; SBUF is needed with `transpose_axes`.
        name: of the result.
        transpose_axes: (1, 0), (2, 1, 0) or (3, 1, 2, 0): the result has x's dimensions in that
            order, as the destination of a later nisa.dma_transpose (NKI 0.7).
        address: as for nl.ndarray (NKI 0.7).

    Raises:
        ShapeError: another order, one that does not fit x, or a transposed tensor outside SBUF.
    """
    run = current("nl.empty_like")
    shape, place = x.shape, buffer or x.buffer
    if transpose_axes is not None:
        if transpose_axes not in _TRANSPOSES or len(transpose_axes) != x.ndim or place is not sbuf:
            raise ShapeError(
                f"nl.empty_like: transpose_axes={transpose_axes!r} of {list(x.shape)} into "
                f"{place.value}; allowed are (1, 0), (2, 1, 0) and (3, 1, 2, 0) for 2 to 4 "
                "dimensions, with buffer=nl.sbuf"
            )
        shape = tuple(x.shape[axis] for axis in transpose_axes)
    return run.allocate(shape, dtype or x.dtype, place, name, address)


def zeros_like(
    x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = ""
) -> NkiTensor:
    """Return zeros of x's shape; dtype and buffer default to x's."""
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def shared_identity_matrix(n: int, dtype: Any = uint8, dst: NkiTensor | None = None) -> NkiTensor:
    """Return the n x n identity in SBUF (written into `dst` if given), made by iota and compare."""
    run = current("nl.shared_identity_matrix")
    if not 1 <= n <= run.spec.partitions:
        raise ShapeError(
            f"nl.shared_identity_matrix: n={n}; it must be 1 to {run.spec.partitions} (one row a "
            "partition)"
        )
    result = run.allocate((n, n), dtype, sbuf) if dst is None else dst
    index = run.allocate((n, n), "int32", sbuf)
    isa.iota(dst=index, pattern=[[-1, n]], offset=0, channel_multiplier=1)
    isa.tensor_scalar(dst=result, data=index, op0=OPS["equal"], operand0=0.0)
    return result


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Print the values of an SBUF or HBM tensor now, after `print_prefix`, to standard output.

    Raises:
        RuleViolation: a prefix that is no string, or a tensor in PSUM.
    """
    current("nl.device_print")
    if not isinstance(print_prefix, str):
        raise RuleViolation(
            f"nl.device_print: print_prefix={print_prefix!r}; it must be a string: the tensor "
            "comes second"
        )
    if not isinstance(tensor, NkiTensor) or tensor.buffer is psum:
        raise RuleViolation(
            f"nl.device_print: tensor={tensor!r}; it must be a tensor in SBUF or HBM: copy PSUM "
            "with nisa.tensor_copy, print what is no tensor with print()"
        )
    print(f"{print_prefix} {tensor}")


class _TileSize(NKIObject):
    """Sizes of the target in force; read them inside a kernel, never as literals.

    Outside a kernel, where published modules read constants from it as they are imported, the
    target is the environment's; a launch for another one does not change what was read.
    """

    @property
    def _spec(self) -> CoreSpec:
        run = core._CURRENT.get()
        return spec_for(current_target()) if run is None else run.spec

    @property
    def pmax(self) -> int:
        """Partitions."""
        return self._spec.partitions

    @property
    def psum_bank_fmax(self) -> int:
        """float32 elements per partition of a PSUM bank."""
        return self._spec.psum_bank_bytes // 4

    psum_fmax = psum_bank_fmax

    @property
    def psum_bank_fmax_bytes(self) -> int:
        """Bytes per partition of a PSUM bank."""
        return self._spec.psum_bank_bytes

    @property
    def psum_num_banks(self) -> int:
        """PSUM banks."""
        return self._spec.psum_banks

    @property
    def gemm_stationary_fmax(self) -> int:
        """Columns of the stationary operand."""
        return self._spec.stationary_fmax

    @property
    def gemm_moving_fmax(self) -> int:
        """Columns of the moving operand."""
        return self._spec.moving_fmax

    @property
    def bn_stats_fmax(self) -> int:
        """Elements per bn_stats."""
        return self._spec.bn_stats_fmax

    @property
    def sbuf_size_bytes(self) -> int:
        """Bytes of SBUF in all."""
        return self._spec.sbuf_bytes * self._spec.partitions

    @property
    def sbuf_fmax_bytes(self) -> int:
        """Usable bytes per partition of SBUF."""
        return self._spec.sbuf_usable_bytes

    total_available_sbuf_size = sbuf_fmax_bytes

    @property
    def sbuf_fmax(self) -> int:
        """Usable float32 elements per partition of SBUF."""
        return self._spec.sbuf_usable_bytes // 4

    @property
    def psum_min_align(self) -> int:
        """Byte alignment of PSUM tiles (undocumented value; 4 here)."""
        return 4

    @property
    def sbuf_min_align(self) -> int:
        """Byte alignment of SBUF tiles (undocumented value; 4 here)."""
        return 4


tile_size = _TileSize()
