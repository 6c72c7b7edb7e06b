"""One small legal call of every instruction, legal on every generation that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nki.isa as nisa
import nki.language as nl

from tests.embedded.harness import hbm, ps, sb

#: GpSimd's cores and the Vector engine's quadrants on the real chips.
CORE = 16


def zeros(*shape: int, dtype: Any = nl.float32) -> Any:
    """A tile of zeros, where a value must be legal as well."""
    made = sb(*shape, dtype=dtype)
    nisa.memset(dst=made, value=0)
    return made


PROBES: dict[str, Callable[[], Any]] = {
    "activate2": lambda: nisa.activate2(
        dst=sb(4, 4), op=nl.copy, data=sb(4, 4), imm0=1.0, imm1=0.0, op0=nl.multiply, op1=nl.add
    ),
    "activation": lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4)),
    "activation_reduce": lambda: nisa.activation_reduce(
        dst=sb(4, 4), op=nl.exp, data=sb(4, 4), reduce_op=nl.add, reduce_res=sb(4, 1)
    ),
    "affine_select": lambda: nisa.affine_select(
        dst=sb(4, 4), pattern=[[1, 4]], channel_multiplier=1, on_true_tile=sb(4, 4),
        on_false_value=0.0,
    ),
    "bn_aggr": lambda: nisa.bn_aggr(dst=sb(4, 2), data=sb(4, 6)),
    "bn_stats": lambda: nisa.bn_stats(dst=sb(4, 6), data=sb(4, 8)),
    "dma_compute": lambda: nisa.dma_compute(dst=sb(4, 4), srcs=[sb(4, 4)], reduce_op=nl.add),
    "dma_copy": lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4)),
    "dma_transpose": lambda: nisa.dma_transpose(dst=sb(4, 4), src=hbm(4, 4)),
    "dropout": lambda: nisa.dropout(dst=sb(4, 4), data=sb(4, 4), prob=0.5),
    "exponential": lambda: nisa.exponential(dst=sb(4, 4), src=sb(4, 4)),
    "iota": lambda: nisa.iota(dst=sb(4, 4), pattern=[[1, 4]]),
    "local_gather": lambda: nisa.local_gather(
        dst=sb(CORE, CORE), src_buffer=sb(CORE, 4), index=zeros(CORE, 1, dtype=nl.uint16)
    ),
    "max8": lambda: nisa.max8(dst=sb(4, 8), src=sb(4, 8)),
    "memset": lambda: nisa.memset(dst=sb(4, 4), value=0.0),
    "nc_find_index8": lambda: nisa.nc_find_index8(
        dst=sb(4, 8, dtype=nl.uint32), data=sb(4, 8), vals=sb(4, 8)
    ),
    "nc_match_replace8": lambda: nisa.nc_match_replace8(
        dst=sb(4, 8), data=sb(4, 8), vals=sb(4, 8), imm=0.0
    ),
    "nc_matmul": lambda: nisa.nc_matmul(dst=ps(4, 4), stationary=sb(4, 4), moving=sb(4, 4)),
    "nc_matmul_mx": lambda: nisa.nc_matmul_mx(
        dst=ps(2, 2), stationary=sb(32, 2, dtype=nl.float8_e5m2_x4),
        moving=sb(32, 2, dtype=nl.float8_e5m2_x4), stationary_scale=sb(4, 2, dtype=nl.uint8),
        moving_scale=sb(4, 2, dtype=nl.uint8),
    ),
    "nc_n_gather": lambda: nisa.nc_n_gather(
        dst=sb(4, 4), data=sb(4, 4), indices=zeros(4, 4, dtype=nl.uint32)
    ),
    "nc_stream_shuffle": lambda: nisa.nc_stream_shuffle(
        dst=sb(32, 4), src=sb(32, 4), shuffle_mask=[0] * 32
    ),
    "nc_transpose": lambda: nisa.nc_transpose(dst=ps(4, 4), data=sb(4, 4)),
    "nonzero_with_count": lambda: nisa.nonzero_with_count(
        dst=sb(CORE, 5, dtype=nl.int32), src=sb(CORE, 4)
    ),
    "quantize_mx": lambda: nisa.quantize_mx(
        dst=sb(32, 1, dtype=nl.float8_e5m2_x4), src=sb(32, 4, dtype=nl.bfloat16),
        dst_scale=sb(4, 1, dtype=nl.uint8),
    ),
    "rand2": lambda: nisa.rand2(dst=sb(4, 4), min=0.0, max=1.0),
    "rand_get_state": lambda: nisa.rand_get_state(dst=sb(4, 6, dtype=nl.uint32)),
    "rand_set_state": lambda: nisa.rand_set_state(src_seeds=sb(4, 6, dtype=nl.uint32)),
    "range_select": lambda: nisa.range_select(
        dst=sb(4, 4), on_true_tile=sb(4, 4), comp_op0=nl.less, comp_op1=nl.less, bound0=sb(4, 1),
        bound1=sb(4, 1),
    ),
    "reciprocal": lambda: nisa.reciprocal(dst=sb(4, 4), data=sb(4, 4)),
    "rng": lambda: nisa.rng(dst=sb(4, 4, dtype=nl.uint32)),
    "scalar_tensor_tensor": lambda: nisa.scalar_tensor_tensor(
        dst=sb(4, 4), data=sb(4, 4), op0=nl.add, operand0=1.0, op1=nl.add, operand1=sb(4, 4)
    ),
    "select_reduce": lambda: nisa.select_reduce(
        dst=sb(4, 4), predicate=sb(4, 4, dtype=nl.uint8), on_true=sb(4, 4), on_false=0.0
    ),
    "sequence_bounds": lambda: nisa.sequence_bounds(dst=sb(1, 2, 4), segment_ids=zeros(1, 4)),
    "set_rng_seed": lambda: nisa.set_rng_seed(src_seeds=sb(1, 1, dtype=nl.uint32)),
    "tensor_copy": lambda: nisa.tensor_copy(dst=sb(4, 4), src=sb(4, 4)),
    "tensor_copy_predicated": lambda: nisa.tensor_copy_predicated(
        dst=sb(4, 4), src=sb(4, 4), predicate=sb(4, 4, dtype=nl.uint8)
    ),
    "tensor_partition_reduce": lambda: nisa.tensor_partition_reduce(
        dst=sb(1, 4), op=nl.add, data=sb(4, 4)
    ),
    "tensor_reduce": lambda: nisa.tensor_reduce(dst=sb(4, 1), op=nl.add, data=sb(4, 4), axis=1),
    "tensor_scalar": lambda: nisa.tensor_scalar(
        dst=sb(4, 4), data=sb(4, 4), op0=nl.add, operand0=1.0
    ),
    "tensor_scalar_cumulative": lambda: nisa.tensor_scalar_cumulative(
        dst=sb(4, 4), src=sb(4, 4), op0=nl.add, op1=nl.add, imm0=0.0
    ),
    "tensor_scalar_reduce": lambda: nisa.tensor_scalar_reduce(
        dst=sb(4, 4), data=sb(4, 4), op0=nl.add, operand0=1.0, reduce_op=nl.add
    ),
    "tensor_tensor": lambda: nisa.tensor_tensor(
        dst=sb(4, 4), data1=sb(4, 4), data2=sb(4, 4), op=nl.add
    ),
    "tensor_tensor_scan": lambda: nisa.tensor_tensor_scan(
        dst=sb(4, 4), data0=sb(4, 4), data1=sb(4, 4), initial=0.0, op0=nl.add, op1=nl.add
    ),
    "topk": lambda: nisa.topk(
        val_dst=sb(CORE, 1, dtype=nl.bfloat16), idx_dst=sb(CORE, 1, dtype=nl.uint32),
        src=sb(CORE, 1, dtype=nl.bfloat16), n=8,
    ),
}  # fmt: skip
