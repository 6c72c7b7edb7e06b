"""Names that NKI has or had and the embedded NKI has not: an AttributeError that says so."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import NoReturn

#: Removed from NKI, with what takes their place (release notes and migration guide).
REMOVED: dict[str, dict[str, str]] = {
    "nki.language": {
        "par_dim": "dimension 0 of a tile is the partition: write the size itself",
        "arange": "index tiles with slices, t[0:128, 0:512]",
        "mgrid": "index tiles with slices, t[0:128, 0:512]",
        "spmd_dim": "launch with kernel[2](...) and read nl.program_id(0)",
        "nc": "launch with kernel[2](...) and read nl.program_id(0)",
        "fp32": "write the number, for example -3.4028235e38 for fp32.min",
        "loop_reduce": "accumulate in a tile with nisa.tensor_tensor",
        "atomic_rmw": "use nisa.dma_compute",
    },
    "nki.isa": {
        "tensor_copy_dynamic_src": "use nisa.tensor_copy with src.ap(..., scalar_offset=...)",
        "tensor_copy_dynamic_dst": "use nisa.tensor_copy with dst.ap(..., scalar_offset=...)",
    },
    "nki": {
        "baremetal": "call the kernel with NumPy arrays",
        "benchmark": "use nki_kernels.profile(kernel, *arguments)",
        "simulate_kernel": "use nki.simulate(kernel)(*arguments)",
    },
}
#: Published by NKI 0.6 or 0.7 and not implemented here, with what does the same.
NOT_HERE: dict[str, dict[str, str]] = {
    "nki.language": {
        "int64": "registers and scalars have 32 bits: use nl.int32",
        **dict.fromkeys(
            ("tiles", "blocks", "NkiGrid", "NkiTileGrid", "NkiBlockGrid"),
            "slice the tensor: t[i * rows : (i + 1) * rows, ...]",
        ),
        **dict.fromkeys(
            ("alloc_tiles", "alloc_blocks"), "allocate each tile with nl.ndarray, in a list"
        ),
    },
    "nki.isa": {},
    "nki": {"compiler": "its options steer the real compiler: leave them out here"},
}


def absent(module: str, present: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of a module.

    Args:
        module: its name.
        present: the names it has, for suggestions.
    """
    names = list(present)
    short = {"nki.language": "nl", "nki.isa": "nisa"}.get(module, module)

    def missing(name: str) -> NoReturn:
        if name in REMOVED[module]:
            reason = f"NKI removed this name; {REMOVED[module][name]}"
        elif name in NOT_HERE[module]:
            reason = f"NKI has this name, the embedded NKI does not; {NOT_HERE[module][name]}"
        else:
            close = difflib.get_close_matches(name, names, 3)
            likely = f"; close to it are {', '.join(close)}" if close else ""
            reason = f"NKI 0.6 has no such name{likely}"
        raise AttributeError(f"{short}.{name}: {reason}", name=name)

    return missing
