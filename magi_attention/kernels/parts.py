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

from magi_attention.mask.bands import Q0, Q1, IntArray, tighten


@dataclass(frozen=True, eq=False)
class Part:
    """One of the parts that the keys come in.

    Attributes:
        goes_on: Which queries attend keys of a later part, bool ``(num_rows,)``.
    """

    goes_on: NDArray[np.bool_]

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
    later = np.zeros(num_rows, np.bool_)
    parts = []
    for part in reversed(bands):
        parts.append(Part(later))
        later = later | _attending(part, num_rows)
    return parts[::-1]


def _attending(bands: IntArray, num_rows: int) -> NDArray[np.bool_]:
    """Which rows attend anything."""
    tight = tighten(bands)[0]
    change = np.bincount(tight[:, Q0], minlength=num_rows + 1) - np.bincount(tight[:, Q1], minlength=num_rows + 1)
    return np.cumsum(change[:num_rows]) > 0


class State(NamedTuple):
    """What queries have so far of the parts of the keys; after the last part, the result.

    Attributes:
        out: ``(num_rows, heads_q, head_dim_v)``, of queries that are done, in the type of ``q``, contiguous.
        lse: Natural log-sum-exp of the scores so far, ``(heads_q, num_rows)``, in the accumulation type.
        sums: The outputs so far of queries that go on, shaped as ``out``, in the accumulation type; None when the
            keys came at once.
        row_max: Each query's highest score so far, shaped and typed as ``lse``, -inf where there is none; None when
            it is not asked for.
    """

    out: torch.Tensor
    lse: torch.Tensor
    sums: torch.Tensor | None
    row_max: torch.Tensor | None = None

    @classmethod
    def empty(cls, q: torch.Tensor, head_dim_v: int, part: Part | None, with_max: bool) -> "State":
        """Memory for the state of ``q`` after the first part, or for all keys at once if ``part`` is None.

        Args:
            q: Queries, ``(num_rows, heads_q, head_dim)``, whose accumulation type is float32.
            head_dim_v: The last dimension of the values.
            part: The first part.
            with_max: Whether the highest scores are asked for.
        """
        out = torch.empty((*q.shape[:2], head_dim_v), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        sums = None if part is None or part.is_last else torch.empty_like(out, dtype=torch.float32)
        return cls(out, lse, sums, torch.empty_like(lse) if with_max else None)

    def max_logits(self) -> torch.Tensor:
        """The highest score of each head, ``(heads_q,)``, of those that are asked for."""
        assert self.row_max is not None
        num_heads, num_rows = self.row_max.shape
        return self.row_max.amax(1) if num_rows else self.row_max.new_full((num_heads,), -torch.inf)
