"""Attention of a few new queries over a paged KV cache."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.decode import decode, outputs
from nki_kernels.kernels.attention.decode_steps import (
    fitted,
    mode_of,
    positions_of,
    rows_of,
    spans,
)


@nki.jit
def attention_decode_paged(q, k, v, table, lengths, sinks, k_scale, v_scale, rule, config):
    """attention_decode over pages: key j of sequence b is row j % P of page table[b, j // P].

    Dimensions:
        B, H, G, T, D, E: as in attention_decode. N: pages. P: keys of a page, a power of 2.
        W: pages of a sequence at most.

    Args:
        q: [B, H, T, D] HBM, bfloat16 | float16 | float32.
        k: [N, G, P, D] HBM, dtype of q; or fp8 beside 2-byte queries.
        v: [N, G, P, E] HBM, dtype of k.
        table: [B, W] HBM int32. Entries behind the last key may be anything; what they point to,
            moved into 0 .. N - 1, is masked but must be finite.
        lengths: [B] HBM int32, 0 .. W * P.
        sinks: [H] HBM float32, or None.
        k_scale: [G] HBM float32, factors of fp8 keys by head, or None.
        v_scale: likewise of the values.
        rule: DecodeRule.
        config: DecodeConfig.

    Returns:
        As attention_decode.

    Limits: as attention_decode; a partition holds a page, or a part of one, of all heads of the
        step, in one descriptor: software makes 64 of them in about 1 us. Nothing is a device loop,
        so the boundary of an iteration, 4 to 9 us by what was reported, is never paid.
    """
    config = fitted(config, k.shape[1], rows_of(q, k), k.shape[2])
    cache, target = Paged(k, v, table, config), outputs(q, v.shape[3])
    decode(q, cache, lengths, sinks, (k_scale, v_scale), target, rule, config)
    return target


class Paged:
    """K and V by pages [N, G, P, D], the pages of a sequence in a table.

    A piece is what a partition holds: `tokens` keys of `heads` heads, neighbours in HBM. Piece s
    of a sequence has keys s * tokens and on. Without V the first `depth` columns of K are the
    values.
    """

    def __init__(self, k, v, table, config, depth=None):
        self.k, self.v, self.table, self.config = k, v, table, config
        self.heads, self.depth = k.shape[1], v.shape[3] if depth is None else depth
        self.parts = k.shape[2] // config.tokens
        self.positions = {}
        self.rows = {}
        self.part = None

    def blocks(self):
        """Return (start, partitions) of each block of pieces."""
        pieces = self.table.shape[1] * self.parts
        return [(start, stop - start) for start, stop in spans(pieces, nl.tile_size.pmax)]

    def load(self, batch, heads, block):
        """Start to load a block of some heads; returns (keys, values) [rows, heads, n, depth]."""
        index = self._index(batch, heads, block)
        keys = self._gather(self.k, index)
        if self.v is None:
            return keys, keys[:, :, :, 0 : self.depth]
        return keys, self._gather(self.v, index)

    def key_positions(self, block):
        """Return the positions of the keys of a block, [rows, n] float32."""
        start, rows = block
        if start not in self.positions:
            tokens = self.config.tokens
            self.positions[start] = positions_of(rows, tokens, start * tokens, None)
        return self.positions[start]

    def _index(self, batch, heads, block):
        """Return which piece of the whole cache each partition takes, [rows, 1] int32."""
        start, rows = block
        groups = self.heads // self.config.heads
        if (batch, start) not in self.rows:
            self.rows = {(batch, start): self._pages(batch, start, rows)}
        page = self.rows[batch, start]
        index = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        # ((page * groups + group) * parts + part): below 2^24, exact in float32.
        nisa.tensor_scalar(
            dst=index, data=page, op0=nl.multiply, operand0=float(groups * self.parts),
            op1=nl.add, operand1=float(heads[0] // self.config.heads * self.parts),
        )  # fmt: skip
        if self.parts > 1:
            if self.part is None:
                self.part = self._part_numbers()
            part = self.part[0:rows, :]
            nisa.tensor_tensor(dst=index, data1=index, data2=part, op=nl.add)
        return index

    def _pages(self, batch, start, rows):
        """Return the page of each partition, moved into 0 .. N - 1."""
        width, parts = self.table.shape[1], self.parts
        page = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        # Blocks start at whole pages: P partitions are a multiple of the parts, both powers of 2.
        pattern = [[1, rows // parts], [0, parts], [1, 1]]
        source = self.table.ap(pattern=pattern, offset=batch * width + start // parts)
        nisa.dma_copy(dst=page, src=source, dge_mode=mode_of(self.config))
        nisa.tensor_scalar(
            dst=page, data=page, op0=nl.maximum, operand0=0.0,
            op1=nl.minimum, operand1=float(self.k.shape[0] - 1),
        )  # fmt: skip
        return page

    def _part_numbers(self):
        """Return p % parts on partition p."""
        part = nl.ndarray((nl.tile_size.pmax, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.iota(dst=part, pattern=[[1, 1]], offset=0, channel_multiplier=1)
        nisa.tensor_scalar(dst=part, data=part, op0=nl.bitwise_and, operand0=self.parts - 1)
        return part

    def load_turned(self, batch, head, block):
        """Start to load a block of one head: keys transposed, and values beside a column of ones.

        Returns (tiles [P of D, n, rows], tile [rows, n, E + 1]).
        """
        index = self._index(batch, (head, head + 1), block)
        keys = self._gather(self.k, index).squeeze_dim(1)
        rows, tokens, depth = keys.shape
        tiles = []
        for left, right in spans(depth, nl.tile_size.pmax):
            tile = nl.ndarray((right - left, tokens, rows), dtype=keys.dtype, buffer=nl.sbuf)
            nisa.dma_transpose(dst=tile, src=keys[:, :, left:right])
            tiles.append(tile)
        values = nl.ndarray((rows, tokens, self.depth + 1), dtype=self.v.dtype, buffer=nl.sbuf)
        # Gathered into its place, every row would be a descriptor: 32 us for 2048, against 2.
        gathered = self._gather(self.v, index).squeeze_dim(1)
        nisa.memset(dst=values[:, :, self.depth], value=1.0, engine=nisa.engine.gpsimd)
        nisa.tensor_copy(dst=values[:, :, 0 : self.depth], src=gathered, engine=nisa.engine.gpsimd)
        return tiles, values

    def _gather(self, source, index):
        pages, heads, size, depth = source.shape
        rows, each, tokens = index.shape[0], self.config.heads, self.config.tokens
        length = each * tokens * depth
        tile = nl.ndarray((rows, each, tokens, depth), dtype=source.dtype, buffer=nl.sbuf)
        flat = source.reshape((pages * heads * size * depth // length, length))
        view = flat.ap(pattern=[[length, rows], [1, length]], vector_offset=index)
        nisa.dma_copy(dst=tile.flatten_dims(1, 3), src=view)
        return tile
