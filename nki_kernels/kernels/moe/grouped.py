"""Grouped matrix product: consecutive groups of rows, each with its own matrix.

Groups and panels of columns are walked in the program; a panel of weights [K, width] is loaded once
for all rows of its group, while the panel before it is at work. The rows of a group are walked by a
device loop, whose trip count is computed on chip: an empty group costs its weights and no product,
and one group that has every row costs no more than balanced ones. A block of rows is gathered by
index (one descriptor a row), turned by PE, multiplied, and scattered by index: the index of a row
of another group lies behind the result, and the DMA skips it. The rows of the next pass arrive
under the products of this one.

The barrier at the end of each pass (6.5 us) and PE's work on the padding of a group's last pass
limit: of 6620 us for Qwen3's gate and up (32768 rows, 128 groups; model, trn2) PE works 4510, 2623
of them on rows of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.tokens import queue, spans, turn_slices


@dataclass(frozen=True)
class GroupedConfig(nl.NKIObject):
    """Tuning of the grouped product. No field changes a result.

    Attributes:
        block: row tiles per pass of the device loop, a power of two: fewer passes, longer tails.
        width: columns of a panel of weights.
        hwdge: load weights through the hardware descriptor engine (gen3 and later).
    """

    block: int
    width: int
    hwdge: bool


@nki.jit
def grouped_matmul(a, b, offsets, out_dtype, config):
    """c[m, n] = sum_k a[m, k] * b[g(m), k, n], g(m) = the first group with m < offsets[g].

    Dimensions:
        M (below 2^22), K, N, G >= 1.

    Args:
        a: [M, K] HBM, bfloat16 | float16 | float32.
        b: [G, K, N] HBM, dtype of a.
        offsets: [G] HBM, int32, the end of each group; not decreasing, at most M.
        out_dtype: dtype of the result.
        config: GroupedConfig.

    Returns:
        [M, N] HBM, out_dtype, rounded once; rows from the last offset on are 0.
    Data flow: rows by index -> SBUF -> turned by PE -> products in PSUM -> SBUF -> rows by index.
    """
    rows, groups = a.shape[0], b.shape[0]
    c = nl.ndarray((rows, b.shape[2]), dtype=out_dtype, buffer=nl.shared_hbm)
    bounds = _bounds(offsets, rows, config)
    panels = [
        (group, left, right)
        for group in range(groups)
        for left, right in spans(b.shape[2], config.width)
    ]
    weights = _load_panel(b, panels[0], config)
    for at in range(len(panels)):
        group, left, right = panels[at]
        entry = _enter(bounds, group)
        # The first rows go before the next weights: behind them they would come 15 us late.
        held = _gather(a, _existing(entry["places"], bounds["rows"]), None)
        ahead = _load_panel(b, panels[at + 1], config) if at + 1 < len(panels) else None
        _walk(bounds, entry, _product(a, held, weights, c, left, right))
        weights = ahead
    _walk(bounds, _enter(bounds, groups), _zeros(c, config))
    return c


def _tile(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def _bounds(offsets, rows, config):
    """Return starts, ends and passes of each group, [pmax, G + 1]; the last has no weights."""
    pmax, groups = nl.tile_size.pmax, offsets.shape[0]
    block = config.block * pmax
    given = _tile(pmax, groups, nl.int32)
    nisa.dma_copy(dst=given, src=offsets.ap(pattern=[[0, pmax], [1, groups]]))
    starts, ends = _tile(pmax, groups + 1), _tile(pmax, groups + 1)
    nisa.memset(dst=starts[:, 0:1], value=0.0)
    nisa.tensor_copy(dst=starts[:, 1:], src=given)
    nisa.tensor_copy(dst=ends[:, 0:groups], src=given)
    nisa.memset(dst=ends[:, groups:], value=float(rows))
    # Rounded up: x / block + 1/2 - 1/(2 block) is no tie, and exact for a power of two.
    scaled, passes = _tile(pmax, groups + 1), _tile(pmax, groups + 1, nl.int32)
    nisa.tensor_tensor(dst=scaled, data1=ends, data2=starts, op=nl.subtract)
    nisa.tensor_scalar(
        dst=passes,
        data=scaled,
        op0=nl.multiply,
        operand0=1.0 / block,
        op1=nl.add,
        operand1=0.5 - 0.5 / block,
    )
    numbers = _tile(pmax, config.block)
    nisa.iota(dst=numbers, pattern=[[pmax, config.block]], channel_multiplier=1)
    return {"starts": starts, "ends": ends, "passes": passes, "numbers": numbers, "rows": rows}


def _load_panel(b, panel, config):
    """Return b[group, :, left:right] in SBUF, one tile per slice of the contraction."""
    group, left, right = panel
    tiles = []
    for start, stop in spans(b.shape[1], nl.tile_size.pmax):
        tile = _tile(stop - start, right - left, b.dtype)
        nisa.dma_copy(dst=tile, src=b[group, start:stop, left:right], dge_mode=queue(config))
        tiles.append(tile)
    return tiles


def _enter(bounds, group):
    """Return what a walk over the rows of a group carries: row numbers, and how many passes."""
    numbers, here = bounds["numbers"], slice(group, group + 1)
    places = _tile(*numbers.shape)
    nisa.tensor_scalar(dst=places, data=numbers, op0=nl.add, operand0=bounds["starts"][:, here])
    passes = nisa.register_alloc(0)
    nisa.register_load(passes, bounds["passes"][0:1, here])
    return {"places": places, "passes": passes, "end": bounds["ends"][:, here]}


def _existing(places, rows):
    """Return the row numbers, int32, clamped to rows that exist."""
    read = _tile(*places.shape, nl.int32)
    nisa.tensor_scalar(dst=read, data=places, op0=nl.minimum, operand0=float(rows - 1))
    return read


def _walk(bounds, entry, work):
    """Call work(read, write) for each block of rows of a group, on the device.

    `write` [pmax, block] are the row numbers of the block, behind the last row where a number is
    behind the group; `read` are those of the block after it, clamped to rows that exist.
    """
    places, rows = entry["places"], bounds["rows"]
    pmax, block = places.shape

    def body(index):
        outside = _tile(pmax, block)
        nisa.tensor_scalar(
            dst=outside,
            data=places,
            op0=nl.greater_equal,
            operand0=entry["end"],
            op1=nl.multiply,
            operand1=float(rows),
        )
        write = _tile(pmax, block, nl.int32)
        nisa.tensor_tensor(dst=write, data1=places, data2=outside, op=nl.maximum)
        nisa.tensor_scalar(dst=places, data=places, op0=nl.add, operand0=float(pmax * block))
        work(_existing(places, rows), write)

    nl.fori_loop(0, entry["passes"], body)


def _gather(a, read, held):
    """Load the rows `read` of a into the tiles `held`, or into new ones; return them."""
    pmax, block = read.shape
    size = a.shape[1]
    if held is None:
        held = [_tile(pmax, size, a.dtype) for _ in range(block)]
    for number in range(block):
        source = a.ap(pattern=[[size, pmax], [1, size]], vector_offset=read[:, number : number + 1])
        nisa.dma_copy(dst=held[number], src=source)
    return held


def _product(a, held, weights, c, left, right):
    """Return the work of a panel: c[write, left:right] = held @ weights, and held = a[read]."""
    width = right - left

    def work(read, write):
        pmax, block = write.shape
        turned = [turn_slices(tile) for tile in held]
        # Turned, the rows are free for those of the next pass, which arrive under the products.
        _gather(a, read, held)
        for number in range(block):
            result = _tile(pmax, width, c.dtype)
            _multiply(result, turned[number], weights)
            target = c.ap(
                pattern=[[c.shape[1], pmax], [1, width]],
                offset=left,
                vector_offset=write[:, number : number + 1],
            )
            nisa.dma_copy(dst=target, src=result, oob_mode=nisa.oob_mode.skip)

    return work


def _multiply(result, turned, weights):
    """result = turned^T @ weights, a bank of PSUM at a time; Scalar evicts beside Vector."""
    parts = spans(result.shape[1], nl.tile_size.gemm_moving_fmax)
    scalar = nisa.get_nc_version() != nisa.nc_version.gen2
    for number in range(len(parts)):
        left, right = parts[number]
        bank = nl.ndarray((result.shape[0], right - left), dtype=nl.float32, buffer=nl.psum)
        for at in range(len(turned)):
            nisa.nc_matmul(
                dst=bank,
                stationary=turned[at],
                moving=weights[at][:, left:right],
                accumulate=at > 0,
            )
        engine = nisa.engine.scalar if scalar and number % 2 == 0 else nisa.engine.vector
        nisa.tensor_copy(dst=result[:, left:right], src=bank, engine=engine)


def _zeros(c, config):
    """Return the work of rows that belong to no group: c[write, :] = 0."""
    size = c.shape[1]

    def work(read, write):
        pmax, block = write.shape
        nothing = _tile(pmax, min(size, config.width), c.dtype)
        nisa.memset(dst=nothing, value=0.0)
        for number in range(block):
            for left, right in spans(size, config.width):
                target = c.ap(
                    pattern=[[size, pmax], [1, right - left]],
                    offset=left,
                    vector_offset=write[:, number : number + 1],
                )
                nisa.dma_copy(
                    dst=target, src=nothing[:, 0 : right - left], oob_mode=nisa.oob_mode.skip
                )

    return work
