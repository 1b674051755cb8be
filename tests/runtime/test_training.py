"""The ways in which training uses attention: layers, checkpointing, many keys, changing masks, no gradients."""

import resource
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from magi_attention.api import calc_attn, compute_pad_size, dispatch, magi_attn_varlen_key, undispatch
from magi_attention.mask import builders
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.rank_pool import RankPool

CU_SEQLENS = ([0, 40, 41, 97], [0, 13, 97], [0, 97])


def make_keys(group: dist.ProcessGroup, chunk_size: int = 8):
    pad_size = compute_pad_size(97, dist.get_world_size(group), chunk_size)
    return [magi_attn_varlen_key(cu, cu, pad_size, chunk_size, group, causal=True) for cu in CU_SEQLENS]


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(97, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def layers_on_rank(rank: int, group: dist.ProcessGroup, use_checkpoint: bool) -> list[torch.Tensor]:
    """Three layers, each with its own mask and key, with a residual between them."""
    keys = make_keys(group)
    x, *weights = inputs()
    h = x
    for key, scale in zip(keys, (1.0, 0.5, 2.0), strict=True):

        def layer(h: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key=key, scale=scale) -> torch.Tensor:
            local = [dispatch(t, key) for t in (h * scale, k, v)]
            return h + undispatch(calc_attn(*local, key)[0], key)

        h = checkpoint(layer, h, *weights, use_reentrant=False) if use_checkpoint else layer(h, *weights)
    (h * h).sum().backward()
    return [h.detach(), x.grad, *(w.grad for w in weights)]


def layers_densely() -> list[torch.Tensor]:
    x, k, v = inputs()
    h = x
    for cu, scale in zip(CU_SEQLENS, (1.0, 0.5, 2.0), strict=True):
        h = h + dense_attention(h * scale, k, v, builders.varlen(cu, causal=True).to_dense())[0]
    (h * h).sum().backward()
    return [h.detach(), x.grad, k.grad, v.grad]  # type: ignore[list-item]


def test_several_layers_and_keys(rank_pool: RankPool) -> None:
    for ours in rank_pool.run(layers_on_rank, 3, False):
        for actual, expected in zip(ours, layers_densely(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_activation_checkpointing_changes_nothing(rank_pool: RankPool) -> None:
    plain, recomputed = (rank_pool.run(layers_on_rank, 2, use) for use in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputed[0], strict=True))


def without_gradients(rank: int, group: dist.ProcessGroup) -> bool:
    key = make_keys(group)[0]
    local = [dispatch(t, key) for t in inputs()]
    with_grad = calc_attn(*local, key)[0]
    with torch.no_grad():
        under_no_grad = calc_attn(*local, key)[0]
    with torch.inference_mode():
        under_inference = calc_attn(*[dispatch(t, key) for t in inputs()], key)[0]
    q_only = calc_attn(local[0].detach().requires_grad_(), local[1].detach(), local[2].detach(), key)[0]
    q_only.sum().backward()
    assert with_grad.requires_grad and not under_no_grad.requires_grad
    return all(torch.equal(with_grad, other) for other in (under_no_grad, under_inference, q_only))


def test_no_gradient_wanted(rank_pool: RankPool) -> None:
    assert rank_pool.run(without_gradients, 2) == [True, True]


def interleaved(rank: int, group: dist.ProcessGroup) -> bool:
    """Forward passes of several keys before any of their backward passes, and those in another order."""
    keys = make_keys(group)
    alone, together = [], []
    for key in keys:
        leaves = inputs()
        calc_attn(*[dispatch(t, key) for t in leaves], key)[0].square().sum().backward()
        alone.append([t.grad for t in leaves])
    pending = []
    for key in keys:
        leaves = inputs()
        pending.append((leaves, calc_attn(*[dispatch(t, key) for t in leaves], key)[0].square().sum()))
    for leaves, loss in (pending[1], pending[2], pending[0]):
        loss.backward()
        together.append([t.grad for t in leaves])
    return all(torch.equal(a, b) for n, m in enumerate((1, 2, 0)) for a, b in zip(together[n], alone[m], strict=True))


def test_several_keys_alive(rank_pool: RankPool) -> None:
    assert rank_pool.run(interleaved, 3) == [True] * 3


def backward_after_eviction(rank: int, group: dist.ProcessGroup) -> bool:
    key = make_keys(group)[0]
    leaves = inputs()
    out = calc_attn(*[dispatch(t, key) for t in leaves], key)[0]
    runtimes.clear()
    out.sum().backward()
    return all(torch.isfinite(t.grad).all() for t in leaves)


def test_backward_outlives_the_cache(rank_pool: RankPool) -> None:
    assert rank_pool.run(backward_after_eviction, 2) == [True, True]


def memory_of_changing_masks(rank: int, group: dist.ProcessGroup, steps: int) -> list[int]:
    """Peak resident memory after each step, in KiB, every step a new mask."""
    runtimes.clear()
    runtimes.set_capacity(16)
    generator = torch.Generator().manual_seed(2)
    pad_size = compute_pad_size(509, dist.get_world_size(group), 16)
    leaves = [torch.randn(509, 2, 16, requires_grad=True) for _ in range(3)]
    peak = []
    for _ in range(steps):
        cuts = torch.randint(1, 508, (6,), generator=generator).sort().values.tolist()
        cu = [0, *cuts, 509]
        key = magi_attn_varlen_key(cu, cu, pad_size, 16, group, causal=True)
        calc_attn(*[dispatch(t, key) for t in leaves], key)[0].sum().backward()
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(runtimes) == 16
    runtimes.set_capacity(128)
    return peak


def test_memory_does_not_grow_with_changing_masks(rank_pool: RankPool) -> None:
    """The allocator takes more now and then; a leak would grow in every stretch of steps."""
    for peak in rank_pool.run(memory_of_changing_masks, 2, 600):
        growth = [end - start for start, end in pairwise(peak[99::100])]
        assert min(growth) < 512, f"KiB of growth over 100 steps each: {growth}"
