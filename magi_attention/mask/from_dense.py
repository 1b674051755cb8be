"""Find the slices of a mask that is given as a dense boolean matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.row_joiner import RowJoiner

if TYPE_CHECKING:
    import torch

MatrixLike = Union[Sequence[Sequence[bool]], NDArray[np.bool_], "torch.Tensor"]


def from_dense(matrix: MatrixLike, max_slices: int = 4096) -> AttnMask:
    """The mask with exactly the cells of a boolean matrix.

    Each row is a list of intervals. Going down the rows, an interval joins the band that ends above it where both
    together are a band. Any matrix can be written so; one without structure needs a slice for each interval of each
    row.

    Args:
        matrix: Boolean, shape ``(total_seqlen_q, total_seqlen_k)``, True where a query attends a key.
        max_slices: Most slices that the mask may need.

    Raises:
        TypeError: If ``matrix`` is not boolean.
        ValueError: If ``matrix`` does not have two dimensions, its rows differ in length, or it needs more than
            ``max_slices`` slices.
    """
    dense = _as_bool_matrix(matrix)
    joiner = RowJoiner()
    for intervals in _intervals_by_row(dense):
        joiner.add_row(intervals)
        if len(joiner.bands) > max_slices:
            break
    mask = joiner.mask(*dense.shape)
    if len(mask.slices) > max_slices:
        raise ValueError(
            f"the {dense.shape[0]} x {dense.shape[1]} matrix needs more than max_slices = {max_slices} slices: "
            "raise max_slices if a mask with so little structure is meant"
        )
    return mask


def _intervals_by_row(dense: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """The half-open runs of True in each row."""
    edges = np.diff(dense.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    by_row: list[list[tuple[int, int]]] = [[] for _ in range(len(dense))]
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        by_row[row].append((start, end))
    return by_row


def _as_bool_matrix(matrix: MatrixLike) -> NDArray[np.bool_]:
    if hasattr(matrix, "cpu"):  # a tensor, perhaps of another device
        matrix = matrix.cpu()
    try:
        dense = np.asarray(matrix)
    except ValueError:
        raise ValueError("matrix must be rectangular, but its rows differ in length") from None
    if dense.ndim != 2:
        raise ValueError(f"matrix must have shape (total_seqlen_q, total_seqlen_k), got shape {dense.shape}")
    if dense.dtype != np.bool_:
        raise TypeError(f"matrix must be boolean, True where a query attends a key, got {dense.dtype}")
    return dense
