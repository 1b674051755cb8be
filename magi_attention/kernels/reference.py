"""The reference engine: attention over a tile schedule in plain torch, on any device.

It is what the other engines are tested against, and what runs on a CPU. Memory grows with the length of the sequence,
not with its square; time grows with the unmasked area. The forward pass is an online softmax over key tiles (Milakov &
Gimelshein 2018, https://arxiv.org/abs/1805.02867; Rabe & Staats 2021, https://arxiv.org/abs/2112.05682). The backward
pass makes the probabilities again from the log-sum-exp (Dao et al. 2022, https://arxiv.org/abs/2205.14135).

The query heads that share a key head are packed into the rows of one matrix, row ``i * group + g`` for query ``i`` and
head ``g`` of the group. Low precision is computed in float32. Scores are in base 2, ``log2(e)`` times the natural
ones: ``torch.exp2`` takes the same time for every value, ``torch.exp`` on a CPU 200 times longer for tiny results.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch

from magi_attention.kernels.merge import add_part, merge_states
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part, State
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.kernels.reference_schedule import TileSchedule, build_tile_schedule
from magi_attention.mask.bands import IntArray

# Measured on a CPU with 2 MiB of cache a core: the scores of a tile, of some heads at a time, stay in the cache.
BLOCK_Q = 256
BLOCK_K = 256
MAX_SCORES = 1 << 19

LN2 = math.log(2)

name = "reference"
parts_side_by_side = False
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Function = TypeVar("Function", bound=Callable[..., Any])


def _undisturbed(function: Function) -> Function:
    """Run without autograd, and without autocast, which would compute products in low precision."""

    @functools.wraps(function)
    def run(first: torch.Tensor | QueryGrads, *args: Any, **kwargs: Any) -> Any:
        device = first.dq.device if isinstance(first, QueryGrads) else first.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(first, *args, **kwargs)

    return cast(Function, run)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
    """See :meth:`magi_attention.kernels.engine.Engine.refusal`: any device, any head_dims."""
    return None if dtype in DTYPES else f"takes float32, float64, bfloat16 and float16, not {dtype}"


def schedule(bands: IntArray, num_rows: int, num_keys: int, part: Part | None = None) -> TileSchedule:
    """Compile a mask for this engine: :func:`~magi_attention.kernels.reference_schedule.build_tile_schedule`."""
    return build_tile_schedule(bands, num_rows, num_keys, BLOCK_Q, BLOCK_K, part)


@_undisturbed
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: TileSchedule,
    params: AttnParams,
    state: State | None = None,
    sink: torch.Tensor | None = None,
) -> State:
    """See :meth:`magi_attention.kernels.engine.Engine.forward`."""
    dtype = accumulation_dtype(q.dtype)
    heads_kv, group, out_dtype = k.shape[1], q.shape[1] // k.shape[1], q.dtype
    out = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=dtype)
    lse, row_max = (q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype) for _ in range(2))
    tiles = _Tiles(schedule, heads_kv, group, out)
    factor, cap = _base_2(params)
    by_rows = q, k, v, out, lse.T.unsqueeze(2), row_max.T.unsqueeze(2)
    q, k, v, out_rows, lse_rows, max_rows = (_by_kv_head(x, heads_kv) for x in by_rows)
    for heads in tiles.head_chunks:
        k_heads, v_heads = _pack(k[heads], dtype), _pack(v[heads], dtype)
        for rows, key_tiles in tiles.query_tiles():
            q_tile = _pack(q[heads, rows], dtype) * factor
            # Each row's highest score so far. It is finite, so that a row without a key has exp2(-inf - top) = 0.
            top = q_tile.new_full((*q_tile.shape[:2], 1), torch.finfo(dtype).min)
            total, out_tile = torch.zeros_like(top), q_tile.new_zeros((*q_tile.shape[:2], v.shape[3]))
            for keys, bias in key_tiles:
                scores = _product(q_tile, k_heads[:, keys], tiles.memory[0])
                if cap:
                    scores.tanh_().mul_(cap)
                scores = _mask(scores, bias)
                new_top = torch.maximum(top, scores.amax(2, keepdim=True))
                decay = top.sub_(new_top).exp2_()
                probs = scores.sub_(new_top).exp2_()
                total.mul_(decay).add_(probs.sum(2, keepdim=True))
                out_tile.mul_(decay).baddbmm_(probs, v_heads[:, keys])
                top = new_top
            # The highest score adds exp2(0) to the total: it is at least 1, or 0 where there is no key.
            out_rows[heads, rows] = out_tile.div_(total.clamp(min=1)).unflatten(1, (-1, group))
            max_rows[heads, rows] = (top * LN2).masked_fill_(total == 0, -torch.inf).unflatten(1, (-1, group))
            lse_rows[heads, rows] = top.add_(total.log2_()).mul_(LN2).unflatten(1, (-1, group))
    if sink is not None and state is None:
        merge_states(out, lse, out.new_zeros(()), sink.to(dtype)[:, None])
    return add_part(out, lse, row_max if params.return_max_logits else None, out_dtype, schedule.part, state)


@_undisturbed
def start_backward(
    out: torch.Tensor,
    dout: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    params: AttnParams,
    head_dim: int,
) -> QueryGrads:
    """See :meth:`magi_attention.kernels.engine.Engine.start_backward`; ``lse`` and ``delta`` go by base 2."""
    dout = torch.zeros_like(out) if dout is None else dout
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(2).T
    if dlse is not None:
        delta = delta - dlse
    attends_nothing = lse == -torch.inf
    return QueryGrads(
        dout=dout.masked_fill(attends_nothing.T.unsqueeze(2), 0),
        lse=(lse / LN2).masked_fill(attends_nothing, torch.inf),  # probabilities become exp2(score - inf) = 0
        delta=(delta * LN2).masked_fill(attends_nothing, 0),
        dq=out.new_zeros((*out.shape[:2], head_dim), dtype=lse.dtype),
    )


@_undisturbed
def backward(
    grads: QueryGrads,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: TileSchedule,
    params: AttnParams,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`magi_attention.kernels.engine.Engine.backward`."""
    wide = grads.dq.dtype
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    dk, dv = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    tiles = _Tiles(schedule, heads_kv, group, grads.dq)
    factor, cap = _base_2(params)
    by_rows = q, grads.dout, grads.lse.T.unsqueeze(2), grads.delta.T.unsqueeze(2)
    q, dout, lse, delta = (_by_kv_head(x, heads_kv) for x in by_rows)
    k, v, dq_rows, dk_keys, dv_keys = (_by_kv_head(x, heads_kv) for x in (k, v, grads.dq, dk, dv))
    for heads in tiles.head_chunks:
        k_heads, v_heads = _pack(k[heads], wide), _pack(v[heads], wide)
        dk_heads, dv_heads = dk_keys[heads].squeeze(2), dv_keys[heads].squeeze(2)
        for rows, key_tiles in tiles.query_tiles():
            q_tile, dout_tile, lse_tile, delta_tile = (_pack(x[heads, rows], wide) for x in (q, dout, lse, delta))
            q_tile = q_tile * factor
            dout_base_2 = dout_tile * LN2  # a score in base 2 is worth LN2 natural ones
            dq_tile = torch.zeros_like(q_tile)
            for keys, bias in key_tiles:
                k_tile = k_heads[:, keys]
                scores = _product(q_tile, k_tile, tiles.memory[0])
                slope = None
                if cap:
                    scores.tanh_().mul_(cap)
                    slope = scores.square().div_(-cap).add_(cap)  # cap * (1 - tanh^2)
                probs = _mask(scores, bias).sub_(lse_tile).exp2_()
                dv_heads[:, keys].add_(torch.bmm(probs.mT, dout_tile))
                dproduct = _product(dout_base_2, v_heads[:, keys], tiles.memory[1]).sub_(delta_tile).mul_(probs)
                if slope is not None:
                    dproduct.mul_(slope)
                dk_heads[:, keys].add_(torch.bmm(dproduct.mT, q_tile))
                dq_tile.baddbmm_(dproduct, k_tile)
            dq_rows[heads, rows] += dq_tile.mul_(factor).unflatten(1, (-1, group))
    return dk.to(dtype or wide), dv.to(dtype or wide)


