"""Naive twins of what the fourth generation added: activate2, quantize_mx, nc_matmul_mx.

The microscaling twins follow the OCP specification and the formula of the page of quantize_mx.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from tests.semantics.naive import (
    Machine,
    Tile,
    arith,
    at,
    fold,
    ordered,
    store_lanes,
    twin,
    write_rows,
)
from tests.semantics.naive_compute import FUNCTIONS
from tests.semantics.naive_moves import address

_START = {
    "add": 0.0, "maximum": -math.inf, "minimum": math.inf, "abs_max": 0.0, "abs_min": math.inf,
}  # fmt: skip


@twin
def activate2(
    m: Machine,
    dst: Tile,
    op: str,
    data: Tile,
    imm0: Any,
    imm1: Any,
    op0: str,
    op1: str,
    relu_param: Any = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: str | None = None,
    reduce_res: Tile | None = None,
    reduce_cmd: str = "idle",
) -> None:
    rows = []
    for p in range(data.partitions):
        row = []
        for given in data.row(p):
            x = given
            for stage, imm, reverse in ((op0, imm0, reverse0), (op1, imm1, reverse1)):
                if stage != "bypass":
                    x = arith(stage, *ordered(x, at(imm, p), reverse))
            if op == "prelu":
                row.append(x if x >= 0 else arith("multiply", at(relu_param, p), x))
            else:
                row.append(arith("add", FUNCTIONS[op](x), 0.0))
        rows.append(row)
        lane = data.start + p
        if reduce_cmd in ("reset", "reset_reduce"):
            m.scalar[lane] = _START[reduce_op or "add"]
        if reduce_cmd in ("reduce", "reset_reduce"):
            m.scalar[lane] = fold(reduce_op or "add", m.scalar[lane], row)
    write_rows(dst, rows)
    store_lanes(reduce_res, [m.scalar.get(data.start + p, 0.0) for p in range(data.partitions)])


#: Value type and largest exponent of a packed type.
_PACKED = {
    "float8_e4m3fn_x4": (ml_dtypes.float8_e4m3fn, 8),
    "float8_e5m2_x4": (ml_dtypes.float8_e5m2, 15),
}


def scale_row(p: int) -> int:
    """The partition of the scale tile that serves data partition p."""
    return 32 * (p // 32) + p % 32 // 8


def byte_of(value: float, host: Any) -> int:
    return int(np.float32(value).astype(host).view(np.uint8))


def value_of(byte: int, host: Any) -> float:
    return float(np.uint8(byte).view(host))


@twin
def quantize_mx(m: Machine, dst: Tile, src: Tile, dst_scale: Tile) -> None:
    host, emax = _PACKED[dst.dtype]
    for first in range(0, src.partitions, 8):
        for column in range(dst.free):
            block = [[src.value(first + r, 4 * column + q) for q in range(4)] for r in range(8)]
            most = max(abs(x) for line in block for x in line)
            exponent = -127 if most == 0 else math.frexp(most)[1] - 1 - (emax - 1)
            dst_scale.put_raw(scale_row(first), column, exponent + 127)
            for r, line in enumerate(block):
                codes = [byte_of(x / 2.0**exponent, host) for x in line]
                word = sum(code << 8 * q for q, code in enumerate(codes))
                dst.put_raw(first + r, column, word)


def _fp4(nibble: int) -> float:
    """Sign, two bits of exponent with bias 1, one bit of mantissa."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def _unpacked(word: int, dtype: str) -> list[float]:
    if dtype == "float4_e2m1fn_x4":
        return [_fp4(word >> 4 * q & 15) for q in range(4)]
    return [value_of(word >> 8 * q & 255, _PACKED[dtype][0]) for q in range(4)]


@twin
def nc_matmul_mx(
    m: Machine,
    dst: Tile,
    stationary: Tile,
    moving: Tile,
    stationary_scale: Tile,
    moving_scale: Tile,
    accumulate: bool | None = None,
) -> None:
    def element(data: Tile, scale: Tile, p: int, i: int) -> list[float]:
        factor = 2.0 ** (int(scale.raw(scale_row(p), i)) - 127)
        return [x * factor for x in _unpacked(int(data.raw(p, i)), data.dtype)]

    for i in range(stationary.free):
        for j in range(moving.free):
            total = 0.0
            for p in range(stationary.partitions):
                left = element(stationary, stationary_scale, p, i)
                right = element(moving, moving_scale, p, j)
                total += sum(x * y for x, y in zip(left, right, strict=True))
            where = (address(dst, i, j),)
            if accumulate or (accumulate is None and where in m.groups):
                total += dst.value(i, j)
            dst.put(i, j, total)
            m.groups.add(where)
