"""Find the slices of a mask that is given as a dense boolean matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.integers import as_array
from magi_attention.mask.row_joiner import GrowingBand, join_rows
from magi_attention.mask.true_runs import split_by_row, true_runs

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
        max_slices: Most slices that the mask may need. The default is less than that of
            ``magi_attention.interop``, whose sequences may be too long for a matrix.

    Raises:
        TypeError: If ``matrix`` is not boolean, or ``max_slices`` no integer.
        ValueError: If ``matrix`` does not have two dimensions, its rows differ in length, or it needs more than
            ``max_slices`` slices.
    """
    dense = _as_bool_matrix(matrix)
    total_q, total_k = dense.shape

    def too_many(bands: list[GrowingBand]) -> ValueError:
        return ValueError(
            f"the {total_q} x {total_k} matrix needs more than max_slices = {max_slices} slices: "
            "raise max_slices if a mask with so little structure is meant"
        )

    rows = split_by_row(*true_runs(dense, np.arange(total_k)), total_q)
    return join_rows(rows, total_q, total_k, max_slices, too_many)


def _as_bool_matrix(matrix: MatrixLike) -> NDArray[np.bool_]:
    dense = as_array(matrix, "matrix")
    if dense.ndim != 2:
        raise ValueError(f"matrix must have shape (total_seqlen_q, total_seqlen_k), got shape {dense.shape}")
    if dense.dtype != np.bool_:
        raise TypeError(f"matrix must be boolean, True where a query attends a key, got {dense.dtype}")
    return dense
