"""Fixtures that every test has."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from magi_attention.testing.rank_pool import RankPool

# Torch then fills uninitialised memory with NaN, so that what nobody wrote does not pass for zero.
torch.use_deterministic_algorithms(True)
# Test tensors are small: threads would mostly wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Four gloo processes that stay up for the whole run."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def local_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
