"""Processes that stay up, and what happens when one does not."""

import os
from functools import partial

import pytest
import torch.distributed as dist

from magi_attention.testing.rank_pool import RankPool


def end(dying: int, code: int, rank: int, group: dist.ProcessGroup) -> int:
    if rank == dying:
        os._exit(code)
    return rank


def test_a_dead_process_is_named_and_replaced() -> None:
    with RankPool(2) as pool:
        assert pool.run(partial(end, 3, 0), 2) == [0, 1]
        with pytest.raises(RuntimeError, match=r"^rank 1:\nits process ended with exit code 7$"):
            pool.run(partial(end, 1, 7), 2)
        assert pool.run(partial(end, 3, 0), 2) == [0, 1]
