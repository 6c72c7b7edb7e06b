"""The bytes of a tile, which of them were written, and which a matmul group started.

A byte that nothing wrote is poison: a map turns its read into an error that names the kernel lines
that allocated and read it. Regions that were checked once are remembered, so the map is consulted
once per distinct access and not once per instruction. Where such reads are no errors, the bytes
hold the poison (NaN, 4 in integers) from the start, so that results do not depend on which buffer
the pool had left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nki_kernels.machine.buffers import give, take
from nki_kernels.machine.dtypes import Array, DType, as_dtype, round_tf32, tfloat32, widen
from nki_kernels.machine.errors import RuleViolation, UninitializedRead
from nki_kernels.machine.products import Pending, Products, Region
from nki_kernels.machine.trace import LoopPath, Tile, where

if TYPE_CHECKING:
    from nki_kernels.machine.tensor import NkiTensor


_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Memory:
    """Storage of one tile.

    Attributes:
        tile: the identity of the allocation, shared with the trace.
        data: its bytes as a flat uint8 array, or None while it has no values.
        abstract: True once something without values was written: the tile has a shape only.
        full: True once every byte is known to be written.
    """

    __slots__ = (
        "_grain", "_group_map", "_groups", "_lent", "_map", "_products", "_regions", "_snapshots",
        "_visible", "abstract", "borrowed",
        "buffer", "data", "full", "loop", "nbytes", "pending", "tile", "whole", "wide",
    )  # fmt: skip

    def __init__(
        self,
        tile: Tile,
        buffer: Any,
        nbytes: int,
        products: Products,
        visible: bool = False,
    ) -> None:
        self.tile = tile
        self.buffer = buffer
        self.nbytes = nbytes
        self.data: Array | None = None
        self.abstract = False
        self.borrowed = False
        #: The access to the tile as it was allocated: most first writes are this one.
        self.whole: Region | None = None
        #: Held as float32 although the dtype is narrower (`Options.precise_fp` is False).
        self.wide = False
        #: Matmuls issued into the tile and not formed yet; every look at the values forms them.
        self.pending: Pending | None = None
        self._products = products
        #: A kernel may come to see what nothing wrote: it must then be poison in fact.
        self._visible = visible
        self._snapshots: dict[Region, Array] = {}
        #: A snapshot is a view of the bytes: matmuls that wait for it are formed before a write.
        self._lent = False
        self.full = False
        #: The device loops around the allocation.
        self.loop: LoopPath = ()
        #: Bytes per flag of the maps; shrinks when a view of a narrower dtype comes along.
        self._grain = tile.itemsize
        self._regions: set[Region] = set()
        self._map: Array | None = None
        self._groups: set[Region] = set()
        self._group_map: Array | None = None

    def __del__(self) -> None:
        """Hand the bytes on to the next tile of their size."""
        self._hand_on()

    def _hand_on(self) -> None:
        data, self.data = self.data, None
        if data is not None and not self.borrowed:
            give(data)

    # -- values ----------------------------------------------------------------------------------

    def array(self, region: Region, host: Any) -> Array:
        """Return the region as an array that shares the tile's bytes, allocated on first use."""
        if self.pending is not None:
            self._products.settle(self)
        return self.array_now(region, host)

    def array_now(self, region: Region, host: Any) -> Array:
        """Return the same without forming the matmuls that are pending."""
        offset, shape, strides, size = region
        data = self.data
        if data is None:
            data = self.materialise()
        if self.wide:
            if host != as_dtype(self.tile.dtype).host:
                raise RuleViolation(
                    f"tile {self.tile.name!r} {self.tile.dtype}: its bits as {host} while "
                    "NKI_PRECISE_FP=0 holds narrow floats as float32; run this kernel with "
                    "NKI_PRECISE_FP=1"
                )
            size, host = 4, np.float32
        return np.ndarray(shape, host, data, offset * size, [s * size for s in strides])

    def bits(self, region: Region) -> Array:
        """Return the region as unsigned integers, for moves that convert nothing.

        NumPy moves its own types several times faster than the extension types of ml_dtypes.
        """
        if self.wide:
            return self.array(region, as_dtype(self.tile.dtype).host)
        return self.array(region, _BITS[region[3]])

    def materialise(self) -> Array:
        """Give the tile bytes: poison where reads of them pass, else undefined until written."""
        nbytes = self.nbytes * 4 // self.tile.itemsize if self.wide else self.nbytes
        self.data = data = take(nbytes)
        if self._visible:
            kind = as_dtype(self.tile.dtype)
            data.view(np.float32 if self.wide else kind.host)[...] = kind.poison
        return data

    def snapshot(self, region: Region, rows: int, dtype: DType) -> Array:
        """Return the region as float32 [rows, columns], fixed at this moment, once per content."""
        found = self._snapshots.get(region)
        if found is None or found.shape[0] != rows:
            values = self.array(region, dtype.host).reshape(rows, -1)
            if dtype is tfloat32:
                found = round_tf32(values)
            elif values.dtype == np.float32 and values.flags.c_contiguous:
                found = values  # the bytes themselves: `touch` forms what needs them first
                self._lent = True
            else:
                found = widen(values)
            self._snapshots[region] = found
        return found

    def multiply(self, region: Region, weights: Array, data: Array, adds: bool) -> None:
        """Note region (+)= weights.T @ data; formed when somebody looks at the values."""
        self._products.add(self, region, (weights, data), adds)

    def touch(self) -> None:
        """Called before the values change: snapshots taken so far stay as they are."""
        if self._lent:
            self._lent = False
            self._products.settle_all()
        if self._snapshots:
            self._snapshots = {}
        if self.borrowed:
            self.own()

    def lose_values(self) -> None:
        """Become a shape without values."""
        self.abstract = True
        self._products.drop(self)
        self._hand_on()
        self.borrowed = False

    def own(self) -> None:
        """Copy bytes borrowed from the caller before the first write to them."""
        if self.borrowed:
            lent, self.data = self.data, None
            if lent is not None:
                self.data = take(lent.nbytes)
                np.copyto(self.data, lent)
            self.borrowed = False

    # -- written map -----------------------------------------------------------------------------

    def covers(self, region: Region) -> bool:
        """Return True if `region` is the whole tile in row-major order."""
        if region == self.whole:
            return True
        offset, shape, strides, itemsize = region
        if offset:
            return False
        expected = 1
        for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return expected * itemsize == self.nbytes

    def mark(self, region: Region) -> None:
        """Record that every element of `region` was written."""
        if self.full or region in self._regions:
            return
        if self.covers(region):
            self.fill()
            return
        self._refine(region)
        if self._map is None:
            self._map = np.zeros(self.nbytes // self._grain, np.bool_)
        self._view(self._map, region)[...] = True
        self._regions.add(region)

    def mark_where(self, region: Region, chosen: Array) -> None:
        """Record that the elements of `region` where `chosen` (of its shape) holds were written."""
        if self.full:
            return
        if chosen.all():
            self.mark(region)
            return
        self._refine(region)
        if self._map is None:
            self._map = np.zeros(self.nbytes // self._grain, np.bool_)
        self._view(self._map, region)[chosen] = True

    def fill(self) -> None:
        """Record that the whole tile was written."""
        self.full = True
        self._map = None
        self._regions.clear()

    def is_written(self, region: Region) -> bool:
        """Return True if every element of `region` was written."""
        if self.full or region in self._regions:
            return True
        self._refine(region)
        if self._map is None or not self._view(self._map, region).all():
            return False
        if self.covers(region):
            self.fill()
        else:
            self._regions.add(region)
        return True

    def written_mask(self, region: Region) -> Array:
        """Return a boolean array of the region's shape: which elements were written."""
        if self.full:
            return np.ones(region[1], np.bool_)
        if self._map is None:
            return np.zeros(region[1], np.bool_)
        self._refine(region)
        return self._flags(self._map, region)

    def _view(self, flags: Array, region: Region) -> Array:
        offset, shape, strides, size = region
        per = size // self._grain
        steps = [s * per for s in strides]
        return np.ndarray((*shape, per), np.bool_, flags, offset * per, [*steps, 1])

    def _flags(self, flags: Array, region: Region) -> Array:
        """Return one flag per element of the region: True where all its bytes are flagged."""
        every: Array = np.all(self._view(flags, region), axis=-1)
        return every

    def _refine(self, region: Region) -> None:
        if region[3] % self._grain:
            ratio = self._grain // region[3]
            self._grain = region[3]
            if self._map is not None:
                self._map = np.repeat(self._map, ratio)
            if self._group_map is not None:
                self._group_map = np.repeat(self._group_map, ratio)

    # -- columns chosen by offsets ---------------------------------------------------------------

    def extract(self, region: Region, at: Array, tile: Tile) -> Memory:
        """Return a tile of the elements ``at[p]`` of the free dimensions of each partition p."""
        part = Memory(
            tile, self.buffer, tile.row_bytes * tile.partitions, self._products, self._visible
        )
        part.loop, part.wide, part.abstract = self.loop, self.wide, self.abstract
        whole = (0, tile.shape, (tile.shape[1], 1), region[3])

        def chosen(values: Array) -> Array:
            return np.take_along_axis(values.reshape(len(at), -1), at, axis=1)

        if not self.abstract:
            np.copyto(part.bits(whole), chosen(self.bits(region)))
        part.full = self.full
        if not self.full:
            part._map = chosen(self.written_mask(region)).reshape(-1)
        if self._groups or self._group_map is not None:
            flags = self._flags(self._group_mask(region), region)
            part._group_map = chosen(flags).reshape(-1)
        return part

    def insert(self, region: Region, at: Array, part: Memory) -> None:
        """Write back what `extract` returned, with what is known of it; the last of equals wins."""
        self.touch()
        shape = region[1]
        where_to = (np.arange(len(at))[:, None], *np.unravel_index(at, shape[1:]))
        whole = (0, part.tile.shape, (part.tile.shape[1], 1), region[3])
        if part.abstract or self.abstract:
            self.lose_values()
        else:
            self.bits(region)[where_to] = part.bits(whole)
        if not self.full:
            written = np.zeros(shape, np.bool_)
            written[where_to] = part.written_mask(whole)
            self.mark_where(region, written)
        if part._groups or part._group_map is not None or self._group_map is not None:
            flags = part._flags(part._group_mask(whole), whole)
            self._view(self._group_mask(region), region)[where_to] = flags[..., None]
            self._groups.clear()

    # -- matmul groups ---------------------------------------------------------------------------

    def accumulates(
        self, region: Region, accumulate: bool | None, loop: LoopPath = ()
    ) -> bool | Array:
        """Return whether a matmul adds to `region`, element by element where that differs.

        ``accumulate=None`` overwrites what no matmul has written since the allocation or the last
        other write, and adds to the rest (nki.isa.nc_matmul; per written region since NKI 0.6.0).
        The device decides that once for all iterations of a loop, so inside one it can only be
        inferred for a tile of the loop's body.

        Args:
            region: what the matmul writes.
            accumulate: its operand.
            loop: the device loops around it.
        """
        if accumulate is None and len(loop) > len(self.loop):
            raise RuleViolation(
                f"accumulate=None inside a device loop on tile {self.tile.name!r}, allocated "
                f"before the loop at {where(self.tile.site)}; which write is the first is decided "
                "once for all iterations: allocate the tile in the body, or pass accumulate=True "
                "or False"
            )
        if accumulate is False:
            result: bool | Array = False
        elif region in self._groups:
            result = True
        elif not self._groups and self._group_map is None:
            result = False
        else:
            mask = self._flags(self._group_mask(region), region)
            result = True if mask.all() else mask if mask.any() else False
        if accumulate is True and result is not True:
            raise RuleViolation(
                f"accumulate=True on elements of tile {self.tile.name!r}, allocated at "
                f"{where(self.tile.site)}, that no matmul of the tile has written; the first "
                "matmul of a group must overwrite: pass accumulate=(k > 0), or accumulate=None to "
                "have it inferred"
            )
        if result is not True:
            self._start(region)
        return result

    def _start(self, region: Region) -> None:
        if self._group_map is not None or (self._groups and region not in self._groups):
            self._view(self._group_mask(region), region)[...] = True
        self._groups.add(region)

    def end_groups(self, region: Region) -> None:
        """A write that is no matmul: the next inferred matmul on `region` overwrites."""
        if not self._groups and self._group_map is None:
            return
        if self.covers(region):
            self._groups.clear()
            self._group_map = None
            return
        self._view(self._group_mask(region), region)[...] = False
        self._groups.clear()

    def _group_mask(self, region: Region) -> Array:
        self._refine(region)
        if self._group_map is None:
            self._group_map = np.zeros(self.nbytes // self._grain, np.bool_)
            for started in self._groups:
                self._view(self._group_map, started)[...] = True
        return self._group_map


def uninitialized(opcode: str, operand: str, view: NkiTensor, reader: str) -> UninitializedRead:
    """Build the error for a read of memory nothing wrote."""
    mask = view.mem.written_mask(view.region)
    missing = int(mask.size - mask.sum())
    first = tuple(int(i) for i in np.argwhere(~mask)[0])
    tile = view.mem.tile
    return UninitializedRead(
        f"{opcode} at {reader}: {operand} reads {missing} of {mask.size} elements that no "
        f"instruction wrote (first at index {first}) of the {tile.memory} tile {tile.name!r} "
        f"{list(tile.shape)} {tile.dtype} allocated at {where(tile.site)}; write them first "
        "(dma_copy, memset, a compute instruction), or read only what was written"
    )


def poisoned(view: NkiTensor, dtype: DType) -> Array:
    """Return a copy of the view's values with poison where nothing was written."""
    values: Array = view.mem.array(view.region, dtype.host).copy()
    mask = view.mem.written_mask(view.region)
    if not mask.all():
        values[~mask] = np.asarray(dtype.poison).astype(dtype.host)
    return values
