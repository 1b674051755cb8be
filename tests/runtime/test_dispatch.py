"""Gradients of dispatch and undispatch: whole on every rank, or in parts that add up, against one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    compute_pad_size,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    undispatch,
)
from magi_attention.comm import reduce_scatter_rows
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.rank_pool import RankPool

CU, CU_K = [0, 10, 37], [0, 21, 22]
SIZES = [1, 2, 3]


def make_key(group: dist.ProcessGroup, uneven: bool) -> DistAttnRuntimeKey:
    """Queries and keys of other numbers, so that both sides can be tried."""
    config = DistAttnConfig(DispatchConfig(uneven=uneven))
    pad_size = 2 if uneven else compute_pad_size(37, group.size(), 4)
    return magi_attn_varlen_key(CU, CU_K, pad_size, 4, group, dist_attn_config=config, is_same_source=False)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(rank: int, rows: torch.Tensor) -> torch.Tensor:
    """A loss that differs by rank, not linear, in which rows far apart meet."""
    weight = normal(10 + rank, len(rows))
    return (torch.einsum("n,nd->d", weight, rows.sin()) ** 2).sum()


def undispatch_on_rank(rank: int, group: dist.ProcessGroup, side: Any, grad: Any, uneven: bool) -> torch.Tensor:
    """The gradient of the rows before a layer on local rows, behind which global rows make each rank's loss."""
    key = make_key(group, uneven)
    x = normal(0, 37 if side == "q" else 22, 3).requires_grad_()
    rows = undispatch(dispatch(x, key, side=side).exp(), key, side=side, grad=grad)
    loss_of(rank if grad == "partial" else 0, rows).backward()
    return x.grad


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("grad", ["replicated", "partial"])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("size", SIZES)
def test_undispatch(rank_pool: RankPool, size: int, side: str, grad: str, uneven: bool) -> None:
    x = normal(0, 37 if side == "q" else 22, 3).requires_grad_()
    ranks = range(size) if grad == "partial" else [0]
    torch.stack([loss_of(rank, x.exp()) for rank in ranks]).sum().backward()
    for ours in rank_pool.run(undispatch_on_rank, size, side, grad, uneven):
        torch.testing.assert_close(ours, x.grad, rtol=1e-12, atol=1e-12)


def dispatch_on_rank(rank: int, group: dist.ProcessGroup, side: Any, grad: Any, uneven: bool) -> torch.Tensor:
    """The gradient of a weight that is used before the dispatch, and of one behind it; each rank's own part."""
    key = make_key(group, uneven)
    before, behind = (normal(seed, 3).requires_grad_() for seed in (1, 2))
    total = 37 if side == "q" else 22
    local = dispatch(normal(0, total, 3) * before, key, side=side, grad=grad)
    plan = runtimes.get(key).plan
    real = (plan.dispatch if side == "q" else plan.dispatch_k).real_seqlens[rank]
    positions = get_position_ids(key, side=side)[:real]
    (torch.exp(local * behind)[:real] * normal(3, total)[positions, None]).sum().backward()
    return torch.stack((before.grad, behind.grad))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("grad", ["replicated", "partial"])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("size", SIZES)
def test_dispatch(rank_pool: RankPool, size: int, side: str, grad: str, uneven: bool) -> None:
    before, behind = (normal(seed, 3).requires_grad_() for seed in (1, 2))
    total = 37 if side == "q" else 22
    (torch.exp(normal(0, total, 3) * before * behind) * normal(3, total)[:, None]).sum().backward()
    results = rank_pool.run(dispatch_on_rank, size, side, grad, uneven)
    of_before, of_behind = ([result[n] for result in results] for n in (0, 1))
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(of_behind), behind.grad, **close)
    if grad == "partial":  # as for the weight behind the dispatch, the ranks' gradients are summed
        torch.testing.assert_close(sum(of_before), before.grad, **close)
    else:
        for ours in of_before:
            torch.testing.assert_close(ours, before.grad, **close)


def low_precision_sum(rank: int, group: dist.ProcessGroup) -> list[float]:
    """256 + 1 + 1 is 258 in float32; bf16 has no number between 256 and 258."""
    rows = torch.full((6, 2), [256.0, 1.0, 1.0][rank]).bfloat16()
    local = reduce_scatter_rows(rows, (1, 3, 2), group)
    assert local.shape == ((1, 3, 2)[rank], 2)
    return local.unique().tolist()


def test_parts_are_rounded_once(rank_pool: RankPool) -> None:
    assert rank_pool.run(low_precision_sum, 3) == [[258.0]] * 3


def shapes_and_layouts(rank: int, group: dist.ProcessGroup) -> None:
    """Rows of any shape, gradients of any strides; padding gets none, though it repeats the last row."""
    key = make_key(group, uneven=True)
    for shape in ((), (2, 3)):
        leaf = dispatch(normal(0, 37, *shape), key).requires_grad_()
        weight = normal(5, *reversed(shape), 37).permute(*reversed(range(len(shape) + 1)))
        undispatch(leaf, key, grad="partial").backward(weight)
        torch.testing.assert_close(leaf.grad, dispatch(weight * group.size(), key))


def test_any_shape(rank_pool: RankPool) -> None:
    rank_pool.run(shapes_and_layouts, 3)


def gradient_penalty(rank: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a global loss that every rank computes, there and back between global and local rows, and without."""
    key = make_key(group, uneven=True)
    x, weight = normal(1, 37, 3).requires_grad_(), normal(2, 37, 3)

    def by_rank(x: torch.Tensor) -> torch.Tensor:
        return undispatch(dispatch(x * weight, key).sin(), key)

    results = []
    for run in (by_rank, lambda x: (x * weight).sin()):
        (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        results += torch.autograd.grad(dx.square().sum(), x)
    return results[0], results[1]


def test_second_derivatives(rank_pool: RankPool) -> None:
    for actual, expected in rank_pool.run(gradient_penalty, 3):
        torch.testing.assert_close(actual, expected)


def test_unknown_gradients_are_refused(local_group: dist.ProcessGroup) -> None:
    key = make_key(local_group, uneven=False)
    for use, rows in ((dispatch, 37), (undispatch, 40)):
        with pytest.raises(ValueError, match="grad must be 'replicated' or 'partial', not 'sum'"):
            use(torch.zeros(rows), key, grad="sum")
