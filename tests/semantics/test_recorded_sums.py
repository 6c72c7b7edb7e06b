"""tensor_reduce against what a NeuronCore returned, bit for bit.

The record (`tests/data/README.md`) names NumPy's generator and a seed for the inputs, so they are
made again here; a checksum proves that they are the same. Evidence for Vector, float32, 128
elements, trn1.
"""

from __future__ import annotations

import csv
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.launch import launch

DATA = Path(__file__).parents[1] / "data"
SEEDS = (3, 7, 11, 19)
ROWS, WIDTH = 4096, 128


def table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file below its comment lines."""
    lines = (DATA / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


RECORD = table("trainium_tensor_reduce.csv")
TOTALS = {int(row["seed"]): row for row in table("trainium_tensor_reduce_totals.csv")}


@cache
def weights(seed: int) -> Any:
    """The recorded input: the generator drew two tiles for another kernel before."""
    rng = np.random.default_rng(seed)
    rng.random((2, 128, 512), dtype=np.float32)
    return rng.random((ROWS, WIDTH), dtype=np.float32)


def row_sums(w: Any) -> Any:
    """Sum each row with nisa.tensor_reduce, on the generation the record is of."""

    def kernel(w: Any) -> Any:
        out = nl.ndarray((w.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
        for start in range(0, w.shape[0], nl.tile_size.pmax):
            rows = nl.ds(start, nl.tile_size.pmax)
            tile = nl.ndarray((nl.tile_size.pmax, w.shape[1]), nl.float32, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=w[rows, :])
            sums = nl.ndarray((nl.tile_size.pmax, 1), nl.float32, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=sums, op=nl.add, data=tile, axis=(1,))
            nisa.dma_copy(dst=out[rows, :], src=sums)
        return out

    return launch(kernel, (w,), target="trn1").outputs[0].reshape(-1)


@cache
def ours(seed: int, width: int) -> Any:
    return row_sums(np.ascontiguousarray(weights(seed)[:, :width]))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_input_is_the_recorded_one(seed: int) -> None:
    assert hashlib.sha256(weights(seed).tobytes()).hexdigest() == TOTALS[seed]["input_sha256"]


@pytest.mark.parametrize("row", RECORD, ids=lambda row: f"{row['seed']}-{row['bin']}")
def test_a_row_is_what_the_device_returned(row: dict[str, str]) -> None:
    seed, at = int(row["seed"]), int(row["bin"])
    assert ours(seed, 128)[at] == np.float32(row["device"])
    assert ours(seed, 127)[at] == np.float32(row["device_127"])


def test_the_record_tells_orders_apart() -> None:
    # A record that every order of addition reproduces would prove nothing.
    assert len(RECORD) == 107
    pairwise = [
        np.sum(weights(int(r["seed"]))[int(r["bin"])]) == np.float32(r["device"]) for r in RECORD
    ]
    assert sum(pairwise) < len(RECORD) // 2
    # AWS's simulator is such an order: it does not reproduce the device either.
    assert sum(r["device"] == r["simulator"] for r in RECORD) < len(RECORD) // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_all_rows_together_have_the_recorded_statistics(seed: int) -> None:
    """Sums and error statistics over all 4096 rows of a seed, as recorded, to the last bit."""
    want = TOTALS[seed]
    got = ours(seed, 128).astype(np.float64)
    # NumPy's own sum, pairwise in float64, is the reference the record was made with.
    reference = weights(seed).astype(np.float64).sum(axis=1)
    error = np.abs(got - reference)
    relative = error / reference
    assert float(got.sum()) == float(want["sum_of_rows"])
    assert float(error.max()) == float(want["abs_max"])
    assert float(np.median(error)) == float(want["abs_median"])
    assert float(relative.max()) == float(want["rel_max"])
    assert float(np.median(relative)) == float(want["rel_median"])
    assert int((got == reference.astype(np.float32)).sum()) == int(want["exact_rows"])