def adds_in_any_order(params: AttnParams) -> bool:
    """See :meth:`magi_attention.kernels.engine.Engine.adds_in_any_order`."""
    return False


@_undisturbed
def sink_grad(grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.sink_grad`."""
    probs = (sink.to(grads.lse.dtype)[:, None] / LN2 - grads.lse).exp2_()
    return (probs.mul_(grads.delta).sum(1) / -LN2).to(sink.dtype)


def finish_backward(grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.finish_backward`."""
    return grads.dq.to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which ``dtype`` is computed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Tiles:
    """The tiles of a schedule, one after the other.

    Attributes:
        head_chunks: The heads of the keys, so many at a time that their scores fit the cache.
        memory: Two places for the scores of one tile, of one chunk of heads.
    """

    def __init__(self, schedule: TileSchedule, heads_kv: int, group: int, like: torch.Tensor) -> None:
        self._bounds, self._offsets = schedule.q_bounds.tolist(), schedule.offsets.tolist()
        key_tiles = schedule.key_starts.tolist(), schedule.key_ends.tolist(), schedule.full.tolist()
        self._key_tiles = list(zip(*key_tiles, strict=True))
        self._starts, self._ends = (
            torch.from_numpy(x).to(like.device).unsqueeze(2) for x in (schedule.starts, schedule.ends)
        )
        in_use = np.logical_or.reduceat(schedule.ends > schedule.starts, schedule.q_bounds[:-1], axis=1)
        self._num_layers = in_use.sum(axis=0).tolist()
        most_rows = int(np.diff(schedule.q_bounds).max(initial=1))
        most_keys = int((schedule.key_ends - schedule.key_starts).max(initial=1))
        num_scores = most_rows * group * most_keys
        step = min(heads_kv, max(1, MAX_SCORES // num_scores))
        self.head_chunks = [slice(head, min(head + step, heads_kv)) for head in range(0, heads_kv, step)]
        self.memory = like.new_empty(2, step * num_scores)
        self._keys = torch.arange(most_keys, dtype=like.dtype, device=like.device)

    def query_tiles(self) -> Iterator[tuple[slice, Iterator[tuple[slice, torch.Tensor | None]]]]:
        """The rows of each query tile that attends something, and its key tiles: keys, and a bias unless it is full."""
        for tile in range(len(self._bounds) - 1):
            key_tiles = self._key_tiles[self._offsets[tile] : self._offsets[tile + 1]]
            if key_tiles:
                rows = slice(self._bounds[tile], self._bounds[tile + 1])
                yield rows, self._with_bias(rows, key_tiles, self._num_layers[tile])

    def _with_bias(
        self, rows: slice, key_tiles: list[tuple[int, int, bool]], num_layers: int
    ) -> Iterator[tuple[slice, torch.Tensor | None]]:
        for start, end, full in key_tiles:
            yield slice(start, end), None if full else self._bias(rows, start, end, num_layers)

    def _bias(self, rows: slice, start: int, end: int, num_layers: int) -> torch.Tensor:
        """0 where a row attends a key, -inf where not, ``(rows, 1, keys)``, to be added to the scores."""
        keys = self._keys[: end - start]
        depth = []  # how far a key lies inside a row's interval, negative outside: faster than comparisons
        for layer in range(num_layers):
            first, last = self._starts[layer, rows] - start, self._ends[layer, rows] - (start + 1)
            depth.append(torch.minimum(keys - first.to(keys.dtype), last.to(keys.dtype) - keys))
        return torch.threshold_(functools.reduce(torch.maximum, depth).clamp_(max=0), -0.5, -torch.inf).unsqueeze(1)


def _product(a: torch.Tensor, b: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``a @ b^T`` of each head, written to ``memory``."""
    shape = (*a.shape[:2], b.shape[1])
    return torch.bmm(a, b.mT, out=memory[: math.prod(shape)].view(shape))


def _mask(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        scores.unflatten(1, (len(bias), -1)).add_(bias)
    return scores


def _base_2(params: AttnParams) -> tuple[float, float]:
    """``(factor, cap)``: a score in base 2 is ``cap * tanh(factor * q . k)``, or ``factor * q . k`` if ``cap`` is 0."""
    if params.softcap:
        return params.softmax_scale / params.softcap, params.softcap / LN2
    return params.softmax_scale / LN2, 0.0


def _by_kv_head(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """``(tokens, heads, dim)`` seen as ``(heads_kv, tokens, group, dim)``."""
    return x.unflatten(1, (heads_kv, -1)).movedim(1, 0)


def _pack(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(heads_kv, tokens, group, dim)`` to ``(heads_kv, tokens * group, dim)``, contiguous."""
    return x.to(dtype).flatten(1, 2).contiguous()
