"""The reference engine: attention over a tile schedule in plain torch, on any device.

It is what the other engines are tested against, and what runs on a CPU. Memory grows with the length of the sequence, not
with its square; time grows with the unmasked area. The forward pass is an online softmax over key tiles (Milakov &
Gimelshein 2018, https://arxiv.org/abs/1805.02867; Rabe & Staats 2021, https://arxiv.org/abs/2112.05682); the backward pass
makes the probabilities again from the log-sum-exp (FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135).

Each head of the keys makes one matrix product with all query heads that share it: they are packed into the rows of one
matrix, row ``i * group + g`` for query ``i`` of a tile and head ``g`` of the group. Low precision is computed in float32.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.tile_schedule import TileSchedule, build_tile_schedule
from magi_attention.mask.bands import IntArray

# Measured on a CPU: the scores of one tile, of a few heads at a time, stay in the cache from one operation to the next.
BLOCK_Q = 128
BLOCK_K = 256
MAX_SCORES = 1 << 18


def schedule(bands: IntArray, num_rows: int, num_keys: int) -> TileSchedule:
    """Compile a mask for this engine: :func:`~magi_attention.kernels.tile_schedule.build_tile_schedule`."""
    return build_tile_schedule(bands, num_rows, num_keys, BLOCK_Q, BLOCK_K)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TileSchedule, params: AttnParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q`` over ``k`` and ``v``.

    Args:
        q: ``(num_rows, heads_q, head_dim)``.
        k: ``(num_keys, heads_kv, head_dim)``; ``heads_kv`` divides ``heads_q``.
        v: Shaped as ``k``.
        schedule: The tiles of ``num_rows`` x ``num_keys`` scores.
        params: How scores are made.

    Returns:
        ``out``, shaped as ``q``, and ``lse``, the natural log-sum-exp of each row's scores, ``(heads_q, num_rows)``. Both
        are float32, or float64 when ``q`` is. A row that attends nothing has ``out`` 0 and ``lse`` -inf.
    """
    dtype = accumulation_dtype(q.dtype)
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
    q, k, v, out_rows, lse_rows = (_by_kv_head(x, heads_kv) for x in (q, k, v, out, lse.T.unsqueeze(2)))
    walk = _Walk(schedule, group, out)
    for heads in walk.head_chunks(heads_kv):
        k_heads, v_heads = _pack(k[heads], dtype), _pack(v[heads], dtype)
        for rows, key_tiles in walk.query_tiles():
            q_tile = _pack(q[heads, rows], dtype) * _product_scale(params)
            # The highest score of each row so far; finite, so that a row without a key has probability exp(-inf - top) = 0.
            top = q_tile.new_full((*q_tile.shape[:2], 1), torch.finfo(dtype).min)
            total, out_tile = torch.zeros_like(top), torch.zeros_like(q_tile)
            for keys, bias in key_tiles:
                scores = _mask(_scores(q_tile, k_heads[:, keys], walk.memory[0], params), bias)
                new_top = torch.maximum(top, scores.amax(2, keepdim=True))
                decay = top.sub_(new_top).exp2_()
                probs = scores.sub_(new_top).exp2_()
                total.mul_(decay).add_(probs.sum(2, keepdim=True))
                out_tile.mul_(decay).baddbmm_(probs, v_heads[:, keys])
                top = new_top
            # The highest score adds exp(0) to the total, so that it is below 1 only where there is no key.
            out_rows[heads, rows] = out_tile.div_(total.clamp(min=1)).unflatten(1, (-1, group))
            lse_rows[heads, rows] = top.add_(total.log2_()).mul_(math.log(2)).unflatten(1, (-1, group))
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    schedule: TileSchedule,
    params: AttnParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`forward`.

    ``k``, ``v`` and ``schedule`` may be a part of the keys that ``lse`` and ``delta`` were made with; the results are then
    that part's share of ``dq``, and its ``dk`` and ``dv``.

    Args:
        dout: Gradient of ``out``, ``(num_rows, heads_q, head_dim)``.
        q: As in :func:`forward`.
        k: As in :func:`forward`.
        v: As in :func:`forward`.
        lse: Log-sum-exp over all keys, ``(heads_q, num_rows)``. Rows where it is -inf have gradient 0, whatever ``dout``
            and ``delta`` hold there.
        delta: See :func:`magi_attention.kernels.merge.compute_delta`, ``(heads_q, num_rows)``.
        schedule: As in :func:`forward`.
        params: As in :func:`forward`.

    Returns:
        ``dq``, ``dk`` and ``dv``, shaped as ``q``, ``k`` and ``v``; float32, or float64 when ``q`` is.
    """
    dtype = accumulation_dtype(q.dtype)
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    dq, dk, dv = q.new_zeros(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)
    attends_nothing = lse == -torch.inf
    lse = (lse * math.log2(math.e)).masked_fill(attends_nothing, torch.inf)  # its probabilities become exp(score - inf) = 0
    delta = (delta * math.log(2)).masked_fill(attends_nothing, 0)
    walk = _Walk(schedule, group, dq)
    by_rows = dout, q, lse.T.unsqueeze(2), delta.T.unsqueeze(2)
    dout, q, lse, delta, k, v, dq_rows, dk_keys, dv_keys = (
        _by_kv_head(x, heads_kv) for x in (*by_rows, k, v, dq, dk, dv)
    )
    for heads in walk.head_chunks(heads_kv):
        k_heads, v_heads = _pack(k[heads], dtype), _pack(v[heads], dtype) * math.log(2)
        dk_heads, dv_heads = torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        for rows, key_tiles in walk.query_tiles():
            dout_tile, q_tile, lse_tile, delta_tile = (_pack(x[heads, rows], dtype) for x in (dout, q, lse, delta))
            dout_tile = dout_tile.masked_fill(lse_tile == torch.inf, 0)
            q_tile = q_tile * _product_scale(params)
            dq_tile = torch.zeros_like(q_tile)
            for keys, bias in key_tiles:
                scores = _scores(q_tile, k_heads[:, keys], walk.memory[0], params)
                slope = _softcap_slope(scores, params)
                probs = _mask(scores, bias).sub_(lse_tile).exp2_()
                dv_heads[:, keys].add_(torch.bmm(probs.mT, dout_tile))
                dproduct = _product(dout_tile, v_heads[:, keys], walk.memory[1]).sub_(delta_tile).mul_(probs)
                if slope is not None:
                    dproduct.mul_(slope)
                dk_heads[:, keys].add_(torch.bmm(dproduct.mT, q_tile))
                dq_tile.baddbmm_(dproduct, k_heads[:, keys])
            dq_rows[heads, rows] = dq_tile.mul_(_product_scale(params)).unflatten(1, (-1, group))
        dk_keys[heads], dv_keys[heads] = dk_heads.unsqueeze(2), dv_heads.unsqueeze(2)
    return dq, dk, dv


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which ``dtype`` is computed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Walk:
    """The tiles of a schedule, one after the other, and memory for the scores of one."""

    def __init__(self, schedule: TileSchedule, group: int, like: torch.Tensor) -> None:
        self.bounds, self.offsets = schedule.q_bounds.tolist(), schedule.offsets.tolist()
        self.key_tiles = list(
            zip(schedule.key_starts.tolist(), schedule.key_ends.tolist(), schedule.full.tolist(), strict=True)
        )
        self.starts, self.ends = (torch.from_numpy(x).to(like.device).unsqueeze(2) for x in (schedule.starts, schedule.ends))
        in_use = np.logical_or.reduceat(schedule.ends > schedule.starts, schedule.q_bounds[:-1], axis=1)
        self.num_layers = in_use.sum(0).tolist()
        longest_q = np.diff(schedule.q_bounds).max(initial=1)
        longest_k = (schedule.key_ends - schedule.key_starts).max(initial=1)
        scores = int(longest_q * longest_k) * group
        self.step = max(1, MAX_SCORES // scores)
        self.keys = torch.arange(int(longest_k), dtype=like.dtype, device=like.device)
        self.memory = like.new_empty(2, self.step * scores)

    def head_chunks(self, heads_kv: int) -> Iterator[slice]:
        """Heads of the keys to compute at a time."""
        return (slice(head, head + self.step) for head in range(0, heads_kv, self.step))

    def query_tiles(self) -> Iterator[tuple[slice, Iterator[tuple[slice, torch.Tensor | None]]]]:
        """The rows of each query tile that attends something, and its key tiles."""
        for tile in range(len(self.bounds) - 1):
            if self.offsets[tile] < self.offsets[tile + 1]:
                yield slice(self.bounds[tile], self.bounds[tile + 1]), self._key_tiles(tile)

    def _key_tiles(self, tile: int) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """The keys of each key tile, and what masks its scores, None where nothing does."""
        rows = slice(self.bounds[tile], self.bounds[tile + 1])
        layers = range(self.num_layers[tile])
        for start, end, full in self.key_tiles[self.offsets[tile] : self.offsets[tile + 1]]:
            yield slice(start, end), None if full else self._bias(rows, start, end, layers)

    def _bias(self, rows: slice, start: int, end: int, layers: range) -> torch.Tensor:
        """0 where a row attends a key and -inf where not, ``(rows, 1, keys)``."""
        keys = self.keys[: end - start]
        depth = None
        for layer in layers:
            x = torch.minimum(keys - (self.starts[layer, rows] - start), (self.ends[layer, rows] - start - 1) - keys)
            depth = x if depth is None else torch.maximum(depth, x)
        return torch.nn.functional.threshold_(depth.clamp_(max=0), -0.5, -torch.inf).unsqueeze(1)


def _product(a: torch.Tensor, b: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``a @ b^T`` of each head, written to ``memory``."""
    shape = *a.shape[:2], b.shape[1]
    return torch.bmm(a, b.mT, out=memory[: math.prod(shape)].view(shape))


