"""What happens to an accumulator on its way out of PSUM.

y = activation(scale * accumulator + bias) + residual, in float32, rounded once to `out_dtype`. A
part that is absent costs nothing. Vector adds (633 ns for a bank), Scalar activates (529 ns), and
PE fills a bank in K / 128 * 217 ns: from K = 1024 on an epilogue with everything hides under PE.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.slices import matrix, mode_of, spans


@dataclass(frozen=True)
class Epilogue(nl.NKIObject):
    """What is done to a sum, apart from the operands it is done with.

    Attributes:
        out_dtype: dtype of the result.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        scale: factor of the sum, before bias and activation.
    """

    out_dtype: str
    activation: str | None = None
    scale: float = 1.0


def activation_of(name):
    """Return the Scalar function of an activation's name."""
    functions = {
        "relu": nl.relu,
        "gelu": nl.gelu,
        "gelu_tanh": nl.gelu_apprx_tanh,
        "silu": nl.silu,
    }
    return functions[name]


def load_extras(operands, batch, m, n, activated, config):
    """Load what the epilogue of c[m, n] needs: {"bias": tile or None, "residual": row tiles}.

    Without an activation between them, GpSimd, idle here, adds the bias to the residual while the
    product runs: one pass of Vector less where nothing else is left to wait for.
    """
    residual = operands["residual"]
    if residual is not None:
        residual = matrix(residual, batch)
    rows = min(m[1] - m[0], nl.tile_size.gemm_stationary_fmax)
    bias = load_bias(operands["bias"], n, rows, config)
    tiles = load_residual(residual, m, n, config)
    if bias is None or activated or len(tiles) == 0:
        return {"bias": bias, "residual": tiles}
    sums = []
    for tile in tiles:
        total = nl.ndarray(tile.shape, dtype=nl.float32, buffer=nl.sbuf)
        addend = bias[0 : tile.shape[0], :]
        nisa.tensor_tensor(
            dst=total, data1=tile, data2=addend, op=nl.add, engine=nisa.engine.gpsimd
        )
        sums.append(total)
    return {"bias": None, "residual": sums}


def load_bias(bias, n, rows, config):
    """Return bias[n] on each of `rows` partitions, or None: one DMA with a step of 0.

    A K = 1 matmul with ones would take 217 ns of PE per bank, where PE is what limits.
    """
    if bias is None:
        return None
    start, stop = n
    tile = nl.ndarray((rows, stop - start), dtype=bias.dtype, buffer=nl.sbuf)
    source = bias.ap(pattern=[[0, rows], [1, stop - start]], offset=start)
    nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
    return tile


def load_residual(residual, m, n, config):
    """Return residual[m, n] as row tiles; empty without one."""
    if residual is None:
        return []
    tiles = []
    for start, stop in spans(m[1] - m[0], nl.tile_size.gemm_stationary_fmax):
        tile = nl.ndarray((stop - start, n[1] - n[0]), dtype=residual.dtype, buffer=nl.sbuf)
        source = residual[m[0] + start : m[0] + stop, n[0] : n[1]]
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
        tiles.append(tile)
    return tiles


def evict(dst, psum, epilogue, bias, residual, engine):
    """dst = the epilogue of an accumulator; bias and residual are tiles of its shape, or None.

    `engine` takes the plain copies; the other forms have one engine each.
    """
    current, scale = psum, epilogue.scale
    if bias is not None:
        final = epilogue.activation is None and residual is None
        total = dst if final else nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
        _scale_and_add(total, current, scale, bias)
        current, scale = total, 1.0
    if epilogue.activation is not None:
        result = dst
        if residual is not None:
            result = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
        op = activation_of(epilogue.activation)
        nisa.activation(dst=result, op=op, data=current, scale=scale)
        current, scale = result, 1.0
    if residual is not None:
        _scale_and_add(dst, current, scale, residual)
    elif bias is None and epilogue.activation is None:
        if scale == 1.0:
            nisa.tensor_copy(dst=dst, src=psum, engine=engine)
        elif engine == nisa.engine.scalar:
            nisa.activation(dst=dst, op=nl.copy, data=psum, scale=scale)
        else:
            nisa.tensor_scalar(dst=dst, data=psum, op0=nl.multiply, operand0=scale)


def _scale_and_add(dst, data, scale, addend):
    """dst = data * scale + addend, on Vector."""
    if scale == 1.0:
        nisa.tensor_tensor(dst=dst, data1=data, data2=addend, op=nl.add)
    else:
        nisa.scalar_tensor_tensor(
            dst=dst, data=data, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=addend
        )
