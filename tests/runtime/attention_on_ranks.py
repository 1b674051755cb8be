"""Run distributed attention on the ranks of a pool, and dense attention here, on the same numbers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.api import calc_attn, compute_pad_size, dispatch, magi_attn_flex_key, undispatch
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.rank_pool import RankPool


@dataclass
class Problem:
    """Global inputs and the gradients of the outputs."""

    mask: AttnMask
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    chunk_size: int = 4
    config: DistAttnConfig = DistAttnConfig()

    @classmethod
    def random(
        cls, mask: AttnMask, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2), **options: object
    ) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        rows, (heads_q, heads_kv) = mask.total_seqlen_q, heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        q, dout = normal(rows, heads_q, 8), normal(rows, heads_q, 8)
        k, v = normal(rows, heads_kv, 8), normal(rows, heads_kv, 8)
        dlse = normal(heads_q, rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(mask, q, k, v, dout, dlse, **options)  # type: ignore[arg-type]


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


def make_key(problem: Problem, group: dist.ProcessGroup):
    mask, cp_size = problem.mask, dist.get_world_size(group)
    total = mask.total_seqlen_q
    pad_size = compute_pad_size(total, cp_size, problem.chunk_size)
    return magi_attn_flex_key(
        *mask.to_ranges(), total, total, pad_size, problem.chunk_size, group, dist_attn_config=problem.config
    )


def attend_on_rank(rank: int, group: dist.ProcessGroup, problem: Problem) -> Result:
    """Dispatch, attend, undispatch, and all the way back."""
    key = make_key(problem, group)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = calc_attn(dispatch(q, key), dispatch(k, key), dispatch(v, key), key)
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


def attend_densely(problem: Problem, dtype: torch.dtype = torch.float64) -> Result:
    """The oracle, in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    dense = torch.from_numpy(problem.mask.to_dense())
    out, lse = dense_attention(q, k, v, dense.numpy())
    alive = torch.isfinite(lse)
    loss = (out * problem.dout.to(dtype)).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse.to(lse.dtype)).sum()
    loss.backward()
    return Result(out.detach(), lse.detach(), q.grad, k.grad, v.grad)  # type: ignore[arg-type]
