"""Rotary position embedding, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl


@dataclass(frozen=True)
class RopeConfig(nl.NKIObject):
    """Tuning of rope. No field changes a result.

    Attributes:
        rows: rows of one head that a partition holds: they are neighbours in HBM, so that a
            descriptor moves rows * D elements instead of D.
        pool: how many of them GpSimd rotates instead of Vector. Rests on GpSimd's assumed rate.
        ahead: tiles loaded before they are needed.
        hwdge: copies go through the hardware descriptor engine (gen3 and later).
    """

    rows: int
    pool: int
    ahead: int
    hwdge: bool


@nki.jit
def rope(x, cos, sin, interleaved, inverse, config):
    """Rotate pairs of columns by the angle of their row, in float32, rounded once.

    y1 = x1 * cos - x2 * sin;  y2 = x2 * cos + x1 * sin;  inverse: sin with the other sign.

    Pair f is columns (f, F + f), or (2 f, 2 f + 1) when interleaved; columns from 2 F on pass.

    Dimensions:
        B, H, S: batch, heads, rows, any. D: row length. F: pairs, 2 F <= D.

    Args:
        x: [B, H, S, D] HBM, bfloat16 | float16 | float32.
        cos: [S, F] HBM float32, or [B, S, F].
        sin: likewise.
        interleaved: which columns form a pair.
        inverse: rotate back: the inverse of a rotation, and its gradient.
        config: RopeConfig.

    Returns:
        [B, H, S, D] HBM, dtype of x.

    Data flow: HBM -> SBUF [P, rows, D] -> Vector and GpSimd (four products, two sums, in place)
        -> HBM. With fewer rows than partitions heads take the partitions and share cos and sin.
    Limits: Vector. Six passes over half of the elements take it 3.1 ns an element, DMA 1.4; with
        GpSimd's help, at a bit over half of Vector's rate, 2.0. Ways past it that were not taken:
        products rounded to 2 bytes run at twice the rate and round three times; PE could add pairs
        of products (fp32 identities, 3.4 ns an element for its share, some 1.7 in all), and one
        infinite element would make 127 other rows NaN.
    """
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    steps = _by_heads(x, cos) if x.shape[2] < nl.tile_size.pmax else _by_rows(x, cos, config)
    loaded = []
    angles = (None, None)
    for number in range(len(steps)):
        while len(loaded) <= min(number + config.ahead, len(steps) - 1):
            step = steps[len(loaded)]
            if step["angles"] is not None:
                angles = (_load(cos, *step["angles"], config), _load(sin, *step["angles"], config))
            loaded.append((_load(x, *step["x"], config), angles))
        tile, (cosine, sine) = loaded[number]
        loaded[number] = None
        rows = tile.shape[1]
        by_pool = min(config.pool * rows // config.rows, rows)
        shares = [(0, by_pool, nisa.engine.gpsimd), (by_pool, rows, nisa.engine.vector)]
        for start, stop, engine in shares:
            if start < stop:
                part = slice(start, stop)
                pair = _pair(tile[:, part, :], cos.shape[-1], interleaved)
                _rotate(*pair, cosine[:, part, :], sine[:, part, :], inverse, engine)
        pattern, offset = steps[number]["x"]
        nisa.dma_copy(dst=y.ap(pattern=pattern, offset=offset), src=tile, dge_mode=_mode(config))
    return y


def _by_rows(x, cos, config):
    """Steps with the rows of one head on the partitions, several neighbours on each."""
    batches, heads, rows, size = x.shape
    pairs, batched = cos.shape[-1], len(cos.shape) == 3
    steps = []
    for start, count, each in _row_tiles(rows, config.rows):
        for batch in range(batches):
            for head in range(heads):
                at = ((batch * heads + head) * rows + start) * size
                pattern = [[each * size, count], [size, each], [1, size]]
                angles = None
                if head == 0 and (batch == 0 or batched):
                    angles_at = (batch * rows * batched + start) * pairs
                    angles = ([[each * pairs, count], [pairs, each], [1, pairs]], angles_at)
                steps.append({"x": (pattern, at), "angles": angles})
    return steps


def _row_tiles(rows, each):
    """Cut rows into (start, partitions, rows per partition), all partitions as long as it goes."""
    pmax = nl.tile_size.pmax
    tiles = []
    start = 0
    while start < rows:
        width = max(1, min(each, (rows - start) // pmax))
        count = min(pmax, rows - start)
        tiles.append((start, count, width))
        start += count * width
    return tiles


def _by_heads(x, cos):
    """Steps with heads on the partitions, for few rows: each partition has all rows of a head."""
    batches, heads, rows, size = x.shape
    pairs, batched = cos.shape[-1], len(cos.shape) == 3
    pmax = nl.tile_size.pmax
    # Heads of several batches share a tile; with angles of their own, whole batches only.
    together = max(1, pmax // heads) if batched else batches
    steps = []
    loaded = 0
    for batch in range(0, batches, together):
        count = min(together, batches - batch)
        for start in range(0, count * heads, pmax):
            stop = min(start + pmax, count * heads)
            at = (batch * heads + start) * rows * size
            pattern = [[rows * size, stop - start], [size, rows], [1, size]]
            angles = None
            if batched:
                if start == 0 or loaded != stop - start:
                    inner = [[0, (stop - start) // count], [pairs, rows], [1, pairs]]
                    outer = [[rows * pairs, count], *inner]
                    angles = (outer, batch * rows * pairs)
            elif loaded != stop - start:
                angles = ([[0, stop - start], [pairs, rows], [1, pairs]], 0)
            loaded = stop - start
            steps.append({"x": (pattern, at), "angles": angles})
    return steps


def _mode(config):
    return nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown


def _load(source, pattern, offset, config):
    """Load the elements of a pattern [.., partitions, rows, columns]; two outer dimensions join."""
    shape = [count for _, count in pattern]
    if len(shape) == 4:
        shape = [shape[0] * shape[1], *shape[2:]]
    tile = nl.ndarray(tuple(shape), dtype=source.dtype, buffer=nl.sbuf)
    view = source.ap(pattern=pattern, offset=offset)
    nisa.dma_copy(dst=tile, src=view, dge_mode=_mode(config))
    return tile


def _pair(tile, pairs, interleaved):
    """Return views of the first and the second column of all pairs."""
    if interleaved:
        return tile[:, :, 0 : 2 * pairs : 2], tile[:, :, 1 : 2 * pairs : 2]
    return tile[:, :, 0:pairs], tile[:, :, pairs : 2 * pairs]


def _rotate(first, second, cos, sin, inverse, engine):
    """Rotate (first, second) in place."""

    def product(a, b):
        result = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=result, data1=a, data2=b, op=nl.multiply, engine=engine)
        return result

    first_cos, second_sin = product(first, cos), product(second, sin)
    second_cos, first_sin = product(second, cos), product(first, sin)
    sums = [(first, first_cos, second_sin, inverse), (second, second_cos, first_sin, not inverse)]
    for dst, left, right, adds in sums:
        op = nl.add if adds else nl.subtract
        nisa.tensor_tensor(dst=dst, data1=left, data2=right, op=op, engine=engine)
