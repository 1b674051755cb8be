"""What goes wrong on some ranks ends with an error on every rank."""

import datetime
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.testing.rank_pool import RankPool


def use_key(rank: int, group: dist.ProcessGroup, cu_seqlens: list[list[int]], chunk_sizes: list[int], use: str) -> str:
    cu = cu_seqlens[rank]
    key = magi_attn_varlen_key(cu, cu, 0, chunk_sizes[rank], group, causal=True)
    x = torch.zeros(16, 1, 4)
    messages = []
    for _ in range(2):  # a key that was found wrong stays wrong
        try:
            if use == "dispatch":
                dispatch(x, key)
            else:
                calc_attn(x[:8], x[:8], x[:8], key)
        except ValueError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("use", ["dispatch", "calc_attn"])
def test_different_masks_are_an_error_on_every_rank(rank_pool: RankPool, use: str) -> None:
    messages = rank_pool.run(use_key, 2, [[0, 16], [0, 8, 16]], [4, 4], use)
    for message in messages:
        assert "given different masks" in message and "[[0], [1]]" in message


def test_different_chunk_sizes_are_an_error_on_every_rank(rank_pool: RankPool) -> None:
    for message in rank_pool.run(use_key, 2, [[0, 16], [0, 16]], [4, 2], "dispatch"):
        assert "[[0], [1]]" in message


def agree_differ_and_agree_again(rank: int, group: dist.ProcessGroup) -> list[str]:
    """Three batches, of which the ranks get the second one wrong, and go on."""
    said = []
    for cu in ([0, 16], [[0, 16], [0, 8, 16]][rank], [0, 16]):
        key = magi_attn_varlen_key(cu, cu, 0, 4, group, causal=True)
        x = torch.zeros(8, 1, 4)
        try:
            said.append(str(tuple(calc_attn(x, x, x, key)[0].shape)))
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_go_on_after_a_disagreement(rank_pool: RankPool) -> None:
    for before, differ, after in rank_pool.run(agree_differ_and_agree_again, 2):
        assert before == after == "(8, 1, 4)" and "given different masks" in differ


def hit_and_miss(rank: int, group: dist.ProcessGroup) -> list[float]:
    """One rank has the plan in its cache, the others don't."""
    from magi_attention.runtime.cache import runtimes

    def make(degree: int):
        config = DistAttnConfig(overlap_config=OverlapConfig(degree=degree))
        return magi_attn_varlen_key([0, 10, 16], [0, 10, 16], 2, 3, group, causal=True, dist_attn_config=config)

    dispatch(torch.zeros(16, 1), make(1))
    if rank == 1:
        runtimes.clear()
    return dispatch(torch.arange(16.0), make(1)).tolist()


def test_a_hit_on_one_rank_and_a_miss_on_another_agree(rank_pool: RankPool) -> None:
    rows = [row for local in rank_pool.run(hit_and_miss, 3) for row in local]
    assert sorted(rows) == [0.0, 0.0, *(float(n) for n in range(16))]


def die_midway(rank: int, store: str, out: str) -> None:
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=timeout)
    key = magi_attn_varlen_key([0, 96], [0, 96], 0, 8, dist.group.WORLD, causal=True)
    leaves = [torch.randn(96, 1, 4, requires_grad=True) for _ in range(3)]
    result = calc_attn(*[dispatch(t, key) for t in leaves], key)[0]
    if rank == 2:
        os._exit(1)
    start = time.monotonic()
    try:
        for _ in range(10):  # the first may still find the dead rank's data on the wire
            result.sum().backward(retain_graph=True)
    except RuntimeError:
        Path(f"{out}.{rank}").write_text(str(time.monotonic() - start))
    os._exit(0)


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    context = mp.spawn(die_midway, (str(tmp_path / "store"), str(tmp_path / "error")), nprocs=3, join=False)
    for process in context.processes:
        process.join(timeout=60)
        assert process.exitcode is not None, "a rank hangs"
    for rank in (0, 1):
        assert float((tmp_path / f"error.{rank}").read_text()) < 30
