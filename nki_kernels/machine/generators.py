"""Pseudo random numbers of an engine: XORWOW states, a few for each compute lane.

The documents name XORWOW (GpSimd, and Vector from gen4) and promise a distribution and that equal
seeds repeat; no sequence of theirs is public. So the contract here is statistical: this is
Marsaglia's xorwow ("Xorshift RNGs", Journal of Statistical Software 8(14), 2003), also for Vector
before gen4, whose generator is another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nki_kernels.machine.dtypes import Array

#: Words of one state: x, y, z, w, v and the counter d.
WORDS = 6
_STEP = np.uint32(362437)


class Xorwow:
    """The generator of one engine; deterministic from its seed.

    Args:
        lanes: compute lanes, one for each partition.
        states: states of a lane; element i of a row comes from state ``i % states``.
        key: seeds it until a kernel does.
    """

    def __init__(self, lanes: int, states: int, key: Sequence[int]) -> None:
        self._shape = (lanes, states, WORDS)
        self.state: Array = np.empty(self._shape, np.uint32)
        self.seed(key)

    def seed(self, key: Sequence[int]) -> None:
        """Fill every state with words mixed from `key` (non-negative ints)."""
        count = self.state.size
        words = np.random.SeedSequence(list(key)).generate_state(count, np.uint32)
        self.state = words.reshape(self._shape)

    def draw(self, first: int, rows: int, count: int) -> Array:
        """Return [rows, count] words of 32 random bits from the lanes from `first` on.

        Every state of a lane advances by ``ceil(count / states)``.
        """
        states = self._shape[1]
        steps = -(-count // states)
        lanes = self.state[first : first + rows]
        # History of v: five words before the first step, then one for each step.
        v = np.empty((steps + WORDS - 1, rows, states), np.uint32)
        v[: WORDS - 1] = np.moveaxis(lanes[..., : WORDS - 1], -1, 0)
        one, two, four = np.uint32(1), np.uint32(2), np.uint32(4)
        for at in range(steps):
            t = v[at] ^ (v[at] >> two)
            last = v[at + WORDS - 2]
            np.bitwise_xor(last ^ (last << four), t ^ (t << one), out=v[at + WORDS - 1])
        counters = np.arange(1, steps + 1, dtype=np.uint32) * _STEP
        d = lanes[..., WORDS - 1] + counters[:, None, None]
        words = v[WORDS - 1 :] + d
        lanes[..., : WORDS - 1] = np.moveaxis(v[steps:], 0, -1)
        lanes[..., WORDS - 1] = d[-1]
        result: Array = np.moveaxis(words, 0, 1).reshape(rows, -1)[:, :count]
        return result
