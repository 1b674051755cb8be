"""Parts: the keys of a call that come one part after the other, and what is known of the queries in between.

Each query's softmax goes on where the part before left it. A query that attends no later part is done: its output is
rounded and stored once, as if there were no parts. Only of the others are the sums kept in the accumulation type, so
that parts cost nothing where they change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.mask.bands import IntArray, attending_rows


@dataclass(frozen=True, eq=False)
class Part:
    """One of the parts that the keys come in.

    Attributes:
        attends: Which queries attend keys of this part, bool ``(num_rows,)``.
        goes_on: Which queries attend keys of a later part.
        waits: Which of these attend none of this part, and of none before.
        apart: Whether no query attends two of the parts, and some the first. Then parts need nothing from each other.
    """

    attends: NDArray[np.bool_]
    goes_on: NDArray[np.bool_]
    waits: NDArray[np.bool_]
    apart: bool

    @cached_property
    def is_last(self) -> bool:
        """Whether no query attends a later part."""
        return not self.goes_on.any()


def make_parts(bands: Sequence[IntArray], num_rows: int) -> list[Part]:
    """The parts of ``num_rows`` queries over keys that come in parts.

    Args:
        bands: What the queries attend in each part, in order, see :mod:`magi_attention.mask.bands`.
        num_rows: Number of queries.
    """
    attending = np.array([attending_rows(part, num_rows) for part in bands])
    begun = np.logical_or.accumulate(attending)
    up_to_end = np.logical_or.accumulate(attending[::-1])[::-1]
    goes_on = np.concatenate((up_to_end[1:], np.zeros((1, num_rows), np.bool_)))
    apart = len(bands) > 1 and bool(attending[0].any()) and attending.sum(axis=0).max() == 1
    return [Part(*part, apart) for part in zip(attending, goes_on, goes_on & ~begun, strict=True)]


class State(NamedTuple):
    """What queries have so far of the parts of the keys; after the last part, the result.

    Attributes:
        out: ``(num_rows, heads_q, head_dim_v)``, of queries that are done, in the type of ``q``, contiguous.
        lse: Natural log-sum-exp of the scores so far, ``(heads_q, num_rows)``, in the accumulation type.
        sums: The outputs so far of queries that go on, shaped as ``out``, in the accumulation type; None while
            there are none to keep.
        row_max: Each query's highest score so far, shaped and typed as ``lse``, -inf where there is none; None when
            it is not asked for.
    """

    out: torch.Tensor
    lse: torch.Tensor
    sums: torch.Tensor | None
    row_max: torch.Tensor | None = None

    @classmethod
    def empty(cls, q: torch.Tensor, head_dim_v: int, with_sums: bool, with_max: bool) -> "State":
        """Memory for the state of ``q`` after the first part, or for all keys at once.

        Args:
            q: Queries, ``(num_rows, heads_q, head_dim)``, whose accumulation type is float32.
            head_dim_v: The last dimension of the values.
            with_sums: Whether outputs so far are kept for later parts.
            with_max: Whether the highest scores are asked for.
        """
        out = torch.empty((*q.shape[:2], head_dim_v), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        sums = torch.empty_like(out, dtype=torch.float32) if with_sums else None
        return cls(out, lse, sums, torch.empty_like(lse) if with_max else None)

    def max_logits(self) -> torch.Tensor:
        """The highest score of each head, ``(heads_q,)``, of those that are asked for."""
        assert self.row_max is not None
        num_heads, num_rows = self.row_max.shape
        return self.row_max.amax(1) if num_rows else self.row_max.new_full((num_heads,), -torch.inf)
