"""Parts: the keys of a call that come one part after the other, and what is known of the queries in between.

Each query's softmax goes on where the part before left it. A query that attends no later part is done: its output is
rounded and stored once, as if there were no parts. Only of the others are the sums kept in the accumulation type, so
that parts cost nothing where they change nothing.

If no query attends two parts, some attend the first, and those of one part stand side by side, parts are *apart*: each
call writes its own queries and no others, and calls need nothing from each other. The first one also writes the queries
that attend nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.mask.bands import IntArray, attending_rows

SELDOM = 128
"""Parts are apart only if there are at least so many queries to each run of queries of one part."""


@dataclass(frozen=True, eq=False)
class Part:
    """One of the parts that the keys come in.

    Attributes:
        goes_on: Which queries attend keys of a later part, bool ``(num_rows,)``.
        waits: Which of these attend none of this part, and of none before.
        own: If parts are apart, which queries this one writes; else None.
    """

    goes_on: NDArray[np.bool_]
    waits: NDArray[np.bool_]
    own: NDArray[np.bool_] | None = None

    @cached_property
    def is_last(self) -> bool:
        """Whether no query attends a later part."""
        return not self.goes_on.any()

    @cached_property
    def keeps_sums(self) -> bool:
        """Whether a query that attends a later part has attended keys."""
        return not np.array_equal(self.goes_on, self.waits)

    @property
    def apart(self) -> bool:
        """Whether this part needs nothing from others."""
        return self.own is not None


def make_parts(bands: Sequence[IntArray], num_rows: int) -> list[Part]:
    """The parts of ``num_rows`` queries over keys that come in parts.

    Args:
        bands: What the queries attend in each part, in order, see :mod:`magi_attention.mask.bands`.
        num_rows: Number of queries.
    """
    attending = [attending_rows(part, num_rows) for part in bands]
    later, goes_on = np.zeros(num_rows, np.bool_), []
    for attends in reversed(attending):
        goes_on.append(later)
        later = later | attends
    goes_on.reverse()
    begun, waits = np.zeros(num_rows, np.bool_), []
    for attends, going in zip(attending, goes_on, strict=True):
        begun = begun | attends
        waits.append(going & ~begun)
    own: Sequence[NDArray[np.bool_] | None] = [~goes_on[0], *attending[1:]]
    if len(bands) == 1 or not _are_apart(attending, goes_on):
        own = [None] * len(bands)
    return [Part(*part) for part in zip(goes_on, waits, own, strict=True)]


def _are_apart(attending: list[NDArray[np.bool_]], goes_on: list[NDArray[np.bool_]]) -> bool:
    """Whether no query attends two parts, some attend the first, and they do not alternate all the time."""
    if not attending[0].any() or any((a & g).any() for a, g in zip(attending, goes_on, strict=True)):
        return False
    changes = sum(np.count_nonzero(np.diff(attends)) for attends in attending)
    return changes * SELDOM <= len(attending[0])


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
