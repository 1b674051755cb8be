"""Attention whose heads are split inside a node, and its sequence among nodes, equals dense attention."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.api import (
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.node_shares import cut_among_ranks
from magi_attention.planning.sources import Sources
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from ..kernels.attention import check_bound, names_of, run_dense
from .attention_on_ranks import Problem, make_key
from .test_hierarchy import Mesh, mesh_of, rows_sent_to_other_nodes

DSINK = 5


@pytest.fixture(scope="module")
def six_ranks() -> Iterator[RankPool]:
    with RankPool(6) as pool:
        yield pool


def by_heads(degree: int = 1, min_chunk_size: int = 3, **dispatch_config) -> DistAttnConfig:
    return DistAttnConfig(
        DispatchConfig(**dispatch_config),
        OverlapConfig(degree=degree, min_chunk_size=min_chunk_size),
        intra_node="heads",
    )


def attend(rank: int, group: dist.ProcessGroup, problem: Problem, shape: Mesh) -> list[Tensor]:
    """Results in the order of ``names_of``, global but for the gradient of the sink."""
    key = make_key(problem, mesh_of(shape))
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    locals_ = [dispatch(x, key, side=side) for x, side in zip(leaves, "qkk", strict=True)]
    params = problem.params
    options = {name: getattr(params, name) for name in ("softcap", "deterministic", "return_max_logits")}
    if problem.sink is not None:
        leaves.append(problem.sink.clone().requires_grad_())
        options["sink"] = leaves[-1]
    out, lse, *max_logits = calc_attn(*locals_, key, **options)
    assert out.is_contiguous() and lse.is_contiguous()
    out, lse = undispatch(out, key), undispatch(lse.T.contiguous(), key).T
    alive = torch.isfinite(lse)
    ((out * problem.dout).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse).sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves), *max_logits]


def attend_on_mesh(pool: RankPool, shape: Mesh, problem: Problem) -> list[Tensor]:
    """The result, which must be the same on every rank, with the sum of the ranks' gradients of the sink."""
    first, *others = pool.run(attend, shape[0] * shape[1], problem, shape)
    names = names_of(problem)
    for other in others:
        assert all(torch.equal(a, b) for n, a, b in zip(names, first, other, strict=True) if n != "dsink")
    if "dsink" in names:
        first[DSINK] = sum(other[DSINK] for other in [first, *others])
    return first


def check_fp64(pool: RankPool, shape: Mesh, problem: Problem) -> None:
    ours = attend_on_mesh(pool, shape, problem)
    for name, actual, expected in zip(names_of(problem), ours, run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks_on_two_nodes_of_two(rank_pool: RankPool, name: str) -> None:
    check_fp64(rank_pool, (2, 2), Problem.random(named_masks(107)[name], config=by_heads(2)))


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (4, 1), (8, 8)])
def test_heads_of_any_shape_of_the_mesh(rank_pool: RankPool, heads: tuple[int, int], shape: Mesh) -> None:
    """Also KV heads that several ranks share, one node, and nodes of one rank."""
    check_fp64(rank_pool, shape, Problem.random(named_masks(107)["varlen causal"], heads=heads, config=by_heads(2)))


@settings(max_examples=25, deadline=None)
@given(
    masks(max_seqlen=70, square=True),
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from([(2, 1), (4, 2), (8, 2)]),
    st.booleans(),
    st.sampled_from([8, 3, 12]),
)
def test_generated_masks(
    rank_pool: RankPool,
    mask: AttnMask,
    chunk_size: int,
    degree: int,
    heads: tuple[int, int],
    has_sink: bool,
    head_dim_v: int,
) -> None:
    config = by_heads(degree)
    problem = Problem.random(mask, chunk_size=chunk_size, heads=heads, config=config, head_dim_v=head_dim_v)
    check_fp64(rank_pool, (2, 2), problem.with_sink() if has_sink else problem)


