"""The public operations: contract, config choice and launch of each, and real model shapes."""

from __future__ import annotations

from nki_kernels.operators.contract import Operator
from nki_kernels.operators.matmul import MATMUL

#: Every operator by name. Tests, benchmarks and torch ops are generated from this table.
OPERATORS: dict[str, Operator] = {op.name: op for op in (MATMUL,)}
