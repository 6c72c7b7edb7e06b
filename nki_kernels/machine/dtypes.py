"""NKI data types and the one arithmetic rule: widen to float32, compute, round once on the write.

Rounding is to nearest even; floats overflow as IEEE says; integers round and saturate, NaN becomes
0. Source: nki.isa docstrings ("casts to float32 ... at no additional performance cost") and the NKI
0.6.0 release notes (fp32 -> int is RNE and saturates).
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nki_kernels.machine.errors import DtypeError

Array: TypeAlias = npt.NDArray[Any]
Kind: TypeAlias = Literal["float", "int", "uint", "packed"]


class DType(str):
    """An NKI data type. It is a string, as in the published API, with its properties attached.

    Attributes:
        itemsize: bytes per element.
        kind: "float", "int" (signed), "uint" (unsigned, and bool), "packed" (raw bits only).
        host: the NumPy dtype that stores it.
        poison: the value never-written memory shows when it is printed (NaN, or 4 for integers).
    """

    itemsize: int
    kind: Kind
    host: np.dtype[Any]
    poison: float

    def __new__(cls, name: str, host: Any, kind: Kind) -> DType:
        """Make the type `name`, stored as the NumPy dtype `host`."""
        self = super().__new__(cls, name)
        self.host = np.dtype(host)
        self.itemsize = self.host.itemsize
        self.kind = kind
        self.poison = float("nan") if kind == "float" else 4
        return self

    def __repr__(self) -> str:
        return f"nl.{self!s}"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of a type is the type: configs that hold one are copied."""
        return as_dtype, (str(self),)

    @property
    def is_float(self) -> bool:
        """True for every floating-point type."""
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """True for signed and unsigned integers and bool."""
        return self.kind in ("int", "uint")


