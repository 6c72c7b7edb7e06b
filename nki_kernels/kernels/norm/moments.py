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
    """Return squares * scale + eps [rows, any], on Vector.

    A form that has no fast mode: that would wait for GpSimd, which shares Vector's port.
    """
    shifted = nl.ndarray(squares.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=shifted,
        data=squares,
        op0=nl.multiply,
        operand0=scale,
        op1=nl.add,
        operand1=epsilon[0 : squares.shape[0], :].broadcast(1, squares.shape[1]),
    )
    return shifted


def reciprocal_root(shifted):
    """Return 1 / sqrt(shifted) of any number: inf of 0, 0 of inf, NaN of NaN.

    On GpSimd: Scalar's root takes nothing outside 2^-87 to 2^97.
    """
    factor = nl.ndarray(shifted.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=factor, data=shifted, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd
    )
    return factor


def reciprocal_rms(tile, epsilon, width):
    """Return 1 / sqrt(mean(tile^2) + eps), one float32 per row, in sums of `width` columns."""
    rows, size = tile.shape
    total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    accumulate_rows(nl.square, tile, width, total)
    return reciprocal_root(shifted_squares(total, 1.0 / size, epsilon))


def moment_places(cuts, by_vector):
    """Return where the partial statistics of each chunk of a row are, side by side.

    Per piece of bn_stats (the leading `by_vector` columns of a chunk) there are two triples (count,
    mean, var * count), and one for Scalar's columns.
    """
    places = []
    width = 0
    for left, right in cuts:
        share = min(by_vector, right - left)
        pieces = spans(0, share, nl.tile_size.bn_stats_fmax)
        rest = right - left - share
        places.append({"at": width, "pieces": pieces, "rest": rest})
        width += 6 * len(pieces) + (3 if rest > 0 else 0)
    return places


def moments_tile(places):
    """Return a tile for partial statistics, the counts of Scalar's columns in place.

    Its users take turns, so that the counts are written once and not per row tile.
    """
    last = places[-1]
    width = last["at"] + 6 * len(last["pieces"]) + (3 if last["rest"] > 0 else 0)
    stats = nl.ndarray((nl.tile_size.pmax, width), dtype=nl.float32, buffer=nl.sbuf)
    for place in places:
        if place["rest"] > 0:
            at = place["at"] + 6 * len(place["pieces"])
            nisa.memset(dst=stats[:, at : at + 1], value=float(place["rest"]))
    return stats


def measure_moments(columns, place, stats):
    """Write the partial statistics of one chunk [rows, columns] to its place in `stats`."""
    at, width = place["at"], columns.shape[1]
    for left, right in place["pieces"]:
        nisa.bn_stats(dst=stats[:, at : at + 6], data=columns[:, left:right])
        at += 6
    if place["rest"] > 0:
        rest = columns[:, width - place["rest"] : width]
        mean, deviations = stats[:, at + 1 : at + 2], stats[:, at + 2 : at + 3]
        accumulate_rows(nl.copy, rest, place["rest"], mean, 1.0 / place["rest"])
        # (mean - x)^2: the sign is free, and the mean is a bias as it stands.
        accumulate_rows(nl.square, rest, place["rest"], deviations, -1.0, mean)


def merge_moments(stats, epsilon):
    """Return the mean and var + eps of each row, [rows, 1] float32 each."""
    rows = stats.shape[0]
    merged = nl.ndarray((rows, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_aggr(dst=merged, data=stats)
    return merged[:, 0:1], shifted_squares(merged[:, 1:2], 1.0, epsilon)
