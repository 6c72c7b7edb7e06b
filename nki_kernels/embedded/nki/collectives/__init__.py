"""nki.collectives: what ranks exchange; here the ranks of one process (`launch_ranks`)."""

from __future__ import annotations

from nki.collectives.group import ReplicaGroup
from nki.collectives.permute import (
    collective_permute,
    collective_permute_implicit,
    collective_permute_implicit_current_processing_rank_id,
    collective_permute_implicit_reduce,
    rank_id,
)
from nki.collectives.uniform import all_gather, all_reduce, all_to_all, reduce_scatter
from nki.collectives.variable import all_gather_v, all_to_all_v

__all__ = [
    "ReplicaGroup",
    "all_gather",
    "all_gather_v",
    "all_reduce",
    "all_to_all",
    "all_to_all_v",
    "collective_permute",
    "collective_permute_implicit",
    "collective_permute_implicit_current_processing_rank_id",
    "collective_permute_implicit_reduce",
    "rank_id",
    "reduce_scatter",
]