def _scores(q: torch.Tensor, k: torch.Tensor, memory: torch.Tensor, params: AttnParams) -> torch.Tensor:
    scores = _product(q, k, memory)
    return scores.tanh_().mul_(params.softcap*math.log2(math.e)) if params.softcap else scores


def _product_scale(params: AttnParams) -> float:
    """What ``q`` is multiplied by before its product with ``k``."""
    return params.softmax_scale / params.softcap if params.softcap else params.softmax_scale*math.log2(math.e)


def _softcap_slope(scores: torch.Tensor, params: AttnParams) -> torch.Tensor | None:
    """Derivative of ``scores = c * tanh(product)``: ``c * (1 - tanh^2) = c - scores^2 / c``; None for 1."""
    return scores.square().div_(-params.softcap*math.log2(math.e)).add_(params.softcap*math.log2(math.e)) if params.softcap else None


def _mask(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        scores.unflatten(1, (len(bias), -1)).add_(bias)
    return scores


def _by_kv_head(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """``(tokens, heads, dim)`` seen as ``(heads_kv, tokens, group, dim)``."""
    return x.unflatten(1, (heads_kv, -1)).movedim(1, 0)


def _pack(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(heads_kv, tokens, group, dim)`` to ``(heads_kv, tokens * group, dim)``."""
    return x.to(dtype).flatten(1, 2).contiguous()
