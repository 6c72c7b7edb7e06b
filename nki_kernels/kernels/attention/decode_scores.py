"""Scores of attention decode: keys and queries transposed, and their products, masked.

PE transposes what DMA brings. Keys of 2 and 4 bytes are transposed a token at a time and meet the
queries element by element (`Whole`). Of fp8 keys, two neighbours along the depth are one element
of 16 bits (`Pairs`): a transpose moves twice as many keys and their eviction half as many bytes.
Then even and odd elements are contracted one after the other. That costs PE nothing: where the
pairs of a key leave rows of the array free, the next token fills them, and queries that are zero
for each other's rows keep the scores apart, in columns a short product would idle through anyway.
PE takes fp8 keys beside 2-byte queries as they are.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.decode_steps import sizeof, spans, transposed_dtype


def form_of(tiles, dtype, each):
    """Return the form in which the queries `tiles` of `load_queries` meet keys of a dtype.

    `each`: rows of a KV head. gen2 transposes by a product, which is no way to move bits.
    """
    paired = sizeof(dtype) == 1 and tiles[0].shape[1] % 2 == 0
    if paired and nisa.get_nc_version() != nisa.nc_version.gen2:
        return Pairs(tiles, each)
    return Whole(tiles)


class Whole:
    """Queries [D, H * T] cut into P of D, for keys transposed element by element."""

    #: Tokens that share a transpose.
    fold = 1

    def __init__(self, tiles):
        depth = tiles[0].shape[1]
        self.dtype = tiles[0].dtype
        self.cuts = spans(depth, nl.tile_size.pmax)
        self.queries = [_transposed([t[:, a:b] for t in tiles]) for a, b in self.cuts]

    def size(self, dtype):
        """Return the bytes of a transposed element in PSUM; 1-byte results take 2 there."""
        return 2 if sizeof(dtype) == 1 else sizeof(transposed_dtype(dtype))

    def bank(self, shape, dtype):
        """Return a tile of PSUM for transposed keys of a dtype."""
        if sizeof(dtype) == 1:
            return nl.ndarray((*shape, 2), dtype=dtype, buffer=nl.psum)[:, :, 0]
        return nl.ndarray(shape, dtype=transposed_dtype(dtype), buffer=nl.psum)

    def data(self, keys, head, start, stop, cut):
        """Return what is transposed at once: [rows, elements]."""
        return keys[:, head, start, cut[0] : cut[1]]

    def evict(self, psum, dtype, engine):
        """Return transposed keys in SBUF."""
        turned = nl.ndarray(psum.shape, dtype=self.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=turned, src=psum, engine=engine)
        return turned

    def terms(self, turned, at, count, first, columns):
        """Return the (stationary, moving) whose products sum to scores, `turned` by cut."""
        span, last = slice(at[0], at[1]), first + columns
        return [(turned[n][:, span], self.queries[n][:, first:last]) for n in range(len(turned))]


class Pairs:
    """Queries [tokens * pairs, tokens, H * T], even and odd, for keys transposed pair by pair.

    The queries of token f are zero outside of the rows f * pairs and on.
    """

    def __init__(self, tiles, each):
        pairs = tiles[0].shape[1] // 2
        self.dtype = tiles[0].dtype
        self.cuts = spans(pairs, nl.tile_size.pmax)
        self.fold = max(1, nl.tile_size.pmax // pairs)
        self.fold = max(1, min(self.fold, nl.tile_size.gemm_moving_fmax // each))
        self.pairs = pairs
        self.queries = []
        for cut in self.cuts:
            self.queries.append([self._spread(tiles, cut, parity) for parity in range(2)])

    def _spread(self, tiles, cut, parity):
        left, right = cut
        width = right - left
        total = sum([tile.shape[0] for tile in tiles])
        shape = (self.fold * width, self.fold, total)
        result = nl.ndarray(shape, dtype=self.dtype, buffer=nl.sbuf)
        padded = []
        for tile in tiles:
            shape = (tile.shape[0], self.fold, self.fold, width)
            one = nl.ndarray(shape, dtype=self.dtype, buffer=nl.sbuf)
            if self.fold > 1:
                nisa.memset(dst=one, value=0.0, engine=nisa.engine.gpsimd)
            source = tile[:, 2 * left + parity : 2 * right : 2]
            for token in range(self.fold):
                nisa.tensor_copy(dst=one[:, token, token, :], src=source)
            padded.append(one.flatten_dims(2, 3))
        for token in range(self.fold):
            turned = _transposed([one[:, token, :] for one in padded])
            nisa.tensor_copy(dst=result[:, token, :], src=turned)
        return result

    def size(self, dtype):
        """Return the bytes of a transposed pair in PSUM."""
        return 2

    def bank(self, shape, dtype):
        """Return a tile of PSUM for transposed pairs."""
        return nl.ndarray(shape, dtype=nl.bfloat16, buffer=nl.psum)

    def data(self, keys, head, start, stop, cut):
        """Return what is transposed at once: [rows, tokens * pairs] of 16 bits."""
        if self.fold == 1:
            return keys[:, head, start, 2 * cut[0] : 2 * cut[1]].view(nl.bfloat16)
        return keys[:, head, start:stop, :].flatten_dims(1, 2).view(nl.bfloat16)

    def evict(self, psum, dtype, engine):
        """Return the transposed pairs apart: [tokens * pairs, columns, 2] of the keys' dtype.

        Copied as integers: as floats some of the bit patterns would be subnormal, and no document
        says that those survive.
        """
        turned = nl.ndarray(psum.shape, dtype=nl.uint16, buffer=nl.sbuf)
        nisa.tensor_copy(dst=turned, src=psum.view(nl.uint16), engine=engine)
        return turned.view(dtype).reshape_dim(1, (psum.shape[1], 2))

    def terms(self, turned, at, count, first, columns):
        """Return the (stationary, moving) whose products sum to the scores of `count` tokens."""
        found = []
        for number in range(len(turned)):
            rows = turned[number].shape[0]
            for parity in range(2):
                queries = self.queries[number][parity]
                moving = queries[0:rows, 0:count, first : first + columns]
                found.append((turned[number][:, at[0] : at[1], parity], moving))
        return found


def _transposed(tiles):
    """Return tiles of rows [count, D], D at most P, transposed side by side."""
    depth, dtype = tiles[0].shape[1], tiles[0].dtype
    rows = sum([tile.shape[0] for tile in tiles])
    whole = nl.ndarray((depth, rows), dtype=dtype, buffer=nl.sbuf)
    at = 0
    for tile in tiles:
        count = tile.shape[0]
        flipped = nl.ndarray((depth, count), dtype=transposed_dtype(dtype), buffer=nl.psum)
        nisa.nc_transpose(dst=flipped, data=tile, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=whole[:, at : at + count], src=flipped)
        at += count
    return whole


class Scores:
    """The scores of one step, formed group by group of keys.

    `keys` is a tile [rows, heads, n, D]; `form` has the queries of the sequence, from column
    `first` on, `share` (R, T) of them per KV head. `mask` [rows, n, T]. `factor` of the products: a
    number, or [P, heads] on every partition; with a cap it is that of the argument of tanh.
    """

    def __init__(self, keys, form, first, share, mask, factor, softcap, config):
        self.keys, self.form, self.first = keys, form, first
        self.share, self.mask, self.config = share, mask, config
        self.factor, self.softcap = factor, softcap
        rows, heads, count, _ = keys.shape
        columns = share[0] * share[1]
        self.scores = nl.ndarray((rows, heads, count, columns), dtype=nl.float32, buffer=nl.sbuf)
        self.groups = self._plan()
        self.turned = []
        self.psum = None
        self.evicted = 0
        self.formed = 0

    def _plan(self):
        """Groups (head, bank start, bank stop, start, stop) of keys whose transposes share a bank.

        The scores of a bank are evicted together. Tokens that do not fill a transpose are a group
        of their own: all transposes of a group have one shape.
        """
        rows, heads, count, _ = self.keys.shape
        columns, fold = self.share[0] * self.share[1], self.form.fold
        per_bank = max(1, nl.tile_size.gemm_moving_fmax // columns // fold) * fold
        size = self.form.size(self.keys.dtype)
        together = max(1, 4 * nl.tile_size.gemm_moving_fmax // size // rows) * fold
        groups = []
        for head in range(heads):
            for left, right in spans(count, per_bank):
                even = (right - left) // fold * fold
                cuts = spans(even, together)
                if even < right - left:
                    cuts.append((even, right - left))
                for start, stop in cuts:
                    groups.append((head, left, right, left + start, left + stop))
        return groups

    def run(self, part):
        """Form the scores of the first `part` of the groups that are not formed yet."""
        while self.formed < int(part * len(self.groups)):
            while len(self.turned) <= min(self.formed + self.config.lag, len(self.groups) - 1):
                self.turned.append(self._transpose(self.groups[len(self.turned)]))
            self._form(self.groups[self.formed], self.turned[self.formed])
            self.turned[self.formed] = None
            self.formed += 1

    def _transpose(self, group):
        head, _, _, start, stop = group
        rows, dtype, form = self.keys.shape[0], self.keys.dtype, self.form
        found = []
        for cut in form.cuts:
            units = spans(stop - start, form.fold)
            data = [form.data(self.keys, head, start + a, start + b, cut) for a, b in units]
            psum = form.bank((data[0].shape[1], len(units) * rows), dtype)
            for number in range(len(units)):
                target = psum[:, number * rows : (number + 1) * rows]
                nisa.nc_transpose(dst=target, data=data[number], engine=nisa.engine.tensor)
            by_scalar = self.evicted * self.config.scalar % 8 + self.config.scalar >= 8
            engine = nisa.engine.scalar if by_scalar else nisa.engine.vector
            found.append(form.evict(psum, dtype, engine))
            self.evicted += 1
        return found

    def _form(self, group, turned):
        head, left, right, start, stop = group
        rows = self.keys.shape[0]
        columns = self.share[0] * self.share[1]
        if start == left:
            shape = (rows, (right - left) * columns)
            self.psum = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
        first = self.first + head * columns
        units = spans(stop - start, self.form.fold)
        for number in range(len(units)):
            a, b = units[number]
            at = (start + a - left) * columns
            where = (number * rows, (number + 1) * rows)
            terms = self.form.terms(turned, where, b - a, first, columns)
            for term in range(len(terms)):
                nisa.nc_matmul(
                    dst=self.psum[:, at : at + (b - a) * columns],
                    stationary=terms[term][0],
                    moving=terms[term][1],
                    accumulate=term > 0,
                )
        if stop == right:
            self._finish(head, left, right)

    def _finish(self, head, left, right):
        """Scale, cap and mask the scores of a bank."""
        each, queries = self.share
        rows = self.keys.shape[0]
        shape = (rows, right - left, each, queries)
        data, factor = self.psum.reshape(shape), self.factor
        if not isinstance(factor, float):
            factor = factor[0:rows, head : head + 1]
        if self.softcap > 0.0:
            capped = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=capped, op=nl.tanh, data=data, scale=factor)
            data, factor = capped, self.softcap
        mask = self.mask[:, left:right, :].expand_dim(2).broadcast(2, each)
        target = self.scores[:, head, left:right, :].reshape_dim(2, (each, queries))
        nisa.scalar_tensor_tensor(
            dst=target, data=data, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=mask
        )
