"""rand, random_seed, dropout. The contract is statistical: no sequence of the device is public."""

from __future__ import annotations

from typing import Any

from nki import isa
from nki.language.math import fresh, require_tile
from nki.language.tensors import by_blocks

from nki_kernels.machine import dtypes
from nki_kernels.machine.core import current
from nki_kernels.machine.errors import DtypeError
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor

_SBUF = MemoryRegion.sbuf


def rand(shape: Any, dtype: Any, buffer: MemoryRegion = _SBUF, name: str = "") -> NkiTensor:
    """Return a new tensor of uniform random numbers from [0, 1), drawn on the Vector engine.

    gen4 has rand2. Before, nisa.rng's upper 24 bits are scaled by 2^-24; the documents suggest 16
    bits over 2^16 - 1, which includes 1. Narrow types may round up to 1. `nl.random_seed` seeds
    both: its published example asks for that on every generation.

    Raises:
        DtypeError: a dtype that is no float.
    """
    run = current("nl.rand")
    kind = dtypes.as_dtype(dtype)
    if not kind.is_float:
        raise DtypeError(f"nl.rand: dtype {kind}; it must be a float type: convert with nl.copy")
    result = run.allocate(shape, kind, buffer, name)

    def fill(tile: NkiTensor) -> None:
        if run.spec.generation >= 4:
            isa.rand2(dst=tile, min=0.0, max=1.0)
            return
        bits = fresh(tile, dtypes.uint32, "nl.rand")
        isa.rng(dst=bits, engine=isa.engine.vector)
        isa.tensor_scalar(dst=bits, data=bits, op0=OPS["right_shift"], operand0=8)
        isa.tensor_scalar(dst=tile, data=bits, op0=OPS["multiply"], operand0=2.0**-24)

    by_blocks(result, fill, once=False)
    return result


def random_seed(seed: NkiTensor) -> None:
    """Seed the Vector engine's generator from one 32-bit element [1, 1] in SBUF or PSUM.

    Equal seeds repeat what `nl.rand` and `nl.dropout` draw afterwards.
    """
    require_tile(seed, "nl.random_seed", "seed")
    isa.set_rng_seed(src_seeds=seed)


def dropout(x: NkiTensor, rate: Any, dtype: Any = None) -> NkiTensor:
    """Return x with each element zeroed with probability `rate`, in a new SBUF tile.

    Args:
        x: a tile.
        rate: a number from 0 to 1, or a [P, 1] tile of one probability per partition.
        dtype: of the result; x's by default.

    What is kept is not scaled up (the documents mention no scaling).
    """
    kept = fresh(x, None, "nl.dropout")
    isa.dropout(dst=kept, data=x, prob=rate)
    kind = dtypes.as_dtype(dtype or x.dtype)
    if kind == x.dtype:
        return kept
    result = fresh(x, kind, "nl.dropout")
    isa.tensor_copy(dst=result, src=kept)
    return result