@pytest.mark.parametrize("head_dim_v", [3, 12])
@pytest.mark.parametrize("heads", [(8, 4), (4, 1)])
def test_values_of_another_head_dim(rank_pool: RankPool, heads: tuple[int, int], head_dim_v: int) -> None:
    mask = named_masks(107)["varlen causal"]
    problem = Problem.random(mask, heads=heads, config=by_heads(2), head_dim_v=head_dim_v)
    check_fp64(rank_pool, (2, 2), problem.with_sink())


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_six_ranks(six_ranks: RankPool, shape: Mesh) -> None:
    """Three ranks share one KV head or have one each."""
    for heads in (6, 6), (6, 2 if shape[1] == 2 else 1):
        problem = Problem.random(named_masks(157)["several intervals a row"], heads=heads, config=by_heads(2))
        check_fp64(six_ranks, shape, problem.with_sink())


@pytest.mark.parametrize("order", ["balanced", "contiguous", "zigzag"])
def test_orders_and_softcap(rank_pool: RankPool, order: str) -> None:
    check_fp64(rank_pool, (2, 2), Problem.random(named_masks(107)["causal"], softcap=1.5, config=by_heads(order=order)))


def test_uneven_shares(rank_pool: RankPool) -> None:
    """The last chunk is short, and numbers of chunks divide neither by nodes nor by the ranks of a node."""
    check_fp64(rank_pool, (2, 2), Problem.random(named_masks(107)["varlen causal"], config=by_heads(2, uneven=True)))


@pytest.mark.parametrize("keys", [3, 53])
def test_cross_attention(rank_pool: RankPool, keys: int) -> None:
    """With three keys there is a rank that has none."""
    mask = AttnMask.from_slices([(0, 30), (30, 41)], [(0, 2), (1, keys)], "full", 41, keys)
    problem = Problem.random(mask, config=by_heads(), sources=Sources(is_same_source=False), chunk_size=2)
    check_fp64(rank_pool, (2, 2), problem)


def test_low_precision_keeps_the_derived_bound(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(205)["varlen causal"], torch.bfloat16, config=by_heads(2)).with_sink()
    check_bound(attend_on_mesh(rank_pool, (2, 2), problem), problem)


def test_a_row_of_each_head_crosses_to_a_node_once(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(157)["causal"], config=by_heads(2))
    nodes = plan_attention(problem.mask, 2, problem.chunk_size, 3, problem.config)
    sent = rank_pool.run(rows_sent_to_other_nodes, 4, problem, (2, 2))
    # Each of two ranks sends half of the heads of these rows forward, again in the backward pass, and gradients home.
    assert sum(sent) == 2 * 3 * nodes.routes.rows.sum() > 0


# --- What goes with it ------------------------------------------------------------------------------------------------


def test_ranks_of_a_node_have_equal_runs_of_its_rows() -> None:
    for uneven, pad_size in ((False, 13), (True, 0)):
        config = by_heads(uneven=uneven)
        nodes = plan_attention(named_masks(203)["varlen causal"], 2, 4, pad_size, config).dispatch
        ranks = cut_among_ranks(nodes, 3)
        for node in range(2):
            share = [ranks.position_ids(rank) for rank in range(3 * node, 3 * node + 3)]
            np.testing.assert_array_equal(np.concatenate(share), nodes.position_ids(node))
        assert max(ranks.local_seqlens) - min(ranks.local_seqlens) <= (4 if uneven else 0)
        assert ranks.cp_size == 6


