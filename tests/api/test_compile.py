"""Distributed attention in code that ``torch.compile`` compiles: the same numbers, from the first call on."""

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import (
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_flex_dispatch,
    magi_attn_mask_key,
    roll,
    undispatch,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.rank_pool import RankPool

MASKS = [builders.causal(96), builders.sliding_window(96, (20, 0)), builders.varlen([0, 40, 96], causal=True)]


def step(x: torch.Tensor, w: torch.Tensor, mask: AttnMask, group: dist.ProcessGroup) -> torch.Tensor:
    """Everything that a training step calls, between operations that a compiler fuses."""
    key = magi_attn_mask_key(mask, 0, 8, group)
    local = dispatch(x * 2.0, key)
    q = (local * (1 + get_position_ids(key)[:, None]).log().to(x.dtype) * w).unflatten(1, (4, 8))
    out, lse = calc_attn(q, q + 1.0, q * 0.5, key)
    return undispatch(roll(out, 1, 0, key).square() + lse.T.square()[:, :, None], key).sum()


def compiled_and_not(rank: int, group: dist.ProcessGroup, backend: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend)
    results = []
    for mask in MASKS:
        for run in (compiled, step):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(96, 32, generator=generator, dtype=torch.float64).requires_grad_()
            w = torch.linspace(0.5, 1, 32, dtype=torch.float64).requires_grad_()
            results.append(torch.autograd.grad(run(x, w, mask, group), (x, w)))
    return results


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(rank_pool: RankPool, backend: str) -> None:
    for results in rank_pool.run(compiled_and_not, 2, backend):
        for compiled, plain in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(compiled, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_graph_ends_before_it_and_goes_on_behind(local_group: dist.ProcessGroup) -> None:
    """Two graphs, of what is before and behind. Nothing inside is traced, so that they serve every mask."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def attend(x: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
        local, key = magi_attn_flex_dispatch(x + 1, ranges, ranges, "causal", 96, 96, 0, 8, local_group)
        return calc_attn(local, local, local, key)[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=count)
    for n in (96, 50, 20, 70):
        x = torch.randn(96, 4, 8)
        assert torch.equal(compiled(x, [(0, n)]), attend(x, [(0, n)]))
    assert len(graphs) == 2
