"""group_cast brings every row that is needed; group_reduce is its transpose."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm import RowRouting, all_gather_rows, group_cast, group_reduce
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, RankPlan, plan_attention
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool

CPU = torch.device("cpu")


def rows_of(runs: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in runs.tolist()] or [np.empty(0, int)])


def plan_of(mask: AttnMask, cp_size: int) -> AttnPlan:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=4))
    return plan_attention(mask, cp_size, 4, config=config)


def cast_and_reduce(rank: int, group: dist.ProcessGroup, plan: RankPlan, dtype: torch.dtype) -> None:
    """Rows carry their global number, so that what arrives says where it came from."""
    own = torch.from_numpy(rows_of(plan.dispatch.runs(rank)))
    wide = torch.stack((own, own + 0.5), dim=1).to(dtype)[:, None, :].expand(-1, 3, -1)  # not contiguous
    narrow = own.to(dtype)[:, None]
    for stage in plan.stages:
        rows = RowRouting.on_device(stage.collective, CPU)
        wanted = torch.from_numpy(rows_of(stage.runs)).to(dtype)
        got_wide, got_narrow = group_cast((wide, narrow), rows, group).wait()
        assert got_wide.shape == (len(wanted), 3, 2)
        assert torch.equal(got_wide, torch.stack((wanted, wanted + 0.5), dim=1)[:, None, :].expand(-1, 3, -1))
        assert torch.equal(got_narrow[:, 0], wanted)

        # Each receiver adds 1 to the count and its number to the sum of every row that it received.
        count = torch.full((len(own), 1), 10.0, dtype=torch.float32)
        total = torch.zeros(len(own), 2, 2)
        ones = torch.ones(len(wanted), 1)
        group_reduce((ones, (rank + ones).expand(-1, 4).unflatten(1, (2, 2))), rows, group).wait(into=(count, total))
        expected = torch.zeros(len(own))
        expected_total = torch.zeros(len(own))
        first = 0
        for receiver, n in enumerate(stage.collective.send_counts):
            sent = torch.from_numpy(stage.collective.send_rows[first : first + n])
            expected[sent] += 1
            expected_total[sent] += receiver + 1
            first += n
        assert torch.equal(count[:, 0], 10 + expected)
        assert torch.equal(total, expected_total[:, None, None].expand(-1, 2, 2))


def run_rank_plan(rank: int, group: dist.ProcessGroup, plan: AttnPlan, dtype: torch.dtype) -> None:
    cast_and_reduce(rank, group, plan.rank(rank), dtype)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "name", ["causal", "varlen causal", "full", "global sliding window", "several intervals a row"]
)
def test_rows_arrive_and_return(rank_pool: RankPool, name: str, size: int) -> None:
    rank_pool.run(run_rank_plan, size, plan_of(named_masks(101)[name], size), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_travels(rank_pool: RankPool, dtype: torch.dtype) -> None:
    rank_pool.run(run_rank_plan, 3, plan_of(named_masks(50)["causal"], 3), dtype)


def reduce_over_bfloat16(rank: int, group: dist.ProcessGroup, plan: AttnPlan) -> None:
    """What is less than a rounding of bfloat16 is lost on the wire and nowhere else."""
    eps = 2.0**-9
    for stage in plan.rank(rank).stages:
        rows = RowRouting.on_device(stage.collective, CPU)
        parts = torch.full((stage.collective.num_recv_rows, 3), 1 + eps)
        for wire_dtype, arriving in ((None, 1 + eps), (torch.bfloat16, 1.0)):
            total = torch.full((plan.dispatch.local_seqlen, 3), eps)
            group_reduce((parts,), rows, group, wire_dtype).wait(into=(total,))
            count = torch.bincount(torch.from_numpy(stage.collective.send_rows), minlength=len(total))
            assert torch.equal(total, (eps + count * arriving)[:, None].expand(-1, 3))


def test_the_wire_may_have_another_dtype(rank_pool: RankPool) -> None:
    rank_pool.run(reduce_over_bfloat16, 3, plan_of(named_masks(50)["causal"], 3))


def test_nothing_is_sent_when_nothing_is_needed() -> None:
    cu_seqlens = builders.cu_seqlens_from_lengths([8, 8, 8, 8])
    plan = plan_attention(builders.varlen(cu_seqlens, causal=True), 4, 8)
    assert [plan.rank(r).stages for r in range(4)] == [(), (), (), ()]


def gather(rank: int, group: dist.ProcessGroup, counts: tuple[int, ...]) -> list[float]:
    return all_gather_rows(torch.full((counts[rank], 1), float(rank)), counts, group).flatten().tolist()


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 3, 0)])
def test_all_gather_rows(rank_pool: RankPool, counts: tuple[int, ...]) -> None:
    expected = [float(rank) for rank, count in enumerate(counts) for _ in range(count)]
    assert rank_pool.run(gather, 3, counts) == [expected] * 3
