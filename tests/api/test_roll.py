"""`roll` on local rows is `torch.roll` on the global tensor, and so is its gradient."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from magi_attention import api
from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    compute_pad_size,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.rank_pool import RankPool

CU = [0, 10, 37]
TOTAL = CU[-1]
SHIFTS = [0, 1, -1, 5, -17, 36, 37, 38, -1000, 10**12]


def make_key(group: dist.ProcessGroup, order: str = "balanced") -> api.DistAttnRuntimeKey:
    pad_size = compute_pad_size(TOTAL, group.size(), 4)
    config = DistAttnConfig(DispatchConfig(order=order))  # type: ignore[arg-type]
    return magi_attn_varlen_key(CU, CU, pad_size, 4, group, causal=True, dist_attn_config=config)


def rolls(rank: int, group: dist.ProcessGroup, order: str) -> None:
    key = make_key(group, order)
    x = torch.randn(TOTAL, 2, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(TOTAL, 2, 3, generator=torch.Generator().manual_seed(1))
    for shift in SHIFTS:
        local = dispatch(x, key).requires_grad_()
        rolled = roll(local, shift, 0, key)
        assert torch.equal(rolled, dispatch(torch.roll(x, shift, 0), key)), f"forward, shift {shift}"
        # NaN in the gradient of padding rows must not reach a real row.
        local_weight = dispatch(weight, key)
        padding = (get_position_ids(key) == TOTAL - 1).cumsum(0) > 1
        local_weight[padding] = torch.nan
        rolled.backward(local_weight)
        assert torch.equal(local.grad, dispatch(torch.roll(weight, -shift, 0), key)), f"gradient, shift {shift}"


@pytest.mark.parametrize("order", ["balanced", "contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_roll_is_torch_roll(rank_pool: RankPool, size: int, order: str) -> None:
    rank_pool.run(rolls, size, order)


def dims_and_dtypes(rank: int, group: dist.ProcessGroup) -> None:
    key = make_key(group)
    tokens = torch.arange(2 * TOTAL).reshape(2, TOTAL)
    for dtype in (torch.int64, torch.int32, torch.bfloat16, torch.float64, torch.bool):
        x = tokens.to(dtype)
        local = dispatch(x.T, key).T
        for dim in (1, -1):
            rolled = roll(local, -2, dim, key)
            assert rolled.dtype == dtype
            assert torch.equal(undispatch(rolled.T.to(torch.float64), key), torch.roll(x, -2, 1).T.to(torch.float64))
    assert torch.equal(undispatch(roll(dispatch(tokens[0], key), 3, 0, key), key), torch.roll(tokens[0], 3))


def test_any_dimension_and_dtype(rank_pool: RankPool) -> None:
    rank_pool.run(dims_and_dtypes, 3)


def second_derivative(rank: int, group: dist.ProcessGroup) -> None:
    key = make_key(group)
    x = torch.arange(1.0, TOTAL + 1, dtype=torch.float64)
    local = dispatch(x, key).requires_grad_()
    (grad,) = torch.autograd.grad((roll(local, 5, 0, key) ** 3).sum(), local, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), local)
    assert torch.equal(second, dispatch(6 * x, key))


def test_gradients_of_gradients(rank_pool: RankPool) -> None:
    rank_pool.run(second_derivative, 2)


def documented_targets(rank: int, group: dist.ProcessGroup) -> None:
    key = make_key(group)
    tokens = torch.arange(100, 100 + TOTAL)
    position_in_document = torch.cat([torch.arange(b - a) for a, b in pairwise(CU)])
    for n in (1, 2, 12):
        labels = roll(dispatch(tokens, key), -n, 0, key)
        position = dispatch(position_in_document, key)
        labels = labels.masked_fill(roll(position, -n, 0, key) != position + n, -100)
        expected = torch.full((TOTAL,), -100)
        for start, end in pairwise(CU):
            expected[start : max(start, end - n)] = tokens[start + n : end]
        assert torch.equal(undispatch(labels, key), expected)
        padding = (get_position_ids(key) == TOTAL - 1).cumsum(0) > 1
        assert (labels[padding] == -100).all()


@pytest.mark.parametrize("size", [1, 4])
def test_targets_end_with_their_document(rank_pool: RankPool, size: int) -> None:
    rank_pool.run(documented_targets, size)


def test_a_shift_is_planned_once(local_group: dist.ProcessGroup) -> None:
    key = make_key(local_group)
    x = dispatch(torch.arange(float(TOTAL)), key)
    runtime = runtimes.get(key)
    runtime.free_devices()
    for shift in (3, 3 - TOTAL, 3 + 5 * TOTAL):
        roll(x, shift, 0, key)
    assert [shift for shift, _ in runtime._rolls] == [3]


def test_wrong_arguments_are_refused(local_group: dist.ProcessGroup) -> None:
    key = make_key(local_group)
    x = dispatch(torch.zeros(TOTAL, 3), key)
    with pytest.raises(
        ValueError, match=r"x has shape \(40, 3\), but the key is for 40 local rows in dimension dim = 1"
    ):
        roll(x, 1, 1, key)
    with pytest.raises(ValueError, match="dimension dim = 2"):
        roll(x, 1, 2, key)
    with pytest.raises(ValueError, match="dimension dim = -3"):
        roll(x, 1, -3, key)
    with pytest.raises(TypeError, match=r"shift must be an integer, got 1\.0"):
        roll(x, 1.0, 0, key)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dim must be an integer"):
        roll(x, 1, None, key)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, not list"):
        roll([1], 1, 0, key)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key must be a DistAttnRuntimeKey"):
        roll(x, 1, 0, "key")  # type: ignore[arg-type]
