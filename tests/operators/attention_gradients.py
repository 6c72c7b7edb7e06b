"""What the tests of the gradients of attention share: operands, and the comparison."""

from __future__ import annotations

from nki_kernels.operators.attention_backward import MASKED_ATTENTION_BACKWARD
from reference.attention_backward import attention_backward as reference
from reference.attention_backward import inputs_of
from tests.operators.attentions import PATTERN
from tests.operators.attentions import operands as forward_operands
from tests.strategies.matrices import normal
from tests.tolerance import assert_close


def pattern_of(options):
    return {name: options[name] for name in PATTERN if name in options}


def operands(b, h, g, m, n, d, dtype, seed=0, options=None, extras=(), e=None):
    """Return do, q, k, v, out and lse, the last two as the forward pass gives them."""
    q, k, v = forward_operands(b, h, g, m, n, d, dtype, seed, e=e)
    do = normal(seed + 7, (b, h, m, e or d), q.dtype)
    return inputs_of(do, q, k, v, *extras, **pattern_of(options or {}))


def run(inputs, options, extras=(), target="toy", config=None):
    """Launch with optional operands None; return the launch."""
    extras = (*extras, None, None, None)[:3]
    return MASKED_ATTENTION_BACKWARD.launch(
        (*inputs, *extras), options, config=config, target=target
    )


def compare(result, inputs, options, extras=(), case=""):
    """Compare dq, dk, dv, and dsinks and dbias where there are, with the reference."""
    extras = (*extras, None, None, None)[:3]
    found = reference(*inputs, *extras, **pattern_of(options))
    names = ["dq", "dk", "dv"]
    names += ["dsinks"] * (extras[0] is not None) + ["dbias"] * (extras[2] is not None)
    for name, got, want in zip(names, result, found, strict=True):
        assert_close(
            got, want.value, want.magnitude, op=f"attention_backward {name}", case=case,
            roundings=MASKED_ATTENTION_BACKWARD.roundings, chain=1,
        )  # fmt: skip


def check(inputs, options, extras=(), case="", target="toy", config=None):
    launched = run(inputs, options, extras, target, config)
    compare(launched.result, inputs, options, extras, case or f"{options}")
    return launched
