"""Writes to a KV cache: bit for bit what a loop over tokens writes, and nothing else."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, OptionError, ShapeError
from nki_kernels.operators.kv_cache import (
    KV_CACHE_WRITE,
    KV_CACHE_WRITE_PAGED,
    CacheConfig,
    kv_cache_write,
)
from tests.strategies.matrices import normal, seeds

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3]
sizes = {
    "b": st.integers(1, 9),
    "g": st.integers(1, 8),
    "t": st.integers(1, 10),
    "d": st.integers(1, 5),
    "e": st.integers(1, 5),
}


def new_tokens(seed, b, g, t, d, e, dtype=np.float32):
    return normal(seed, (b, g, t, d), dtype), normal(seed + 1, (b, g, t, e), dtype)


def written(news, caches, place):
    """Return copies of the caches with token (b, t) at `place(cache, b, t)`."""
    found = []
    for new, cache in zip(news, caches, strict=True):
        want = cache.copy()
        for b, t in np.ndindex(new.shape[0], new.shape[2]):
            row = place(want, b, t)
            if row is not None:
                row[...] = new[b, :, t]
        found.append(want)
    return found


def same(got, want):
    return all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


@given(dtype=st.sampled_from(DTYPES), seed=seeds(), spare=st.integers(0, 9), scatter=st.booleans(),
       hwdge=st.booleans(), **sizes)  # fmt: skip
def test_tokens_go_to_their_places(b, g, t, d, e, dtype, seed, spare, scatter, hwdge):
    news = new_tokens(seed, b, g, t, d, e, dtype)
    caches = new_tokens(seed + 5, b, g, t + spare, d, e, dtype)
    starts = np.random.default_rng(seed).integers(0, spare + 1, b).astype(np.int32)
    want = written(news, caches, lambda cache, b, t: cache[b, :, starts[b] + t])
    config = CacheConfig(scatter=scatter, hwdge=hwdge)
    kv_cache_write(*news, *caches, starts=starts, config=config, target="toy")
    assert same(caches, want)


@given(dtype=st.sampled_from(DTYPES), seed=seeds(), page=st.sampled_from([1, 2, 8]),
       spare=st.integers(0, 3), **sizes)  # fmt: skip
def test_tokens_go_to_their_slots(b, g, t, d, e, dtype, seed, page, spare):
    news = new_tokens(seed, b, g, t, d, e, dtype)
    pages = -(-b * t // page) + spare
    caches = new_tokens(seed + 5, pages, g, page, d, e, dtype)
    rng = np.random.default_rng(seed)
    slots = rng.permutation(pages * page)[: b * t].reshape(b, t).astype(np.int32)
    slots[rng.random((b, t)) < 0.2] = -1 - rng.integers(0, 2**30)

    def place(cache, b, t):
        slot = int(slots[b, t])
        return cache[slot // page, :, slot % page] if slot >= 0 else None

    want = written(news, caches, place)
    kv_cache_write(*news, *caches, slots=slots, target="toy")
    assert same(caches, want)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (17, 1), (3, 2), (1, 40)])
def test_real_sizes(b, t, target):
    news = new_tokens(1, b, 8, t, 128, 128, ml_dtypes.bfloat16)
    caches = new_tokens(2, b, 8, 48, 128, 128, ml_dtypes.bfloat16)
    starts = np.arange(b, dtype=np.int32) % (49 - t)
    want = written(news, caches, lambda cache, b, t: cache[b, :, starts[b] + t])
    kv_cache_write(*news, *caches, starts=starts, target=target)
    assert same(caches, want)
    pages = new_tokens(3, 40, 8, 16, 128, 128, ml_dtypes.bfloat16)
    slots = (np.arange(b * t).reshape(b, t) * 13).astype(np.int32)
    want = written(news, pages, lambda c, b, t: c[slots[b, t] // 16, :, slots[b, t] % 16])
    kv_cache_write(*news, *pages, slots=slots, target=target)
    assert same(pages, want)


def test_few_tokens_take_one_scatter_per_cache():
    shapes = [(16, 8, 1, 128)] * 2 + [(16, 8, 64, 128)] * 2
    arrays = [np.zeros(shape, np.float32) for shape in shapes]
    run = KV_CACHE_WRITE.launch((*arrays, np.zeros(16, np.int32)), {}, target="trn2")
    # Starts, row numbers, and per cache the rows in and out.
    assert Counter(e.opcode for e in run.trace) == {
        "iota": 1, "dma_copy": 2 + 2 * 2, "tensor_tensor": 1,
    }  # fmt: skip


def calls(b=2, g=2, t=2, s=8, d=4, **keywords):
    arrays = (*new_tokens(0, b, g, t, d, 3), *new_tokens(2, b, g, s, d, 3))
    return arrays, {"starts": np.zeros(b, np.int32), **keywords}


def paged(page=4, slots=((0, 1), (2, -1)), **keywords):
    arrays = (*new_tokens(0, 2, 2, 2, 4, 3), *new_tokens(2, 3, 2, page, 4, 3))
    return arrays, {"slots": np.array(slots, np.int32), **keywords}


ILLEGAL = {
    "heads": (*calls(g=9), ShapeError, "the cache has 9 heads; at most 8 on toy; split it"),
    "tokens": (*calls(t=9), ShapeError, "9 new tokens do not fit a cache of 8; write at most"),
    "depth": (*calls(d=300), ShapeError, "a row has 1200 bytes; at most 1024 on toy; split the"),
    "page": (*paged(page=3), ShapeError, "a page has 3 tokens; a power of 2 is needed; use pages"),
    "start": (*calls(starts=np.array([0, 7], np.int32)), OptionError,
              "starts has 7; allowed are 0 to 6, where the new tokens fit; correct it"),
    "slot": (*paged(slots=((0, 1), (12, -1))), OptionError,
             "slots has 12; the cache has slots 0 to 11, and negative ones are left out; correct"),
    "twice": (*paged(slots=((0, 1), (1, -1))), OptionError,
              "slots has 1 twice; one token per slot is needed; leave one out with -1"),
    "neither": (*calls(starts=None), OptionError, "neither of starts and slots is given; exactly"),
    "both": (*calls(slots=np.zeros((2, 2), np.int32)), OptionError, "both of starts and slots is"),
    "config": (*calls(config=1), ConfigError, "config is a int; a CacheConfig is needed; pass"),
    "field": (*calls(config=CacheConfig(1, True)), ConfigError,
              "config.scatter is 1; True or False is needed; pass one of them"),
    "descriptors": (*calls(config=CacheConfig(True, True), target="trn1"), ConfigError,
                    "config.hwdge is True; trn1 has no hardware descriptor engine; set it False"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_says_why_and_writes_nothing(name):
    arrays, keywords, error, text = ILLEGAL[name]
    before = [x.copy() for x in arrays]
    with pytest.raises(error) as caught:
        kv_cache_write(*arrays, **{"target": "toy", **keywords})
    assert text in str(caught.value)
    assert same(arrays, before)


def test_rows_that_32_bits_cannot_count():
    spec = spec_for("trn2")
    axes = {"B": 1, "G": 8, "T": 1, "D": 8, "E": 8, "N": 2**24, "P": 16}
    (reason,) = KV_CACHE_WRITE_PAGED.limits(axes, "bfloat16", spec)
    assert reason == "the cache has 2147483648 rows; at most 1073741824 are counted; split it"
