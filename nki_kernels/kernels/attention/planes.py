"""A mask and a bias, one value per query and key, on scores that stand transposed."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import spans

#: What is added to the score of a masked pair: whatever the score, the sum is this, exactly.
_FAR = -(2.0**100)

#: Least factor of a score that leaves exp of _FAR 0.
_LEAST_SCALE = 2.0**-80

_MINUS_INFINITY = float("-inf")


def fit(mask, rule):
    """Tell whether the fast path takes a mask: it acts on scores before a cap would."""
    return mask is None or (not rule.softcap and rule.scale >= _LEAST_SCALE)


class Planes:
    """Adds a mask on PE and a bias on Vector.

    A tile of the mask as it lies in HBM, queries on partitions, is the stationary operand of its
    own transposition: (mask - 1)^T (2^100 I) falls into the bank of the scores, 4 * 57 ns on PE for
    512 queries, exact. PE limits then: 673 ns a tile. The bias is transposed by its DMA and added
    by a pass of Vector, 633 ns, on the way to SBUF, from where Scalar takes its exponentials.
    """

    def __init__(self, mask, bias, config):
        self.mask, self.bias, self.config = mask, bias, config
        self.pmax = nl.tile_size.pmax
        self.home = None
        self.loaded = {}
        self.some = {}
        self.turn = 0
        self.unit = None if mask is None else _far_unit(nl.tile_size.gemm_stationary_fmax)

    def load(self, step):
        """Issue the loads of a step's group, and remember them for it."""
        home = (step["q"], step["block"])
        if home != self.home:
            self.home, self.loaded = home, {}
        for piece in step["group"]["pieces"]:
            chunk = piece["keys"][0] // self.pmax // self.config.chunk
            if chunk not in self.loaded:
                self.loaded[chunk] = self._chunk(step, chunk)
        step["planes"] = self.loaded

    def hide(self, s, step, piece):
        """Add _FAR to a piece of the scores s [keys, columns] where a pair does not attend.

        At once behind the products of the piece: a bank bears one unfinished sum.
        """
        if self.mask is None:
            return
        sub = nl.tile_size.gemm_stationary_fmax
        size = step["block"][1] - step["block"][0]
        (left, right), (key, stop) = piece["columns"], piece["keys"]
        chunk = self._ready(step, key)
        start = key - chunk["first"]
        for column in range(left, right, sub):
            count, at = min(sub, size - column), piece["at"] + column - left
            nisa.nc_matmul(
                dst=s[: stop - key, at : at + count],
                stationary=chunk["less"][:count, column // sub, start : start + stop - key],
                moving=self.unit[:count, :count],
                accumulate=True,
            )

    def add(self, scores, scale, step):
        """Return scale * scores + bias in SBUF, and the scale that is left."""
        if self.bias is None:
            return scores, scale
        t = nl.ndarray(scores.shape, dtype=nl.float32, buffer=nl.sbuf)
        keys = scores.shape[0]
        for piece in step["group"]["pieces"]:
            (left, right), key = piece["columns"], piece["keys"][0]
            chunk = step["planes"][key // self.pmax // self.config.chunk]
            number = (key - chunk["first"]) // self.pmax
            part = slice(piece["at"], piece["at"] + right - left)
            nisa.scalar_tensor_tensor(
                dst=t[:, part],
                data=scores[:, part],
                op0=nl.multiply,
                operand0=scale,
                op1=nl.add,
                operand1=chunk["bias"][:keys, number, left:right],
            )
        return t, 1.0

    def attending(self, step):
        """Return [queries, output tiles], 0 where the mask lets some key through, else -1."""
        return self.some.pop((step["q"], step["block"]), None)

    def _chunk(self, step, number):
        (b, h), block = step["q"], step["block"]
        first = number * self.config.chunk * self.pmax
        found = {"first": first, "owner": (step["q"], block), "less": None}
        for name, tensor in (("mask", self.mask), ("bias", self.bias)):
            if tensor is not None:
                plane = tensor[min(b, tensor.shape[0] - 1), min(h, tensor.shape[1] - 1)]
                keys = (first, min(first + self.config.chunk * self.pmax, tensor.shape[3]))
                loading = self._natural if name == "mask" else self._transposed
                found[name] = loading(plane, block, keys)
        return found

    def _natural(self, plane, block, keys):
        """Return a mask's [query in tile, output tile, key]."""
        sub, count = nl.tile_size.gemm_stationary_fmax, keys[1] - keys[0]
        size = block[1] - block[0]
        tiles, full = -(-size // sub), size // sub
        tile = nl.ndarray((min(sub, size), tiles, count), dtype=plane.dtype, buffer=nl.sbuf)
        if full < tiles and full:
            nisa.memset(dst=tile[:, full, :], value=0, engine=nisa.engine.gpsimd)
        for n in range(tiles):
            start = block[0] + n * sub
            rows = min(sub, block[1] - start)
            source = plane[start : start + rows, keys[0] : keys[1]]
            _copy(tile[:rows, n, :], source, self.config)
        return tile

    def _transposed(self, plane, block, keys):
        """Return a bias's [key in tile, key tile, query], zeros behind the last key."""
        queries, tiles = block[1] - block[0], spans(keys[1] - keys[0], self.pmax)
        tile = nl.ndarray((self.pmax, len(tiles), queries), dtype=plane.dtype, buffer=nl.sbuf)
        for n in range(len(tiles)):
            left, right = tiles[n]
            if right - left < self.pmax:
                nisa.memset(dst=tile[:, n, :], value=0.0, engine=nisa.engine.gpsimd)
            source = plane[block[0] : block[1], keys[0] + left : keys[0] + right]
            nisa.dma_transpose(dst=tile[: right - left, n, :], src=source)
        return tile

    def _ready(self, step, key):
        """Return the chunk of a key, its mask made -1 and 0, and note who attends something."""
        chunk = step["planes"][key // self.pmax // self.config.chunk]
        if chunk["less"] is not None:
            return chunk
        mask = chunk["mask"]
        chunk["less"] = nl.ndarray(mask.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
        most = nl.ndarray((mask.shape[0], mask.shape[1]), dtype=nl.float32, buffer=nl.sbuf)
        for n in range(mask.shape[1]):
            nisa.tensor_scalar_reduce(
                dst=chunk["less"][:, n, :],
                data=mask[:, n, :],
                op0=nl.subtract,
                operand0=1.0,
                reduce_op=nl.maximum,
                reduce_res=most[:, n : n + 1],
            )
        before = self.some.get(chunk["owner"])
        if before is not None:
            nisa.tensor_tensor(dst=most, data1=most, data2=before, op=nl.maximum)
        self.some[chunk["owner"]] = most
        return chunk


def _far_unit(size):
    """Return -_FAR on the diagonal: (mask - 1) times this is _FAR where the mask is 0."""
    unit = nl.ndarray((size, size), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=unit, value=-_FAR)
    for sign in (1, -1):
        nisa.affine_select(
            dst=unit,
            pattern=[[sign, size]],
            channel_multiplier=-sign,
            on_true_tile=unit,
            on_false_value=0.0,
            cmp_op=nl.greater_equal,
            offset=0,
        )
    return unit


def _copy(dst, src, config):
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)
