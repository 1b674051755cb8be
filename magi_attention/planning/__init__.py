"""Who computes what, and who sends what to whom: pure functions of a mask, a number of ranks and a configuration."""

from magi_attention.planning.attn_plan import AttnPlan, plan_attention, plan_new_mask
from magi_attention.planning.chunking import compute_pad_size
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.rank_plan import RankPlan, StagePlan
from magi_attention.planning.routing import GroupCollectivePlan
from magi_attention.planning.sources import Sources

__all__ = [
    "AttnPlan",
    "DispatchPlan",
    "GroupCollectivePlan",
    "RankPlan",
    "Sources",
    "StagePlan",
    "compute_pad_size",
    "plan_attention",
    "plan_new_mask",
]
