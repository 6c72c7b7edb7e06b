"""Loads of the attention kernel: queries and keys transposed, values beside a column of ones."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import spans


class Loads:
    """Issues loads some groups ahead and hands each group its tiles.

    K and V are kept for all queries of a head, or, where SBUF does not hold a head's, loaded anew
    for each block of queries.
    """

    def __init__(self, q, k, v, steps, config):
        self.q, self.k, self.v = q, k, v
        self.steps, self.config = steps, config
        self.issued = 0
        self.block = None
        self.queries = None
        self.home = None
        self.chunks = {}

    def run_to(self, last):
        """Issue the loads of all groups up to number `last`."""
        while self.issued < len(self.steps) and self.issued <= last:
            self._issue(self.steps[self.issued])
            self.issued += 1

    def done(self, number):
        """Let go of the tiles of a group."""
        self.steps[number]["tiles"] = None

    def _issue(self, step):
        config = self.config
        place = (step["q"], step["block"])
        if place != self.block:
            self.block = place
            self.queries = self._transposed(self.q, step["q"], step["block"])
        home = step["kv"] if config.resident else (step["kv"], place)
        if home != self.home:
            self.home = home
            self.chunks = {}
        size = config.chunk * nl.tile_size.pmax
        for piece in step["group"]["pieces"]:
            number = piece["keys"][0] // size
            if number not in self.chunks:
                span = (number * size, min((number + 1) * size, self.k.shape[2]))
                self.chunks[number] = (
                    self._transposed(self.k, step["kv"], span),
                    self._values(step["kv"], span),
                )
        step["tiles"] = {
            "q": self.queries,
            "k": {number: pair[0] for number, pair in self.chunks.items()},
            "v": {number: pair[1] for number, pair in self.chunks.items()},
            "chunk": size,
            "p_dtype": nl.float32 if self.q.dtype == nl.float32 else nl.bfloat16,
        }

    def _transposed(self, source, place, span):
        """Return rows `span` of source[place], transposed: one tile per slice of the depth."""
        (b, h), (start, stop) = place, span
        tiles = []
        for left, right in spans(source.shape[3], nl.tile_size.pmax):
            rows = right - left
            full = nl.tile_size.pmax if self.config.fill else rows
            tile = nl.ndarray((full, stop - start), dtype=source.dtype, buffer=nl.sbuf)
            if full > rows:
                # The array's clock is halved while less than half of its rows work.
                nisa.memset(dst=tile, value=0.0, engine=nisa.engine.gpsimd)
            nisa.dma_transpose(dst=tile[:rows], src=source[b, h, start:stop, left:right])
            tiles.append(tile)
        return tiles

    def _values(self, place, span):
        """Return rows `span` of v as [key in tile, tile, Dv + 1]; the last column is 1."""
        (b, h), (start, stop) = place, span
        pmax, depth = nl.tile_size.pmax, self.v.shape[3]
        count = stop - start
        tiles = -(-count // pmax)
        full = count // pmax
        mode = nisa.dge_mode.hwdge if self.config.hwdge else nisa.dge_mode.unknown
        rows = min(pmax, count)
        tile = nl.ndarray((rows, tiles, depth + 1), dtype=self.v.dtype, buffer=nl.sbuf)
        nisa.memset(dst=tile[:, :, depth : depth + 1], value=1.0, engine=nisa.engine.gpsimd)
        if full:
            source = self.v[b, h, start : start + full * pmax, :]
            source = source.reshape((full, pmax, depth)).permute((1, 0, 2))
            nisa.dma_copy(dst=tile[:, :full, :depth], src=source, dge_mode=mode)
        if full < tiles:
            rest = count - full * pmax
            source = self.v[b, h, start + full * pmax : stop, :]
            nisa.dma_copy(dst=tile[:rest, full, :depth], src=source, dge_mode=mode)
        return tile
