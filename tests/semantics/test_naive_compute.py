"""Instructions that compute, against the naive machine: elementwise, reductions, activations."""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.embedded.harness import FLOATS, HOSTS, INTEGERS, PSUM, SBUF
from tests.semantics.both import TOY4, Call, agree, embedded, operand, vector
from tests.semantics.naive import BINARY, BITS, UNARY
from tests.semantics.naive_compute import EXACT, FUNCTIONS
from tests.tolerance import assert_close

NARROW = (nl.float8_e4m3, nl.float8_e5m2)
EVERY = (*FLOATS, *NARROW, *INTEGERS)
SIXTEEN_BITS = (*FLOATS, *NARROW, nl.int8, nl.int16, nl.uint8, nl.uint16)
NEW_IN_GEN4 = ("abs_max", "abs_min", "square", "relu")
ALU = tuple(BINARY)
COMMUTING = ("add", "multiply", "maximum", "minimum")
rows = st.integers(1, 8)
columns = st.integers(1, 16)
kinds = st.sampled_from(EVERY)
flags = st.booleans()


def places(draw: Any, count: int) -> list[Any]:
    """Memories of inputs, of which at most one is PSUM."""
    psum = draw(st.integers(-1, count - 1), label="operand in PSUM")
    return [PSUM if i == psum else SBUF for i in range(count)]


def core(*operators: str | None) -> Any:
    """The core that has the operators."""
    return TOY4 if set(operators) & set(NEW_IN_GEN4) else "toy"


def zeros_signed(*operators: str | None) -> bool:
    """The documents do not say which of two zeros is the larger."""
    return not any("max" in op or "min" in op or op == "relu" for op in operators if op)


def number_or_vector(draw: Any, count: int) -> Any:
    if draw(flags, label="vector"):
        return vector(draw, count)
    return draw(st.sampled_from([0, 1, -2, 0.5, -3.25, 0.1, 7]))


# -- elementwise -----------------------------------------------------------------------------------


@given(st.data(), rows, columns, kinds, kinds)
def test_tensor_copy(d: Any, p: int, n: int, source: Any, target: Any) -> None:
    src = operand(d.draw, p, n, source, *places(d.draw, 1))
    dst = operand(d.draw, p, n, target, written=True)
    agree(Call("tensor_copy", {"dst": dst, "src": src}))


@given(st.data(), rows, columns, kinds)
def test_memset(d: Any, p: int, n: int, kind: Any) -> None:
    dst = operand(d.draw, p, n, kind, written=True)
    if np.dtype(HOSTS[kind]).kind in "iu":
        info = np.iinfo(HOSTS[kind])
        value: Any = d.draw(st.integers(int(info.min), int(info.max)))
    else:
        value = d.draw(st.floats(-200, 200) | st.integers(-200, 200))
    agree(Call("memset", {"dst": dst, "value": value}))


@given(st.data(), rows, columns, st.sampled_from(ALU))
def test_tensor_tensor(d: Any, p: int, n: int, op: str) -> None:
    kinds_of = [d.draw(kinds) for _ in range(3)]
    first, second = places(d.draw, 2)
    arguments = {
        "dst": operand(d.draw, p, n, kinds_of[0], written=True),
        "data1": operand(d.draw, p, n, kinds_of[1], first),
        "data2": operand(d.draw, p, n, kinds_of[2], second),
        "op": op,
    }
    call = Call("tensor_tensor", arguments, {"engine": nisa.engine.vector})
    if set(kinds_of) <= {nl.int32, nl.uint32}:
        # On Vector through float32; the exact way is the next test's.
        arguments["dst"] = operand(d.draw, p, n, nl.float32, written=True)
    agree(call, target=core(op), signed_zeros=zeros_signed(op))


@given(
    st.data(),
    rows,
    columns,
    st.sampled_from(["add", "subtract", "multiply", "maximum", "minimum", "equal", "less"]),
)
def test_tensor_tensor_integers_are_exact(d: Any, p: int, n: int, op: str) -> None:
    kind = d.draw(st.sampled_from([nl.int32, nl.uint32]))
    left, right, dst = (operand(d.draw, p, n, kind, written=True) for _ in range(3))
    for side in (left, right):
        # Products up to 2^30: far past what float32 holds, inside 32 bits.
        side.base.bits[...] = np.abs(side.base.bits) * 16
    if kind == nl.uint32 and op == "subtract":
        left.base.bits[...] += 2**20
    agree(Call("tensor_tensor", {"dst": dst, "data1": left, "data2": right, "op": op}))