float32 = DType("float32", np.float32, "float")
tfloat32 = DType("tfloat32", np.float32, "float")
bfloat16 = DType("bfloat16", ml_dtypes.bfloat16, "float")
float16 = DType("float16", np.float16, "float")
float8_e4m3 = DType("float8_e4m3", ml_dtypes.float8_e4m3, "float")
float8_e4m3fn = DType("float8_e4m3fn", ml_dtypes.float8_e4m3fn, "float")
float8_e5m2 = DType("float8_e5m2", ml_dtypes.float8_e5m2, "float")
float8_e8m0fnu = DType("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, "float")
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", np.uint32, "packed")
float8_e5m2_x4 = DType("float8_e5m2_x4", np.uint32, "packed")
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", np.uint16, "packed")
int8 = DType("int8", np.int8, "int")
int16 = DType("int16", np.int16, "int")
int32 = DType("int32", np.int32, "int")
uint8 = DType("uint8", np.uint8, "uint")
uint16 = DType("uint16", np.uint16, "uint")
uint32 = DType("uint32", np.uint32, "uint")
bool_ = DType("bool_", np.bool_, "uint")

ALL: tuple[DType, ...] = (
    float32, tfloat32, bfloat16, float16, float8_e4m3, float8_e4m3fn, float8_e5m2, float8_e8m0fnu,
    float8_e4m3fn_x4, float8_e5m2_x4, float4_e2m1fn_x4,
    int8, int16, int32, uint8, uint16, uint32, bool_,
)  # fmt: skip

#: Types the Tensor engine multiplies, by generation (nki.isa.nc_matmul).
MATMUL_INPUTS: tuple[DType, ...] = (
    float8_e4m3, float8_e5m2, bfloat16, float16, tfloat32, float32,
)  # fmt: skip
FP8: tuple[DType, ...] = (float8_e4m3, float8_e4m3fn, float8_e5m2)

_BY_NAME: dict[str, DType] = {str(d): d for d in ALL}
_BY_NAME |= {
    "bool": bool_, "float8e4": float8_e4m3, "float8e5": float8_e5m2, "float8_e5m2fn": float8_e5m2,
    "fp32": float32, "f32": float32, "fp16": float16, "f16": float16, "bf16": bfloat16,
    "tf32": tfloat32,
}  # fmt: skip
_BY_HOST: dict[np.dtype[Any], DType] = {}
for _d in ALL:
    if _d.kind != "packed" and _d is not tfloat32:
        _BY_HOST.setdefault(_d.host, _d)
_CACHE: dict[Any, DType] = {d: d for d in ALL}


def as_dtype(value: Any) -> DType:
    """Return the NKI dtype that `value` names.

    Args:
        value: an `nl` dtype, a name ("bfloat16", "bf16"), a NumPy dtype or scalar type, or a torch
            dtype.

    Raises:
        DtypeError: float64, int64 and everything else a NeuronCore has no type for.
    """
    try:
        return _CACHE[value]
    except (KeyError, TypeError):
        pass
    found = _lookup(value)
    if found is None:
        raise DtypeError(
            f"dtype {value!r}: not a NeuronCore data type; allowed are "
            f"{', '.join(str(d) for d in ALL)}; cast the array first, for example "
            "x.astype('float32')"
        )
    with contextlib.suppress(TypeError):  # an unhashable value is looked up every time
        _CACHE[value] = found
    return found


def _lookup(value: Any) -> DType | None:
    if isinstance(value, str):
        return _BY_NAME.get(str(value).removeprefix("nl.").removeprefix("torch."))
    if type(value).__module__.partition(".")[0] == "torch":
        return _BY_NAME.get(str(value).removeprefix("torch."))
    try:
        kind = np.dtype(value)
    except (TypeError, ValueError):
        return None
    if kind.names is not None:
        # NumPy has no packed types; a record with one field of the type's name carries one.
        named = _BY_NAME.get(kind.names[0]) if len(kind.names) == 1 else None
        return named if named is not None and named.host == kind[0] else None
    return _BY_HOST.get(kind)


_INT_BOUNDS: dict[np.dtype[Any], tuple[float, float]] = {
    d.host: (float(np.iinfo(d.host).min), float(np.iinfo(d.host).max))
    for d in ALL
    if d.kind in ("int", "uint") and d is not bool_
}


def widen(values: Array) -> Array:
    """Return 16- and 8-bit floats (and anything else) as a fresh float32 array.

    A bfloat16 is the upper half of a float32: shifting it there is twice as fast as the cast of
    ml_dtypes.
    """
    if values.dtype == bfloat16.host:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16  # in place: one pass with a cast in it takes a quarter longer
        return wide.view(np.float32)
    return values.astype(np.float32)


def store(dst: Array, values: Array) -> None:
    """Write `values` (float32, or integers of any width) to `dst`, rounding once to its dtype.

    Args:
        dst: a writable array of a host dtype.
        values: an array of the same shape.
    """
    if dst.dtype.kind in "iu":
        _store_integer(dst, values)
    elif dst.dtype.kind == "b":
        np.copyto(dst, values != 0)
    else:
        np.copyto(dst, values, casting="unsafe")


def _store_integer(dst: Array, values: Array) -> None:
    low, high = _INT_BOUNDS[dst.dtype]
    if values.dtype.kind in "iub":
        wide = values.astype(np.int64)
        np.copyto(dst, np.clip(wide, int(low), int(high)), casting="unsafe")
        return
    # float64 holds every int32 bound exactly, so the clip cannot round past the range.
    wide = np.rint(values.astype(np.float64))
    np.clip(wide, low, high, out=wide)
    np.copyto(wide, 0.0, where=np.isnan(wide))
    np.copyto(dst, wide, casting="unsafe")


def round_tf32(values: Array) -> Array:
    """Round float32 values to the 10-bit mantissa of tfloat32 (nearest even).

    The documents give the width, not the rounding; nearest even is this project's choice.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    lsb = (bits >> np.uint32(13)) & np.uint32(1)
    rounded = (bits + np.uint32(0xFFF) + lsb) & np.uint32(0xFFFFE000)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    result: Array = np.where(special, bits, rounded).view(np.float32)
    return result
