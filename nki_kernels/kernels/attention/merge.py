"""Merge of two attentions over different keys by their logarithms."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

#: -inf becomes _LOWEST, and the maximum at least _FLOOR: their difference is finite and has no exp.
_LOWEST, _FLOOR = -3e38, -1e30

_LEAST = 2.0**-64


@dataclass(frozen=True)
class MergeConfig(nl.NKIObject):
    """Tuning of merge_attention. No field changes a result.

    Attributes:
        section: rows a partition holds at most whose logarithms are taken at once.
        rows: of them, those whose outputs are loaded at once: a descriptor of rows * E elements.
        ahead: tiles of outputs loaded before they are needed.
        hwdge: copies go through the hardware descriptor engine (gen3 and later).
    """

    section: int
    rows: int
    ahead: int
    hwdge: bool


@nki.jit
def merge_attention(out_a, lse_a, out_b, lse_b, config):
    """out = (e^(la - l) a + e^(lb - l) b), l = log(e^la + e^lb), by row.

    Dimensions:
        B, H, T: any. E: row length.

    Args:
        out_a: [B, H, T, E] HBM, bfloat16 | float16 | float32.
        lse_a: [B, H, T] HBM float32; -inf where nothing was attended.
        out_b: likewise.
        lse_b: likewise.
        config: MergeConfig.

    Returns:
        out [B, H, T, E], dtype of out_a, rounded once, and l [B, H, T] float32.

    Data flow: HBM -> SBUF; factors of a section of rows by Vector and Scalar, [P, n]; then row by
        row Scalar scales a, Vector adds b scaled -> HBM.
    Limits: DMA, 6 bytes an element in 2-byte types: 2.1 us for 1024 rows of 128, where Scalar and
        Vector take 1.6 and 1.9. As three passes of Vector over whole tiles it would be 3.2.
    """
    batch, heads, queries, depth = out_a.shape
    total = batch * heads * queries
    out = nl.ndarray(out_a.shape, dtype=out_a.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray(lse_a.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    for start, count, width in _sections(total, config.section):
        place = ([[width, count], [1, width]], start)
        shares = _factors(lse_a, lse_b, lse, place, config)
        tiles = [(a, min(a + config.rows, width)) for a in range(0, width, config.rows)]
        loaded = []
        for number in range(len(tiles)):
            while len(loaded) <= min(number + config.ahead, len(tiles) - 1):
                at = _view(tiles[len(loaded)], width, count, depth)
                loaded.append([_load(x, at, start * depth, config) for x in (out_a, out_b)])
            left, right = tiles[number]
            result = _merge(loaded[number], shares, left)
            loaded[number] = None
            pattern, offset = _view((left, right), width, count, depth)
            view = out.ap(pattern=pattern, offset=start * depth + offset)
            nisa.dma_copy(dst=view, src=result, dge_mode=_mode(config))
    return out, lse


def _sections(rows, most):
    """Cut rows into (start, partitions, rows per partition), all partitions as long as it goes."""
    pmax = nl.tile_size.pmax
    found = []
    start = 0
    while start < rows:
        width = max(1, min(most, (rows - start) // pmax))
        count = min(pmax, rows - start)
        found.append((start, count, width))
        start += count * width
    return found


def _mode(config):
    return nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown


def _view(columns, width, count, depth):
    """Return (pattern, offset) of rows left .. right - 1 of each partition."""
    left, right = columns
    return [[width * depth, count], [depth, right - left], [1, depth]], left * depth


def _load(source, view, start, config):
    pattern, offset = view
    shape = tuple([size for _, size in pattern])
    tile = nl.ndarray(shape, dtype=source.dtype, buffer=nl.sbuf)
    at = source.ap(pattern=pattern, offset=start + offset)
    nisa.dma_copy(dst=tile, src=at, dge_mode=_mode(config))
    return tile


def _factors(lse_a, lse_b, lse, place, config):
    """Store the logarithms of a section; return the factors of both outputs, [rows, n]."""
    raw = [_load(x, (place[0], 0), place[1], config) for x in (lse_a, lse_b)]
    shape = raw[0].shape

    def tile():
        return nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)

    most, total, inverse, result = tile(), tile(), tile(), tile()
    for one in raw:
        nisa.tensor_scalar(dst=one, data=one, op0=nl.maximum, operand0=_LOWEST)
    nisa.scalar_tensor_tensor(
        dst=most, data=raw[0], op0=nl.maximum, operand0=_FLOOR, op1=nl.maximum, operand1=raw[1]
    )
    for one in raw:
        nisa.tensor_tensor(dst=one, data1=one, data2=most, op=nl.subtract)
        nisa.activation(dst=one, op=nl.exp, data=one)
    nisa.tensor_tensor(dst=total, data1=raw[0], data2=raw[1], op=nl.add)
    nisa.tensor_scalar(dst=total, data=total, op0=nl.maximum, operand0=_LEAST)
    nisa.reciprocal(dst=inverse, data=total)
    for one in raw:
        nisa.tensor_tensor(dst=one, data1=one, data2=inverse, op=nl.multiply)
    nisa.activation(dst=result, op=nl.log, data=total)
    nisa.tensor_tensor(dst=result, data1=result, data2=most, op=nl.add)
    # Twice -3e38 is -inf; and 0 * -3e38 leaves the others as they are.
    nisa.tensor_scalar(
        dst=most, data=most, op0=nl.less_equal, operand0=_FLOOR, op1=nl.multiply, operand1=_LOWEST
    )
    for _ in range(2):
        nisa.tensor_tensor(dst=result, data1=result, data2=most, op=nl.add)
    view = lse.ap(pattern=place[0], offset=place[1])
    nisa.dma_copy(dst=view, src=result, dge_mode=_mode(config))
    return raw


def _merge(outputs, shares, first):
    """Return share_a * a + share_b * b of a tile; its rows are from `first` on those of shares."""
    a, b = outputs
    scaled = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.sbuf)
    result = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.sbuf)
    for row in range(a.shape[1]):
        of_a, of_b = (share[:, first + row : first + row + 1] for share in shares)
        nisa.activation(dst=scaled[:, row, :], op=nl.copy, data=a[:, row, :], scale=of_a)
        nisa.scalar_tensor_tensor(
            dst=result[:, row, :], data=b[:, row, :], op0=nl.multiply, operand0=of_b,
            op1=nl.add, operand1=scaled[:, row, :],
        )  # fmt: skip
    return result
