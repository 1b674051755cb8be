"""QueryGrads: what a backward pass knows of each query, whatever part of the keys it is at."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class QueryGrads:
    """Made by an engine's ``start_backward``, read by its ``backward`` for each part of the keys.

    The form of each is the engine's own affair: its units, its order in memory, and what stands for a query that
    attends nothing.

    Attributes:
        dout: The gradient of ``out``.
        lse: The log-sum-exp of each query's scores over all keys, and of its sink.
        delta: What the scores of a query share: ``dscore = prob * (dout . v - delta)``. The softmax gives
            ``dout . out`` (FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135). A gradient of the
            log-sum-exp, whose derivative by a score is the probability, is subtracted from it.
        dq: The gradient of the queries so far, in the accumulation type: 0 at first, and each ``backward`` adds to it.
    """

    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    dq: torch.Tensor
