"""Checks of a finished trace: what a kernel did, judged from its events and addresses alone.

They see no value, run off the path of instructions, and find the same with shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator

from nki_kernels.machine.checks.alias import alias_errors
from nki_kernels.machine.checks.groups import interleaved, sums_read
from nki_kernels.machine.checks.independence import carried
from nki_kernels.machine.checks.program import repeated_names, too_long
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.options import Options
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.trace import Trace


def findings(
    trace: Trace, placement: Placement | None, options: Options
) -> Iterator[tuple[str, NkiKernelsError]]:
    """Yield (name of the check, error) for every mistake the trace shows.

    Args:
        trace: of a finished kernel.
        placement: where its tiles lie, or None where they did not fit.
        options: which checks look.
    """
    if placement is not None and options.alias != "off":
        yield from (("alias", error) for error in alias_errors(trace, placement))
    for check, find in (
        ("accumulation", sums_read),
        ("interleave", interleaved),
        ("independent", carried),
        ("names", repeated_names),
    ):
        if options.level(check) != "off":
            yield from ((check, error) for error in find(trace))
    if options.instruction_count != "off":
        for error in too_long(trace, options.instruction_limit):
            yield "instruction_count", error
