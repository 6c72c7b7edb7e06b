"""Attention in three passes over the scores: maximum, sum, product. For any finite scores.

The plain algorithm with queries on partitions. Probabilities are exp(score - lse), at most 1, so
nothing overflows that the result does not. PE forms the scores three times and transposes the
probabilities: a twentieth of the speed of the optimistic kernel, whose second path this is. Masks
of capped scores, and slopes with sinks or without `causal`, come here directly.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.alibi import add_distances
from nki_kernels.kernels.attention.plan import attended, masks_of, spans

#: What a score that does not count becomes, and the least maximum: their difference has no exp.
_OUTSIDE, _LEAST = -3.0e38, -1.0e30

#: Keeps a logarithm and a quotient defined where nothing is attended.
_TINY = 2.0**-60


def exact_attention(q, k, v, extras, results, rule, config):
    """Write out and lse, `results`; the rest as in `forward.attention`, options in `extras`."""
    (out, lse), sinks = results, extras["sinks"]
    batch, heads, rows, _ = q.shape
    for b in range(batch):
        for h in range(heads):
            sources = {
                "k": k[b, h * k.shape[1] // heads],
                "v": v[b, h * k.shape[1] // heads],
                "sink": None if sinks is None else sinks[h : h + 1],
                "mask": _plane(extras["mask"], b, h),
                "bias": _plane(extras["bias"], b, h),
                "segments": extras["segments"],
                "slope": None if rule.slopes is None else rule.slopes[h],
            }
            for queries in spans(rows, nl.tile_size.gemm_stationary_fmax):
                target = (out[b, h, queries[0] : queries[1], :], lse[b, h, queries[0] : queries[1]])
                _tile(q[b, h], sources, queries, target, rule, config)


def _plane(tensor, b, h):
    """Return the [Sq, Sk] plane of a tensor whose first two sizes may be 1."""
    if tensor is None:
        return None
    return tensor[min(b, tensor.shape[0] - 1), min(h, tensor.shape[1] - 1)]


def _tile(q, sources, queries, target, rule, config):
    """Attend with one tile of queries."""
    rows = queries[1] - queries[0]
    first, last = attended(queries, sources["k"].shape[0], rule)
    cuts = []
    if first < last:
        width = nl.tile_size.gemm_moving_fmax
        cuts = [(first + left, first + right) for left, right in spans(last - first, width)]
    transposed = _transposed(q, queries)
    sink = _sink(sources["sink"], rows, config)
    work = {"q": transposed, "queries": queries, "rule": rule, "config": config, **sources}
    most = _maximum(work, cuts, sink)
    total = _total(work, cuts, sink, most)
    # -(most + log total) is the bias of the last exponentials.
    shift = _logarithm(total, most)
    weights = _products(work, cuts, sink, shift)
    _store(weights, shift, total, target, config)


def _column(rows, value=None):
    tile = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    if value is not None:
        nisa.memset(dst=tile, value=value)
    return tile


def _transposed(source, span):
    """Return rows of source [S, D] as [depth slice, rows] tiles."""
    tiles = []
    for left, right in spans(source.shape[1], nl.tile_size.pmax):
        tile = nl.ndarray((right - left, span[1] - span[0]), dtype=source.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=tile, src=source[span[0] : span[1], left:right])
        tiles.append(tile)
    return tiles


def _sink(sink, rows, config):
    """Return the sink of a head on every partition, or None."""
    if sink is None:
        return None
    tile = _column(rows)
    _copy(tile, sink.ap(pattern=[[0, rows], [1, 1]]), config)
    return tile


def _copy(dst, src, config):
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)


def _scores(work, keys):
    """Return the scores of the tile and the span `keys`, float32; _OUTSIDE where they do not count.

    scale, softcap, slope, bias, mask and bounds in this order.
    """
    queries, rule = work["queries"], work["rule"]
    rows, count = queries[1] - queries[0], keys[1] - keys[0]
    psum = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.psum)
    key_tiles = _transposed(work["k"], keys)
    for number in range(len(key_tiles)):
        nisa.nc_matmul(
            dst=psum, stationary=work["q"][number], moving=key_tiles[number], accumulate=number > 0
        )
    s = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
    if rule.softcap:
        nisa.activation(dst=s, op=nl.tanh, data=psum, scale=rule.scale / rule.softcap)
        nisa.tensor_scalar(dst=s, data=s, op0=nl.multiply, operand0=rule.softcap)
    else:
        nisa.tensor_scalar(dst=s, data=psum, op0=nl.multiply, operand0=rule.scale)
    if work["slope"] is not None:
        add_distances(s, work["slope"], queries[0] + rule.offset, keys[0])
    if work["bias"] is not None:
        nisa.tensor_tensor(dst=s, data1=s, data2=_rectangle(work, "bias", keys), op=nl.add)
    if work["mask"] is not None:
        _keep(s, _rectangle(work, "mask", keys))
    if work["segments"] is not None:
        _keep(s, work["segments"].attend(queries, keys))
    for start, stop, bound in masks_of(queries, keys, rule):
        _bound(s, queries[0], keys[0], bound, rule, start, stop)
    return s


def _keep(s, attend):
    """Set s to _OUTSIDE where `attend`, 0 or 1, is 0."""
    outside = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=outside, data=attend, op0=nl.subtract, operand0=1.0, op1=nl.multiply, operand1=-_OUTSIDE
    )
    nisa.tensor_tensor(dst=s, data1=s, data2=attend, op=nl.multiply)
    nisa.tensor_tensor(dst=s, data1=s, data2=outside, op=nl.add)


def _bound(s, query, key, bound, rule, start, stop):
    """Set s[query, key] to _OUTSIDE beyond a bound; start .. stop - 1 hold all such queries."""
    sign = 1 if bound == "right" else -1
    reach = rule.right if bound == "right" else rule.left
    nisa.affine_select(
        dst=s,
        pattern=[[-sign, s.shape[1]]],
        channel_multiplier=sign,
        on_true_tile=s,
        on_false_value=_OUTSIDE,
        cmp_op=nl.greater_equal,
        offset=sign * (query + rule.offset - key) + reach,
    )


def _rectangle(work, name, keys):
    queries = work["queries"]
    shape = (queries[1] - queries[0], keys[1] - keys[0])
    tile = nl.ndarray(shape, dtype=work[name].dtype, buffer=nl.sbuf)
    _copy(tile, work[name][queries[0] : queries[1], keys[0] : keys[1]], work["config"])
    return tile


def _maximum(work, cuts, sink):
    """Return the largest score of each row, or of its sink; at least _LEAST."""
    rows = work["queries"][1] - work["queries"][0]
    most = _column(rows, _LEAST)
    if sink is not None:
        nisa.tensor_tensor(dst=most, data1=most, data2=sink, op=nl.maximum)
    for keys in cuts:
        part = _column(rows)
        nisa.tensor_reduce(dst=part, op=nl.maximum, data=_scores(work, keys), axis=1)
        nisa.tensor_tensor(dst=most, data1=most, data2=part, op=nl.maximum)
    return most


def _negated(column):
    result = _column(column.shape[0])
    nisa.tensor_scalar(dst=result, data=column, op0=nl.multiply, operand0=-1.0)
    return result


def _total(work, cuts, sink, most):
    """Return the sum of exp(score - most) of each row, its sink included."""
    total = _column(most.shape[0], 0.0)
    shift = _negated(most)
    if sink is not None:
        nisa.activation(dst=total, op=nl.exp, data=sink, bias=shift)
    for keys in cuts:
        s = _scores(work, keys)
        part = _column(most.shape[0])
        nisa.activation(
            dst=s,
            op=nl.exp,
            data=s,
            bias=shift,
            reduce_op=nl.add,
            reduce_res=part,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        nisa.tensor_tensor(dst=total, data1=total, data2=part, op=nl.add)
    return total


def _logarithm(total, most):
    """Return most + log(total), a finite number where nothing is attended."""
    result = _column(most.shape[0])
    nisa.tensor_scalar(dst=result, data=total, op0=nl.maximum, operand0=_TINY)
    nisa.activation(dst=result, op=nl.log, data=result)
    nisa.tensor_tensor(dst=result, data1=result, data2=most, op=nl.add)
    return result


def _products(work, cuts, sink, lse):
    """Return the sums of exp(score - lse) times [v | 1], float32 [rows, Dv + 1]."""
    rows, depth = lse.shape[0], work["v"].shape[1]
    result = nl.ndarray((rows, depth + 1), dtype=nl.float32, buffer=nl.sbuf)
    if not cuts:
        nisa.memset(dst=result, value=0.0)
    else:
        shift = _negated(lse)
        sums = nl.ndarray((rows, depth + 1), dtype=nl.float32, buffer=nl.psum)
        for keys in cuts:
            _add_products(work, keys, shift, sums, keys == cuts[0])
        nisa.tensor_copy(dst=result, src=sums)
    if sink is not None:
        share = _column(rows)
        nisa.activation(dst=share, op=nl.exp, data=sink, bias=_negated(lse))
        last = result[:, depth : depth + 1]
        nisa.tensor_tensor(dst=last, data1=last, data2=share, op=nl.add)
    return result


def _add_products(work, keys, shift, sums, first):
    """sums += exp(scores + shift) [v | 1] over a span of keys; the first one overwrites."""
    rows, depth = sums.shape[0], work["v"].shape[1]
    s = _scores(work, keys)
    dtype = nl.float32 if work["v"].dtype == nl.float32 else nl.bfloat16
    p = nl.ndarray(s.shape, dtype=dtype, buffer=nl.sbuf)
    nisa.activation(dst=p, op=nl.exp, data=s, bias=shift)
    # gen2 transposes through a matmul, whose result is float32.
    psum_dtype = nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype
    for left, right in spans(keys[1] - keys[0], nl.tile_size.pmax):
        flipped = nl.ndarray((right - left, rows), dtype=psum_dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=flipped, data=p[:, left:right], engine=nisa.engine.tensor)
        columns = nl.ndarray((right - left, rows), dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=columns, src=flipped)
        values = nl.ndarray((right - left, depth + 1), dtype=work["v"].dtype, buffer=nl.sbuf)
        nisa.memset(dst=values[:, depth : depth + 1], value=1.0)
        source = work["v"][keys[0] + left : keys[0] + right, :]
        _copy(values[:, :depth], source, work["config"])
        for start, stop in spans(depth + 1, nl.tile_size.gemm_moving_fmax):
            nisa.nc_matmul(
                dst=sums[:, start:stop],
                stationary=columns,
                moving=values[:, start:stop],
                accumulate=not (first and left == 0),
            )


def _store(weights, lse, total, target, config):
    """Store weights / their last column, and lse; -inf where the sum is 0."""
    rows, depth = weights.shape[0], weights.shape[1] - 1
    factor = _column(rows)
    last = weights[:, depth : depth + 1]
    nisa.tensor_scalar(dst=factor, data=last, op0=nl.maximum, operand0=_TINY)
    nisa.reciprocal(dst=factor, data=factor)
    result = nl.ndarray((rows, depth), dtype=target[0].dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=result, data=weights[:, :depth], op0=nl.multiply, operand0=factor)
    _copy(target[0], result, config)
    nothing = _column(rows)
    # 0 or -inf: no immediate is infinite.
    nisa.tensor_scalar(
        dst=nothing, data=total, op0=nl.equal, operand0=0.0, op1=nl.multiply, operand1=_OUTSIDE
    )
    nisa.tensor_scalar(dst=nothing, data=nothing, op0=nl.multiply, operand0=10.0)
    nisa.tensor_tensor(dst=nothing, data1=nothing, data2=lse, op=nl.add)
    _copy(target[1].reshape((rows, 1)), nothing, config)
