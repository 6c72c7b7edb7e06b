"""Loads of the gradients of attention, row statistics, and the transposes that stay on chip."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import spans

#: A row without a key has lse -inf. Scores plus this have no exponential, and no infinity arises.
FAR = 1.0e38


class BackwardLoads:
    """Issues loads some steps ahead and hands each step its tiles.

    Queries, their gradients and the row statistics of a segment stay for all its blocks of keys;
    keys and values come once per block and segment. What Vector and PE make of the loads waits for
    `prepare`, since engines take their work in order.
    """

    def __init__(self, arrays, steps, config):
        self.do, self.q, self.k, self.v, self.out, self.lse = arrays
        self.steps, self.config = steps, config
        self.issued, self.multiplied, self.prepared = 0, 0, 0

    def run_to(self, near, far):
        """Issue the loads of all steps up to `near`, and one more if a step up to `far` has any.

        The first block of a segment needs a tile per step, which with the transposes of dS is more
        than the DMA engines move in that time; the blocks before it leave room.
        """
        more = False
        while self.issued < len(self.steps) and self.issued <= max(near, far):
            if self._due(self.steps[self.issued]):
                if self.issued > near:
                    if more:
                        return
                    more = True
                self._load(self.steps[self.issued])
            self.issued += 1

    def _due(self, step):
        return step["block"]["tiles"] is None or "chunk" not in step["tile"]

    def _load(self, step):
        """Issue what a step needs in the order of its use: k as it is comes last, for dq."""
        block, due = step["block"], step["block"]["tiles"] is None
        (b, g), keys = block["segment"]["kv"], block["keys"]
        if due:
            block["tiles"] = {
                "k_t": flipped_load(self.k[b, g], keys, self.config),
                "v_t": flipped_load(self.v[b, g], keys, self.config),
            }
        if "chunk" not in step["tile"]:
            self._queries(step["tile"])
        if due:
            block["tiles"]["k"] = plain_load(self.k[b, g], keys, self.config)

    def prepare(self, last):
        """Make the statistics of all steps up to number `last`.

        GpSimd multiplies before Vector adds up, by two steps: Vector takes its work in order.
        """
        while self.multiplied < len(self.steps) and self.multiplied <= last + 2:
            tile = self.steps[self.multiplied]["tile"]
            if self.multiplied < self.issued and tile["chunk"]["out"] is not None:
                self._multiply(tile["chunk"])
            self.multiplied += 1
        while self.prepared < len(self.steps) and self.prepared <= last:
            tile = self.steps[self.prepared]["tile"]
            segment, chunk = tile["segment"], tile["chunk"]
            if "bias" not in segment:
                self._shifts(segment)
            if chunk["out"] is not None:
                self._multiply(chunk)
            if chunk["terms"] is not None:
                self._deltas(segment, chunk)
            self.prepared += 1

    def _queries(self, tile):
        """Load a tile of queries and those that follow it in its head."""
        segment, config = tile["segment"], self.config
        b = segment["kv"][0]
        if "lines" not in segment:
            segment["lines"] = self._lines(segment)
        some = []
        for other in segment["tiles"][tile["at"] // config.chunk * config.chunk :]:
            if other["head"] == tile["head"] and len(some) < config.chunk:
                some.append(other)
        # Chunks begin at multiples of their size in a segment, or where a head does.
        some = [other for other in some if "chunk" not in other]
        head = tile["head"]
        span = (some[0]["rows"][0], some[-1]["rows"][1])
        chunk = {
            "tiles": some,
            "rows": span[1] - span[0],
            "open": len(some),
            "dq": None,
            "q_t": flipped_load(self.q[b, head], span, config),
            "do_t": flipped_load(self.do[b, head], span, config),
            "do": plain_load(self.do[b, head], span, config),
            "out": plain_load(self.out[b, head], span, config),
            "terms": None,
            "q": plain_load(self.q[b, head], span, config),
        }
        for other in some:
            other["chunk"] = chunk
            other["start"] = other["rows"][0] - span[0]

    def _lines(self, segment):
        """Load lse as lines, one per tile, in groups that a transpose takes."""
        sub, lines = nl.tile_size.gemm_stationary_fmax, []
        b, rows = segment["kv"][0], self.lse.shape[2]
        for first, last in spans(len(segment["tiles"]), nl.tile_size.pmax):
            some = segment["tiles"][first:last]
            line = nl.ndarray((last - first, sub), dtype=nl.float32, buffer=nl.sbuf)
            at = 0
            if rows % sub:
                # A row that is not there takes part in nothing.
                nisa.memset(dst=line, value=FAR, engine=nisa.engine.gpsimd)
            while at < len(some):
                tile, count = some[at], 1
                if tile["rows"][1] - tile["rows"][0] == sub:
                    count = _alike(some, at, sub)
                start, stop = tile["rows"][0], some[at + count - 1]["rows"][1]
                source = self.lse[b, tile["head"], start:stop]
                width = min(sub, stop - start)
                copy(line[at : at + count, :width], source.reshape((count, width)), self.config)
                at += count
            lines.append(line)
        return lines

    def _shifts(self, segment):
        """Make [query, tile] -lse, or -FAR where lse is -inf; room for delta beside it."""
        sub, count = nl.tile_size.gemm_stationary_fmax, len(segment["tiles"])
        segment["bias"] = nl.ndarray((sub, count), dtype=nl.float32, buffer=nl.sbuf)
        segment["delta"] = nl.ndarray((sub, count), dtype=nl.float32, buffer=nl.sbuf)
        if self.lse.shape[2] % sub:
            nisa.memset(dst=segment["delta"], value=0.0, engine=nisa.engine.gpsimd)
        at = 0
        for line in segment["lines"]:
            size = line.shape[0]
            columns = nl.ndarray((sub, size), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_transpose(dst=columns, data=line, engine=nisa.engine.tensor)
            bias = segment["bias"][:, at : at + size]
            away = nl.ndarray((sub, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=bias,
                data=columns,
                op0=nl.maximum,
                operand0=-FAR,
                op1=nl.multiply,
                operand1=-1.0,
            )
            nisa.tensor_scalar(
                dst=away,
                data=columns,
                op0=nl.less,
                operand0=-FAR,
                op1=nl.multiply,
                operand1=-2 * FAR,
            )
            nisa.tensor_tensor(dst=bias, data1=bias, data2=away, op=nl.add)
            at += size

    def _multiply(self, chunk):
        """Multiply do and out of a chunk; a part of whole tiles, and a short tile."""
        sub = nl.tile_size.gemm_stationary_fmax
        rows = chunk["rows"]
        whole = rows // sub
        chunk["terms"] = []
        for count, first, last in ((sub, 0, whole), (rows % sub, whole, whole + 1)):
            if count == 0 or first == last:
                continue
            terms = nl.ndarray(
                (count, last - first, self.out.shape[3]), dtype=nl.float32, buffer=nl.sbuf
            )
            nisa.tensor_tensor(
                dst=terms,
                data1=chunk["do"][:count, first:last, :],
                data2=chunk["out"][:count, first:last, :],
                op=nl.multiply,
                engine=nisa.engine.gpsimd,
            )
            chunk["terms"].append((terms, first))
        chunk["out"] = None

    def _deltas(self, segment, chunk):
        """delta[query] = sum_e do * out for the tiles of a chunk."""
        at = chunk["tiles"][0]["at"]
        for terms, first in chunk["terms"]:
            count, tiles, _ = terms.shape
            delta = segment["delta"][:count, at + first : at + first + tiles]
            nisa.tensor_reduce(dst=delta, op=nl.add, data=terms, axis=2)
        chunk["terms"] = None


def _alike(tiles, at, sub):
    """Count the whole tiles from `at` on whose rows are one span of a head."""
    count = 1
    while (
        at + count < len(tiles)
        and tiles[at + count]["head"] == tiles[at]["head"]
        and tiles[at + count]["rows"][1] - tiles[at + count]["rows"][0] == sub
    ):
        count += 1
    return count


def copy(dst, src, config):
    """Copy between HBM and SBUF."""
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)


def flipped_load(source, span, config):
    """Return rows `span` of source [rows, depth], transposed: a tile per slice of the depth."""
    (start, stop), depth = span, source.shape[1]
    count = stop - start
    tiles = []
    for left, right in spans(depth, nl.tile_size.pmax):
        rows = right - left
        # The array's clock is halved while less than half of its rows work.
        full = nl.tile_size.pmax if config.fill else rows
        tile = nl.ndarray((full, count), dtype=source.dtype, buffer=nl.sbuf)
        if full > rows:
            nisa.memset(dst=tile, value=0.0, engine=nisa.engine.gpsimd)
        piece = source[start:stop, left:right]
        if config.hwdge and source.dtype != nl.float32 and count % 16 == 0:
            nisa.dma_transpose(
                dst=tile[:rows].reshape((rows, count, 1)),
                src=piece.reshape((1, count, rows)) if rows == depth else piece.expand_dim(0),
                dge_mode=nisa.dge_mode.hwdge,
            )
        else:
            nisa.dma_transpose(dst=tile[:rows], src=piece)
        tiles.append(tile)
    return tiles


def plain_load(source, span, config):
    """Return rows `span` of source [rows, depth] as [row in tile, tile, depth]."""
    (start, stop), depth = span, source.shape[1]
    pmax = nl.tile_size.pmax
    count = stop - start
    tiles, whole = -(-count // pmax), count // pmax
    tile = nl.ndarray((min(pmax, count), tiles, depth), dtype=source.dtype, buffer=nl.sbuf)
    if whole:
        rows = source[start : start + whole * pmax, :].reshape((whole, pmax, depth))
        copy(tile[:, :whole, :], rows.permute((1, 0, 2)), config)
    if whole < tiles:
        copy(tile[: count - whole * pmax, whole, :], source[start + whole * pmax : stop, :], config)
    return tile


def flip(dst, source, by_dma, engine):
    """dst[c, t, r] = source[r, t * pmax + c], both in SBUF; the last t may be short.

    The DMA engines transpose beside all other work; PE takes 57 ns a square, and `engine` empties
    its banks.
    """
    pmax, (rows, count) = nl.tile_size.pmax, source.shape
    whole = count // pmax
    if not by_dma:
        _flip_on_pe(dst, source, engine)
        return
    if whole:
        squares = source[:, : whole * pmax].reshape((rows, whole, pmax))
        nisa.dma_transpose(dst=dst[:, :whole, :], src=squares)
    if count > whole * pmax:
        rest = count - whole * pmax
        nisa.dma_transpose(dst=dst[:rest, whole, :], src=source[:, whole * pmax :])


def _flip_on_pe(dst, source, engine):
    (rows, count), pmax = source.shape, nl.tile_size.pmax
    # gen2 transposes through a matmul, whose result is float32.
    gen2 = nisa.get_nc_version() == nisa.nc_version.gen2
    dtype = nl.float32 if gen2 else source.dtype
    for left, right in spans(count, nl.tile_size.gemm_moving_fmax):
        squares = spans(right - left, pmax)
        psum = nl.ndarray((pmax, len(squares), rows), dtype=dtype, buffer=nl.psum)
        for number, (start, stop) in enumerate(squares):
            nisa.nc_transpose(
                dst=psum[: stop - start, number, :],
                data=source[:, left + start : left + stop],
                engine=nisa.engine.tensor,
            )
        first, whole = left // pmax, (right - left) // pmax
        if whole:
            _empty(dst[:, first : first + whole, :], psum[:, :whole, :], engine)
        if whole < len(squares):
            rest = right - left - whole * pmax
            _empty(dst[:rest, first + whole, :], psum[:rest, whole, :], engine)


def _empty(dst, psum, engine):
    if engine == nisa.engine.scalar:
        # tensor_copy runs on Scalar from gen3 only.
        nisa.activation(dst=dst, op=nl.copy, data=psum)
    else:
        nisa.tensor_copy(dst=dst, src=psum)
