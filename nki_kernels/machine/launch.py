"""From a kernel and its arguments to results and a trace: `jit`, `simulate`, `launch`."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from nki_kernels.hardware import spec_for
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine import core
from nki_kernels.machine.core import Run
from nki_kernels.machine.dtypes import Array, as_dtype
from nki_kernels.machine.errors import (
    DoesNotFit,
    DtypeError,
    KernelError,
    ShapeError,
    UninitializedRead,
)
from nki_kernels.machine.hazards import alias_errors
from nki_kernels.machine.layout import MAX_DIMS, is_int
from nki_kernels.machine.options import Options, default_options
from nki_kernels.machine.placement import Placement, place
from nki_kernels.machine.tensor import Abstract, MemoryRegion, NkiTensor
from nki_kernels.machine.trace import Trace, where

if TYPE_CHECKING:
    from nki_kernels.machine.timeline import Timeline

_LOG = logging.getLogger("nki")
DEFAULT_TARGET = "trn2"
_said: set[str] = set()


@dataclass(slots=True)
class Launch:
    """One executed kernel.

    Attributes:
        result: what the kernel returned, in the caller's array type; `Abstract` where values are
            unknown.
        outputs: the returned tensors as NumPy arrays, None where values are unknown.
        trace: every event and tile.
        placement: addresses of the tiles.
    """

    result: Any
    outputs: tuple[Array | None, ...]
    trace: Trace
    placement: Placement | None
    _timeline: Timeline | None = field(default=None, repr=False)

    def time(self) -> Timeline:
        """Return the modelled timeline (unvalidated), computed once."""
        from nki_kernels.machine.timeline import schedule

        if self._timeline is None:
            self._timeline = schedule(self.trace, self.placement)
        return self._timeline


def current_target() -> str:
    """Return the target the environment names, or trn2 (said once; AWS defaults to trn3)."""
    named = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if named:
        return named
    if "target" not in _said:
        _said.add("target")
        _LOG.warning(
            "NEURON_PLATFORM_TARGET_OVERRIDE is not set: kernels run for %s (AWS's own default "
            "is trn3)",
            DEFAULT_TARGET,
        )
    return DEFAULT_TARGET


def launch(
    kernel: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | CoreSpec | None = None,
    lnc: int | None = None,
    options: Options | None = None,
) -> Launch:
    """Execute `kernel` on the embedded machine.

    Args:
        kernel: a function or a `Kernel`.
        args: NumPy arrays, CPU torch tensors, `Abstract` (a shape without values), and
            compile-time constants of any other type.
        kwargs: the same, by name.
        target: "trn1", "trn2", "trn3" or "toy"; None reads the environment.
        lnc: cores of the launch, 1 or 2; None takes the kernel's bracket or the environment.
        options: what is checked; None takes the environment's.

    Raises:
        NkiKernelsError: for every mistake of the kernel or the call. Then no argument has changed.
    """
    function, bracket = _unwrap(kernel)
    spec = target if isinstance(target, CoreSpec) else spec_for(target or current_target())
    cores = _cores(lnc, bracket)
    chosen = options or default_options()
    trace = Trace(kernel=getattr(function, "__name__", "kernel"), spec=spec, lnc=cores)
    shared: dict[int, NkiTensor] = {}
    bound = _Arguments(function, trace.kernel)
    returned: Any = None
    for number in range(cores):
        run = Run(spec, chosen, trace, _enter.__code__, number)
        run.shared = shared
        run.gridded = bracket is not None
        if number == 0:
            tensors = bound.bind(run, args, kwargs or {})
        token = core._CURRENT.set(run)
        try:
            with np.errstate(all="ignore"):
                result = _enter(function, *tensors)
        finally:
            core._CURRENT.reset(token)
        returned = result if number == 0 else returned
    with np.errstate(all="ignore"):
        return _finish(trace, chosen, bound, returned)


def _enter(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The frame below which call sites are no kernel lines."""
    return function(*args, **kwargs)


def _finish(trace: Trace, options: Options, bound: _Arguments, returned: Any) -> Launch:
    outputs: list[NkiTensor] = []
    _collect(returned, outputs, trace.kernel)
    for tensor in outputs:
        bound.check_output(tensor, options)
    placement = None
    if options.capacity != "off":
        try:
            placement = place(trace)
        except DoesNotFit as error:
            bound.run.report(options.capacity, error)
    if placement is not None and options.alias != "off":
        for hazard in alias_errors(trace, placement):
            bound.run.report(options.alias, hazard)
    arrays = tuple(None if t.mem.abstract else _values(t) for t in outputs)
    bound.write_back()
    converted = iter([bound.convert(t, a) for t, a in zip(outputs, arrays, strict=True)])
    return Launch(_rebuild(returned, converted), arrays, trace, placement)


def _unwrap(kernel: Any) -> tuple[Callable[..., Any], int | None]:
    if isinstance(kernel, Kernel):
        return kernel.func, kernel.lnc
    if not callable(kernel):
        raise KernelError(f"launch: {kernel!r} is no kernel; pass a function or an @nki.jit kernel")
    return kernel, None


