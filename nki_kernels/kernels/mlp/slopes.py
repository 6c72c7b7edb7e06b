"""Derivatives of the activations of a gated layer."""

from __future__ import annotations

import math

import nki.isa as nisa
import nki.language as nl

#: gelu_tanh(z) = z * (1 + tanh(u)) / 2, u = LINEAR * z + CUBIC * z^3.
LINEAR = math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715


def slope(name, z):
    """Return the derivative, float32, of activation `name` at z in SBUF.

    Scalar has those of silu and gelu, each in a table of its own: callers take all tiles of a wave
    before another function. That of gelu_tanh takes seven passes of Vector and three of Scalar.
    """
    result = _like(z)
    if name == "relu":
        nisa.tensor_scalar(dst=result, data=z, op0=nl.greater, operand0=0.0)
    elif name == "gelu_tanh":
        _gelu_tanh(result, z)
    else:
        op = nl.silu_dx if name == "silu" else nl.gelu_dx
        nisa.activation(dst=result, op=op, data=z)
    return result


def _like(z):
    return nl.ndarray(z.shape, dtype=nl.float32, buffer=nl.sbuf)


def _gelu_tanh(result, z):
    """result = (1 + t - z * (t^2 - 1) * u') / 2 with t = tanh(u), u' = LINEAR + 3 * CUBIC * z^2."""
    squared, inner, t, bent = _like(z), _like(z), _like(z), _like(z)
    nisa.activation(dst=squared, op=nl.square, data=z)
    nisa.tensor_scalar(
        dst=inner, data=squared, op0=nl.multiply, operand0=CUBIC, op1=nl.add, operand1=LINEAR
    )
    nisa.tensor_tensor(dst=inner, data1=inner, data2=z, op=nl.multiply)
    nisa.activation(dst=t, op=nl.tanh, data=inner)
    nisa.tensor_scalar(
        dst=squared, data=squared, op0=nl.multiply, operand0=3 * CUBIC, op1=nl.add, operand1=LINEAR
    )
    nisa.tensor_tensor(dst=squared, data1=squared, data2=z, op=nl.multiply)
    nisa.activation(dst=bent, op=nl.square, data=t)
    nisa.scalar_tensor_tensor(
        dst=bent, data=bent, op0=nl.subtract, operand0=1.0, op1=nl.multiply, operand1=squared
    )
    nisa.tensor_tensor(dst=bent, data1=t, data2=bent, op=nl.subtract)
    nisa.tensor_scalar(
        dst=result, data=bent, op0=nl.multiply, operand0=0.5, op1=nl.add, operand1=0.5
    )
