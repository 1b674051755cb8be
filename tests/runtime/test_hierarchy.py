"""Attention over nodes of several ranks equals dense attention, and rows cross between nodes once."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import (
    calc_attn,
    compute_pad_size,
    dispatch,
    init_hierarchical_mesh,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    undispatch,
)
from magi_attention.comm import hierarchical_exchange
from magi_attention.comm.chain import PendingStep
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.joining import join_first_stage
from magi_attention.planning.two_level import MeshShape, rows_across_nodes
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from .attention_on_ranks import Problem, Result, attend, attend_densely, waiting

Mesh = tuple[int, int]
T = TypeVar("T")


@pytest.fixture(scope="module")
def six_ranks() -> Iterator[RankPool]:
    with RankPool(6) as pool:
        yield pool


@cache
def mesh_of(shape: Mesh) -> DeviceMesh:
    """A process has one mesh of each shape, as a training has."""
    return init_hierarchical_mesh(shape[0] * shape[1], *shape)


def make_key(problem: Problem, mesh: DeviceMesh):
    total = problem.mask.total_seqlen_q
    pad_size = compute_pad_size(total, mesh.size(), problem.chunk_size)
    return magi_attn_flex_key(
        *problem.mask.to_ranges(),
        total,
        total,
        pad_size,
        problem.chunk_size,
        cp_mesh=mesh,
        dist_attn_config=problem.config,
    )


def attend_on_mesh(rank: int, group: dist.ProcessGroup, problem: Problem, shape: Mesh) -> Result:
    return attend(problem, make_key(problem, mesh_of(shape)))


def check_fp64(pool: RankPool, shape: Mesh, problem: Problem) -> None:
    first, *others = pool.run(attend_on_mesh, shape[0] * shape[1], problem, shape)
    oracle = attend_densely(problem)
    for (name, actual), (_, expected) in zip(first.items(), oracle.items(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert all(torch.equal(actual, dict(other.items())[name]) for other in others), f"ranks disagree on {name}"


def config_of(degree: int, min_chunk_size: int = 3) -> DistAttnConfig:
    return DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=min_chunk_size))


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks_on_two_nodes_of_two(rank_pool: RankPool, name: str) -> None:
    check_fp64(rank_pool, (2, 2), Problem.random(named_masks(107)[name], config=config_of(3)))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "global sliding window", "several intervals a row"])
def test_named_masks_on_six_ranks(six_ranks: RankPool, name: str, shape: Mesh) -> None:
    check_fp64(six_ranks, shape, Problem.random(named_masks(157)[name], config=config_of(2)))


@settings(max_examples=25, deadline=None)
@given(masks(max_seqlen=70, square=True), st.integers(1, 9), st.integers(0, 3), st.sampled_from([8, 3, 12]))
def test_generated_masks_on_two_nodes_of_two(
    rank_pool: RankPool, mask: AttnMask, chunk_size: int, degree: int, head_dim_v: int
) -> None:
    problem = Problem.random(mask, chunk_size=chunk_size, config=config_of(degree), head_dim_v=head_dim_v)
    check_fp64(rank_pool, (2, 2), problem)


@pytest.mark.parametrize("head_dim_v", [3, 12])
def test_values_of_another_head_dim(rank_pool: RankPool, head_dim_v: int) -> None:
    mask = named_masks(107)["varlen causal"]
    check_fp64(rank_pool, (2, 2), Problem.random(mask, config=config_of(3), head_dim_v=head_dim_v))


@pytest.mark.parametrize("degree", [1, 3])
def test_queries_that_wait_for_the_first_stage(rank_pool: RankPool, degree: int) -> None:
    """For rows that take no time, some do; here, own rows lie ahead of those that come in two levels."""
    config = waiting(degree)
    problem = Problem.random(named_masks(1300)["varlen causal"], chunk_size=40, config=config)
    plan = plan_attention(problem.mask, 4, problem.chunk_size, config=config).on_mesh((2, 2))
    assert all(join_first_stage(plan.rank(rank), one_host=True) for rank in range(4))
    check_fp64(rank_pool, (2, 2), problem)


@settings(max_examples=10, deadline=None)
@given(masks(max_seqlen=90, square=True), st.integers(1, 6), st.integers(0, 3))
def test_generated_masks_on_two_nodes_of_three(
    six_ranks: RankPool, mask: AttnMask, chunk_size: int, degree: int
) -> None:
    check_fp64(six_ranks, (2, 3), Problem.random(mask, chunk_size=chunk_size, config=config_of(degree)))


def at_once(step: Callable[[], T], device: torch.device) -> PendingStep[T]:
    result = step()
    return PendingStep(lambda: result)


def attend_with_steps_ahead(rank: int, group: dist.ProcessGroup, problem: Problem, shape: Mesh) -> list[Result]:
    """With second steps taken when they are waited for, and at once, as on CUDA."""
    key = make_key(problem, mesh_of(shape))
    later = attend(problem, key)
    chain = hierarchical_exchange.chain
    hierarchical_exchange.chain = at_once
    try:
        return [later, attend(problem, key)]
    finally:
        hierarchical_exchange.chain = chain


def test_when_steps_are_taken_changes_nothing(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(107)["varlen causal"], dtype=torch.float32, config=config_of(3))
    for later, at_once in rank_pool.run(attend_with_steps_ahead, 4, problem, (2, 2)):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(later.items(), at_once.items(), strict=True))


def rows_sent_to_other_nodes(rank: int, group: dist.ProcessGroup, problem: Problem, shape: Mesh) -> int:
    """How many rows leave the node from this rank in a forward and a backward pass, beside dispatch."""
    sent = []
    all_to_all = dist.all_to_all_single

    def counting(out, rows, recv_counts, send_counts, group, async_op):
        peers = dist.get_process_group_ranks(group)
        sent.append(sum(n for peer, n in zip(peers, send_counts, strict=True) if peer // shape[1] != rank // shape[1]))
        return all_to_all(out, rows, recv_counts, send_counts, group=group, async_op=async_op)

    dist.all_to_all_single = counting
    try:
        attend_on_mesh(rank, group, problem, shape)
    finally:
        dist.all_to_all_single = all_to_all
    return sum(sent)


@pytest.mark.parametrize("degree", [1, 3])
def test_rows_cross_to_a_node_once_and_come_back_once(six_ranks: RankPool, degree: int) -> None:
    problem = Problem.random(named_masks(157)["causal"], config=config_of(degree))
    plan = plan_attention(problem.mask, 6, problem.chunk_size, config=problem.config)
    rows = rows_across_nodes(plan.routes, MeshShape(2, 3))
    sent = six_ranks.run(rows_sent_to_other_nodes, 6, problem, (2, 3))
    assert sum(sent) == 3 * rows.two_levels  # forward; again in the backward pass, and the gradients home
    assert rows.two_levels < rows.one_level / 2


def use_key(rank: int, group: dist.ProcessGroup, cu_seqlens: list[list[int]]) -> str:
    cu = cu_seqlens[rank]
    key = magi_attn_varlen_key(cu, cu, 0, 4, cp_mesh=mesh_of((2, 2)), causal=True)
    try:
        x = torch.zeros(8, 1, 4)
        calc_attn(x, x, x, key)
    except ValueError as error:
        return str(error)
    return ""


def test_different_masks_are_an_error_on_every_rank(rank_pool: RankPool) -> None:
    for message in rank_pool.run(use_key, 4, [[0, 32], [0, 32], [0, 16, 32], [0, 32]]):
        assert "given different masks" in message and "[[0, 1, 3], [2]]" in message


def keys_of(rank: int, group: dist.ProcessGroup) -> list:
    """Keys over six ranks, in one level and in two."""

    def key(**group_or_mesh):
        return magi_attn_varlen_key([0, 48], [0, 48], 0, 4, causal=True, **group_or_mesh)

    return [key(cp_mesh=mesh_of(shape)) for shape in ((2, 3), (3, 2), (1, 6), (6, 1))] + [key(cp_group=group)]


def test_the_shape_of_the_mesh_is_part_of_the_key(six_ranks: RankPool) -> None:
    (wide, tall, *one_level), *_ = six_ranks.run(keys_of, 6)
    assert (wide.mesh_shape, tall.mesh_shape) == ((2, 3), (3, 2))
    assert wide != tall and wide.digest != tall.digest
    assert [key.mesh_shape for key in one_level] == [None] * 3
    assert len({key.digest for key in one_level}) == 1 and wide.digest != one_level[0].digest


def key_with_plan(rank: int, group: dist.ProcessGroup) -> list[str]:
    mask = builders.varlen([0, 20, 32], causal=True)
    plan = plan_attention(mask, 4, 4)
    messages = []
    for made_ahead in (plan.on_mesh((2, 2)), plan.on_mesh((2, 2)).rank(rank), plan, plan.on_mesh((1, 4))):
        runtimes.clear()
        try:
            key = magi_attn_varlen_key(
                [0, 20, 32], [0, 20, 32], 0, 4, cp_mesh=mesh_of((2, 2)), causal=True, plan=made_ahead
            )
            x = torch.ones(8, 1, 4)
            messages.append(f"out {calc_attn(x, x, x, key)[0].sum():g}")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_plans_made_ahead(rank_pool: RankPool) -> None:
    refused = "plan was made with mesh_shape None, but the key has mesh_shape MeshShape(nodes=2, ranks_per_node=2)"
    assert rank_pool.run(key_with_plan, 4) == [["out 32", "out 32", refused, refused]] * 4


def attend_with_new_mask(rank: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, tuple[int, int]]:
    key = magi_attn_varlen_key([0, 32], [0, 32], 0, 4, cp_mesh=mesh_of((2, 2)), causal=True)
    windows = make_varlen_key_for_new_mask_after_dispatch([0, 32], [0, 32], key, window_size=(9, 3))
    x = Problem.random(builders.sliding_window(32, (9, 3)))
    out, _ = calc_attn(dispatch(x.q, key), dispatch(x.k, key), dispatch(x.v, key), windows)
    return undispatch(out, key), windows.mesh_shape


def test_new_mask_after_dispatch(rank_pool: RankPool) -> None:
    oracle = attend_densely(Problem.random(builders.sliding_window(32, (9, 3))))
    for out, mesh_shape in rank_pool.run(attend_with_new_mask, 4):
        torch.testing.assert_close(out, oracle.out, rtol=1e-11, atol=1e-11)
        assert mesh_shape == (2, 2)


def key_of_unordered_mesh(rank: int, group: dist.ProcessGroup) -> str:
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("inter", "intra"))
    try:
        magi_attn_varlen_key([0, 16], [0, 16], 0, 4, cp_mesh=mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_a_mesh_out_of_order_is_refused(rank_pool: RankPool) -> None:
    refused = "the ranks of a cp_mesh of two axes must be in ascending order, node by node, not [[0, 2], [1, 3]]"
    assert rank_pool.run(key_of_unordered_mesh, 4) == [refused] * 4
