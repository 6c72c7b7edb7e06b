"""Statistics of rows: mean square, or mean and variance from pieces that several engines fill."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.rows import accumulate_rows, spans


def root_constants(eps):
    """Return what `reciprocal_root` needs: eps in a [P, 1] float32 tile."""
    epsilon = nl.ndarray((nl.tile_size.pmax, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=epsilon, value=eps)
    return epsilon


def shifted_squares(squares, scale, epsilon):
    """Return squares * scale + eps [rows, 1], on Vector.

    A form that has no fast mode: that would wait for GpSimd, which shares Vector's port.
    """
    shifted = nl.ndarray(squares.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=shifted,
        data=squares,
        op0=nl.multiply,
        operand0=scale,
        op1=nl.add,
        operand1=epsilon[0 : squares.shape[0], :],
    )
    return shifted


def reciprocal_root(shifted):
    """Return 1 / sqrt(shifted) [rows, 1] of any number: inf of 0, 0 of inf, NaN of NaN.

    On GpSimd: Scalar's root takes nothing outside 2^-87 to 2^97.
    """
    factor = nl.ndarray(shifted.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=factor, data=shifted, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd
    )
    return factor


def reciprocal_rms(tile, epsilon, config):
    """Return 1 / sqrt(mean(tile^2) + eps), one float32 per row."""
    rows, size = tile.shape
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    accumulate_rows(nl.square, tile, config.chunk, total)
    return reciprocal_root(shifted_squares(total, 1.0 / size, epsilon))


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


def merge_moments(stats, epsilon):
    """Return the mean and var + eps of each row, [rows, 1] float32 each."""
    rows = stats.shape[0]
    merged = nl.ndarray((rows, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_aggr(dst=merged, data=stats)
    return merged[:, 0:1], shifted_squares(merged[:, 1:2], 1.0, epsilon)
