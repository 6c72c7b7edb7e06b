"""Stand-ins for packages that AWS's library and its tests import and that are not public.

They hold what is used and nothing else. Names of the compiler's package appear here only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from nki_kernels.machine.dtypes import Array, as_dtype

#: Packed types as NumPy can carry them: four values in one record, named by its field.
PACKED = {
    name: np.dtype([(name, host)])
    for name, host in (
        ("float8_e4m3fn_x4", np.uint32),
        ("float8_e5m2_x4", np.uint32),
        ("float4_e2m1fn_x4", np.uint16),
    )
}
_ELEMENTS = {
    "float8_e4m3fn_x4": ml_dtypes.float8_e4m3fn,
    "float8_e5m2_x4": ml_dtypes.float8_e5m2,
    "float4_e2m1fn_x4": ml_dtypes.float4_e2m1fn,
}
_LARGE = 4096
_OLD = "neuronxcc"


def packed_name(dtype: Any) -> str | None:
    """The name of a packed type, given in any of its spellings; None for every other type."""
    if isinstance(dtype, np.dtype):
        return str(dtype.names[0]) if dtype.names and dtype.names[0] in PACKED else None
    return str(dtype) if str(dtype) in PACKED else None


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype for an NKI dtype, a name or a NumPy dtype."""
    name = packed_name(dtype)
    if name is not None:
        return PACKED[name]
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        found = as_dtype(str(dtype)).host
    return found


def unpack(x: Array) -> Array:
    """The four values of each element of a packed array, side by side, as float32."""
    name = packed_name(x.dtype)
    if name is None:
        return x.astype(np.float32)
    plain = np.ascontiguousarray(x)[name]
    if name.startswith("float4"):
        nibbles = (plain[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)) & 0xF
        plain = nibbles.astype(np.uint8).reshape(*x.shape[:-1], -1)
    values: Array = plain.view(_ELEMENTS[name]).astype(np.float32)
    return values


def pack(x: Array, name: str) -> Array:
    """Round to the element type (saturating) and pack four neighbours of the last axis."""
    element = _ELEMENTS[name]
    bits = np.ascontiguousarray(_saturated(x, np.dtype(element))).view(np.uint8)
    if not name.startswith("float4"):
        return bits.view(np.uint32).view(PACKED[name])
    quads = bits.reshape(*x.shape[:-1], -1, 4).astype(np.uint16)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    packed: Array = np.ascontiguousarray(np.bitwise_or.reduce(quads << shifts, axis=-1))
    return packed.view(PACKED[name])


def static_cast(x: Any, dtype: Any) -> Array:
    """Convert as ``neuron_dtypes.static_cast`` does: 8-bit floats saturate, packed types pack."""
    array = np.asarray(x)
    name = packed_name(dtype)
    if name is not None:
        return array if packed_name(array.dtype) == name else pack(array, name)
    if packed_name(array.dtype) is not None:
        array = unpack(array)
    return _saturated(array, numpy_dtype(dtype))


def _saturated(array: Array, target: np.dtype[Any]) -> Array:
    if is_float_type(target) and target.itemsize == 1:
        limit = float(finfo(target).max)
        array = np.clip(array.astype(np.float32), -limit, limit)
    return array.astype(target)


def is_float_type(dtype: Any) -> bool:
    """True for NumPy's and ml_dtypes' floating-point types, False for packed ones."""
    kind = numpy_dtype(dtype)
    if kind.names:
        return False
    return kind.kind == "f" or (kind.kind == "V" and "float" in kind.name) or "float" in kind.name


def finfo(dtype: Any) -> Any:
    """Limits of a floating-point type."""
    return ml_dtypes.finfo(numpy_dtype(dtype))  # type: ignore[no-untyped-call]


def sizeinbytes(dtype: Any) -> int:
    """Bytes of one element."""
    return numpy_dtype(dtype).itemsize


class AllPairs:
    """Rows of choices in which every pair of values occurs that the filter lets occur.

    Stands for ``allpairspy.AllPairs``: rows of the product in order, kept if they add a pair.
    """

    def __init__(
        self, parameters: Sequence[Sequence[Any]], filter_func: Callable[[Any], bool] | None = None
    ) -> None:
        self._parameters = [list(p) for p in parameters]
        self._filter = filter_func

    def __iter__(self) -> Iterator[list[Any]]:
        seen: set[tuple[int, int, int, int]] = set()
        rows = product(*(range(len(p)) for p in self._parameters))
        for indices in islice(rows, _LARGE):
            pairs = {
                (a, indices[a], b, indices[b]) for b in range(len(indices)) for a in range(b)
            } - seen
            row = [self._parameters[i][j] for i, j in enumerate(indices)]
            if pairs and (self._filter is None or self._filter(row)):
                seen |= pairs
                yield row


def _module(name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


class _Nothing:
    """A class that is named in AWS's tests and never does anything here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def install(orchestrator: type) -> None:
    """Put the stand-ins into ``sys.modules``.

    Args:
        orchestrator: the class AWS's tests hand their kernels to.
    """
    import nki

    # As AWS's package does: NumPy then knows the types by name.
    np.sctypeDict.update(PACKED)  # type: ignore[arg-type]
    scalars = {
        name: getattr(ml_dtypes, name)
        for name in ("bfloat16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
    }
    _module(
        "neuron_dtypes", static_cast=static_cast, is_float_type=is_float_type,
        sizeinbytes=sizeinbytes, finfo=finfo,
        **scalars, **PACKED,
    )  # fmt: skip
    for name in ("", ".nki", ".starfish", ".starfish.support"):
        _module(_OLD + name)
    _module(f"{_OLD}.nki.typing", mutable_tensor=object, tensor=object)
    _module(f"{_OLD}.starfish.support.dtype", static_cast=static_cast)
    _module("allpairspy", AllPairs=AllPairs)
    metrics = "aws_embedded_metrics"
    for name in ("", ".logger", ".serializers"):
        _module(metrics + name)
    _module(f"{metrics}.logger.metrics_context", MetricsContext=_Nothing)
    _module(f"{metrics}.serializers.log_serializer", LogSerializer=_Nothing)
    _module("plotext")
    _module("fabric2", Connection=_Nothing, Result=_Nothing)
    _module("test.utils.test_orchestrator", Orchestrator=orchestrator)
    if not hasattr(nki, "dtype"):
        _module("nki.dtype", **vars(nki.language))  # named in annotations
