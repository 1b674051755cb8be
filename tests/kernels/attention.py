"""Inputs of attention, what an engine and the dense oracle make of them, and how far they may be apart."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magi_attention.kernels import reference
from magi_attention.kernels.engine import Engine
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import make_parts
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import relocate
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.error_bound import assert_close_to_oracle


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
        device: str = "cpu",
        **options: object,
    ) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        rows, keys, (heads_q, heads_kv) = mask.total_seqlen_q, mask.total_seqlen_k, heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        q, dout = normal(rows, heads_q, head_dim), normal(rows, heads_q, head_dim)
        k, v = normal(keys, heads_kv, head_dim), normal(keys, heads_kv, head_dim)
        dlse = normal(heads_q, rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(mask, q, k, v, dout, dlse, AttnParams(head_dim**-0.5, softcap), **options)

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another type that holds them."""
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")})


NAMES = ("out", "lse", "dq", "dk", "dv")


def run_engine(engine: Engine, problem: Problem) -> list[Tensor]:
    """``NAMES`` by an engine, in the types in which users get them."""
    p = problem
    schedule = engine.schedule(p.mask.bands, len(p.q), len(p.k))
    out, lse, _ = engine.forward(p.q, p.k, p.v, schedule, p.params)
    grads = engine.start_backward(out, p.dout, lse, p.dlse, p.params)
    dk, dv = engine.backward(grads, p.q, p.k, p.v, schedule, p.params, p.k.dtype)
    return [out, lse, engine.finish_backward(grads, p.params, p.q.dtype), dk, dv]


def run_in_parts(engine: Engine, problem: Problem, bounds: list[int]) -> list[Tensor]:
    """The same, the keys cut at ``bounds`` and taken one part after the other, as in stages."""
    p = problem
    whole = np.array([[0, len(p.q)]])
    cuts = list(pairwise([0, *bounds, len(p.k)]))
    bands = [relocate(p.mask.bands, whole, np.array([cut])) for cut in cuts]
    parts = [
        (p.k[start:end], p.v[start:end], engine.schedule(part_bands, len(p.q), end - start, part))
        for (start, end), part_bands, part in zip(cuts, bands, make_parts(bands, len(p.q)), strict=True)
    ]
    state = None
    for k, v, schedule in parts:
        after = engine.forward(p.q, k, v, schedule, p.params, state)
        assert state is None or all(a is b for a, b in zip(after, state, strict=True)), "parts are added in place"
        state = after
    assert state is not None
    out, lse, _ = state
    grads = engine.start_backward(out, p.dout, lse, p.dlse, p.params)
    shares = [engine.backward(grads, p.q, k, v, schedule, p.params) for k, v, schedule in parts]
    dk, dv = (torch.cat(x).to(p.k.dtype) for x in zip(*shares, strict=True))
    return [out, lse, engine.finish_backward(grads, p.params, p.q.dtype), dk, dv]


def run_dense(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """``NAMES`` by the plain formula in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    params = problem.params
    out, lse = dense_attention(q, k, v, problem.mask.to_dense(), params.softmax_scale, params.softcap)
    alive = torch.isfinite(lse)
    loss = (out * problem.dout.to(dtype)).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return [out.detach(), lse.detach(), *grads]


def plain_results(problem: Problem) -> list[Tensor]:
    """``NAMES`` by what the error of others is measured with: the plain formula in the type of the inputs.

    In float32 it is the reference engine: as all engines it has no more than a rounded log-sum-exp to make the
    probabilities of the backward pass from, and that is most of the error.
    """
    if problem.q.dtype == torch.float32:
        return run_engine(reference, problem)
    return run_dense(problem, problem.q.dtype)


def check_bound(results: list[Tensor], problem: Problem, plain: list[Tensor] | None = None) -> None:
    """Hold results to the derived bound; ``plain`` is ``plain_results`` by default."""
    plain = plain_results(problem) if plain is None else plain
    for actual, exact, low in zip(results, run_dense(problem), plain, strict=True):
        assert_close_to_oracle(actual, exact, low)