@given(st.data(), rows, columns, st.sampled_from(sorted(set(BITS) - {"invert"})))
def test_tensor_tensor_bits(d: Any, p: int, n: int, op: str) -> None:
    kind = d.draw(st.sampled_from(INTEGERS))
    dst, left, right = (operand(d.draw, p, n, kind, written=True) for _ in range(3))
    if "shift" in op:
        width = 8 * np.dtype(HOSTS[kind]).itemsize
        right.base.bits[...] = np.abs(right.base.bits.astype(np.int64)) % width
    agree(Call("tensor_tensor", {"dst": dst, "data1": left, "data2": right, "op": op}))


@given(st.data(), rows, columns, kinds, kinds, st.sampled_from((*ALU, *UNARY)))
def test_tensor_scalar(d: Any, p: int, n: int, source: Any, target: Any, op0: str) -> None:
    op1 = d.draw(st.none() | st.sampled_from(ALU))
    unary = op0 in UNARY
    arguments = {
        "dst": operand(d.draw, p, n, target, written=True),
        "data": operand(d.draw, p, n, source, *places(d.draw, 1)),
        "op0": op0,
        "operand0": d.draw(st.sampled_from([None, 0])) if unary else number_or_vector(d.draw, p),
        "reverse0": not unary and d.draw(flags),
    }
    if op1 is not None:
        arguments |= {
            "op1": op1, "operand1": number_or_vector(d.draw, p), "reverse1": d.draw(flags),
        }  # fmt: skip
    agree(
        Call("tensor_scalar", arguments),
        target=core(op0, op1),
        signed_zeros=zeros_signed(op0, op1),
    )


@given(st.data(), rows, columns, st.sampled_from(sorted(BITS)))
def test_tensor_scalar_bits(d: Any, p: int, n: int, op0: str) -> None:
    kind = d.draw(st.sampled_from(INTEGERS))
    width = 8 * np.dtype(HOSTS[kind]).itemsize
    arguments: dict[str, Any] = {
        "dst": operand(d.draw, p, n, kind, written=True),
        "data": operand(d.draw, p, n, kind),
    }
    for which, op in (("0", op0), ("1", d.draw(st.none() | st.sampled_from(sorted(BITS))))):
        if op is None:
            continue
        arguments[f"op{which}"] = op
        if op == "invert":
            arguments[f"operand{which}"] = None if which == "0" else 0
        elif "shift" in op:
            arguments[f"operand{which}"] = d.draw(st.integers(0, width - 1))
        elif d.draw(flags):
            arguments[f"operand{which}"] = vector(d.draw, p, kind)
        else:
            arguments[f"operand{which}"] = d.draw(st.integers(0, 2 ** (width - 1) - 1))
    agree(Call("tensor_scalar", arguments))


@given(st.data(), rows, columns, st.sampled_from(["left_shift", "right_shift"]))
def test_tensor_scalar_shifts_its_operand_when_reversed(d: Any, p: int, n: int, op: str) -> None:
    kind = d.draw(st.sampled_from(INTEGERS))
    width = 8 * np.dtype(HOSTS[kind]).itemsize
    data = operand(d.draw, p, n, kind)
    data.base.bits[...] = np.abs(data.base.bits.astype(np.int64)) % width
    number = d.draw(st.integers(1, 2 ** (width - 1) - 1))
    arguments = {
        "dst": operand(d.draw, p, n, kind, written=True), "data": data, "op0": op,
        "operand0": vector(d.draw, p, kind) if d.draw(flags) else number, "reverse0": True,
    }  # fmt: skip
    agree(Call("tensor_scalar", arguments))


@given(st.data(), rows, columns, st.sampled_from((*ALU, *UNARY)), st.sampled_from(ALU))
def test_scalar_tensor_tensor(d: Any, p: int, n: int, op0: str, op1: str) -> None:
    first, second = places(d.draw, 2)
    unary = op0 in UNARY
    arguments = {
        "dst": operand(d.draw, p, n, d.draw(kinds), written=True),
        "data": operand(d.draw, p, n, d.draw(kinds), first),
        "op0": op0,
        "operand0": 0 if unary else number_or_vector(d.draw, p),
        "op1": op1,
        "operand1": operand(d.draw, p, n, d.draw(kinds), second),
        "reverse0": not unary and d.draw(flags),
        "reverse1": d.draw(flags),
    }
    agree(
        Call("scalar_tensor_tensor", arguments),
        target=core(op0, op1),
        signed_zeros=zeros_signed(op0, op1),
    )