def use_rows(rank: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key = magi_attn_varlen_key([0, 20, 45], [0, 20, 45], 3, 4, cp_mesh=mesh_of((2, 2)), dist_attn_config=by_heads())
    x = torch.arange(45.0)
    local = dispatch(x, key)
    return get_position_ids(key), local, undispatch(local, key), undispatch(roll(local, -7, 0, key), key)


def test_rows_come_and_go(rank_pool: RankPool) -> None:
    x = torch.arange(45.0)
    positions, rows, *back = zip(*rank_pool.run(use_rows, 4), strict=True)
    assert sorted(torch.cat(positions).tolist()) == [*range(45), 44, 44, 44]
    assert {len(row) for row in rows} == {12}
    for position, row in zip(positions, rows, strict=True):
        real = row != 0
        assert torch.equal(row[real], position[real].float())
    for there_and_back, rolled in zip(*back, strict=True):
        assert torch.equal(there_and_back, x) and torch.equal(rolled, x.roll(-7))


def attend_with_new_mask(rank: int, group: dist.ProcessGroup) -> tuple[Tensor, str]:
    key = magi_attn_varlen_key([0, 32], [0, 32], 0, 4, cp_mesh=mesh_of((2, 2)), dist_attn_config=by_heads())
    windows = make_varlen_key_for_new_mask_after_dispatch([0, 32], [0, 32], key, window_size=(9, 3))
    x = Problem.random(builders.sliding_window(32, (9, 3)))
    out = undispatch(calc_attn(*(dispatch(x, key) for x in (x.q, x.k, x.v)), windows)[0], key)
    try:
        make_varlen_key_for_new_mask_after_dispatch([0, 32], [0, 32], key, dist_attn_config=DistAttnConfig())
    except ValueError as error:
        return out, str(error)
    return out, ""


def test_new_mask_after_dispatch(rank_pool: RankPool) -> None:
    expected = run_dense(Problem.random(builders.sliding_window(32, (9, 3))))[0]
    for out, message in rank_pool.run(attend_with_new_mask, 4):
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
        assert "has intra_node='sequence', but the rows were dispatched with 'heads'" in message


def keys_of(rank: int, group: dist.ProcessGroup) -> list:
    return [
        magi_attn_varlen_key([0, 48], [0, 48], 0, 4, cp_mesh=mesh_of(shape), dist_attn_config=config)
        for shape, config in (((2, 2), by_heads()), ((1, 4), by_heads()), ((2, 2), DistAttnConfig()))
    ]


def test_keys_differ_by_mesh_and_by_what_nodes_split(rank_pool: RankPool) -> None:
    keys, *_ = rank_pool.run(keys_of, 4)
    assert len({key.digest for key in keys}) == len(set(keys)) == 3
    assert [key.mesh_shape for key in keys] == [(2, 2), (1, 4), (2, 2)]


def messages_of(rank: int, group: dist.ProcessGroup, cases: list[tuple]) -> list[str]:
    """What keys and plans made ahead, and attention with them, say."""
    messages = []
    for shape, pad_size, plan, heads in cases:
        runtimes.clear()
        where = {"cp_group": group} if shape is None else {"cp_mesh": mesh_of(shape)}
        try:
            key = magi_attn_varlen_key(
                [0, 20, 32], [0, 20, 32], pad_size, 4, **where, dist_attn_config=by_heads(), plan=plan
            )
            q, k = (torch.ones(8, n, 4) for n in heads)
            messages.append(f"out {calc_attn(q, k, k, key)[0].sum():g}")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_is_refused_and_plans_made_ahead(rank_pool: RankPool) -> None:
    over_nodes, over_ranks = (plan_attention(builders.varlen([0, 20, 32]), n, 4, config=by_heads()) for n in (2, 4))
    shared = (
        "with intra_node='heads' the {0} ranks of a node share the heads: q must have a multiple of {0} heads, k and v "
        "a multiple or a divisor of it, not {1} and 3; use a cp_mesh with fewer ranks in a node, or "
        "intra_node='sequence'"
    )
    cases = {
        ((2, 2), 0, over_nodes, (2, 1)): "out 64",
        ((2, 2), 0, over_ranks, (2, 1)): "plan was made with cp_size 4, but the key has cp_size 2",
        (None, 0, None, (2, 1)): "intra_node='heads' needs a cp_mesh of two axes, nodes and the ranks in each, such as "
        "init_hierarchical_mesh(4, nodes, ranks_per_node), not a group without nodes",
        ((2, 2), 8, None, (2, 1)): "pad_size 8 does not fit: total_seqlen 32 + pad_size must be a multiple of "
        "cp_size * chunk_size = 4 * 4; use 0, as compute_pad_size gives, or DispatchConfig(uneven=True)",
        ((2, 2), 0, None, (3, 3)): shared.format(2, 3),
        ((1, 4), 0, None, (12, 3)): shared.format(4, 12),
    }
    assert rank_pool.run(messages_of, 4, list(cases)) == [list(cases.values())] * 4
    with pytest.raises(ValueError, match="a plan with intra_node='heads' is over nodes, here 2"):
        over_nodes.on_mesh((2, 2))
    with pytest.raises(ValueError, match="intra_node must be 'sequence' or 'heads', not 'rows'"):
        DistAttnConfig(intra_node="rows")
