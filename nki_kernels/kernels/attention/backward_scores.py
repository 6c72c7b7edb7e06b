"""Probabilities and the gradients of scores, a rectangle at a time."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.backward_loads import FAR, copy, flip
from nki_kernels.kernels.attention.backward_plan import bounds_of
from nki_kernels.kernels.attention.plan import spans


class Scores:
    """Makes p and ds of a step, queries on partitions; sums the gradients of sinks and bias.

    Without softcap, mask and bias Scalar reads the scores from PSUM and Vector the gradients of the
    probabilities, one instruction each. With them the scores go through SBUF.
    """

    def __init__(self, arrays, rule, out_dtype, by_dma, config):
        self.q, self.sinks, self.mask, self.bias = arrays
        self.rule, self.out_dtype, self.by_dma, self.config = rule, out_dtype, by_dma, config
        self.dtype = nl.float32 if self.q.dtype == nl.float32 else nl.bfloat16
        self.shares = None
        if self.sinks is not None:
            rows, heads = nl.tile_size.pmax, self.sinks.shape[0]
            self.logits = nl.ndarray((rows, heads), dtype=nl.float32, buffer=nl.sbuf)
            copy(self.logits, self.sinks.ap(pattern=[[0, rows], [1, heads]]), config)
            self.shares = nl.ndarray((rows, heads), dtype=nl.float32, buffer=nl.sbuf)
            nisa.memset(dst=self.shares, value=0.0, engine=nisa.engine.gpsimd)
        self.dbias = None
        if self.bias is not None:
            self._start_dbias()

    def cap(self, steps):
        """Add tanh of the scores to some steps: each change of function costs Scalar 1.3 us."""
        for step in steps:
            s = self._products(step, "q_t", "k_t")
            capped = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
            scale = self.rule.scale / self.rule.softcap
            nisa.activation(dst=capped, op=nl.tanh, data=s, scale=scale)
            step["capped"] = capped

    def weigh(self, step):
        """Add p to a step."""
        tile, at = step["tile"], step["tile"]["at"]
        size = tile["rows"][1] - tile["rows"][0]
        s, scale = step.get("capped"), self.rule.softcap
        if s is None:
            s, scale = self._products(step, "q_t", "k_t"), self.rule.scale
        shift = tile["segment"]["bias"][:size, at : at + 1]
        step["p"] = self._probabilities(step, s, scale, shift)

    def derive(self, step):
        """Add ds to a step."""
        tile, at = step["tile"], step["tile"]["at"]
        size = tile["rows"][1] - tile["rows"][0]
        capped = step.pop("capped", None)
        dp = self._products(step, "do_t", "v_t")
        plain = capped is None and self.bias is None
        ds = nl.ndarray(dp.shape, dtype=self.dtype if plain else nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=ds,
            data=dp,
            op0=nl.subtract,
            operand0=tile["segment"]["delta"][:size, at : at + 1],
            op1=nl.multiply,
            operand1=step["p"],
        )
        step["ds"] = ds if plain else self._finish(step, ds, capped)

    def _products(self, step, rows, keys):
        """Return the products of a step's rows and keys over the depth, in PSUM."""
        tile, (left, right) = step["tile"], step["columns"]
        first, last = tile["start"], tile["start"] + tile["rows"][1] - tile["rows"][0]
        result = nl.ndarray((last - first, right - left), dtype=nl.float32, buffer=nl.psum)
        stationary, moving = tile["chunk"][rows], step["block"]["tiles"][keys]
        for number in range(len(stationary)):
            nisa.nc_matmul(
                dst=result,
                stationary=stationary[number][:, first:last],
                moving=moving[number][:, left:right],
                accumulate=number > 0,
            )
        return result

    def turn(self, step):
        """Add ds transposed to a step, [key in tile, tile, query]."""
        pmax, (rows, width) = nl.tile_size.pmax, step["ds"].shape
        shape = (min(pmax, width), -(-width // pmax), rows)
        step["ds_t"] = nl.ndarray(shape, dtype=self.dtype, buffer=nl.sbuf)
        flip(step["ds_t"], step["ds"], self.by_dma, nisa.engine.scalar)

    def _probabilities(self, step, s, scale, shift):
        """Return exp(scale * s + shift), and 0 where nothing is attended."""
        slopes = self.rule.slopes
        if self.mask is not None or self.bias is not None or (slopes and scale == 0):
            s, scale = self._adjusted(step, s, scale), 1.0
        elif slopes:
            s = self._sloped(step, s, slopes[step["tile"]["head"]] / scale)
        p = nl.ndarray(s.shape, dtype=self.dtype, buffer=nl.sbuf)
        nisa.activation(dst=p, op=nl.exp, data=s, bias=shift, scale=scale)
        self._bound(step, p)
        return p

    def _sloped(self, step, s, slope):
        """Return s - slope * |position of query - position of key|, float32.

        One instruction of Vector where no key is behind a query's position, else two.
        """
        query = step["tile"]["rows"][0] + self.rule.offset
        key = step["block"]["keys"][0] + step["columns"][0]
        distance = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(
            dst=distance, pattern=[[-1, s.shape[1]]], offset=query - key, channel_multiplier=1
        )
        if self.rule.right is None or self.rule.right > 0:
            nisa.scalar_tensor_tensor(
                dst=distance,
                data=distance,
                op0=nl.multiply,
                operand0=-1.0,
                op1=nl.maximum,
                operand1=distance,
            )
        result = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=result, data=distance, op0=nl.multiply, operand0=-slope, op1=nl.add, operand1=s
        )
        return result

    def _bound(self, step, p):
        """Set p to 0 beyond the bounds, exponentials that overflowed there too."""
        rule, (row, stop) = self.rule, step["tile"]["rows"]
        start = step["block"]["keys"][0]
        keys = (start + step["columns"][0], start + step["columns"][1])
        for left, right, bound in bounds_of((row, stop), keys, rule):
            sign = 1 if bound == "right" else -1
            reach = rule.right if bound == "right" else rule.left
            nisa.affine_select(
                dst=p[:, left:right],
                pattern=[[-sign, right - left]],
                channel_multiplier=sign,
                on_true_tile=p[:, left:right],
                on_false_value=0.0,
                cmp_op=nl.greater_equal,
                offset=sign * (row + rule.offset - keys[0] - left) + reach,
            )

    def _adjusted(self, step, s, scale):
        """Return scale * s, less slopes, plus bias, and -FAR where the mask says no."""
        result = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=result, data=s, op0=nl.multiply, operand0=scale)
        if self.rule.slopes:
            result = self._sloped(step, result, self.rule.slopes[step["tile"]["head"]])
        if self.bias is not None:
            tile = nl.ndarray(s.shape, dtype=self.bias.dtype, buffer=nl.sbuf)
            copy(tile, self._rectangle(self.bias, step), self.config)
            nisa.tensor_tensor(dst=result, data1=result, data2=tile, op=nl.add)
        if self.mask is not None:
            tile = nl.ndarray(s.shape, dtype=self.mask.dtype, buffer=nl.sbuf)
            copy(tile, self._rectangle(self.mask, step), self.config)
            away = nl.ndarray(s.shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=away,
                data=tile,
                op0=nl.subtract,
                operand0=1.0,
                op1=nl.multiply,
                operand1=FAR,
            )
            nisa.tensor_tensor(dst=result, data1=result, data2=tile, op=nl.multiply)
            nisa.tensor_tensor(dst=result, data1=result, data2=away, op=nl.add)
        return result

    def _rectangle(self, tensor, step):
        """Return the part of a [1 | B, 1 | H, M, N] tensor that belongs to a step."""
        tile, start = step["tile"], step["block"]["keys"][0]
        b = min(tile["segment"]["kv"][0], tensor.shape[0] - 1)
        h = min(tile["head"], tensor.shape[1] - 1)
        (first, last), (left, right) = tile["rows"], step["columns"]
        return tensor[b, h, first:last, start + left : start + right]

    def _finish(self, step, ds, capped):
        """Hand ds to the gradient of the bias; return it behind the softcap, as PE takes it."""
        if self.bias is not None:
            self._add_dbias(step, ds)
        result = nl.ndarray(ds.shape, dtype=self.dtype, buffer=nl.sbuf)
        if capped is None:
            nisa.tensor_copy(dst=result, src=ds)
            return result
        squares = nl.ndarray(ds.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(
            dst=squares, data1=capped, data2=capped, op=nl.multiply, engine=nisa.engine.gpsimd
        )
        nisa.scalar_tensor_tensor(
            dst=result,
            data=squares,
            op0=nl.subtract,
            operand0=1.0,
            op1=nl.multiply,
            operand1=ds,
            reverse0=True,
        )
        return result

    # -- gradients of sinks and bias ---------------------------------------------------------------

    def close(self, segment):
        """Subtract what the sinks take of the rows of a segment: exp(sink - lse) * delta."""
        if self.sinks is None:
            return
        tiles, start = segment["tiles"], 0
        while start < len(tiles):
            head, stop = tiles[start]["head"], start
            while stop < len(tiles) and tiles[stop]["head"] == head:
                stop += 1
            rows = nl.tile_size.gemm_stationary_fmax
            terms = nl.ndarray((rows, stop - start), dtype=nl.float32, buffer=nl.sbuf)
            part = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(
                dst=terms,
                op=nl.exp,
                data=segment["bias"][:, start:stop],
                bias=self.logits[:rows, head : head + 1],
            )
            delta = segment["delta"][:, start:stop]
            nisa.tensor_tensor(dst=terms, data1=terms, data2=delta, op=nl.multiply)
            nisa.tensor_reduce(dst=part, op=nl.add, data=terms, axis=1)
            total = self.shares[:rows, head : head + 1]
            nisa.tensor_tensor(dst=total, data1=total, data2=part, op=nl.subtract)
            start = stop

    def store_dsinks(self):
        """Return dsinks [H], summed over the partitions by PE."""
        rows, heads = self.shares.shape
        result = nl.ndarray((heads,), dtype=nl.float32, buffer=nl.shared_hbm)
        ones = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=ones, value=1.0)
        for left, right in spans(heads, nl.tile_size.gemm_stationary_fmax):
            total = nl.ndarray((right - left, 1), dtype=nl.float32, buffer=nl.psum)
            shares = self.shares[:, left:right]
            nisa.nc_matmul(dst=total, stationary=shares, moving=ones, accumulate=False)
            column = nl.ndarray((right - left, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=column, src=total)
            copy(result[left:right].reshape((right - left, 1)), column, self.config)
        return result

    def _start_dbias(self):
        """Make room for the gradient of the bias, zero: no step covers what nobody attends."""
        shape = self.bias.shape
        self.dbias = nl.ndarray(shape, dtype=self.out_dtype, buffer=nl.shared_hbm)
        # Heads that share a bias add up, in float32.
        self.adds = (shape[0], shape[1]) != (self.q.shape[0], self.q.shape[1])
        self.target = self.dbias
        if self.adds:
            self.target = nl.ndarray(shape, dtype=nl.float32, buffer=nl.private_hbm)
        size = (nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax)
        zeros = nl.ndarray(size, dtype=self.target.dtype, buffer=nl.sbuf)
        nisa.memset(dst=zeros, value=0.0)
        for part in _rectangles(self.target):
            copy(part, zeros[: part.shape[0], : part.shape[1]], self.config)

    def _add_dbias(self, step, ds):
        part = self._rectangle(self.target, step)
        result = nl.ndarray(ds.shape, dtype=self.target.dtype, buffer=nl.sbuf)
        if self.adds:
            before = nl.ndarray(ds.shape, dtype=nl.float32, buffer=nl.sbuf)
            copy(before, part, self.config)
            nisa.tensor_tensor(dst=result, data1=before, data2=ds, op=nl.add)
        else:
            nisa.tensor_copy(dst=result, src=ds)
        copy(part, result, self.config)

    def store_dbias(self):
        """Return dbias, rounded once."""
        if self.adds:
            parts = _rectangles(self.dbias)
            for number, source in enumerate(_rectangles(self.target)):
                total = nl.ndarray(source.shape, dtype=nl.float32, buffer=nl.sbuf)
                copy(total, source, self.config)
                result = nl.ndarray(source.shape, dtype=self.out_dtype, buffer=nl.sbuf)
                nisa.tensor_copy(dst=result, src=total)
                copy(parts[number], result, self.config)
        return self.dbias


def _rectangles(tensor):
    """Cut a [B, H, M, N] tensor in HBM into what an SBUF tile holds."""
    parts = []
    for b in range(tensor.shape[0]):
        for h in range(tensor.shape[1]):
            for first, last in spans(tensor.shape[2], nl.tile_size.pmax):
                for left, right in spans(tensor.shape[3], nl.tile_size.gemm_moving_fmax):
                    parts.append(tensor[b, h, first:last, left:right])
    return parts
