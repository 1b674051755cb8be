"""Inputs of attention, and what an engine and the dense oracle make of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from magi_attention.kernels.engine import Engine
from magi_attention.kernels.merge import compute_delta
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import AttnMask
from magi_attention.testing.dense_oracle import dense_attention


@dataclass
class Problem:
    """q, k, v, the gradients of the outputs, the mask and the parameters."""

    mask: AttnMask
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    params: AttnParams

    @classmethod
    def random(
        cls,
        mask: AttnMask,
        dtype: torch.dtype = torch.float64,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 8,
        softcap: float = 0.0,
        **options: object,
    ) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        rows, keys, (heads_q, heads_kv) = mask.total_seqlen_q, mask.total_seqlen_k, heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        q, dout = normal(rows, heads_q, head_dim), normal(rows, heads_q, head_dim)
        k, v = normal(keys, heads_kv, head_dim), normal(keys, heads_kv, head_dim)
        dlse = normal(heads_q, rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(mask, q, k, v, dout, dlse, AttnParams(head_dim**-0.5, softcap), **options)


NAMES = ("out", "lse", "dq", "dk", "dv")


def run_engine(engine: Engine, problem: Problem) -> list[Tensor]:
    """``NAMES`` by an engine."""
    p = problem
    schedule = engine.schedule(p.mask.bands, len(p.q), len(p.k))
    out, lse = engine.forward(p.q, p.k, p.v, schedule, p.params)
    delta = compute_delta(out, p.dout, p.dlse)
    return [out, lse, *engine.backward(p.dout, p.q, p.k, p.v, lse, delta, schedule, p.params)]


def run_dense(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """``NAMES`` by the plain formula in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    params = problem.params
    out, lse = dense_attention(q, k, v, problem.mask.to_dense(), params.softmax_scale, params.softcap)
    alive = torch.isfinite(lse)
    loss = (out * problem.dout.to(dtype)).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return [out.detach(), lse.detach(), *grads]
