"""Over nodes, cast and reduce do what they do over one group, with each row crossing to a node once."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import init_hierarchical_mesh
from magi_attention.comm import FlatExchange, HierarchicalExchange, RowRouting
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.routing import route_stage
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool

from ..planning.test_plan_laws import rows_of

CPU = torch.device("cpu")


@cache
def mesh_of(nodes: int, size: int) -> DeviceMesh:
    return init_hierarchical_mesh(nodes * size, nodes, size)


def both_exchanges(
    plan: AttnPlan, rank: int, stage: int, group: dist.ProcessGroup
) -> tuple[FlatExchange, HierarchicalExchange]:
    """The same rows in one level and in two."""
    assert plan.mesh_shape is not None
    mesh = mesh_of(*plan.mesh_shape)
    straight, _ = route_stage(plan.routes, plan.dispatch_k, rank, stage)
    two_level = plan.rank(rank).stages[stage].collective
    return (
        FlatExchange(RowRouting.on_device(straight, CPU), group),
        HierarchicalExchange.on_device(two_level, mesh.get_group(0), mesh.get_group(1), CPU),
    )


def cast_and_reduce(rank: int, group: dist.ProcessGroup, plan: AttnPlan, dtype: torch.dtype) -> None:
    own = torch.from_numpy(rows_of(plan.dispatch_k.runs(rank)))
    wide = torch.stack((own, own + 0.5), dim=1).to(dtype)[:, None, :].expand(-1, 3, -1)  # not contiguous
    narrow = own.to(dtype)[:, None]
    for stage in range(plan.routes.num_stages):
        flat, hierarchical = both_exchanges(plan, rank, stage, group)
        wanted = flat.cast((wide, narrow)).wait()
        under_way = hierarchical.cast((wide, narrow))
        under_way.transfer.wait()
        for got, expected in zip(under_way.wait(), wanted, strict=True):
            assert torch.equal(got, expected)

        # Whole numbers add up exactly in any order.
        parts = [torch.full_like(rows, rank + 1, dtype=torch.float32) * (1 + rows.float() % 3) for rows in wanted]
        results = []
        for exchange in (flat, hierarchical):
            totals = [torch.full(rows.shape, 10.0) for rows in (wide, narrow)]
            exchange.reduce(parts).wait(into=totals)
            results.append(totals)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "global sliding window", "several intervals a row"])
def test_rows_arrive_and_return_as_over_one_group(rank_pool: RankPool, name: str, dtype: torch.dtype) -> None:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=4))
    plan = plan_attention(named_masks(101)[name], 4, 4, config=config)
    rank_pool.run(cast_and_reduce, 4, plan.on_mesh((2, 2)), dtype)


def reduce_in_bf16(rank: int, group: dist.ProcessGroup, plan: AttnPlan) -> None:
    """Ranks 2 and 3 send parts of the rows of rank 0 that bf16 holds; it does not hold their sum, 257."""
    _, exchange = both_exchanges(plan, rank, 0, group)
    num_rows = exchange.direct.recv_counts, exchange.relay.recv_counts
    parts = torch.full((sum(map(sum, num_rows)), 1), {2: 256.0, 3: 1.0}.get(rank, 0.0))
    total = torch.zeros(len(rows_of(plan.dispatch_k.runs(rank))), 1)
    exchange.reduce((parts,), torch.bfloat16).wait(into=(total,))
    if rank == 0:
        assert set(total.flatten().tolist()) == {256.0}  # rounded once, where it crosses
    _, exchange = both_exchanges(plan, rank, 0, group)
    total.zero_()
    exchange.reduce((parts,)).wait(into=(total,))
    if rank == 0:
        assert set(total.flatten().tolist()) == {257.0}


def test_wire_dtype_rounds_what_travels(rank_pool: RankPool) -> None:
    rank_pool.run(reduce_in_bf16, 4, plan_attention(named_masks(32)["full"], 4, 8).on_mesh((2, 2)))
