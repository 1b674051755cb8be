"""What a mask and attention mean, written down plainly: dense matrices, one row at a time, no bands.

Everything fast is held against these functions. They use memory in proportion to queries times keys.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.mask.mask_type import AttnMaskType


def dense_mask(
    q_ranges: Sequence[tuple[int, int]],
    k_ranges: Sequence[tuple[int, int]],
    mask_types: Sequence[AttnMaskType | str | int],
    total_seqlen_q: int,
    total_seqlen_k: int,
) -> NDArray[np.bool_]:
    """The cells of slices, True where a query attends a key, shape ``(total_seqlen_q, total_seqlen_k)``.

    * full: every query sees every key.
    * causal: the last query sees every key, each query before it one key fewer at the end.
    * inverse causal: the first query sees every key, each query after it one key fewer at the start.
    * bi-causal: both.
    """
    dense = np.zeros((total_seqlen_q, total_seqlen_k), np.bool_)
    for (q_start, q_end), (k_start, k_end), mask_type in zip(q_ranges, k_ranges, mask_types, strict=True):
        kind = AttnMaskType.parse(mask_type)
        for query in range(q_start, q_end):
            first, last = k_start, k_end - 1
            if kind in (AttnMaskType.CAUSAL, AttnMaskType.BICAUSAL):
                last -= q_end - 1 - query
            if kind in (AttnMaskType.INVCAUSAL, AttnMaskType.BICAUSAL):
                first += query - q_start
            for key in range(first, last + 1):
                dense[query, key] = True
    return dense


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense_mask: NDArray[np.bool_] | torch.Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention in the dtype of ``q``, differentiable through both results.

    Args:
        q: Queries, shape ``(tokens_q, heads_q, head_dim)``.
        k: Keys, shape ``(tokens_k, heads_kv, head_dim)``. Query head ``h`` uses head ``h // (heads_q // heads_kv)``.
        v: Values, shape ``(tokens_k, heads_kv, head_dim_v)``.
        dense_mask: True where a query attends a key, shape ``(tokens_q, tokens_k)``.
        softmax_scale: Factor of the scores, ``head_dim ** -0.5`` by default.
        softcap: If positive, scores become ``softcap * tanh(scores / softcap)``.
        sink: If given, one more score for each query of a head, whose value is 0, shape ``(heads_q,)``.

    Returns:
        ``out``, shape ``(tokens_q, heads_q, head_dim_v)``, and the natural log-sum-exp of the scores ``lse``, shape
        ``(heads_q, tokens_q)``, at least float32. A query that attends nothing has ``out`` 0, and ``lse`` -inf or
        the sink; without a sink it passes no gradient on.
    """
    scores = dense_scores(q, k, dense_mask, softmax_scale, softcap)
    v = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if sink is None:
        # A softmax over no key is NaN and so is its gradient, which ends where the scores are masked: all of them.
        p = scores.softmax(dim=-1).masked_fill((scores == -torch.inf).all(dim=-1, keepdim=True), 0)
    else:
        scores = torch.cat([scores, sink.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)], dim=-1)
        p = scores.softmax(dim=-1)[..., :-1]
    out = torch.einsum("hqk,khd->qhd", p, v)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return out, wide.logsumexp(dim=-1)


def dense_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    dense_mask: NDArray[np.bool_] | torch.Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """What goes into the softmax, -inf where a query does not attend a key, shape ``(heads_q, tokens_q, tokens_k)``.

    Arguments are those of :func:`dense_attention`.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mask = torch.as_tensor(dense_mask, dtype=torch.bool, device=q.device)
    return scores.masked_fill(~mask, float("-inf"))


def dense_max_logits(scores: torch.Tensor) -> torch.Tensor:
    """The highest of each head's :func:`dense_scores`, shape ``(heads_q,)``; -inf where nothing is attended."""
    nothing = scores.new_full((len(scores), 1), -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.cat([scores.detach().flatten(1), nothing], dim=1).amax(dim=1).to(wide)
