"""Ranks with different numbers of rows: attention, both ways between global and local rows, positions, and shifts."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    OverlapConfig,
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.mask import AttnMask
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from .attention_on_ranks import Problem, attend_densely, attend_on_ranks

CU = [0, 10, 37]
ORDERS = ["balanced", "contiguous", "zigzag"]


def uneven(order: str = "balanced") -> DistAttnConfig:
    overlap = OverlapConfig(degree=2, min_chunk_size=5)
    return DistAttnConfig(DispatchConfig(order=order, uneven=True), overlap)  # type: ignore[arg-type]


def check_fp64(pool: RankPool, size: int, problem: Problem) -> None:
    ours, oracle = attend_on_ranks(pool, size, problem), attend_densely(problem)
    for (name, actual), (_, expected) in zip(ours.items(), oracle.items(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=30, deadline=None)
@given(masks(max_seqlen=70, square=True), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.sampled_from(ORDERS))
def test_generated_masks(rank_pool: RankPool, mask: AttnMask, size: int, chunk_size: int, order: str) -> None:
    assume(mask.total_seqlen_q > chunk_size * (size - 1))
    check_fp64(rank_pool, size, Problem.random(mask, chunk_size=chunk_size, config=uneven(order)))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "global sliding window", "prefix tree", "nothing"])
def test_named_masks(rank_pool: RankPool, name: str, size: int) -> None:
    check_fp64(rank_pool, size, Problem.random(named_masks(107)[name], config=uneven()))


def make_key(group: dist.ProcessGroup, pad_size: int, order: str) -> DistAttnRuntimeKey:
    return magi_attn_varlen_key(CU, CU, pad_size, 4, group, causal=True, dist_attn_config=uneven(order))


def rows_on_rank(rank: int, group: dist.ProcessGroup, pad_size: int, order: str) -> tuple[list[int], int]:
    key = make_key(group, pad_size, order)
    positions, real = get_position_ids(key), runtimes.get(key).plan.dispatch.real_seqlens[rank]
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.bool):
        x = torch.arange(37 * 3).reshape(37, 3).to(dtype)
        local = dispatch(x, key)
        assert len(local) == len(positions)
        assert torch.equal(local[:real], x[positions[:real]]) and (local[real:] == 0).all()
        assert (positions[real:] == 36).all()
        assert torch.equal(undispatch(local, key), x)
        for shift in (1, -5, 36):
            assert torch.equal(roll(local, shift, 0, key), dispatch(torch.roll(x, shift, 0), key))
    for shift in (3, -17):
        leaf = dispatch(torch.randn(37, 2, generator=torch.Generator().manual_seed(0)), key).requires_grad_()
        weight = torch.randn(37, 2, generator=torch.Generator().manual_seed(1))
        roll(leaf, shift, 0, key).backward(dispatch(weight, key))
        assert torch.equal(leaf.grad, dispatch(torch.roll(weight, -shift, 0), key))
    return positions[:real].tolist(), len(positions)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pad_size", [0, 1, 6])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows(rank_pool: RankPool, size: int, pad_size: int, order: str) -> None:
    results = rank_pool.run(rows_on_rank, size, pad_size, order)
    assert sorted(row for positions, _ in results for row in positions) == list(range(37))
    lengths = [length for _, length in results]
    assert sum(lengths) == 37 + pad_size and max(lengths) - min(lengths) <= 4


def test_it_must_be_asked_for(local_group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match=r"pad_size 0 does not fit.*use 3.*DispatchConfig\(uneven=True\)"):
        magi_attn_varlen_key(CU, CU, 0, 4, local_group)
    key = make_key(local_group, 0, "balanced")
    assert get_position_ids(key).tolist() == list(range(37))
    q = torch.zeros(40, 2, 8)
    with pytest.raises(ValueError, match=r"q has shape .40, 2, 8., but the key is for 37 local rows"):
        calc_attn(q, q, q, key)
    with pytest.raises(ValueError, match="pad_size must not be negative, got -1"):
        make_key(local_group, -1, "balanced")
