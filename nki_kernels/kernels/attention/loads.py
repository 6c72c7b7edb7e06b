"""Loads of the attention kernel: queries and keys transposed, values beside a column of ones."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import spans


class Loads:
    """Issues loads some groups ahead and hands each group its tiles.

    K and V are kept for all queries of a head, or, where SBUF does not hold a head's, loaded anew
    for each block of queries. Short heads share a load: each costs its queue 0.6 us.
    """

    def __init__(self, q, k, v, steps, rule, config):
        self.q, self.k, self.v = q, k, v
        self.steps, self.config = steps, config
        self.issued = 0
        # With a narrow window PE has time for half the clock, and GpSimd none for filling rows.
        self.fill = config.fill and (
            rule.left is None or rule.left >= nl.tile_size.gemm_moving_fmax
        )
        # Under a window less work follows a load, and its issue weighs more.
        chunk = config.chunk if rule.left is None else config.chunk * config.join
        self.size = chunk * nl.tile_size.pmax
        self.query_home = None
        self.queries = None
        self.home = None
        self.chunks = {}
        self.query_heads = max(1, self.size // q.shape[2])
        whole = k.shape[2] % nl.tile_size.pmax == 0
        self.key_heads = max(1, self.size // k.shape[2]) if whole and config.resident else 1

    def run_to(self, last):
        """Issue the loads of all groups up to number `last`; return these steps."""
        first = self.issued
        while self.issued < len(self.steps) and self.issued <= last:
            self._issue(self.steps[self.issued])
            self.issued += 1
        return self.steps[first : self.issued]

    def done(self, number):
        """Let go of the tiles of a group."""
        self.steps[number]["tiles"] = None
        self.steps[number]["planes"] = None

    def _issue(self, step):
        config, size = self.config, self.size
        queries, query_at = self._block(step)
        (b, g), keys = step["kv"], self.k.shape[2]
        number = b * self.k.shape[1] + g
        first = number // self.key_heads * self.key_heads
        home = (first,) if config.resident else (first, step["q"], step["block"])
        if home != self.home:
            self.home = home
            self.chunks = {}
        base = (number - first) * keys
        heads = min(self.key_heads, self.k.shape[0] * self.k.shape[1] - first)
        for piece in step["group"]["pieces"]:
            chunk = (base + piece["keys"][0]) // size
            if chunk not in self.chunks:
                start = chunk * size
                span = (first * keys + start, first * keys + min(start + size, heads * keys))
                self.chunks[chunk] = (self._transposed(self.k, span, True), self._values(span))
        step["tiles"] = {
            "q": queries,
            "q_at": query_at,
            "k": {number: pair[0] for number, pair in self.chunks.items()},
            "v": {number: pair[1] for number, pair in self.chunks.items()},
            "base": base,
            "size": size,
            "p_dtype": nl.float32 if self.q.dtype == nl.float32 else nl.bfloat16,
        }

    def _block(self, step):
        """Return the transposed queries that hold a step's block, and where it begins in them."""
        (b, h), rows = step["q"], self.q.shape[2]
        number = b * self.q.shape[1] + h
        first = number // self.query_heads * self.query_heads
        if self.query_heads > 1:
            heads = min(self.query_heads, self.q.shape[0] * self.q.shape[1] - first)
            start, stop = first * rows, (first + heads) * rows
        else:
            # Loads of a part of a head begin at multiples of a block of queries.
            width = nl.tile_size.gemm_moving_fmax
            length = max(1, self.size // width) * width
            inside = step["block"][0] // length * length
            start, stop = first * rows + inside, first * rows + min(rows, inside + length)
        if start != self.query_home:
            self.query_home = start
            self.queries = self._transposed(self.q, (start, stop))
        return self.queries, number * rows + step["block"][0] - start

    def _transposed(self, source, span, whole=False):
        """Return rows `span` of all heads, transposed: one tile per slice of the depth.

        With `whole` the last of several tiles of keys is filled up with zeros.
        """
        (start, stop), depth = span, source.shape[3]
        count, pmax = stop - start, nl.tile_size.pmax
        columns = count
        if whole and source.shape[2] > pmax:
            columns = -(-count // pmax) * pmax
        flat = source.reshape((source.shape[0] * source.shape[1] * source.shape[2], depth))
        short = source.dtype != nl.float32
        tiles = []
        for left, right in spans(depth, pmax):
            rows = right - left
            full = pmax if self.fill else rows
            tile = nl.ndarray((full, columns), dtype=source.dtype, buffer=nl.sbuf)
            if full > rows:
                # The array's clock is halved while less than half of its rows work.
                nisa.memset(dst=tile, value=0.0, engine=nisa.engine.gpsimd)
            elif columns > count:
                nisa.memset(dst=tile[:, count:], value=0.0, engine=nisa.engine.gpsimd)
            piece = flat[start:stop, left:right]
            if self.config.hwdge and short and count % 16 == 0 and rows <= pmax:
                nisa.dma_transpose(
                    dst=tile[:rows, :count].expand_dim(2),
                    src=piece.reshape((1, count, rows)) if rows == depth else piece.expand_dim(0),
                    dge_mode=nisa.dge_mode.hwdge,
                )
            else:
                nisa.dma_transpose(dst=tile[:rows, :count], src=piece)
            tiles.append(tile)
        return tiles

    def _values(self, span):
        """Return rows `span` of all heads of v as [key in tile, tile, Dv + 1]; last column 1."""
        start, stop = span
        pmax, depth = nl.tile_size.pmax, self.v.shape[3]
        flat = self.v.reshape((self.v.shape[0] * self.v.shape[1] * self.v.shape[2], depth))
        count = stop - start
        tiles, full = -(-count // pmax), count // pmax
        mode = nisa.dge_mode.hwdge if self.config.hwdge else nisa.dge_mode.unknown
        tile = nl.ndarray((min(pmax, count), tiles, depth + 1), self.v.dtype, buffer=nl.sbuf)
        nisa.memset(dst=tile[:, :, depth : depth + 1], value=1.0, engine=nisa.engine.gpsimd)
        if full:
            source = flat[start : start + full * pmax, :]
            source = source.reshape((full, pmax, depth)).permute((1, 0, 2))
            nisa.dma_copy(dst=tile[:, :full, :depth], src=source, dge_mode=mode)
        if full < tiles:
            rest = count - full * pmax
            source = flat[start + full * pmax : stop, :]
            nisa.dma_copy(dst=tile[:rest, full, :depth], src=source, dge_mode=mode)
        return tile
