"""Side groups: made by the ranks of a group alone, whatever other groups each of them is in."""

import pytest
import torch
import torch.distributed as dist

from magi_attention.runtime import side_groups
from magi_attention.runtime.side_groups import host_group, side_group, transfer_group
from magi_attention.testing.rank_pool import RankPool


def exchange(rank: int, group: dist.ProcessGroup, groups_of_first: int) -> tuple[list[int], list[int], bool, float]:
    """Rank 0 alone is in more groups; a third rank of the world does not take part."""
    for _ in range(groups_of_first):
        if rank == 0:
            dist.new_group([0], use_local_synchronization=True)
    side = side_group(group, "gloo")
    size = side.size()
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(gathered, torch.tensor([rank]), group=side)
    received = torch.empty(size, dtype=torch.int64)
    dist.all_to_all_single(received, torch.arange(size) + 10 * rank, group=side, async_op=True).wait()
    transport = side._get_backend(torch.device("cpu"))
    is_kept = side_group(group, "gloo") is side
    return [int(x) for x in gathered], received.tolist(), is_kept, transport.options._timeout.total_seconds()


def test_ranks_in_different_numbers_of_groups() -> None:
    with RankPool(3, timeout_seconds=17) as pool:
        results = pool.run(exchange, 2, 2)
    assert results == [([0, 1], [0, 10], True, 17.0), ([0, 1], [1, 11], True, 17.0)]


def same_group(rank: int, group: dist.ProcessGroup) -> bool:
    cpu = torch.device("cpu")
    if host_group(group) is not group or transfer_group(group, cpu) is not group:
        return False
    # A group with gloo and NCCL: only what is on a GPU needs NCCL.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_groups, "is_on_gpus", lambda group: True)
        patch.setattr(side_groups, "side_group", lambda group, backend: backend)
        return transfer_group(group, cpu) is group and transfer_group(group, torch.device("cuda", 0)) == "nccl"


def test_no_side_group_where_the_users_does_it(rank_pool: RankPool) -> None:
    assert all(rank_pool.run(same_group, 2))
