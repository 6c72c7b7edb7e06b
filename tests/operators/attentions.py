"""What the tests of attention share: operands, and the comparison under the error rule."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nki_kernels.operators.attention import MASKED_ATTENTION
from reference.attention import attention as reference
from tests.strategies.matrices import normal
from tests.tolerance import assert_close

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
PATTERN = ("causal", "align", "window", "scale", "softcap", "slopes")


def operands(b, h, g, m, n, d, dtype, seed=0, e=None, make=normal):
    host = DTYPES[dtype]
    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, e or d))
    return tuple(make(seed + at, shape, host) for at, shape in enumerate(shapes))


def run(inputs, options, target="toy", config=None):
    """Launch with optional operands None; return the launch."""
    inputs = (*inputs, None, None, None)[:6]
    return MASKED_ATTENTION.launch(inputs, options, config=config, target=target)


def compare(result, inputs, options, case, dtype=None):
    """Compare (out, lse) with the reference."""
    pattern = {name: options[name] for name in PATTERN if name in options}
    found = reference(*inputs, **pattern)
    for name, got, want in zip(("out", "lse"), result, found, strict=True):
        assert_close(
            got, want.value, want.magnitude, op=f"attention {name}", case=case,
            roundings=MASKED_ATTENTION.roundings, chain=1,
        )  # fmt: skip


def check(inputs, options, case, target="toy", config=None):
    launched = run(inputs, options, target, config)
    compare(launched.result, inputs, options, case)
    return launched


def repaired(launched):
    """Tell whether the exact second path ran."""
    return any(event.opcode == "loop_iteration" for event in launched.trace)
