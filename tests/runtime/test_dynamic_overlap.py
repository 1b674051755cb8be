"""Attention in stages that a cost model chose equals dense attention, forward and backward."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import AttnOverlapMode, CostModel, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.planning import plan_attention
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from .attention_on_ranks import Problem
from .test_dist_attn import check_fp64


def dynamic(**costs: float) -> DistAttnConfig:
    model = CostModel(forward_tflops=1e-3, backward_tflops=1e-3, hbm_bandwidth=1e14, **costs)
    return DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC, min_chunk_size=3, cost_model=model))


@pytest.mark.parametrize(("latency", "degree"), [(0.0, 4), (1.0, 1)])
def test_many_stages_and_one(rank_pool: RankPool, latency: float, degree: int) -> None:
    problem = Problem.random(
        named_masks(107)["causal"], config=dynamic(latency=latency, bandwidth=3e6, stage_overhead=0.0)
    )
    choice = plan_attention(problem.mask, 3, problem.chunk_size, config=problem.config).overlap_choice
    assert choice is not None and choice.chosen.degree == degree
    check_fp64(rank_pool, 3, problem)


@settings(max_examples=15, deadline=None)
@given(
    mask=masks(max_seqlen=70, square=True),
    size=st.sampled_from([1, 2, 4]),
    bandwidth=st.sampled_from([1e6, 1e8, 1e10]),
)
def test_generated_masks(rank_pool: RankPool, mask: AttnMask, size: int, bandwidth: float) -> None:
    config = dynamic(latency=0.0, bandwidth=bandwidth, stage_overhead=0.0)
    check_fp64(rank_pool, size, Problem.random(mask, chunk_size=5, config=config))
