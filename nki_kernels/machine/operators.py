"""ALU operators and activation functions: a data table, not instructions.

Formulas are the standard ones; the constants of the approximations (1.702, 0.044715) are not in the
NKI documents. Source: nki.isa "supported math operators" and "supported activation functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import RuleViolation

Kernel = Callable[..., Array]


@dataclass(frozen=True, eq=False)
class Op:
    """An operator token, and what it means.

    Attributes:
        name: the `nl` name.
        alu: ``f(x, y, out=...)`` on float32 (bitvec: on raw integers), or None.
        arity: operands of the ALU form.
        kind: "bitvec" works on bits, "arith" on float32.
        reduces: may be a reduction operator.
        activation: the Scalar engine's function of float32, or None.
        domain: inputs outside it give invalid results on hardware.
        smallest: so do inputs of a smaller magnitude.
    """

    name: str
    alu: Kernel | None = None
    arity: int = 2
    kind: Literal["bitvec", "arith"] = "arith"
    reduces: bool = False
    activation: Kernel | None = None
    domain: tuple[float, float] = (-math.inf, math.inf)
    smallest: float = 0.0

    def __repr__(self) -> str:
        return f"nl.{self.name}"


def _comparison(ufunc: Any) -> Kernel:
    def compare(x: Array, y: Any, out: Array | None = None) -> Array:
        result: Array = ufunc(x, y).astype(np.float32)
        return result

    return compare


def _logical(ufunc: Any) -> Kernel:
    def logical(x: Array, y: Any, out: Array | None = None) -> Array:
        result: Array = ufunc(np.not_equal(x, 0), np.not_equal(y, 0)).astype(np.float32)
        return result

    return logical


def _abs_pick(greater: bool) -> Kernel:
    def pick(x: Array, y: Any, out: Array | None = None) -> Array:
        first = np.abs(x) > np.abs(y) if greater else np.abs(x) < np.abs(y)
        return np.where(first, x, y)

    return pick


def _rsqrt(x: Array, out: Array | None = None) -> Array:
    root = np.sqrt(x, out=out)
    result: Array = np.divide(np.float32(1), root, out=out)
    return result


def _reciprocal(x: Array, out: Array | None = None) -> Array:
    result: Array = np.divide(np.float32(1), x, out=out)
    return result


def _relu(x: Array, out: Array | None = None) -> Array:
    result: Array = np.maximum(x, np.float32(0), out=out)
    return result


def _right_shift(x: Array, y: Any, out: Array | None = None) -> Array:
    """Logical shift: the sign bit is not copied (arithmetic shifts do not exist)."""
    bits = x.view(x.dtype.str.replace("i", "u"))
    result: Array = np.right_shift(bits, np.asarray(y).astype(bits.dtype)).view(x.dtype)
    return result


def _sigmoid(x: Array) -> Array:
    half = np.float32(0.5)
    result: Array = half * np.tanh(half * x) + half
    return result


def _erf(x: Array) -> Array:
    result: Array = _ERF(x.astype(np.float64)).astype(np.float32)
    return result


_ERF = np.vectorize(math.erf, otypes=[np.float64])


def _phi(x: Array) -> Array:
    """Standard normal cumulative distribution."""
    result: Array = np.float32(0.5) * (np.float32(1) + _erf(x * np.float32(math.sqrt(0.5))))
    return result


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: Array = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return result


def _gelu_dx(x: Array) -> Array:
    density = np.exp(np.float32(-0.5) * x * x) * np.float32(1 / math.sqrt(2 * math.pi))
    result: Array = _phi(x) + x * density
    return result


def _silu_dx(x: Array) -> Array:
    gate = _sigmoid(x)
    result: Array = gate * (np.float32(1) + x * (np.float32(1) - gate))
    return result


def _gelu_sigmoid_dx(x: Array) -> Array:
    scaled = np.float32(1.702) * x
    gate = _sigmoid(scaled)
    result: Array = gate + scaled * gate * (np.float32(1) - gate)
    return result


def _softplus(x: Array) -> Array:
    result: Array = np.logaddexp(np.float32(0), x)
    return result


def _sin(x: Array) -> Array:
    """Sine on [-pi, pi]; outside, the cubic Taylor polynomial about the nearer end.

    Source: nki simulator notes, "sin evaluates a cubic outside [-pi, pi]", sin(9.0) = 27.65:
    with d = 9 - pi, -d + d^3 / 6 = 27.65.
    """
    edge = np.clip(x, np.float32(-math.pi), np.float32(math.pi))
    past = x - edge
    result: Array = np.sin(edge) - past + past**3 / np.float32(6)
    return result


_TABLE: tuple[Op, ...] = (
    Op("add", np.add, reduces=True),
    Op("subtract", np.subtract, reduces=True),
    Op("multiply", np.multiply, reduces=True),
    Op("maximum", np.maximum, reduces=True),
    Op("minimum", np.minimum, reduces=True),
    Op("power", np.power),
    Op("abs_max", _abs_pick(True)),
    Op("abs_min", _abs_pick(False)),
    Op("equal", _comparison(np.equal)),
    Op("not_equal", _comparison(np.not_equal)),
    Op("less", _comparison(np.less)),
    Op("less_equal", _comparison(np.less_equal)),
    Op("greater", _comparison(np.greater)),
    Op("greater_equal", _comparison(np.greater_equal)),
    Op("logical_and", _logical(np.logical_and), reduces=True),
    Op("logical_or", _logical(np.logical_or), reduces=True),
    Op("logical_xor", _logical(np.logical_xor), reduces=True),
    Op("bitwise_and", np.bitwise_and, kind="bitvec", reduces=True),
    Op("bitwise_or", np.bitwise_or, kind="bitvec", reduces=True),
    Op("bitwise_xor", np.bitwise_xor, kind="bitvec", reduces=True),
    Op("left_shift", np.left_shift, kind="bitvec"),
    Op("right_shift", _right_shift, kind="bitvec"),
    Op("invert", np.invert, arity=1, kind="bitvec"),
    Op("abs", np.abs, arity=1, activation=np.abs),
    Op("square", np.square, arity=1, activation=np.square),
    Op("relu", _relu, arity=1, activation=_relu),
    Op("rsqrt", _rsqrt, arity=1, activation=_rsqrt, domain=(2.0**-87, 2.0**97)),
    Op(
        "reciprocal",
        _reciprocal,
        arity=1,
        activation=_reciprocal,
        domain=(-(2.0**42), 2.0**42),
        smallest=2.0**-42,
    ),
    Op("copy", activation=np.positive),
    Op("exp", activation=np.exp),
    Op("log", activation=np.log, domain=(2.0**-64, 2.0**64)),
    Op("sqrt", activation=np.sqrt, domain=(2.0**-116, 2.0**118)),
    Op("sigmoid", activation=_sigmoid),
    Op("tanh", activation=np.tanh),
    Op("gelu", activation=lambda x: x * _phi(x)),
    Op("gelu_dx", activation=_gelu_dx),
    Op("gelu_apprx_tanh", activation=_gelu_tanh),
    Op("gelu_apprx_sigmoid", activation=lambda x: x * _sigmoid(np.float32(1.702) * x)),
    Op("gelu_apprx_sigmoid_dx", activation=_gelu_sigmoid_dx),
    Op("silu", activation=lambda x: x * _sigmoid(x)),
    Op("silu_dx", activation=_silu_dx),
    Op("softplus", activation=_softplus),
    Op("mish", activation=lambda x: x * np.tanh(_softplus(x))),
    Op("erf", activation=_erf),
    Op(
        "erf_dx",
        activation=lambda x: np.float32(2 / math.sqrt(math.pi)) * np.exp(-x * x),
    ),
    Op("sin", activation=_sin, domain=(-math.pi, math.pi)),
    Op("arctan", activation=np.arctan, domain=(-math.pi / 2, math.pi / 2)),
    Op("sign", activation=np.sign),
    Op("bypass"),
    Op("average"),
    Op("prelu"),
)

OPS: dict[str, Op] = {op.name: op for op in _TABLE}


def operator(token: object) -> Op:
    """Return the table entry that an ``nl`` operator function, or an entry itself, stands for.

    Raises:
        RuleViolation: anything else, for example a NumPy function.
    """
    if isinstance(token, Op):
        return token
    found = getattr(token, "nki_op", None)
    if not isinstance(found, Op):
        raise RuleViolation(
            f"operator {token!r}: it must be a function of nki.language such as nl.add or nl.exp"
        )
    return found
