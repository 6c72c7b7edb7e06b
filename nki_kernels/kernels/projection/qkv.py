"""The projection to queries, keys and values of attention, with all that happens to them before it.

One product; what differs between the heads happens behind it. A column tile holds whole heads of
one kind. Queries and keys leave PSUM as float32, scaled by the factor of the input norm and with
their bias; then, while PE works at the next wave, Scalar sums the squares of each head, Vector
multiplies by the root and the gain, and Vector and GpSimd rotate, each a tile behind the other (all
of a tile at once makes Vector wait 3 us for the others). For 4 heads of 128 that takes
Vector 0.6 + 0.9 + 1.5 us (2.2 without GpSimd) and Scalar 2, while PE takes 6.9 us for a tile at
K = 4096 and 3.5 at 2048.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.slices import in_passes, mode_of, spans
from nki_kernels.kernels.norm.rows import accumulate_chunk, broadcast_rows
from nki_kernels.kernels.projection.stream import (
    epsilon_tile,
    evict_scaled,
    inverse_rms,
    stream,
)


@nki.jit
def qkv_projection(
    x, weight, bias, gain, q_gain, k_gain, cos, sin, heads, eps, transposed, out_dtype, config
):
    """Project x to heads; [q | k | v] = norm(x)·weight + bias, then q and k are treated by head.

    norm(x)[t] = x[t] * gain / sqrt(mean(x[t]^2) + eps) where there is a gain, else x; each head z
    of q (likewise of k) becomes rope(z * q_gain / sqrt(mean(z^2) + eps)), with
    rope(z)[f] = z[f] * cos[f] - z[F + f] * sin[f], rope(z)[F + f] = z[F + f] * cos + z[f] * sin,
    as far as there are a q_gain, and cos and sin.

    Dimensions:
        T: tokens; H: width of x; Q, G: heads of q, and of k and v; D: size of a head, at most the
        columns of a moving operand; F: pairs that are rotated, 2 F <= D.

    Args:
        x: [T, H] HBM, bfloat16 | float32.
        weight: [H, C, D] HBM, dtype of x, C = Q + 2 G heads; [C, D, H] when `transposed`.
        bias: [C, D] HBM, dtype of x, or None.
        gain: [H] HBM, dtype of x, or None for no norm of x.
        q_gain: [D] HBM, dtype of x, or None for no norm of the heads of q.
        k_gain: as q_gain, for k.
        cos: [T, F] HBM float32, or None for no rotation.
        sin: as cos.
        heads: Q; those of k and v are half of the others.
        eps: added to every mean square.
        transposed: the weight is stored as PyTorch does.
        out_dtype: dtype of the results.
        config: ProjectionConfig.

    Returns:
        q [T, Q, D], k [T, G, D], v [T, G, D] HBM, rounded once. All between is float32, but for
        x * gain, which is rounded to the dtype of x.

    Data flow: that of the matmul kernel; PSUM -> SBUF (float32) -> Scalar, Vector, GpSimd -> HBM.
    Limits: PE; with few tokens the stream of the weights.
    """
    count, size = (weight.shape[0], weight.shape[1]) if transposed else weight.shape[1:]
    weight = weight.flatten_dims(0, 1) if transposed else weight.flatten_dims(1, 2)
    others = (count - heads) // 2
    results = []
    for number in (heads, others, others):
        shape = (x.shape[0], number, size)
        results.append(nl.ndarray(shape, dtype=out_dtype, buffer=nl.shared_hbm))
    places = _places((heads, others, others), size)
    waves = _waves(places, size, x.shape[0], config.product)
    extras = {
        "gain": gain,
        "eps": None if gain is None else eps,
        "bias": None if bias is None else bias.reshape((count * size,)),
    }
    arrays = {"x": x, "cos": cos, "sin": sin, "q": results[0], "k": results[1], "v": results[2]}
    by_token = {name: None if array is None else (array, 0) for name, array in arrays.items()}

    def work(parts):
        parted = [parts[name] for name in ("q", "k", "v")]
        angles = (parts["cos"], parts["sin"])
        sink = Heads(parted, places, (q_gain, k_gain, None), angles, eps, config)
        stream(parts["x"], weight, extras, waves, transposed, sink, config)

    in_passes(by_token, x.shape[0], config.product.rows, work)
    q, k, v = results
    return q, k, v


def _places(counts, size):
    """Return the column tiles: heads start .. stop - 1 of all, from `head` on in result `part`."""
    each = nl.tile_size.gemm_moving_fmax // size
    places = []
    before = 0
    for part in range(len(counts)):
        for start, stop in spans(counts[part], each):
            places.append(
                {"part": part, "head": start, "start": before + start, "stop": before + stop}
            )
        before += counts[part]
    return places


def _waves(places, size, rows, config):
    """Return the column tiles of each wave.

    With one row tile the stream of the weights limits, and nothing hides what follows the last
    wave: that one has values only, of which there is nothing to do.
    """
    tiles = [(place["start"] * size, place["stop"] * size) for place in places]
    values = len([place for place in places if place["part"] == 2])
    ends = [len(tiles)]
    if rows <= nl.tile_size.gemm_stationary_fmax:
        ends = [len(tiles) - values, len(tiles)]
    waves = []
    begin = 0
    for end in ends:
        # Equal waves: a thin one would have short rows.
        number = -(-(end - begin) // config.wave_n)
        each = -(-(end - begin) // number)
        waves += [tiles[begin + a : begin + b] for a, b in spans(end - begin, each)]
        begin = end
    return waves


class Heads:
    """A sink that normalises, rotates and stores whole heads."""

    def __init__(self, results, places, gains, angles, eps, config):
        """Keep what the heads need; load the gains, one row for all partitions."""
        self.results = results
        self.places = places
        self.angles = angles
        self.config = config
        rows = min(results[0].shape[0], nl.tile_size.pmax)
        self.gains = [broadcast_rows(gain, rows, config.product) for gain in gains]
        normalised = gains[0] is not None or gains[1] is not None
        self.epsilon = epsilon_tile(eps) if normalised else None
        self.tables = {}

    def prepare(self, m):
        """Load cos and sin of a block of rows."""
        cos, sin = self.angles
        if cos is None:
            return
        for start, stop in spans(m[1] - m[0], nl.tile_size.gemm_stationary_fmax):
            rows = (m[0] + start, m[0] + stop)
            self.tables[rows[0]] = [self._load_rows(cos, rows), self._load_rows(sin, rows)]

    def _load_rows(self, table, rows):
        tile = nl.ndarray((rows[1] - rows[0], table.shape[1]), dtype=table.dtype, buffer=nl.sbuf)
        source = table[rows[0] : rows[1], :]
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(self.config.product))
        return tile

    def evict(self, psum, place, factor, bias, engine):
        """Move the heads of one tile to SBUF; values are stored at once, the others wait."""
        at = self.places[place["tile"]]
        part, count = at["part"], at["stop"] - at["start"]
        gain = self.gains[part]
        tables = self.tables.get(place["m"][0]) if part < 2 else None
        result = self.results[part]
        plain = gain is None and tables is None
        dtype = result.dtype if plain else nl.float32
        z = nl.ndarray(psum.shape, dtype=dtype, buffer=nl.sbuf)
        evict_scaled(z, psum, factor, bias, engine)
        z = z.reshape_dim(1, (count, result.shape[2]))
        (start, stop), head = place["m"], at["head"]
        target = result[start:stop, head : head + count, :]
        if plain:
            self._store(target, z)
            return []
        return self._stages(z, target, gain, tables)

    def _stages(self, z, target, gain, tables):
        """Return what is left to do with heads z [rows, heads, D]: each stage has other engines."""
        rounded = nl.ndarray(z.shape, dtype=target.dtype, buffer=nl.sbuf)
        kept = {}

        def measure():
            kept["factors"] = head_factors(z, self.epsilon)

        def scale():
            if gain is not None:
                # In place where a rotation follows.
                scale_heads(rounded if tables is None else z, z, kept["factors"], gain)
            if tables is not None:
                kept["products"] = products(z, tables, self.config.pool)

        def finish():
            if tables is not None:
                combine(rounded, z, kept["products"])
            self._store(target, rounded)

        return [scale, finish] if gain is None else [measure, scale, finish]

    def _store(self, target, tile):
        nisa.dma_copy(dst=target, src=tile, dge_mode=mode_of(self.config.product))


def head_factors(z, epsilon):
    """Return 1 / sqrt(mean(z[r, h, :]^2) + eps), [rows, heads]."""
    rows, heads, size = z.shape
    squares = nl.ndarray((rows, heads), dtype=nl.float32, buffer=nl.sbuf)
    for head in range(heads):
        accumulate_chunk(nl.square, z[:, head, :], squares[:, head : head + 1], True)
    return inverse_rms(squares, size, epsilon)


def scale_heads(dst, z, factors, gain):
    """dst[r, h, :] = z[r, h, :] * factors[r, h] * gain, may be in place."""
    rows, heads, _ = z.shape
    for head in range(heads):
        nisa.scalar_tensor_tensor(
            dst=dst[:, head, :],
            data=z[:, head, :],
            op0=nl.multiply,
            operand0=factors[:, head : head + 1],
            op1=nl.multiply,
            operand1=gain[0:rows, :],
        )


def products(z, tables, pool):
    """Return the four products of a rotation of heads z [rows, heads, D], in the order of use.

    cos and sin [rows, F] serve every head. GpSimd, with `pool`, takes the products with sin.
    """
    rows, heads, _ = z.shape
    pairs = tables[0].shape[1]
    cos, sin = [table.expand_dim(1).broadcast(1, heads) for table in tables]
    one, two = z[:, :, 0:pairs], z[:, :, pairs : 2 * pairs]
    other = nisa.engine.gpsimd if pool else nisa.engine.vector
    found = []
    for data, table, engine in (
        (two, sin, other),
        (one, sin, other),
        (one, cos, nisa.engine.vector),
        (two, cos, nisa.engine.vector),
    ):
        result = nl.ndarray((rows, heads, pairs), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=result, data1=data, data2=table, op=nl.multiply, engine=engine)
        found.append(result)
    return found


def combine(dst, z, parts):
    """dst = rope(z) from its four products; columns that are not rotated pass."""
    size, pairs = z.shape[2], parts[0].shape[2]
    two_sin, one_sin, one_cos, two_cos = parts
    one, two = dst[:, :, 0:pairs], dst[:, :, pairs : 2 * pairs]
    nisa.tensor_tensor(dst=one, data1=one_cos, data2=two_sin, op=nl.subtract)
    nisa.tensor_tensor(dst=two, data1=two_cos, data2=one_sin, op=nl.add)
    if 2 * pairs < size:
        nisa.tensor_copy(dst=dst[:, :, 2 * pairs : size], src=z[:, :, 2 * pairs : size])
