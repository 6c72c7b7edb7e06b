"""Worlds of ranks for the tests of nki.collectives."""

from __future__ import annotations

import nki.collectives as ncc
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import KernelError, NkiKernelsError
from nki_kernels.machine.ranks import launch_ranks
from tests.embedded.harness import hbm, sb

FOUR = ncc.ReplicaGroup([[0, 1, 2, 3]])
PAIRS = ncc.ReplicaGroup([[2, 0], [1, 3]])


def copied(x):
    """A shared tensor with the values of an argument: collectives reach no arguments."""
    fresh = hbm(*x.shape, dtype=x.dtype)
    nisa.dma_copy(dst=fresh, src=x)
    return fresh


def worked(body, arrays, *, out, lnc=1, target="toy", memory="hbm"):
    """Per rank, dst after ``body(src, dst)`` with src a copy of its array."""

    def kernel(x):
        src, dst = copied(x), hbm(*out, dtype=x.dtype)
        result = dst
        if memory == "sbuf":
            src, dst = sb(*x.shape, dtype=x.dtype), sb(*out, dtype=x.dtype)
            nisa.dma_copy(dst=src, src=x)
        body(src, dst)
        if memory == "sbuf":
            nisa.dma_copy(dst=result, src=dst)
        return result

    runs = launch_ranks(kernel, [(x,) for x in arrays], target=target, lnc=lnc)
    return [run.result for run in runs]


def integers(ranks, *shape, dtype=np.float32):
    return [
        (np.arange(np.prod(shape)).reshape(shape) * (r + 1) - 5 * r).astype(dtype)
        for r in range(ranks)
    ]


def grouped(group, arrays):
    """Per rank, the arrays of its group in order, and its place."""
    places = {r: (list(g), i) for g in group.groups for i, r in enumerate(g)}
    return [([arrays[r] for r in places[rank][0]], places[rank][1]) for rank in range(len(arrays))]


def failing(body, ranks=4, error: type[NkiKernelsError] = KernelError, lnc=1, target="toy"):
    """The message of ``body(rank)`` on every rank."""

    def kernel(rank):
        body(rank)

    with pytest.raises(error) as caught:
        launch_ranks(kernel, [(r,) for r in range(ranks)], target=target, lnc=lnc)
    return str(caught.value)


def full(*shape, dtype=nl.float32):
    tensor = hbm(*shape, dtype=dtype)
    tile = sb(shape[0], *shape[1:], dtype=dtype)
    nisa.memset(tile, 0)
    nisa.dma_copy(dst=tensor, src=tile)
    return tensor


def metadata(*shape, dtype=nl.uint32):
    """A table of sizes, all 0."""
    return full(*shape, dtype=dtype)
