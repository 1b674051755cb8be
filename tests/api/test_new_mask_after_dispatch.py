"""Keys of several masks over rows that are dispatched once."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    MinHeapDispatchAlg,
    OverlapConfig,
    calc_attn,
    compute_pad_size,
    dispatch,
    get_position_ids,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    plan_attention,
    plan_new_mask,
    undispatch,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from ..planning import test_plan_laws as laws
from ..runtime.attention_on_ranks import Problem, Result, attend_densely

STAGED = DistAttnConfig(overlap_config=OverlapConfig(degree=3, min_chunk_size=5))
CU = [0, 10, 37]


# --- The plan -------------------------------------------------------------------------------------------------------


def check_laws(mask: AttnMask, other: AttnMask, cp_size: int, chunk_size: int, config: DistAttnConfig) -> None:
    base = plan_attention(other, cp_size, chunk_size, config=config)
    plan = plan_new_mask(mask, base.rank(0))
    assert plan.dispatch is base.dispatch
    laws.check_plan(mask, plan)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 12), laws.configs)
def test_laws_hold_for_generated_masks(data, cp_size: int, chunk_size: int, config: DistAttnConfig) -> None:
    mask = data.draw(masks(max_seqlen=80, square=True))
    total = mask.total_seqlen_q
    cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=5)) - {total})
    check_laws(mask, builders.varlen([0, *cuts, total], causal=True), cp_size, chunk_size, config)


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_laws_hold_for_named_masks(name: str) -> None:
    zoo = named_masks(211)
    check_laws(zoo[name], zoo["varlen causal"], 4, 4, STAGED)


def test_the_own_mask_gives_the_own_plan() -> None:
    base = plan_attention(named_masks(203)["varlen causal"], 3, 8, config=STAGED)
    plan = plan_new_mask(base.mask, plan_new_mask(named_masks(203)["full"], base))
    assert plan.dispatch_of is None
    for ours, theirs in ((plan.rank(r), base.rank(r)) for r in range(3)):
        np.testing.assert_array_equal(ours.local_bands, theirs.local_bands)
        for a, b in zip(ours.stages, theirs.stages, strict=True):
            np.testing.assert_array_equal(a.bands, b.bands)
            np.testing.assert_array_equal(a.collective.send_rows, b.collective.send_rows)


# --- The keys -------------------------------------------------------------------------------------------------------


def new_key(mask: AttnMask, key: DistAttnRuntimeKey, **options) -> DistAttnRuntimeKey:
    return make_flex_key_for_new_mask_after_dispatch(*mask.to_ranges(), key, **options)


def attend_on_rank(rank: int, group: dist.ProcessGroup, problem: Problem, dispatched_for: AttnMask) -> Result:
    """Dispatch with one mask's key, attend with another's, undispatch with either."""
    total = dispatched_for.total_seqlen_q
    pad_size = compute_pad_size(total, dist.get_world_size(group), problem.chunk_size)
    key = magi_attn_flex_key(
        *dispatched_for.to_ranges(), total, total, pad_size, problem.chunk_size, group, dist_attn_config=problem.config
    )
    key_of_mask = new_key(problem.mask, key)
    assert torch.equal(get_position_ids(key), get_position_ids(key_of_mask))
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = calc_attn(dispatch(q, key), dispatch(k, key_of_mask), dispatch(v, key), key_of_mask)
    out, lse = undispatch(out, key), undispatch(lse.T.contiguous(), key_of_mask).T
    alive = torch.isfinite(lse)
    ((out * problem.dout).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse).sum()).backward()
    return Result(out.detach(), lse.detach(), q.grad, k.grad, v.grad)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_attention_equals_dense_attention(rank_pool: RankPool, name: str, size: int) -> None:
    zoo = named_masks(107)
    problem = Problem.random(zoo[name], config=STAGED)
    oracle = attend_densely(problem)
    for result in rank_pool.run(attend_on_rank, size, problem, zoo["varlen causal"]):
        for (what, ours), (_, expected) in zip(result.items(), oracle.items(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=what: f"{n}: {m}")


def layers_on_rank(rank: int, group: dist.ProcessGroup) -> Tensor:
    """Full and windowed layers in turn, on rows dispatched once; no row moves between layers."""
    key = magi_attn_varlen_key(CU, CU, compute_pad_size(37, group.size(), 4), 4, group, causal=True)
    window = make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, causal=True, window_size=(5, 0))
    x = dispatch(torch.randn(37, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), key)
    for layer_key in (key, window, key, window):
        x = x + calc_attn(x, x, x, layer_key)[0]
    return undispatch(x, window)


def test_layers_of_two_masks(rank_pool: RankPool) -> None:
    (alone,) = rank_pool.run(layers_on_rank, 1)
    for size in (2, 3):
        for ours in rank_pool.run(layers_on_rank, size):
            torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)


@pytest.fixture
def key(local_group: dist.ProcessGroup) -> DistAttnRuntimeKey:
    return magi_attn_varlen_key(CU, CU, 3, 4, local_group, causal=True)


def test_keys_are_values(key: DistAttnRuntimeKey) -> None:
    window = make_varlen_key_for_new_mask_after_dispatch(CU, torch.tensor(CU), key, causal=True, window_size=(5, -1))
    assert window.mask == builders.sliding_window(CU, (5, 0)) and window.dispatch_of == key.mask
    again = make_varlen_key_for_new_mask_after_dispatch(tuple(CU), CU, key, True, (5, 0))
    assert window == again and hash(window) == hash(again)
    assert window == pickle.loads(pickle.dumps(window)) != key
    # Whatever key of these rows it was made from, the key is the same; and going back gives the first one.
    assert new_key(builders.full(37), window) == new_key(builders.full(37), key)
    assert make_varlen_key_for_new_mask_after_dispatch(CU, CU, window, causal=True) == key
    # The same mask with chunks of its own is another key, with another digest for the ranks to compare.
    own = magi_attn_varlen_key(CU, CU, 3, 4, key_group(key), causal=False)
    after = make_varlen_key_for_new_mask_after_dispatch(CU, CU, key)
    assert own.mask == after.mask and own != after and own.digest != after.digest


def key_group(key: DistAttnRuntimeKey) -> dist.ProcessGroup:
    return runtimes.get(key).group


def test_overlap_can_differ_but_not_dispatch(key: DistAttnRuntimeKey) -> None:
    assert new_key(builders.full(37), key, dist_attn_config=STAGED).config == STAGED
    other = DistAttnConfig(DispatchConfig(MinHeapDispatchAlg()))
    with pytest.raises(ValueError, match=r"MinHeapDispatchAlg.*which a new mask cannot change"):
        new_key(builders.full(37), key, dist_attn_config=other)
    with pytest.raises(TypeError, match="dist_attn_config must be a DistAttnConfig, not 3"):
        new_key(builders.full(37), key, dist_attn_config=3)


def test_plans_made_ahead(key: DistAttnRuntimeKey) -> None:
    runtimes_before = len(runtimes)
    base = plan_attention(key.mask, 1, 4, 3)
    mask = builders.causal(37)
    made = new_key(mask, key, plan=plan_new_mask(mask, base).rank(0))
    assert len(runtimes) == runtimes_before + 1 and runtimes.get(made).plan.dispatch_of == key.mask
    runtimes.clear()
    key = magi_attn_varlen_key(CU, CU, 3, 4, dist.group.WORLD, causal=True)
    with pytest.raises(ValueError, match="plan was made with dispatch_of None, but the key has dispatch_of AttnMask"):
        new_key(mask, key, plan=plan_attention(mask, 1, 4, 3))
    with pytest.raises(ValueError, match=r"plan was made with dispatch_of AttnMask.*but the key has dispatch_of None"):
        magi_attn_varlen_key([0, 37], [0, 37], 3, 4, dist.group.WORLD, causal=True, plan=plan_new_mask(mask, base))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda key: new_key(builders.full(38), key), ValueError, r"\[0, 38\) is out of bounds: total_seqlen_q is 37"),
        (
            lambda key: make_varlen_key_for_new_mask_after_dispatch([0, 40], [0, 40], key),
            ValueError,
            "over 40 .* of 37",
        ),
        (lambda key: make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, window_size=(-2, 0)), ValueError, "-2"),
        (lambda key: make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, window_size=9), ValueError, "a pair"),
        (lambda key: make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, (9, 0)), TypeError, "causal must be"),
        (lambda key: make_varlen_key_for_new_mask_after_dispatch(CU, CU, "key"), TypeError, "must be a DistAttnRuntim"),
        (lambda key: new_key(builders.full(37), None), TypeError, "must be a DistAttnRuntimeKey"),
        (lambda key: new_key(builders.full(37), key, plan=1), TypeError, "plan must be what plan_attention returns"),
        (lambda key: new_key(builders.full(37), replace(key, pad_size=7)), ValueError, "not in the cache"),
    ],
)
def test_what_is_refused(key: DistAttnRuntimeKey, make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(key)


def different_masks(rank: int, group: dist.ProcessGroup) -> str:
    key = magi_attn_varlen_key(CU, CU, 3, 4, group, causal=True)
    window = make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, causal=True, window_size=(5 + rank, 0))
    x = dispatch(torch.zeros(37, 1, 4), key)
    with pytest.raises(ValueError) as caught:
        calc_attn(x, x, x, window)
    return str(caught.value)


def test_different_new_masks_are_an_error_on_every_rank(rank_pool: RankPool) -> None:
    for message in rank_pool.run(different_masks, 2):
        assert "given different masks" in message and "[[0], [1]]" in message
