"""nki.isa: one function per instruction, filed by family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nki._absent import absent
from nki.isa import constants
from nki.isa.activate2 import activate2
from nki.isa.activation import activation, activation_reduce
from nki.isa.cumulative import tensor_partition_reduce, tensor_scalar_cumulative
from nki.isa.dma import dma_copy, dma_transpose
from nki.isa.dma_compute import dma_compute
from nki.isa.elementwise import (
    memset,
    reciprocal,
    scalar_tensor_tensor,
    tensor_copy,
    tensor_scalar,
    tensor_tensor,
)
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
from nki.isa.exponential import exponential
from nki.isa.gather import local_gather, nc_n_gather, nc_stream_shuffle
from nki.isa.matmul import nc_matmul, nc_transpose
from nki.isa.mx import nc_matmul_mx, quantize_mx
from nki.isa.nonzero import nonzero_with_count, sequence_bounds, topk
from nki.isa.random import (
    dropout,
    rand2,
    rand_get_state,
    rand_set_state,
    rng,
    set_rng_seed,
)
from nki.isa.reduction import (
    bn_aggr,
    bn_stats,
    select_reduce,
    tensor_reduce,
    tensor_scalar_reduce,
    tensor_tensor_scan,
)
from nki.isa.register import register_alloc, register_load, register_move, register_store
from nki.isa.scalar import NkiScalar, scalar_load, scalar_store
from nki.isa.search import max8, nc_find_index8, nc_match_replace8
from nki.isa.select import affine_select, iota, range_select, tensor_copy_predicated
from nki.isa.sync import core_barrier, sendrecv

from nki_kernels.machine.core import VirtualRegister, current
from nki_kernels.machine.errors import RuleViolation as NkiValidationError
from nki_kernels.machine.handles import NkiInstruction, dependency


def get_nc_version() -> nc_version:
    """Return the generation of the NeuronCore the kernel is built for."""
    return nc_version(current("nisa.get_nc_version").spec.generation)


def get_nc_sub_version() -> int:
    """Return the silicon revision; always 0 (first silicon) here."""
    current("nisa.get_nc_sub_version")
    return 0


__all__ = [
    "NkiInstruction",
    "NkiScalar",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "constants",
    "core_barrier",
    "dependency",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_matmul_mx",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "quantize_mx",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "rng",
    "scalar_engine",
    "scalar_load",
    "scalar_store",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "topk",
    "unknown_engine",
    "vector_engine",
]

if not TYPE_CHECKING:  # for a type checker, a name that is missing is missing
    __getattr__ = absent(__name__, __all__)
