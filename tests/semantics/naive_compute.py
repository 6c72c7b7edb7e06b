"""Naive twins of instructions that compute element by element, reduce or scan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.semantics.naive import (
    BITS,
    IDENTITY,
    UNARY,
    Machine,
    Tile,
    accumulate,
    arith,
    at,
    bits,
    fold,
    is_integer,
    ordered,
    rounded,
    store_lanes,
    twin,
    write_rows,
)

# -- elementwise -----------------------------------------------------------------------------------


@twin
def tensor_copy(m: Machine, dst: Tile, src: Tile) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            if dst.dtype == src.dtype:
                dst.put_raw(p, i, src.raw(p, i))
            else:
                dst.put(p, i, src.value(p, i))


@twin
def memset(m: Machine, dst: Tile, value: float) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            if is_integer(dst.dtype):
                dst.put_raw(p, i, value)
            else:
                dst.put(p, i, value)


@twin
def tensor_tensor(m: Machine, dst: Tile, data1: Tile, data2: Tile, op: str) -> None:
    exact = all(t.dtype in ("int32", "uint32") for t in (dst, data1, data2))
    for p in range(dst.partitions):
        for i in range(dst.free):
            if op in BITS:
                dst.put_raw(p, i, bits(op, data1.raw(p, i), data2.raw(p, i), dst.dtype))
            elif exact:
                dst.put_raw(p, i, _integer(op, data1.raw(p, i), data2.raw(p, i), dst.dtype))
            else:
                dst.put(p, i, arith(op, data1.value(p, i), data2.value(p, i)))


def _integer(op: str, x: Any, y: Any, dtype: str) -> Any:
    """GpSimd's 32-bit integers: exact."""
    x, y = int(x), int(y)
    exact = {
        "add": x + y, "subtract": x - y, "multiply": x * y, "maximum": max(x, y),
        "minimum": min(x, y), "equal": x == y, "not_equal": x != y, "less": x < y,
        "less_equal": x <= y, "greater": x > y, "greater_equal": x >= y,
    }  # fmt: skip
    return (np.int32 if dtype == "int32" else np.uint32)(int(exact[op]))


def _step(op: str, data: Any, operand: Any, reverse: bool) -> float:
    return arith(op, data) if op in UNARY else arith(op, *ordered(data, operand, reverse))


@twin
def tensor_scalar(
    m: Machine,
    dst: Tile,
    data: Tile,
    op0: str,
    operand0: Any,
    reverse0: bool = False,
    op1: str | None = None,
    operand1: Any = None,
    reverse1: bool = False,
) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            if op0 in BITS:
                x = data.raw(p, i)
                for op, operand, reverse in ((op0, operand0, reverse0), (op1, operand1, reverse1)):
                    if op is not None:
                        other = operand.raw(p, 0) if isinstance(operand, Tile) else operand or 0
                        x = bits(op, *ordered(x, other, reverse), dst.dtype)
                dst.put_raw(p, i, x)
                continue
            middle = _step(op0, data.value(p, i), at(operand0, p), reverse0)
            if op1 is not None:
                middle = _step(op1, middle, at(operand1, p), reverse1)
            dst.put(p, i, middle)


