"""Attention sinks and highest scores over several ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key, undispatch
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.planning.sources import Sources
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool

from ..kernels.attention import check_bound, names_of, run_dense
from .attention_on_ranks import Problem, make_key

STAGED = DistAttnConfig(overlap_config=OverlapConfig(degree=3, min_chunk_size=5))
DSINK = 5


def attend_with_sink(rank: int, group: dist.ProcessGroup, problem: Problem) -> list[Tensor]:
    """Results in the order of ``names_of``, global but for the gradient of the sink."""
    key = make_key(problem, group)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sink)]
    q, k, v, sink = leaves
    local_q, local_k, local_v = dispatch(q, key), dispatch(k, key, side="k"), dispatch(v, key, side="k")
    softcap = problem.params.softcap
    local_out, local_lse, max_logits = calc_attn(
        local_q, local_k, local_v, key, softcap=softcap, sink=sink, return_max_logits=True
    )
    assert not max_logits.requires_grad
    out, lse = undispatch(local_out, key), undispatch(local_lse.T.contiguous(), key).T
    ((out * problem.dout).sum() + (lse * problem.dlse).sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves), max_logits]


def attend_on_ranks(pool: RankPool, size: int, problem: Problem) -> list[Tensor]:
    """The result, which must be the same on every rank, with the sum of the ranks' gradients of the sink."""
    first, *others = pool.run(attend_with_sink, size, problem)
    for other in others:
        assert all(torch.equal(a, b) for n, (a, b) in enumerate(zip(first, other, strict=True)) if n != DSINK)
    first[DSINK] = torch.stack([first[DSINK], *(other[DSINK] for other in others)]).sum(0)
    return first


def check_fp64(pool: RankPool, size: int, problem: Problem) -> None:
    ours = attend_on_ranks(pool, size, problem)
    for name, actual, expected in zip(names_of(problem), ours, run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "holes", "several intervals a row", "nothing"])
def test_named_masks(rank_pool: RankPool, name: str, size: int) -> None:
    check_fp64(rank_pool, size, Problem.random(named_masks(107)[name], softcap=1.5, config=STAGED).with_sink())


def test_ranks_without_keys_of_their_own(rank_pool: RankPool) -> None:
    mask = AttnMask.from_slices([(0, 30)], [(0, 2)], "full", 41, 2)
    check_fp64(rank_pool, 3, Problem.random(mask, sources=Sources(is_same_source=False)).with_sink())


def test_low_precision_keeps_the_derived_bound(rank_pool: RankPool) -> None:
    problem = Problem.random(named_masks(205)["varlen causal"], dtype=torch.bfloat16, config=STAGED)
    check_bound(attend_on_ranks(rank_pool, 3, problem.with_sink(torch.float32)), problem.with_sink(torch.float32))


def test_sinks_far_below_and_above_all_scores(rank_pool: RankPool) -> None:
    """One changes nothing, the other takes all."""
    problem = Problem.random(named_masks(61)["varlen causal"], config=STAGED).with_sink()
    low, high = (replace(problem, sink=torch.full_like(problem.sink, x)) for x in (-100.0, 100.0))
    plain = run_dense(replace(problem, sink=None))
    torch.testing.assert_close(attend_on_ranks(rank_pool, 2, low)[:5], plain[:5], rtol=1e-11, atol=1e-11)
    out, lse, *_ = attend_on_ranks(rank_pool, 2, high)
    assert out.abs().max() < 1e-30 and (lse == 100).all()


def test_sinks_that_are_refused(local_group: dist.ProcessGroup) -> None:
    key = magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group)
    x = torch.zeros(8, 4, 8)
    for sink, error, message in (
        (torch.zeros(2), ValueError, r"sink must have shape \(4,\), one score for each head of q, got \(2,\)"),
        (torch.zeros(4).double(), TypeError, "sink must be float32 or of the dtype of q"),
        (0.0, TypeError, "sink must be a torch.Tensor or None, not float"),
    ):
        with pytest.raises(error, match=message):
            calc_attn(x, x, x, key, sink=sink)
    with pytest.raises(TypeError, match="return_max_logits must be True or False, got None"):
        calc_attn(x, x, x, key, return_max_logits=None)
