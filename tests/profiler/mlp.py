"""One good kernel, and ten ways to spoil it that change its speed and nothing else.

The kernel computes exp(x @ w) and, per row, the reciprocal root of the row's sum. Well made, the
weights stay in SBUF, x arrives transposed ahead of use, four PSUM banks are evicted by two engines,
and each engine has about the same to do.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

FAULTS = (
    "serialised loads",
    "single buffering",
    "tiny DMAs",
    "table switches",
    "eviction on one engine",
    "strided operand",
    "unused partitions",
    "bank conflict",
    "redundant transposes",
    "reloaded input",
)


@nki.jit
def mlp(x, w, fault="none"):
    """Return exp(x @ w) [M, N] and rsqrt of its row sums [128, M / 128].

    M and N are multiples of 128 and 512 with N / 512 = 4, K of 128.
    """
    part = nl.tile_size.pmax
    rows, depth = x.shape
    columns = w.shape[1]
    count = rows // part
    out = nl.ndarray((rows, columns), dtype=x.dtype, buffer=nl.shared_hbm)
    roots = nl.ndarray((part, count), dtype=nl.float32, buffer=nl.shared_hbm)
    sums = nl.ndarray((part, 2, count), dtype=nl.float32, buffer=nl.sbuf)
    root = nl.ndarray((part, count), dtype=nl.float32, buffer=nl.sbuf)
    held = _held(x, depth) if fault == "single buffering" else None
    bank = nl.ndarray((part, nl.tile_size.gemm_moving_fmax), dtype=nl.float32, buffer=nl.psum)
    weights = _weights(w, fault)
    for at in range(count):
        if fault == "reloaded input" and at:
            weights = _weights(w, fault)
        moved = _rows(x, at, held, fault)
        result = nl.ndarray((part, columns), dtype=x.dtype, buffer=nl.sbuf)
        waiting = nl.ndarray((part, columns), dtype=x.dtype, buffer=nl.sbuf)
        split = _products(moved, weights, waiting, result, sums, at, bank, fault)
        _exponentials(waiting, result, split, sums, at, fault)
        _store(out, result, at, fault)
        if fault == "table switches":
            _root(root, sums, at, at + 1)
        if fault == "serialised loads":
            # GpSimd triggers the transposing loads: the next row's stand behind this, which waits.
            nisa.tensor_copy(
                dst=root[:, at : at + 1], src=sums[:, 0, at : at + 1], engine=nisa.engine.gpsimd
            )
    if fault != "table switches":
        _root(root, sums, 0, count)
    nisa.dma_copy(dst=roots, src=root, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)
    return out, roots


def _spans(extent, size):
    return [(start, start + size) for start in range(0, extent, size)]


def _slice(fault):
    """Rows of the array that one matmul uses."""
    return 32 if fault == "unused partitions" else nl.tile_size.pmax


def _weights(w, fault):
    depth, columns = w.shape
    found = []
    for start, stop in _spans(depth, _slice(fault)):
        tile = nl.ndarray((stop - start, columns), dtype=w.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=tile, src=w[start:stop, :], dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync
        )
        found.append(tile)
    return found


def _held(x, depth):
    part = nl.tile_size.pmax
    return [nl.ndarray((part, part), dtype=x.dtype, buffer=nl.sbuf) for _ in range(depth // part)]


def _rows(x, at, held, fault):
    """Start the load of a row tile: transposed, or plain where PE has to transpose."""
    part = nl.tile_size.pmax
    first, last = at * part, (at + 1) * part
    depth = x.shape[1]
    if fault == "redundant transposes":
        tile = nl.ndarray((part, depth), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=tile, src=x[first:last, :], dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync
        )
        return tile
    found = []
    for index, (start, stop) in enumerate(_spans(depth, _slice(fault))):
        tile = (
            nl.ndarray((stop - start, part), dtype=x.dtype, buffer=nl.sbuf)
            if held is None
            else held[index]
        )
        nisa.dma_transpose(dst=tile, src=x[first:last, start:stop])
        found.append(tile)
    return found


def _transposed(plain, dtype):
    part = nl.tile_size.pmax
    found = []
    for start, stop in _spans(plain.shape[1], part):
        flipped = nl.ndarray((part, part), dtype=dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=flipped, data=plain[:, start:stop], engine=nisa.engine.tensor)
        tile = nl.ndarray((part, part), dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=tile, src=flipped, engine=nisa.engine.vector)
        found.append(tile)
    return found


def _products(moved, weights, waiting, result, sums, at, bank, fault):
    """Multiply and evict; returns how many columns wait in `waiting` for their exponential."""
    part, wide = nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax
    columns = result.shape[1]
    spans = _spans(columns, wide)
    for index, (start, stop) in enumerate(spans):
        stationary = _transposed(moved, result.dtype) if fault == "redundant transposes" else moved
        psum = bank
        if fault != "bank conflict":
            psum = nl.ndarray((part, wide), dtype=nl.float32, buffer=nl.psum)
        for number, tile in enumerate(stationary):
            nisa.nc_matmul(
                dst=psum,
                stationary=tile,
                moving=weights[number][:, start:stop],
                accumulate=number > 0,
            )
        if fault == "bank conflict":
            _evict_together(psum, waiting, start)
        elif fault == "eviction on one engine":
            nisa.activation(dst=waiting[:, start:stop], op=nl.copy, data=psum)
        elif index < len(spans) - 1:
            nisa.tensor_copy(dst=waiting[:, start:stop], src=psum, engine=nisa.engine.vector)
        else:
            nisa.activation_reduce(
                dst=result[:, start:stop],
                op=nl.exp,
                data=psum,
                reduce_op=nl.add,
                reduce_res=sums[:, 1, at : at + 1],
            )
    return columns if fault in ("bank conflict", "eviction on one engine") else spans[-1][0]


def _evict_together(psum, waiting, start):
    """Two engines at the one bank, which PE then fills again, at the same time."""
    wide = psum.shape[1]
    cut = wide // 2
    nisa.tensor_copy(
        dst=waiting[:, start + cut : start + wide], src=psum[:, cut:], engine=nisa.engine.vector
    )
    nisa.activation(dst=waiting[:, start : start + cut], op=nl.copy, data=psum[:, :cut])


def _exponentials(waiting, result, split, sums, at, fault):
    data, dst = waiting[:, 0:split], result[:, 0:split]
    if fault == "strided operand":
        shape = (data.shape[0], 16, split // 16)
        data = data.reshape(shape).permute((0, 2, 1))
        dst = dst.reshape(shape).permute((0, 2, 1))
    nisa.activation_reduce(
        dst=dst, op=nl.exp, data=data, reduce_op=nl.add, reduce_res=sums[:, 0, at : at + 1]
    )
    if split == result.shape[1]:
        nisa.memset(dst=sums[:, 1, at : at + 1], value=0.0)


def _root(root, sums, first, last):
    """root = 1 / sqrt(sum of the row)."""
    both = nl.ndarray((root.shape[0], last - first), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=both, data1=sums[:, 0, first:last], data2=sums[:, 1, first:last], op=nl.add
    )
    nisa.activation(dst=root[:, first:last], op=nl.rsqrt, data=both)


def _store(out, result, at, fault):
    part = nl.tile_size.pmax
    first, last = at * part, (at + 1) * part
    pieces = [(0, result.shape[1])]
    if fault == "tiny DMAs":
        pieces = _spans(result.shape[1], 64)
    for start, stop in pieces:
        nisa.dma_copy(
            dst=out[first:last, start:stop],
            src=result[:, start:stop],
            dge_mode=nisa.dge_mode.hwdge,
            engine=nisa.engine.scalar,
        )
