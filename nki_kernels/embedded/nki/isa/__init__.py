"""nki.isa: one function per instruction, filed by family."""

from __future__ import annotations

from nki.isa import constants
from nki.isa.activation import activation
from nki.isa.dma import dma_copy, dma_transpose
from nki.isa.elementwise import memset, tensor_copy, tensor_scalar, tensor_tensor
from nki.isa.enums import (
    dge_mode,
    dma_engine,
    engine,
    gpsimd_engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
    scalar_engine,
    tensor_engine,
    unknown_engine,
    vector_engine,
)
from nki.isa.matmul import nc_matmul, nc_transpose
from nki.isa.register import register_alloc, register_load, register_move, register_store
from nki.isa.select import iota

from nki_kernels.machine.core import VirtualRegister, current
from nki_kernels.machine.errors import RuleViolation as NkiValidationError
from nki_kernels.machine.instruction import NkiInstruction


def get_nc_version() -> nc_version:
    """Return the generation of the NeuronCore the kernel is built for."""
    return nc_version(current("nisa.get_nc_version").spec.generation)


def get_nc_sub_version() -> int:
    """Return the silicon revision; always 0 (first silicon) here."""
    current("nisa.get_nc_sub_version")
    return 0


__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activation",
    "constants",
    "dge_mode",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "engine",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "matmul_perf_mode",
    "memset",
    "nc_matmul",
    "nc_transpose",
    "nc_version",
    "oob_mode",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "scalar_engine",
    "tensor_copy",
    "tensor_engine",
    "tensor_scalar",
    "tensor_tensor",
    "unknown_engine",
    "vector_engine",
]
