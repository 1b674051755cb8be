"""Distributed attention equals dense attention, forward and backward, on any number of ranks."""

import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import DispatchConfig, DistAttnConfig, MinHeapDispatchAlg, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.planning import plan_attention
from magi_attention.planning.joining import join_first_stage
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from ..kernels.attention import check_bound
from .attention_on_ranks import Problem, attend_densely, attend_on_ranks, make_key, waiting

STAGED = DistAttnConfig(overlap_config=OverlapConfig(degree=3, min_chunk_size=5))


def check_fp64(pool: RankPool, size: int, problem: Problem) -> None:
    ours, oracle = attend_on_ranks(pool, size, problem), attend_densely(problem)
    for (name, actual), (_, expected) in zip(ours.items(), oracle.items(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(rank_pool: RankPool, name: str, size: int) -> None:
    check_fp64(rank_pool, size, Problem.random(named_masks(107)[name], config=STAGED))


@settings(max_examples=40, deadline=None)
@given(
    mask=masks(max_seqlen=70, square=True),
    size=st.sampled_from([2, 3, 4]),
    chunk_size=st.integers(1, 9),
    degree=st.integers(0, 3),
    alg=st.sampled_from([DispatchConfig(), DispatchConfig(MinHeapDispatchAlg())]),
    head_dim_v=st.sampled_from([8, 3, 12]),
)
def test_generated_masks(
    rank_pool: RankPool, mask: AttnMask, size: int, chunk_size: int, degree: int, alg: DispatchConfig, head_dim_v: int
) -> None:
    config = DistAttnConfig(alg, OverlapConfig(degree=degree, min_chunk_size=3))
    check_fp64(rank_pool, size, Problem.random(mask, chunk_size=chunk_size, config=config, head_dim_v=head_dim_v))


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "sliding window causal", "block causal", "holes"])
def test_queries_that_wait_for_the_first_stage(rank_pool: RankPool, name: str, degree: int) -> None:
    """For rows that take no time, some do."""
    problem = Problem.random(named_masks(1200)[name], chunk_size=40, config=waiting(degree))
    plan = plan_attention(problem.mask, 3, problem.chunk_size, config=problem.config)
    assert any(join_first_stage(plan.rank(rank), one_host=True) for rank in range(3))
    check_fp64(rank_pool, 3, problem)


def says_one_host(rank: int, group: dist.ProcessGroup, names: list[str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: names[rank])
        problem = Problem.random(named_masks(64)["causal"], chunk_size=4 + len(set(names)))  # of no other test
        runtime = runtimes.get(make_key(problem, group))
    runtime.agreement.settle()
    return runtime.agreement.one_host


def test_ranks_know_whether_they_share_a_host(rank_pool: RankPool) -> None:
    assert rank_pool.run(says_one_host, 3, ["here"] * 3) == [True] * 3
    assert rank_pool.run(says_one_host, 3, ["here", "here", "there"]) == [False] * 3


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 1), (8, 2)])
def test_head_counts(rank_pool: RankPool, heads: tuple[int, int]) -> None:
    check_fp64(rank_pool, 2, Problem.random(named_masks(61)["varlen causal"], heads=heads, config=STAGED))


@pytest.mark.parametrize("head_dim_v", [3, 12])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_values_of_another_head_dim(rank_pool: RankPool, degree: int, head_dim_v: int) -> None:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=5))
    mask = named_masks(107)["varlen causal"]
    check_fp64(rank_pool, 3, Problem.random(mask, softcap=1.5, config=config, head_dim_v=head_dim_v))


@pytest.mark.parametrize("head_dim_v", [3, 12])
@pytest.mark.parametrize("wire_dtype", ["float32", "input"])
def test_values_of_another_head_dim_in_bfloat16(rank_pool: RankPool, wire_dtype: str, head_dim_v: int) -> None:
    config = replace(STAGED, grad_wire_dtype=wire_dtype)
    problem = Problem.random(named_masks(205)["causal"], torch.bfloat16, config=config, head_dim_v=head_dim_v)
    check_bound(list(vars(attend_on_ranks(rank_pool, 3, problem)).values()), problem)


def test_softcap_and_scale(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(61)["varlen causal"], softcap=0.5, config=STAGED)
    problem.params = replace(problem.params, softmax_scale=0.7)
    check_fp64(rank_pool, 3, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "global sliding window", "prefix tree"])
def test_low_precision_keeps_the_derived_bound(rank_pool: RankPool, name: str, dtype: torch.dtype) -> None:
    problem = Problem.random(named_masks(205)[name], dtype=dtype, config=STAGED)
    check_bound(list(vars(attend_on_ranks(rank_pool, 3, problem)).values()), problem)


def test_rows_that_attend_nothing(rank_pool: RankPool) -> None:
    mask = AttnMask.from_slices([(5, 9)], [(20, 30)], "full", 41, 41)
    ours = attend_on_ranks(rank_pool, 3, Problem.random(mask))
    dead = torch.ones(41, dtype=torch.bool)
    dead[5:9] = False
    assert (ours.out[dead] == 0).all() and torch.isneginf(ours.lse[:, dead]).all() and (ours.dq[dead] == 0).all()
    unseen = torch.ones(41, dtype=torch.bool)
    unseen[20:30] = False
    assert (ours.dk[unseen] == 0).all() and (ours.dv[unseen] == 0).all()
    assert all(torch.isfinite(x).all() for name, x in ours.items() if name != "lse")


def test_repeated_runs_are_bitwise_equal(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(150)["varlen causal"], dtype=torch.float32, config=STAGED)
    first, second = (attend_on_ranks(rank_pool, 4, problem) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.items(), second.items(), strict=True))
