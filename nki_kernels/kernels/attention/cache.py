"""Writes of new keys and values into a KV cache, in place."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.decode_steps import mode_of, spans

#: Added to the row of a token that is not to be written: far outside of any cache.
_OUTSIDE = -(2**30)

_SIGN = -(2**31)


@dataclass(frozen=True)
class CacheConfig(nl.NKIObject):
    """Tuning of the cache writes. No field changes a result.

    Attributes:
        scatter: write rows of several sequences with one DMA, a descriptor per row; else one DMA
            per sequence and head range, straight from HBM to HBM (contiguous caches only).
        hwdge: plain copies go through the hardware descriptor engine (gen3 and later).
    """

    scatter: bool
    hwdge: bool


@nki.jit
def kv_cache_write(k, v, k_cache, v_cache, starts, config):
    """k_cache[b, g, starts[b] + t] = k[b, g, t], and the same for v, in place.

    Dimensions:
        B: sequences. G: KV heads, at most P. T: new tokens. S: keys of the cache. D, E: depths.

    Args:
        k: [B, G, T, D] HBM, any dtype.
        v: [B, G, T, E] HBM, likewise.
        k_cache: [B, G, S, D] HBM, dtype of k; written.
        v_cache: [B, G, S, E] HBM, dtype of v; written.
        starts: [B] HBM int32, 0 .. S - T.
        config: CacheConfig.

    Data flow: HBM -> SBUF [B * G * T rows, D] -> HBM rows whose numbers GpSimd computes.
    Limits: latency: starts, row numbers, rows and scatter follow each other, 2 us each.
    """
    batches, heads, tokens, _ = k.shape
    size = k_cache.shape[2]
    if not config.scatter:
        row = nl.ndarray((1, batches), dtype=nl.int32, buffer=nl.sbuf)
        source = starts.ap(pattern=[[batches, 1], [1, batches]])
        nisa.dma_copy(dst=row, src=source, dge_mode=mode_of(config))
        for batch in range(batches):
            start = row[:, batch : batch + 1]
            for new, cache in ((k, k_cache), (v, v_cache)):
                depth = new.shape[3]
                pattern = [[size * depth, heads], [1, tokens * depth]]
                offset = batch * heads * size * depth
                view = cache.ap(pattern=pattern, offset=offset, scalar_offset=start, indirect_dim=2)
                nisa.dma_copy(dst=view, src=new[batch].flatten_dims(1, 2))
        return
    for piece in _pieces(batches, heads, tokens):
        shape, (b, t) = _shape(piece, heads), piece
        index = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        pattern = [[heads * size, shape[1]], [size, heads], [1, shape[3]]]
        nisa.iota(dst=index, pattern=pattern, offset=b[0] * heads * size + t[0])
        start = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        source = starts.ap(
            pattern=[[batches, 1], [1, shape[1]], [0, heads], [0, shape[3]]], offset=b[0]
        )
        nisa.dma_copy(dst=start, src=source, dge_mode=mode_of(config))
        _integer(index, index, start, nl.add)
        _scatter(((k, k_cache), (v, v_cache)), piece, index, config)


@nki.jit
def kv_cache_write_paged(k, v, k_cache, v_cache, slots, config):
    """k_cache[s // P, g, s % P] = k[b, g, t] with s = slots[b, t], and the same for v, in place.

    Dimensions:
        B, G, T, D, E: as in kv_cache_write. N: pages. P: tokens of a page, a power of 2.

    Args:
        k: [B, G, T, D] HBM, any dtype.
        v: [B, G, T, E] HBM, likewise.
        k_cache: [N, G, P, D] HBM, dtype of k; written.
        v_cache: [N, G, P, E] HBM, dtype of v; written.
        slots: [B, T] HBM int32; a negative one is not written.
        config: CacheConfig.
    """
    batches, heads, tokens, _ = k.shape
    page = k_cache.shape[2]
    for piece in _pieces(batches, heads, tokens):
        shape, (b, t) = _shape(piece, heads), piece
        slot = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        source = slots.ap(
            pattern=[[batches * tokens, 1], [tokens, shape[1]], [0, heads], [1, shape[3]]],
            offset=b[0] * tokens + t[0],
        )
        nisa.dma_copy(dst=slot, src=source, dge_mode=mode_of(config))
        # Row = slot + (slot // P) * (G - 1) * P + g * P; the shift is exact, as GpSimd's integers.
        number = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            dst=number, data=slot, op0=nl.right_shift, operand0=page.bit_length() - 1
        )
        _integer(number, number, _constant(shape, (heads - 1) * page), nl.multiply)
        _integer(number, number, slot, nl.add)
        head = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        nisa.iota(dst=head, pattern=[[0, shape[1]], [page, heads], [0, shape[3]]])
        _integer(number, number, head, nl.add)
        # Of a negative slot neither the shift nor the sum means anything. Its sign is a bit.
        sign = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=sign, data=slot, op0=nl.bitwise_and, operand0=_SIGN)
        outside = sign.view(nl.uint32)
        nisa.tensor_copy_predicated(dst=number, src=_constant(shape, _OUTSIDE), predicate=outside)
        _scatter(((k, k_cache), (v, v_cache)), piece, number, config)


def _pieces(batches, heads, tokens):
    """Cut the new rows into (sequences, tokens) whose rows of all heads fit the partitions."""
    pmax = nl.tile_size.pmax
    together = max(1, pmax // (heads * tokens))
    each = tokens if together > 1 else max(1, min(tokens, pmax // heads))
    pieces = []
    for b in spans(batches, together):
        for t in spans(tokens, each):
            pieces.append((b, t))
    return pieces


def _shape(piece, heads):
    (first, last), (start, stop) = piece
    return 1, last - first, heads, stop - start


def _constant(shape, value):
    tile = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=value)
    return tile


def _integer(dst, left, right, op):
    """dst = op(left, right) in 32-bit integers: Vector would compute in float32."""
    nisa.tensor_tensor(dst=dst, data1=left, data2=right, op=op, engine=nisa.engine.gpsimd)


def _scatter(pairs, piece, index, config):
    """Write the rows of a piece to the rows `index` [1, b, g, t] of their caches [.., D]."""
    (first, last), (start, stop) = piece
    _, batches, heads, tokens = index.shape
    rows = batches * heads * tokens
    column = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=index.flatten_dims(1, 3), dge_mode=mode_of(config))
    for new, cache in pairs:
        depth, total = new.shape[3], new.shape[2]
        tile = nl.ndarray((rows, depth), dtype=new.dtype, buffer=nl.sbuf)
        pattern = [[heads * total * depth, last - first], [total * depth, heads]]
        pattern += [[depth, stop - start], [1, depth]]
        at = (first * heads * total + start) * depth
        source = new.ap(pattern=pattern, offset=at)
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
        flat = cache.reshape((cache.shape[0] * cache.shape[1] * cache.shape[2], depth))
        view = flat.ap(pattern=[[depth, rows], [1, depth]], vector_offset=column)
        nisa.dma_copy(dst=view, src=tile, oob_mode=nisa.oob_mode.skip)
