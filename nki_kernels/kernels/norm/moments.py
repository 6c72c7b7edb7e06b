"""Statistics of rows: mean square, or mean and variance from pieces that several engines fill."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.rows import accumulate_rows, spans

#: What rsqrt of the Scalar engine takes; outside of it the hardware's result is invalid.
_LEAST, _MOST = 2.0**-87, 2.0**97


def root_constants(eps):
    """Return what `reciprocal_root` needs, [P, 1] float32 tiles: eps, and the most beside it.

    "least" is a number: the least beside eps, or None where eps is enough.
    """
    most = _MOST - eps if eps <= _MOST else -1.0
    tile = nl.ndarray((nl.tile_size.pmax, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=tile[:, 0:1], value=min(eps, _MOST))
    nisa.memset(dst=tile[:, 1:2], value=most)
    least = _LEAST - eps if eps < _LEAST else None
    return {"eps": tile[:, 0:1], "most": tile[:, 1:2], "least": least}


def reciprocal_root(squares, scale, constants):
    """Return 1 / sqrt(squares * scale + eps) [rows, 1]; 0 above what rsqrt takes, NaN of NaN.

    Infinity must give 0, as the square root of it would. Below what rsqrt takes, which only an eps
    below it reaches, the sum counts as the least that it does take.
    """
    rows = squares.shape[0]
    eps, most = constants["eps"][0:rows, :], constants["most"][0:rows, :]
    limited = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    inside = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    root = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    factor = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    # In a form that has no fast mode: that would wait for GpSimd, which shares Vector's port.
    for target, op in ((limited, nl.minimum), (inside, nl.less_equal)):
        nisa.scalar_tensor_tensor(
            dst=target, data=squares, op0=nl.multiply, operand0=scale, op1=op, operand1=most
        )
    if constants["least"] is not None:
        nisa.scalar_tensor_tensor(
            dst=limited,
            data=limited,
            op0=nl.maximum,
            operand0=constants["least"],
            op1=nl.minimum,
            operand1=most,
        )
    nisa.activation(dst=root, op=nl.rsqrt, data=limited, bias=eps)
    # On Scalar as well: Vector would wait for the root.
    nisa.activation(dst=factor, op=nl.copy, data=root, scale=inside)
    return factor


def reciprocal_rms(tile, constants, config):
    """Return 1 / sqrt(mean(tile^2) + eps), one float32 per row."""
    rows, size = tile.shape
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    accumulate_rows(nl.square, tile, config.chunk, total)
    return reciprocal_root(total, 1.0 / size, constants)


def moments_tile(size, by_vector):
    """Return a [P, 3 * pieces] tile for partial statistics, the count of Scalar's in place.

    Its users take turns, so that the count is written once and not per row tile.
    """
    pieces = 2 * len(spans(0, by_vector, nl.tile_size.bn_stats_fmax))
    width = 3 * (pieces + (1 if by_vector < size else 0))
    stats = nl.ndarray((nl.tile_size.pmax, width), dtype=nl.float32, buffer=nl.sbuf)
    if by_vector < size:
        nisa.memset(dst=stats[:, width - 3 : width - 2], value=float(size - by_vector))
    return stats


def partial_moments(tile, stats, by_vector, config):
    """Fill `stats` with (count, mean, var * count) of pieces of each row, side by side."""
    size, width = tile.shape[1], stats.shape[1]
    cuts = spans(0, by_vector, nl.tile_size.bn_stats_fmax)
    for number in range(len(cuts)):
        left, right = cuts[number]
        nisa.bn_stats(dst=stats[:, 6 * number : 6 * number + 6], data=tile[:, left:right])
    if by_vector == size:
        return
    columns = tile[:, by_vector:size]
    mean, deviations = stats[:, width - 2 : width - 1], stats[:, width - 1 : width]
    accumulate_rows(nl.copy, columns, config.chunk, mean, scale=1.0 / (size - by_vector))
    # (mean - x)^2: the sign is free, and the mean is a bias as it stands.
    accumulate_rows(nl.square, columns, config.chunk, deviations, scale=-1.0, bias=mean)


def merge_moments(stats, constants):
    """Return the mean and 1 / sqrt(var + eps) of each row, [rows, 1] float32 each."""
    rows = stats.shape[0]
    merged = nl.ndarray((rows, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_aggr(dst=merged, data=stats)
    return merged[:, 0:1], reciprocal_root(merged[:, 1:2], 1.0, constants)
