"""Inputs of attention, what an engine and the dense oracle make of them, and how far they may be apart."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magi_attention.kernels import reference
from magi_attention.kernels.engine import Engine
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import State, make_parts
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import relocate
from magi_attention.testing.dense_oracle import dense_attention, dense_max_logits, dense_scores
from magi_attention.testing.error_bound import assert_close_to_oracle


@dataclass
class Problem:
    """q, k, v, the gradients of the outputs, the mask and the parameters, and maybe a sink."""

    mask: AttnMask
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    params: AttnParams
    sink: Tensor | None = None

    @classmethod
    def random(
        cls,
        mask: AttnMask,
        dtype: torch.dtype = torch.float64,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 8,
        softcap: float = 0.0,
        device: str = "cpu",
        head_dim_v: int | None = None,
        **options: object,
    ) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        rows, keys, (heads_q, heads_kv) = mask.total_seqlen_q, mask.total_seqlen_k, heads
        head_dim_v = head_dim if head_dim_v is None else head_dim_v

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        q, dout = normal(rows, heads_q, head_dim), normal(rows, heads_q, head_dim_v)
        k, v = normal(keys, heads_kv, head_dim), normal(keys, heads_kv, head_dim_v)
        dlse = normal(heads_q, rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(mask, q, k, v, dout, dlse, AttnParams(head_dim**-0.5, softcap), **options)

    def with_sink(self, dtype: torch.dtype | None = None) -> "Problem":
        """The same with a sink, in the type of ``q`` if no other is given, and asking for the highest scores.

        The sinks are from as high as one score to as high as many together.
        """
        sink = torch.linspace(-1, 4, self.q.shape[1], device=self.q.device)
        params = replace(self.params, return_max_logits=True)
        return replace(self, params=params, sink=sink.to(dtype or self.q.dtype))

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another type that holds them."""
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")})


NAMES = ("out", "lse", "dq", "dk", "dv", "dsink", "max_logits")
"""What attention gives. The gradient of the sink is there where there is one, the highest scores if asked for."""


def names_of(problem: Problem) -> list[str]:
    """Those of ``NAMES`` that a problem has."""
    lacking = {"dsink": problem.sink is None, "max_logits": not problem.params.return_max_logits}
    return [name for name in NAMES if not lacking.get(name)]


def run_engine(engine: Engine, problem: Problem) -> list[Tensor]:
    """``NAMES`` by an engine, in the types in which users get them."""
    p = problem
    schedule = engine.schedule(p.mask.bands, len(p.q), len(p.k))
    state = engine.forward(p.q, p.k, p.v, schedule, p.params, sink=p.sink)
    grads = engine.start_backward(state.out, p.dout, state.lse, p.dlse, p.params, p.q.shape[2])
    key_grads = engine.backward(grads, p.q, p.k, p.v, schedule, p.params, p.k.dtype)
    return _results(engine, problem, state, grads, key_grads)


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
        after = engine.forward(p.q, k, v, schedule, p.params, state, p.sink)
        kept = [] if state is None else [(a, b) for a, b in zip(after, state, strict=True) if b is not None]
        assert all(a is b for a, b in kept), "parts are added in place"
        state = after
    assert state is not None
    grads = engine.start_backward(state.out, p.dout, state.lse, p.dlse, p.params, p.q.shape[2])
    shares = [engine.backward(grads, p.q, k, v, schedule, p.params) for k, v, schedule in parts]
    dk, dv = (torch.cat(x).to(p.k.dtype) for x in zip(*shares, strict=True))
    return _results(engine, problem, state, grads, (dk, dv))


def _results(
    engine: Engine, problem: Problem, state: State, grads: QueryGrads, key_grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    params = problem.params
    max_logits = [state.max_logits()] if params.return_max_logits else []
    dsink = [] if problem.sink is None else [engine.sink_grad(grads, problem.sink, params)]
    dq = engine.finish_backward(grads, params, problem.q.dtype)
    return [state.out, state.lse, dq, *key_grads, *dsink, *max_logits]


def run_dense(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """``NAMES`` by the plain formula in ``dtype``."""
    given = [problem.q, problem.k, problem.v, *([] if problem.sink is None else [problem.sink])]
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    q, k, v, *sink = leaves
    how = problem.mask.to_dense(), problem.params.softmax_scale, problem.params.softcap
    out, lse = dense_attention(q, k, v, *how, *sink)
    alive = torch.isfinite(lse)
    loss = (out * problem.dout.to(dtype)).sum() + (lse.masked_fill(~alive, 0.0) * problem.dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    max_logits = [dense_max_logits(dense_scores(q, k, *how))] if problem.params.return_max_logits else []
    return [out.detach(), lse.detach(), *grads, *max_logits]


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