@given(st.data(), rows, columns, kinds, kinds)
def test_reciprocal(d: Any, p: int, n: int, source: Any, target: Any) -> None:
    dst = operand(d.draw, p, n, target, written=True)
    agree(Call("reciprocal", {"dst": dst, "data": operand(d.draw, p, n, source)}))


# -- reductions ------------------------------------------------------------------------------------

REDUCTIONS = (*COMMUTING, "subtract", "logical_and", "logical_or", "logical_xor")


@given(st.data(), rows, st.lists(st.integers(1, 4), min_size=1, max_size=3), kinds, kinds)
def test_tensor_reduce(d: Any, p: int, free: list[int], source: Any, target: Any) -> None:
    op = d.draw(st.sampled_from(REDUCTIONS))
    _reduce(d, p, tuple(free), source, target, op, negate=d.draw(flags))


@given(st.data(), rows, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_tensor_reduce_bits(d: Any, p: int, free: list[int]) -> None:
    kind = d.draw(st.sampled_from(INTEGERS))
    op = d.draw(st.sampled_from(["bitwise_and", "bitwise_or", "bitwise_xor"]))
    _reduce(d, p, tuple(free), kind, kind, op, negate=False)


def _reduce(
    d: Any, p: int, free: tuple[int, ...], source: Any, target: Any, op: str, *, negate: bool
) -> None:
    data = operand(d.draw, p, free, source, most=3)
    view = data.of_array(data.base.bits)
    first = d.draw(st.integers(1, view.ndim - 1), label="first axis")
    axes = tuple(range(first, view.ndim))
    axis = axes[0] if len(axes) == 1 and d.draw(flags) else axes
    dst = operand(d.draw, p, int(np.prod(view.shape[1:first])), target, written=True)
    call = Call(
        "tensor_reduce", {"dst": dst, "op": op, "data": data, "axis": axis, "negate": negate}
    )
    agree(call, signed_zeros=zeros_signed(op))


def chained(d: Any, p: int, make: Any, commands: tuple[str, ...], init: str) -> list[Call]:
    """A chain of calls on the accumulator: a start, then continuations on the same partitions."""
    first = d.draw(st.sampled_from([c for c in commands if c != "reduce"]))
    chain = [first, *["reduce"] * d.draw(st.integers(0, 2), label="continued")]
    return [
        make(command, {init: number_or_vector(d.draw, p)} if command == "load_reduce" else {})
        for command in chain
    ]


@given(st.data(), rows, columns, st.sampled_from((*ALU, *UNARY)), st.sampled_from(COMMUTING))
def test_tensor_scalar_reduce(d: Any, p: int, n: int, op0: str, op: str) -> None:
    target, source, result = (d.draw(kinds) for _ in range(3))
    data = operand(d.draw, p, n, source, most=3)
    dst = operand(d.draw, p, n, target, written=True)
    res = vector(d.draw, p, result, written=True)

    def make(command: str, more: dict[str, Any]) -> Call:
        arguments = {
            "dst": dst, "data": data, "op0": op0, "reduce_op": op, "reduce_cmd": command,
            "operand0": 0 if op0 in UNARY else number_or_vector(d.draw, p), "reduce_res": res,
            "reduce_res_negate": d.draw(flags),
        }  # fmt: skip
        return Call("tensor_scalar_reduce", arguments | more)

    calls = chained(d, p, make, ("reset_reduce", "load_reduce"), "reduce_init")
    agree(*calls, target=core(op0), signed_zeros=zeros_signed(op0, op))


@given(st.data(), rows, columns, st.sampled_from((*ALU, *UNARY)))
def test_tensor_scalar_cumulative(d: Any, p: int, n: int, op0: str) -> None:
    op1 = d.draw(st.sampled_from([*COMMUTING, "subtract"]))
    src = operand(d.draw, p, n, d.draw(st.sampled_from(SIXTEEN_BITS)), most=3)
    dst = operand(d.draw, p, n, d.draw(st.sampled_from(SIXTEEN_BITS)), written=True)

    def make(command: str, more: dict[str, Any]) -> Call:
        imm0 = 0 if op0 in UNARY else number_or_vector(d.draw, p)
        arguments = {
            "dst": dst, "src": src, "op0": op0, "op1": op1, "imm0": imm0, "reduce_cmd": command,
        }  # fmt: skip
        return Call("tensor_scalar_cumulative", arguments | more)

    calls = chained(d, p, make, ("reset_reduce", "load_reduce"), "imm1")
    agree(*calls, target=core(op0), signed_zeros=zeros_signed(op0, op1))


@given(st.data(), rows, columns, st.sampled_from(ALU), st.sampled_from(ALU))
def test_tensor_tensor_scan(d: Any, p: int, n: int, op0: str, op1: str) -> None:
    first, second = places(d.draw, 2)
    arguments = {
        "dst": operand(d.draw, p, n, d.draw(kinds), written=True),
        "data0": operand(d.draw, p, n, d.draw(kinds), first, most=2),
        "data1": operand(d.draw, p, n, d.draw(kinds), second, most=2),
        "initial": number_or_vector(d.draw, p),
        "op0": op0,
        "op1": op1,
        "reverse0": d.draw(flags),
        "reverse1": d.draw(flags),
    }
    agree(
        Call("tensor_tensor_scan", arguments),
        target=core(op0, op1),
        signed_zeros=zeros_signed(op0, op1),
    )


@given(st.data(), rows, columns, kinds, kinds)
def test_bn_stats(d: Any, p: int, n: int, source: Any, target: Any) -> None:
    dst = operand(d.draw, p, 6, target, written=True)
    agree(Call("bn_stats", {"dst": dst, "data": operand(d.draw, p, n, source)}))


@given(st.data(), rows, st.integers(1, 5), st.sampled_from(FLOATS), kinds)
def test_bn_aggr(d: Any, p: int, triples: int, source: Any, target: Any) -> None:
    data = operand(d.draw, p, 3 * triples, source, written=True)
    view = data.of_array(data.base.bits).reshape(-1)
    # Counts and spreads are no negative numbers.
    data.base.bits[...] = np.abs(data.base.bits)
    assert view.size == p * 3 * triples
    agree(Call("bn_aggr", {"dst": operand(d.draw, p, 2, target, written=True), "data": data}))


@given(st.data(), rows, columns, st.sampled_from(["add", "average", "maximum"]), kinds, kinds)
def test_tensor_partition_reduce(d: Any, p: int, n: int, op: str, source: Any, target: Any) -> None:
    dst = operand(d.draw, 1, n, target, written=True)
    call = Call("tensor_partition_reduce", {"dst": dst, "op": op,
                                            "data": operand(d.draw, p, n, source)})  # fmt: skip
    agree(call, signed_zeros=zeros_signed(op))


@given(st.data(), rows, columns, st.sampled_from(["bitwise_or", "bitwise_and"]))
def test_tensor_partition_reduce_bits(d: Any, p: int, n: int, op: str) -> None:
    kind = d.draw(st.sampled_from(INTEGERS))
    dst = operand(d.draw, 1, n, kind, written=True)
    data = operand(d.draw, p, n, kind)
    agree(Call("tensor_partition_reduce", {"dst": dst, "op": op, "data": data}))


# -- activations -----------------------------------------------------------------------------------


def scale_and_bias(d: Any, p: int) -> dict[str, Any]:
    bias: Any = number_or_vector(d.draw, p)
    if d.draw(flags):
        bias = vector(d.draw, p, d.draw(st.sampled_from(FLOATS)))
    return {"scale": number_or_vector(d.draw, p), "bias": bias}


@given(st.data(), rows, columns, st.sampled_from([f for f in EXACT if f != "sqrt"]))
def test_activation(d: Any, p: int, n: int, function: str) -> None:
    """Functions with one right float32 value, with chains on the accumulator, bit for bit."""
    data = operand(d.draw, p, n, d.draw(kinds), *places(d.draw, 1))
    dst = operand(d.draw, p, n, d.draw(kinds), written=True)
    res = vector(d.draw, p, d.draw(st.sampled_from(FLOATS)), written=True)
    commands = ["reset_reduce", "reduce", "idle", "reset", "reduce"]
    calls = [
        Call("activation", {
            "dst": dst, "op": function, "data": data, "reduce_op": "add", "reduce_res": res,
            "reduce_cmd": command, **scale_and_bias(d, p),
        })
        for command in commands[: d.draw(st.integers(1, len(commands)))]
    ]  # fmt: skip
    if function == "reciprocal":
        calls = calls[:1]
    agree(*calls, signed_zeros=zeros_signed(function))


@given(st.data(), rows, columns, st.sampled_from(EXACT))
def test_activation_reduce(d: Any, p: int, n: int, function: str) -> None:
    data = operand(d.draw, p, n, d.draw(kinds))
    more = scale_and_bias(d, p)
    if function == "sqrt":
        data.base.bits[...] = np.abs(data.base.bits.astype(np.float32)).clip(0, 100)
        more = {}
    call = Call("activation_reduce", {
        "dst": operand(d.draw, p, n, d.draw(kinds), written=True), "op": function, "data": data,
        "reduce_op": "add", "reduce_res": vector(d.draw, p, written=True), **more,
    })  # fmt: skip
    agree(call, signed_zeros=zeros_signed(function))


@given(st.data(), columns, st.sampled_from(["tensor_scalar_reduce", "activation"]))
def test_registers_belong_to_partitions(d: Any, n: int, name: str) -> None:
    """Chains on tiles that start at different partitions do not meet, wherever dst lies."""
    starts = [0, d.draw(st.sampled_from([0, 2, 4, 6]), label="second start")]
    tiles = [operand(d.draw, 2, n, nl.float32, start=start, most=3) for start in starts]
    results = [vector(d.draw, 2, written=True) for _ in tiles]
    calls = []
    for which, command in ((0, "reset_reduce"), (1, "reset_reduce"), (0, "reduce"), (1, "reduce")):
        arguments = {
            "dst": operand(d.draw, 2, n, nl.float32, written=True), "data": tiles[which],
            "reduce_op": "add", "reduce_cmd": command, "reduce_res": results[which],
        }  # fmt: skip
        one = {"op": "copy"} if name == "activation" else {"op0": "add", "operand0": 0.5}
        calls.append(Call(name, arguments | one))
    agree(*calls)


#: More than the float32 operations of any formula, and float32 functions good to a few ulp each.
FORMULA_STEPS = 32


@given(st.data(), rows, columns, st.sampled_from(sorted(set(FUNCTIONS) - set(EXACT))))
def test_activation_functions(d: Any, p: int, n: int, function: str) -> None:
    """The others have no documented bits: within the roundings of their formula."""
    data = operand(d.draw, p, n, d.draw(st.sampled_from(FLOATS)), most=3)
    if function in ("log", "rsqrt"):
        data.base.bits[...] = np.maximum(np.abs(data.base.bits), 2.0**-8)
    if function == "arctan":
        data.base.bits[...] = data.base.bits / 2
    dst = operand(d.draw, p, n, nl.float32, written=True)
    dst.base.bits[...] = 0
    got, _ = embedded([Call("activation", {"dst": dst, "op": function, "data": data})])
    x = np.ascontiguousarray(data.of_array(data.base.bits)).astype(np.float64).reshape(p, n)
    want = np.vectorize(FUNCTIONS[function], otypes=[np.float64])(x)
    mine = np.ascontiguousarray(dst.of_array(got)).reshape(p, n)
    # Every term of every formula is below (1 + |x|)^2 or the value itself.
    magnitude = np.maximum((1 + np.abs(x)) ** 2, np.abs(want))
    assert_close(
        mine, want, magnitude, op=function, case=f"{p}x{n}", roundings=1, chain=FORMULA_STEPS
    )


@given(st.data(), rows, columns)
def test_exponential(d: Any, p: int, n: int) -> None:
    """Values within the roundings of exp; sums bit for bit from the values that were written."""
    src = operand(d.draw, p, n, d.draw(kinds), most=3)
    src.base.bits[...] = np.clip(src.base.bits, 0 if src.base.bits.dtype.kind == "u" else -3, 3)
    dst = operand(d.draw, p, n, nl.float32, written=True)
    res = vector(d.draw, p, written=True)
    shift = d.draw(st.sampled_from([0.0, 1.5, -2]))
    command = d.draw(st.sampled_from(["reset_reduce", "load_reduce"]))
    init = {"reduce_init": 2.5} if command == "load_reduce" else {}
    got = embedded(
        [Call("exponential", {"dst": dst, "src": src, "max_value": shift, "reduce_res": res,
                              "reduce_cmd": command, **init})],
        TOY4,
    )  # fmt: skip
    values = np.ascontiguousarray(dst.of_array(got[0])).reshape(p, n)
    x = np.ascontiguousarray(src.of_array(src.base.bits)).astype(np.float64).reshape(p, n) - shift
    assert_close(
        values, np.exp(x), np.exp(x), op="exponential", case=f"{p}x{n}", roundings=1,
        chain=FORMULA_STEPS,
    )  # fmt: skip
    sums = np.ascontiguousarray(res.of_array(got[2])).reshape(p)
    for line, total in zip(values, sums, strict=True):
        state = np.float32(2.5 if init else 0)
        for value in line:
            state = np.float32(state + value)
        assert state == total
