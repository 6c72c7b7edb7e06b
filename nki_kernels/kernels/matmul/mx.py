"""C = A·B of operands that are quantized to MXFP8 on their way to PE (gen4).

PE contracts four values in each row of the array, 512 of k at once: four times the rate of bf16.
Vector quantizes four elements a cycle, so that A and B once each take it a sixth of PE's time at
4096^3; what must not happen is to quantize them for every tile. A block of rows of A is therefore
held quantized (5 bytes for 4 elements and their scale), as many rows as SBUF takes, while panels of
columns of B pass, quantized a few tiles ahead. Every sum runs over the whole contraction before the
next one starts; an eviction hides under the next sum.

A slab of 4 P values of k lies on P partitions: partition p holds k = p, P + p, 2 P + p, 3 P + p. A
DMA transposes a slab so in one piece. A block that shares a scale is 8 neighbouring partitions: 32
values of k of one row (column), 8 next to each other from each quarter of the slab.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.slices import mode_of, spans

#: Values of one x4 element, and partitions of a block that shares a scale.
PACKED, BLOCK = 4, 8


@dataclass(frozen=True)
class MatmulMxConfig(nl.NKIObject):
    """Tuning of the MX product. No field changes a result.

    Attributes:
        rows: rows of A that are held quantized.
        columns: columns of a panel of B, and of a store: 1024 of 2 bytes move at 92 % of the rate.
        ahead: tiles of C whose operands are loaded before they are needed.
        hwdge: plain copies go through the hardware descriptor engine.
    """

    rows: int
    columns: int
    ahead: int
    hwdge: bool


@nki.jit
def matmul_mx(a, b, transposed, packed, out_dtype, config):
    """c[m, n] = sum_k q(a)[m, k] * q(b)[k, n], q = quantization to MXFP8; float32 sums.

    q divides each block by X = 2^(floor(log2(max |block|)) + 1 - Emax), rounds to `packed`'s
    elements, and multiplies by X again; Emax is 8 (e4m3fn) or 15 (e5m2).

    Dimensions:
        M, N: any size >= 1; K: a multiple of 32.

    Args:
        a: [M, K] HBM, bfloat16 | float16.
        b: [K, N] HBM, dtype of a; [N, K] when `transposed`.
        transposed: how b is stored.
        packed: "float8_e4m3fn_x4" or "float8_e5m2_x4".
        out_dtype: dtype of the result.
        config: MatmulMxConfig.

    Returns:
        [M, N] HBM, out_dtype, rounded once.
    Data flow: HBM -> SBUF (transposed by DMA) -> Vector (quantized) -> PE -> PSUM -> SBUF -> HBM.
    Limits: PE; with few rows the stream of b.
    """
    rows, columns = a.shape[0], b.shape[0] if transposed else b.shape[1]
    c = nl.ndarray((rows, columns), dtype=out_dtype, buffer=nl.shared_hbm)
    for block in spans(rows, config.rows):
        steps = _steps(block, columns, config)
        ready = {}
        for at in range(len(steps)):
            # Ahead: Vector quantizes while PE multiplies.
            for step in steps[at : at + 1 + config.ahead]:
                _prepare(a, step["group"], "a", True, packed, ready, config)
                _prepare(b, step["n"], "b", transposed, packed, ready, config)
            _multiply(c, steps[at], ready, config)
    return c


def _steps(block, columns, config):
    """Return the tiles of C of a block of rows, in the order of execution.

    "group" are the rows of A that are loaded at once: a DMA of one row tile would be too short.
    """
    start, stop = block
    steps = []
    for n in spans(columns, config.columns):
        for group in spans(stop - start, nl.tile_size.gemm_moving_fmax):
            for m in spans(group[1] - group[0], nl.tile_size.gemm_stationary_fmax):
                steps.append({"group": (start + group[0], start + group[1]), "m": m, "n": n})
    return steps


def _prepare(x, columns, name, flipped, packed, ready, config):
    """Load and quantize x[:, columns] (x[columns, :] when flipped), unless it is ready."""
    key = (name, columns[0])
    if key in ready:
        return
    size = x.shape[1] if flipped else x.shape[0]
    slabs = []
    for k in spans(size, PACKED * nl.tile_size.pmax):
        raw = _load(x, k, columns, flipped, config)
        slabs.append(_quantize(raw, packed))
    ready[key] = slabs


def _load(x, k, columns, flipped, config):
    """Return [partitions, 4, columns] of a slab; partitions and columns are padded by zeros.

    PE takes whole quadrants of partitions and an even number of columns.
    """
    (k_start, k_stop), (start, stop) = k, columns
    p, width = (k_stop - k_start) // PACKED, stop - start
    quadrant = nl.tile_size.pmax // PACKED
    padded = (-(-p // quadrant) * quadrant, width + width % 2)
    raw = nl.ndarray((padded[0], PACKED, padded[1]), dtype=x.dtype, buffer=nl.sbuf)
    if padded != (p, width):
        nisa.memset(dst=raw, value=0.0)
    if flipped:
        source = x[start:stop, k_start:k_stop].reshape_dim(1, (PACKED, p))
        nisa.dma_transpose(dst=raw[0:p, :, 0:width], src=source)
    else:
        source = x[k_start:k_stop, start:stop].reshape_dim(0, (PACKED, p)).permute((1, 0, 2))
        nisa.dma_copy(dst=raw[0:p, :, 0:width], src=source, dge_mode=mode_of(config))
    return raw


def _quantize(raw, packed):
    """Return (x4 elements, scales) of a slab."""
    p, _, width = raw.shape
    elements = nl.ndarray((p, width), dtype=packed, buffer=nl.sbuf)
    scales = nl.ndarray((p, width), dtype=nl.uint8, buffer=nl.sbuf)
    nisa.quantize_mx(dst=elements, src=raw.permute((0, 2, 1)), dst_scale=scales)
    return elements, scales


def _multiply(c, step, ready, config):
    """Form, round and store one row tile of a panel of C."""
    (m_start, m_stop), (n_start, n_stop) = step["m"], step["n"]
    first = step["group"][0]
    a, b = ready["a", first], ready["b", n_start]
    rows = m_stop - m_start
    # The columns of A were padded to an even number.
    m = slice(m_start, m_stop + rows % 2)
    result = nl.ndarray((rows, n_stop - n_start), dtype=c.dtype, buffer=nl.sbuf)
    for left, right in spans(n_stop - n_start, nl.tile_size.gemm_moving_fmax):
        psum = nl.ndarray((rows + rows % 2, right - left), dtype=nl.float32, buffer=nl.psum)
        for slab in range(len(a)):
            nisa.nc_matmul_mx(
                dst=psum,
                stationary=a[slab][0][:, m],
                moving=b[slab][0][:, left:right],
                stationary_scale=a[slab][1][:, m],
                moving_scale=b[slab][1][:, left:right],
                accumulate=slab > 0,
            )
        # Scalar evicts: Vector quantizes.
        part = result[:, left:right]
        nisa.tensor_copy(dst=part, src=psum[0:rows, :], engine=nisa.engine.scalar)
    place = c[first + m_start : first + m_stop, n_start:n_stop]
    nisa.dma_copy(dst=place, src=result, dge_mode=mode_of(config))