def _cores(asked: Any, bracket: int | None) -> int:
    if asked is None:
        return bracket or _environment_lnc()
    if not is_int(asked) or asked not in (1, 2):
        raise KernelError(
            f"launch: lnc={asked!r}; a launch has 1 or 2 cores: pass one of these, or None for the "
            "kernel's bracket or NEURON_LOGICAL_NC_CONFIG"
        )
    return int(asked)


def _environment_lnc() -> int:
    raw = os.environ.get("NEURON_LOGICAL_NC_CONFIG", "1")
    if raw not in ("1", "2"):
        raise KernelError(f"NEURON_LOGICAL_NC_CONFIG={raw!r}; allowed are 1 and 2")
    return int(raw)


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


class _Arguments:
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
            return value if same else _like(value, bound)
        if isinstance(value, (np.ndarray, Abstract)) or _is_torch(value):
            return self._tensor(run, name, value)
        return value

    def _tensor(self, run: Run, name: str, value: Any) -> NkiTensor:
        what = f"kernel {self.kernel!r}, argument {name!r}"
        array: Array | None = None
        if not isinstance(value, Abstract):
            if _is_torch(value):
                self.torch = True
                array = _from_torch(value, what)
            else:
                array = value
        shape = value.shape if array is None else array.shape
        dtype = value.dtype if array is None else array.dtype
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
            raise ShapeError(
                f"{what}: shape {list(shape)}; a kernel argument has 1 to {MAX_DIMS} dimensions of "
                "size >= 1: reshape it, or leave the call out where there is nothing to do"
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

    def write_back(self) -> None:
        """Copy what the kernel changed into the caller's arrays, all or nothing."""
        changed = [(t, a) for t, _, a in self.bound if a is not None and self._changed(t, a)]
        for tensor, array in changed:
            if not array.flags.writeable:
                raise KernelError(
                    f"kernel {self.kernel!r} writes to argument {tensor.name!r}, but the array is "
                    "read-only; pass a writable copy"
                )
        for tensor, array in changed:
            np.copyto(array, _values(tensor))

    def _changed(self, tensor: NkiTensor, array: Array) -> bool:
        if tensor.mem.abstract or tensor.mem.borrowed:
            return False
        return not tensor.mem.wide or not np.array_equal(_values(tensor), array, equal_nan=False)

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


def _values(tensor: NkiTensor) -> Array:
    values: Array = tensor.mem.array(tensor.region, tensor.dtype.host)
    return values.astype(tensor.dtype.host, copy=True)


def _collect(returned: Any, outputs: list[NkiTensor], kernel: str) -> None:
    if isinstance(returned, NkiTensor):
        outputs.append(returned)
    elif isinstance(returned, (tuple, list)):
        for item in returned:
            _collect(item, outputs, kernel)
    elif returned is not None:
        raise KernelError(
            f"kernel {kernel!r} returns {returned!r}; a kernel returns None, an HBM tensor, or a "
            "tuple of them"
        )


def _rebuild(returned: Any, converted: Any) -> Any:
    if isinstance(returned, NkiTensor):
        return next(converted)
    if isinstance(returned, (tuple, list)):
        return _like(returned, [_rebuild(item, converted) for item in returned])
    return returned


def _like(sequence: Any, items: list[Any]) -> Any:
    """Return `items` as the type of `sequence`: list, tuple or named tuple."""
    return getattr(type(sequence), "_make", type(sequence))(items)


class Kernel:
    """A jitted kernel: call it with arrays or inside a kernel, or index it with a core count."""

    def __init__(self, func: Callable[..., Any], lnc: int | None = None) -> None:
        self.func = func
        self.lnc = lnc
        functools.update_wrapper(self, func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel; inside another kernel it is inlined."""
        if core._CURRENT.get() is not None:
            return self.func(*args, **kwargs)
        return launch(self, args, kwargs).result

    def __getitem__(self, lnc: Any) -> Kernel:
        """Return the kernel for a launch on `lnc` cores (1 or 2)."""
        count = lnc[0] if isinstance(lnc, tuple) and len(lnc) == 1 else lnc
        if isinstance(count, bool) or not isinstance(count, int) or count not in (1, 2):
            raise KernelError(
                f"kernel {self.__name__!r}[{lnc!r}]: the bracket is the number of cores, 1 or 2"  # type: ignore[attr-defined]
            )
        return Kernel(self.func, count)

    def __repr__(self) -> str:
        return f"<nki kernel {getattr(self.func, '__name__', self.func)!r}>"


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Make a kernel of a function: ``@nki.jit`` or ``@nki.jit(keyword=...)``.

    Keywords steer the real compiler and have no meaning here (since NKI 0.3.0 ``mode`` and
    ``platform_target`` are ignored there too).
    """
    if fn is None:
        return functools.partial(jit, **kwargs)
    return fn if isinstance(fn, Kernel) else Kernel(fn)


def simulate(kernel: Any) -> Callable[..., Any]:
    """Return a function that runs a kernel, ``kernel[2]`` or a plain function on the CPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return launch(kernel, args, kwargs).result

    return run
