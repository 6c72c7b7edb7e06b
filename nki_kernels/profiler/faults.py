"""The performance faults that `advise` knows, one rule each."""

from __future__ import annotations

from nki_kernels.profiler.advice import Rule
from nki_kernels.profiler.engines import (
    collisions,
    eviction,
    loop_overhead,
    strided_operands,
    table_switches,
    transposes,
    unused_partitions,
)
from nki_kernels.profiler.movement import (
    reloaded_input,
    serialised_loads,
    single_buffering,
    spills,
    tiny_dmas,
)

RULES: tuple[Rule, ...] = (
    serialised_loads,
    single_buffering,
    tiny_dmas,
    table_switches,
    eviction,
    strided_operands,
    unused_partitions,
    loop_overhead,
    collisions,
    transposes,
    reloaded_input,
    spills,
)