@twin
def scalar_tensor_tensor(
    m: Machine,
    dst: Tile,
    data: Tile,
    op0: str,
    operand0: Any,
    op1: str,
    operand1: Tile,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            middle = _step(op0, data.value(p, i), at(operand0, p), reverse0)
            dst.put(p, i, arith(op1, *ordered(middle, operand1.value(p, i), reverse1)))


@twin
def reciprocal(m: Machine, dst: Tile, data: Tile) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            dst.put(p, i, arith("reciprocal", data.value(p, i)))


# -- reductions ------------------------------------------------------------------------------------


@twin
def tensor_reduce(
    m: Machine, dst: Tile, op: str, data: Tile, axis: Any, negate: bool = False
) -> None:
    first = min(axis) if isinstance(axis, tuple) else axis
    width = math.prod(data.array.shape[first:])
    for p in range(data.partitions):
        for k in range(data.free // width):
            block = range(k * width, (k + 1) * width)
            if op in BITS:
                state = data.raw(p, block[0])
                for i in block[1:]:
                    state = bits(op, state, data.raw(p, i), data.dtype)
                dst.put_raw(p, k, bits("bitwise_or", state, 0, dst.dtype))
                continue
            elements = [data.value(p, i) for i in block]
            if op.startswith("logical"):
                elements = [float(x != 0) for x in elements]
            total = fold(op, elements[0], elements[1:])
            dst.put(p, k, -total if negate else total)


@twin
def tensor_scalar_reduce(
    m: Machine,
    dst: Tile,
    data: Tile,
    op0: str,
    operand0: Any,
    reduce_op: str,
    reduce_res: Tile | None = None,
    reduce_cmd: str = "reset_reduce",
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
) -> None:
    rows = [
        [_step(op0, x, at(operand0, p), False) for x in data.row(p)] for p in range(data.partitions)
    ]
    lanes = accumulate(m.vector, data, rows, reduce_op, reduce_cmd, reduce_init)
    write_rows(dst, rows)
    store_lanes(reduce_res, lanes, reduce_res_negate)


@twin
def tensor_scalar_cumulative(
    m: Machine,
    dst: Tile,
    src: Tile,
    op0: str,
    op1: str,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: str = "reset_reduce",
) -> None:
    for p in range(src.partitions):
        lane = src.start + p
        if reduce_cmd == "reset_reduce":
            m.vector[lane] = IDENTITY[op1]
        elif reduce_cmd == "load_reduce":
            m.vector[lane] = at(imm1, p)
        for i in range(src.free):
            new = _step(op0, src.value(p, i), at(imm0, p), False)
            m.vector[lane] = arith(op1, new, m.vector[lane])
            dst.put(p, i, m.vector[lane])


@twin
def tensor_tensor_scan(
    m: Machine,
    dst: Tile,
    data0: Tile,
    data1: Tile,
    initial: Any,
    op0: str,
    op1: str,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    for p in range(dst.partitions):
        state = at(initial, p)
        for i in range(dst.free):
            middle = arith(op0, *ordered(data0.value(p, i), state, reverse0))
            state = arith(op1, *ordered(middle, data1.value(p, i), reverse1))
            dst.put(p, i, state)


@twin
def bn_stats(m: Machine, dst: Tile, data: Tile) -> None:
    for p in range(data.partitions):
        row = data.row(p)
        for half, first in ((row[0::2], 0), (row[1::2], 3)):
            count = float(len(half))
            if not half:
                stats = [0.0, 0.0, 0.0]
            else:
                mean = _quotient(fold("add", half[0], half[1:]), count)
                squares = [arith("square", arith("subtract", x, mean)) for x in half]
                stats = [count, mean, fold("add", squares[0], squares[1:])]
            for k, x in enumerate(stats):
                dst.put(p, first + k, x)


def _quotient(x: float, y: float) -> float:
    return float(np.float32(x) / np.float32(y))


@twin
def bn_aggr(m: Machine, dst: Tile, data: Tile) -> None:
    for p in range(data.partitions):
        row = data.row(p)
        counts, means, spreads = row[0::3], row[1::3], row[2::3]
        total = fold("add", counts[0], counts[1:])
        if total == 0:
            dst.put(p, 0, 0.0)
            dst.put(p, 1, 0.0)
            continue
        weighted = [arith("multiply", c, x) for c, x in zip(counts, means, strict=True)]
        mean = _quotient(fold("add", weighted[0], weighted[1:]), total)
        parts = []
        for c, x, s in zip(counts, means, spreads, strict=True):
            off = arith("square", arith("subtract", x, mean))
            parts.append(arith("add", s, arith("multiply", c, off)))
        dst.put(p, 0, mean)
        dst.put(p, 1, _quotient(fold("add", parts[0], parts[1:]), total))


@twin
def tensor_partition_reduce(m: Machine, dst: Tile, op: str, data: Tile) -> None:
    for i in range(data.free):
        if op in BITS:
            state = data.raw(0, i)
            for p in range(1, data.partitions):
                state = bits(op, state, data.raw(p, i), data.dtype)
            dst.put_raw(0, i, bits("bitwise_or", state, 0, dst.dtype))
            continue
        column = [data.value(p, i) for p in range(data.partitions)]
        total = fold("add" if op == "average" else op, column[0], column[1:])
        dst.put(0, i, _quotient(total, data.partitions) if op == "average" else total)


# -- activations -----------------------------------------------------------------------------------


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


#: float64 formulas; those of EXACT need no more than one rounding to be exact in float32.
FUNCTIONS: dict[str, Any] = {
    "copy": lambda x: x,
    "square": lambda x: x * x,
    "relu": lambda x: max(x, 0.0),
    "abs": abs,
    "sign": lambda x: float((x > 0) - (x < 0)),
    "reciprocal": UNARY["reciprocal"],
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "gelu": lambda x: x * _phi(x),
    "gelu_dx": lambda x: _phi(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "gelu_apprx_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: (
        _sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - _sigmoid(1.702 * x)))
    ),
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "erf": math.erf,
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x),
    "sin": math.sin,
    "arctan": math.atan,
}
EXACT = ("copy", "square", "relu", "abs", "sign", "reciprocal", "sqrt")


