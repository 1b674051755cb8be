"""RowSums: which arriving rows are added to which local rows, and the sum itself, in an order that never changes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from magi_attention.planning.routing import IntArray


@dataclass(frozen=True, eq=False)
class RowSums:
    """The rows on the wire, grouped by the local row that they are parts of.

    The parts of local row ``rows[i]`` are the rows ``order[offsets[i]:offsets[i + 1]]`` of the wire, by the rank that
    they come from.

    Attributes:
        rows: Local rows with parts, ascending, int32 ``(n,)``.
        offsets: int32 ``(n + 1,)``.
        order: int32 ``(rows on the wire,)``.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor


def group_parts(local_rows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The arrays of :class:`RowSums`, for a wire that brings parts of ``local_rows``, ordered by rank."""
    order = np.argsort(local_rows, kind="stable")
    ascending = local_rows[order]
    first = np.flatnonzero(np.diff(ascending, prepend=-1))
    return ascending[first], np.append(first, len(order)), order


def add_rows(totals: Sequence[torch.Tensor], matrix: torch.Tensor, sums: RowSums) -> None:
    """Add the rows of a matrix to the local rows that they are parts of, in place.

    Each local row gets its parts one after the other, in the order of ``sums`` and in the type of the total, so results
    are equal bit by bit from run to run, on every device.

    Args:
        totals: Contiguous tensors of equal numbers of rows, ``(local rows, ...)``, all float32 or all float64.
        matrix: Parts of the rows of all totals side by side, ``(rows on the wire, elements of a row)``, contiguous, of
            any floating point type.
        sums: Which row of the matrix is a part of which local row.
    """
    assert totals[0].dtype in (torch.float32, torch.float64) and all(x.dtype == totals[0].dtype for x in totals)
    assert matrix.is_contiguous() and all(x.is_contiguous() for x in totals)
    assert matrix.shape == (len(sums.order), sum(x.shape[1:].numel() for x in totals))
    if matrix.is_cuda:
        from magi_attention.comm import row_kernels

        row_kernels.add_rows(totals, matrix, sums)
    else:
        _add_in_rounds(totals, matrix, sums)


def _add_in_rounds(totals: Sequence[torch.Tensor], matrix: torch.Tensor, sums: RowSums) -> None:
    """The first part of every row, then the second, and so on: no row is in a round twice."""
    first, count = sums.offsets[:-1], sums.offsets.diff()
    for nth in range(int(count.max()) if len(count) else 0):
        some = count > nth
        rows, arrived = sums.rows[some], matrix.index_select(0, sums.order[first[some] + nth])
        for total, part in zip(totals, arrived.split([x.shape[1:].numel() for x in totals], dim=1), strict=True):
            total.flatten(1).index_add_(0, rows, part.to(total.dtype))
