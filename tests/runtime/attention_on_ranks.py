"""Run distributed attention on the ranks of a pool, and dense attention here, on the same numbers."""

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import calc_attn, compute_pad_size, dispatch, magi_attn_flex_key, undispatch
from magi_attention.config import CostModel, DistAttnConfig, OverlapConfig
from magi_attention.planning.sources import SELF_ATTENTION, Sources
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.testing.rank_pool import RankPool

from ..kernels import attention

OPTIONS = ("softmax_scale", "softcap", "deterministic", "sm_margin")


def waiting(degree: int) -> DistAttnConfig:
    """Rows take no time, so that queries wait for the first stage in short sequences, too."""
    instant = CostModel(bandwidth=1e30, latency=0.0)
    return DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=64, cost_model=instant))


@dataclass
class Problem(attention.Problem):
    """Global inputs, and how they are shared among the ranks."""

    chunk_size: int = 4
    config: DistAttnConfig = DistAttnConfig()
    sources: Sources = SELF_ATTENTION


@dataclass
class Result:
    """What attention gives: outputs and gradients, global."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def items(self) -> list[tuple[str, Tensor]]:
        return list(vars(self).items())


def make_key(problem: Problem, ranks: dist.ProcessGroup | DeviceMesh) -> DistAttnRuntimeKey:
    mask, chunk_size = problem.mask, problem.chunk_size
    uneven = problem.config.dispatch_config.uneven
    return magi_attn_flex_key(
        *mask.to_ranges(),
        mask.total_seqlen_q,
        mask.total_seqlen_k,
        0 if uneven else compute_pad_size(mask.total_seqlen_q, ranks.size(), chunk_size),
        chunk_size,
        dist_attn_config=problem.config,
        **{"cp_mesh" if isinstance(ranks, DeviceMesh) else "cp_group": ranks},  # type: ignore[arg-type]
        **asdict(problem.sources),
    )


def attend_on_rank(rank: int, group: dist.ProcessGroup, problem: Problem) -> Result:
    """Attend over a group."""
    return attend(problem, make_key(problem, group))


def attend(problem: Problem, key: DistAttnRuntimeKey) -> Result:
    """Dispatch, attend, undispatch, and all the way back."""
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    options = {name: getattr(problem.params, name) for name in OPTIONS}
    local_k, local_v = (dispatch(x, key, side="k") for x in (k, v))
    out, lse = calc_attn(dispatch(q, key), local_k, local_v, key, **options)
    out, lse = undispatch(out, key), undispatch(lse.T.contiguous(), key).T
    alive = torch.isfinite(lse)  # the gradient of an lse of -inf says nothing
    loss = (out * problem.dout).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse).sum()
    loss.backward()
    return Result(out.detach(), lse.detach(), q.grad, k.grad, v.grad)


def attend_on_ranks(pool: RankPool, size: int, problem: Problem) -> Result:
    """The ranks' result, which must be the same on every rank, bit for bit."""
    first, *others = pool.run(attend_on_rank, size, problem)
    for other in others:
        for (name, a), (_, b) in zip(first.items(), other.items(), strict=True):
            assert torch.equal(a, b), f"ranks disagree on {name}"
    return first


def attend_densely(problem: Problem) -> Result:
    """The oracle."""
    return Result(*attention.run_dense(problem))