@twin
def activation(
    m: Machine,
    dst: Tile,
    op: str,
    data: Tile,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: str | None = None,
    reduce_res: Tile | None = None,
    reduce_cmd: str = "idle",
) -> None:
    rows = []
    for p in range(data.partitions):
        scaled = [arith("multiply", x, at(scale, p)) for x in data.row(p)]
        moved = [arith("add", x, at(bias, p)) for x in scaled]
        rows.append([arith("add", FUNCTIONS[op](x), 0.0) for x in moved])
    # The pseudo-code of the page reduces the row first and then adds it to the register.
    sums = [[fold("add", row[0], row[1:])] for row in rows]
    lanes = accumulate(m.scalar, data, sums, "add", reduce_cmd)
    write_rows(dst, rows)
    store_lanes(reduce_res, lanes)


@twin
def activation_reduce(
    m: Machine,
    dst: Tile,
    op: str,
    data: Tile,
    reduce_op: str,
    reduce_res: Tile | None,
    bias: Any = None,
    scale: Any = 1.0,
) -> None:
    activation(m, dst, op, data, bias, scale, reduce_op, reduce_res, "reset_reduce")


@twin
def exponential(
    m: Machine,
    dst: Tile,
    src: Tile,
    max_value: Any = 0.0,
    reduce_res: Tile | None = None,
    reduce_cmd: str = "idle",
    reduce_init: Any = 0.0,
) -> None:
    rows = [
        [math.exp(arith("subtract", x, at(max_value, p))) for x in src.row(p)]
        for p in range(src.partitions)
    ]
    lanes = accumulate(m.vector, src, rows, "add", reduce_cmd, reduce_init)
    write_rows(dst, rows)
    store_lanes(reduce_res, lanes)


# -- selection -------------------------------------------------------------------------------------

FP32_MIN = float(np.finfo(np.float32).min)


@twin
def select_reduce(
    m: Machine,
    dst: Tile,
    predicate: Tile,
    on_true: Tile,
    on_false: Any,
    reduce_res: Tile | None = None,
    reduce_cmd: str = "idle",
    reduce_op: str = "maximum",
    reverse_pred: bool = False,
) -> None:
    rows = []
    for p in range(dst.partitions):
        chosen = [(predicate.raw(p, i) != 0) != reverse_pred for i in range(dst.free)]
        rows.append([on_true.value(p, i) if c else at(on_false, p) for i, c in enumerate(chosen)])
    lanes = accumulate(m.vector, on_true, rows, reduce_op, reduce_cmd)
    write_rows(dst, rows)
    store_lanes(reduce_res, lanes)


@twin
def range_select(
    m: Machine,
    dst: Tile,
    on_true_tile: Tile,
    comp_op0: str,
    comp_op1: str,
    bound0: Tile,
    bound1: Tile,
    reduce_cmd: str = "reset_reduce",
    reduce_res: Tile | None = None,
    range_start: int = 0,
) -> None:
    rows = []
    for p in range(dst.partitions):
        row = []
        for i in range(dst.free):
            index = float(range_start + i)
            inside = arith(comp_op0, index, at(bound0, p)) and arith(comp_op1, index, at(bound1, p))
            row.append(on_true_tile.value(p, i) if inside else FP32_MIN)
        rows.append(row)
    lanes = accumulate(m.vector, on_true_tile, rows, "maximum", reduce_cmd)
    write_rows(dst, rows)
    store_lanes(reduce_res, lanes)


@twin
def tensor_copy_predicated(
    m: Machine, dst: Tile, src: Any, predicate: Tile, reverse_pred: bool = False
) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            if (predicate.raw(p, i) != 0) != reverse_pred:
                new = src.raw(p, i) if isinstance(src, Tile) else rounded(src, dst.dtype)
                dst.put_raw(p, i, new)


def _affine(pattern: Any, i: int) -> int:
    """The pattern's sum of index times step at flattened position i."""
    total = 0
    for step, count in reversed(pattern):
        i, index = divmod(i, count)
        total += index * step
    return total


def _wrapped(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


@twin
def iota(m: Machine, dst: Tile, pattern: Any, offset: int = 0, channel_multiplier: int = 0) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            value = _wrapped(offset + p * channel_multiplier + _affine(pattern, i))
            if is_integer(dst.dtype):
                info = np.iinfo(dst.array.dtype)
                dst.put_raw(p, i, min(max(value, info.min), info.max))
            else:
                dst.put(p, i, float(value))


@twin
def affine_select(
    m: Machine,
    dst: Tile,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: Tile,
    on_false_value: float,
    cmp_op: str = "equal",
    offset: int = 0,
) -> None:
    for p in range(dst.partitions):
        for i in range(dst.free):
            where = _wrapped(offset + p * channel_multiplier + _affine(pattern, i))
            if not arith(cmp_op, float(where), 0.0):
                dst.put(p, i, on_false_value)
            elif dst.dtype == on_true_tile.dtype:
                dst.put_raw(p, i, on_true_tile.raw(p, i))
            else:
                dst.put(p, i, on_true_tile.value(p, i))
