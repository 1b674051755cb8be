"""Own keys kept for the end of the backward pass, or all attended first: the results are those of dense attention."""

import pytest

from magi_attention.config import CostModel, DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.planning import plan_attention
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool

from .attention_on_ranks import Problem
from .test_dist_attn import check_fp64


def config(keeps: bool, degree: int) -> DistAttnConfig:
    costs = CostModel(latency=1.0) if keeps else CostModel(stage_overhead=1.0)
    return DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=4, cost_model=costs))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "sliding window"])
def test_named_masks(rank_pool: RankPool, name: str, degree: int, keeps: bool) -> None:
    problem = Problem.random(named_masks(107)[name], config=config(keeps, degree))
    plan = plan_attention(problem.mask, 3, problem.chunk_size, config=problem.config)
    assert plan.keeps_own_keys is keeps
    assert [plan.rank(n).own_keys_before < plan.rank(n).local_seqlen_k for n in range(3)] == [keeps] * 3
    check_fp64(rank_pool, 3, problem)


def test_ranks_that_attend_none_of_their_own(rank_pool: RankPool) -> None:
    mask = AttnMask.from_slices([(0, 64), (64, 128)], [(64, 128), (0, 64)], "full", 128, 128)
    contiguous = DistAttnConfig(DispatchConfig(order="contiguous"), config(keeps=True, degree=2).overlap_config)
    problem = Problem.random(mask, config=contiguous)
    plan = plan_attention(mask, 2, problem.chunk_size, config=contiguous)
    assert plan.keeps_own_keys and all(len(plan.rank(n).local_bands) == 0 for n in range(2))
    check_fp64(rank_pool, 2, problem)
