"""The caller's arrays and the HBM tensors that stand for them, there and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from nki_kernels.machine.core import Run
from nki_kernels.machine.dtypes import Array, as_dtype
from nki_kernels.machine.errors import DtypeError, KernelError, ShapeError, UninitializedRead
from nki_kernels.machine.options import Options
from nki_kernels.machine.tensor import Abstract, MemoryRegion, NkiTensor
from nki_kernels.machine.trace import where


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever passes a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(value: Any, name: str) -> Array:
    """Return a NumPy view of a CPU torch tensor, 16- and 8-bit floats included."""
    torch = sys.modules["torch"]
    tensor = value.detach()
    if tensor.device.type != "cpu":
        raise KernelError(f"{name}: tensor on {tensor.device}; the embedded NKI takes CPU tensors")
    hosts = {
        "torch.bfloat16": (torch.int16, ml_dtypes.bfloat16),
        "torch.float8_e4m3fn": (torch.uint8, ml_dtypes.float8_e4m3fn),
        "torch.float8_e5m2": (torch.uint8, ml_dtypes.float8_e5m2),
    }
    special = hosts.get(str(tensor.dtype))
    if special is None:
        array: Array = tensor.numpy()
        return array
    bits, host = special
    return np.asarray(tensor.view(bits).numpy()).view(host)


def _to_torch(array: Array) -> Any:
    torch = sys.modules["torch"]
    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    names["float8_e5m2"] = torch.float8_e5m2
    special = names.get(array.dtype.name)
    if array.dtype == ml_dtypes.float8_e4m3:
        raise DtypeError(
            "kernel result of dtype float8_e4m3: torch has no such type (its float8_e4m3fn has no "
            "infinities); return float8_e5m2, bfloat16 or the bits as uint8, or pass NumPy arrays"
        )
    if special is None:
        return torch.from_numpy(array)
    bits = np.int16 if array.dtype.itemsize == 2 else np.uint8
    return torch.from_numpy(array.view(bits)).view(special)


class Arguments:
    """The caller's arrays and the HBM tensors that stand for them."""

    def __init__(self, function: Callable[..., Any], kernel: str) -> None:
        self.function = function
        self.kernel = kernel
        self.torch = False
        self.run: Run
        self.bound: list[tuple[NkiTensor, Any, Array | None]] = []

    def bind(
        self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with arrays replaced by HBM tensors."""
        self.run = run
        code = getattr(self.function, "__code__", None)
        names = [] if code is None else list(code.co_varnames[: code.co_argcount])
        names += [f"argument {i}" for i in range(len(names), len(args))]
        new_args = tuple(self._bind(run, n, a) for n, a in zip(names, args, strict=False))
        new_kwargs = {n: self._bind(run, n, a) for n, a in kwargs.items()}
        self._annotations(dict(zip(names, new_args, strict=False)) | new_kwargs)
        return new_args, new_kwargs

    def _bind(self, run: Run, name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            bound = [self._bind(run, f"{name}[{i}]", v) for i, v in enumerate(value)]
            same = all(new is old for new, old in zip(bound, value, strict=True))
            return value if same else like(value, bound)
        if isinstance(value, (np.ndarray, Abstract)) or _is_torch(value):
            return self._tensor(run, name, value)
        return value

    def _tensor(self, run: Run, name: str, value: Any) -> NkiTensor:
        what = f"kernel {self.kernel!r}, argument {name!r}"
        if isinstance(value, np.ma.MaskedArray):
            raise KernelError(
                f"{what}: a masked array; a NeuronCore has no masks: pass .filled(value), or .data "
                "and the mask as an array of its own"
            )
        array: Array | None = None
        if not isinstance(value, Abstract):
            if _is_torch(value):
                self.torch = True
                array = _from_torch(value, what)
            else:
                array = value
        shape = value.shape if array is None else array.shape
        dtype = value.dtype if array is None else array.dtype
        if not shape or min(shape) < 1:
            raise ShapeError(
                f"{what}: shape {list(shape)}; a kernel argument has dimensions, of size >= 1: "
                "reshape it, or leave the call out where there is nothing to do"
            )
        try:
            kind = as_dtype(dtype)
        except DtypeError as error:
            raise DtypeError(f"{what}: {error}") from None
        region = MemoryRegion.private_hbm if run.lnc == 1 else MemoryRegion.shared_hbm
        tensor = run.allocate(shape, kind, region, name=name, role="input")
        mem = tensor.mem
        mem.fill()
        if array is None:
            mem.abstract = True
        elif mem.wide:
            mem.materialise()
            mem.array(tensor.region, kind.host)[...] = array
        else:
            mem.data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            mem.borrowed = True
        self.bound.append((tensor, value, array))
        return tensor

    def _annotations(self, given: dict[str, Any]) -> None:
        for name, stated in getattr(self.function, "__annotations__", {}).items():
            note = _evaluated(stated, self.function)
            expected = getattr(note, "shape", None)
            tensor = given.get(name)
            if not isinstance(tensor, NkiTensor) or type(note).__name__ != "TensorAnnotation":
                continue
            if expected is not None and tuple(expected) != tensor.shape:
                raise ShapeError(
                    f"kernel {self.kernel!r}, argument {name!r}: shape {list(tensor.shape)}; it is "
                    f"annotated {note!r}"
                )

    def check_output(self, tensor: NkiTensor, options: Options) -> None:
        """Refuse outputs that are not in shared HBM or not wholly written."""
        tile = tensor.mem.tile
        if tile.memory != "hbm":
            raise KernelError(
                f"kernel {self.kernel!r} returns {tensor!r}, a tile on chip; copy it to an HBM "
                "tensor (buffer=nl.shared_hbm) with dma_copy and return that"
            )
        if tile.role == "input":
            return
        if tensor.buffer is not MemoryRegion.shared_hbm:
            raise KernelError(
                f"kernel {self.kernel!r} returns {tensor!r}, allocated at {where(tile.site)} in "
                "private HBM; outputs are allocated with buffer=nl.shared_hbm"
            )
        tile.role = "output"
        if options.outputs != "off" and not tensor.mem.is_written(tensor.region):
            mask = tensor.mem.written_mask(tensor.region)
            first = [int(i) for i in np.argwhere(~mask)[0]]
            error = UninitializedRead(
                f"kernel {self.kernel!r}: output {tensor!r} allocated at {where(tile.site)} has "
                f"{int(mask.size - mask.sum())} of {mask.size} elements that no instruction wrote "
                f"(first at {first}); write them, or return only what was written"
            )
            self.run.report(options.outputs, error)

    def check_silence(self, options: Options) -> None:
        """Refuse a kernel that returns None and leaves no trace: its ``return`` is missing.

        One that writes into its arguments may return nothing.
        """
        if options.outputs == "off":
            return
        written = {id(a.tile): a.tile for e in self.run.trace.events for a in e.writes}
        if any(tile.role == "input" for tile in written.values()):
            return
        lost = [tile for tile in written.values() if tile.shared and tile.role == "temp"]
        if lost:
            error = KernelError(
                f"kernel {self.kernel!r} returns None, but wrote {lost[-1].name!r} "
                f"{list(lost[-1].shape)} in shared HBM, allocated at {where(lost[-1].site)}; "
                "return it (is the `return` missing?), or allocate what is no result in "
                "nl.private_hbm"
            )
            self.run.report(options.outputs, error)

    def changed(self) -> list[tuple[NkiTensor, Array]]:
        """Return what the kernel changed, with the caller's arrays; all must be writable."""
        changed = [(t, a) for t, _, a in self.bound if a is not None and self._changed(t, a)]
        for tensor, array in changed:
            if not array.flags.writeable:
                raise KernelError(
                    f"kernel {self.kernel!r} writes to argument {tensor.name!r}, but the array is "
                    "read-only; pass a writable copy"
                )
        return changed

    def _changed(self, tensor: NkiTensor, array: Array) -> bool:
        if tensor.mem.abstract or tensor.mem.borrowed:
            return False
        return not tensor.mem.wide or not np.array_equal(values(tensor), array, equal_nan=False)

    @staticmethod
    def write_back(tensor: NkiTensor, array: Array) -> None:
        """Copy the tensor's values to the caller's array, bit for bit.

        A packed type has two NumPy types of one size, the caller's record and the integer in here,
        and NumPy casts none to the other.
        """
        host = tensor.dtype.host
        # Narrow floats held wide are rounded by the copy: their own cast, as `values` makes it.
        held = tensor.mem.array(tensor.region, host)
        held = held if held.dtype == host else values(tensor)
        np.copyto(array.view(host) if array.dtype.names else array, held)

    def convert(self, tensor: NkiTensor, array: Array | None) -> Any:
        """Return an output in the caller's type; a returned input is the caller's own object."""
        for bound, value, _ in self.bound:
            if bound.mem is tensor.mem and bound.region == tensor.region:
                return value
        if array is None:
            return Abstract(tensor.shape, tensor.dtype)
        return _to_torch(array) if self.torch else array


def _evaluated(note: Any, function: Callable[..., Any]) -> Any:
    """Return an annotation; ``from __future__ import annotations`` leaves it a string."""
    if not isinstance(note, str) or "tensor" not in note:
        return note
    try:
        return eval(note, getattr(function, "__globals__", {}))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return None  # an annotation for type checkers only


def values(tensor: NkiTensor) -> Array:
    """Return a copy of the tensor's values in its dtype."""
    values: Array = tensor.mem.array(tensor.region, tensor.dtype.host)
    return values.astype(tensor.dtype.host, copy=True)


def like(sequence: Any, items: list[Any]) -> Any:
    """Return `items` as the type of `sequence`: list, tuple or named tuple."""
    return getattr(type(sequence), "_make", type(sequence))(items)
