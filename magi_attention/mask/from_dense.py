"""Find the slices of a mask that is given as a dense boolean matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.attn_mask import AttnMask

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
        ValueError: If ``matrix`` does not have two dimensions, or needs more than ``max_slices`` slices.
    """
    dense = _as_bool_matrix(matrix)
    bands: list[_GrowingBand] = []
    above: dict[int, _GrowingBand] = {}  # bands that reach the row before, by the first key of that row
    for row, intervals in enumerate(_intervals_by_row(dense)):
        here = {}
        for start, end in intervals:
            band = above.get(start) or above.get(start - 1)
            if band is None or not band.try_extend(start, end):
                band = _GrowingBand(row, start, end, row, start, end)
                bands.append(band)
            here[start] = band
        above = here
        if len(bands) > max_slices:
            break
    mask = AttnMask.from_bands(np.array([b.as_row() for b in bands], np.int64).reshape(-1, 6), *dense.shape)
    if len(mask.slices) > max_slices:
        raise ValueError(
            f"the {dense.shape[0]} x {dense.shape[1]} matrix needs more than max_slices = {max_slices} slices: "
            "raise max_slices if a mask with so little structure is meant"
        )
    return mask


@dataclass(slots=True)
class _GrowingBand:
    """Joined intervals of consecutive rows: of the first row and of the last."""

    first_row: int
    first_start: int
    first_end: int
    last_row: int
    last_start: int
    last_end: int

    def try_extend(self, start: int, end: int) -> bool:
        """Take in the next row's interval if a band can hold it.

        Down the rows of a band, the start stays at the left side and then moves by one key a row, and the end moves by
        one key a row and then stays at the right side.
        """
        start_moves, end_moves = start - self.last_start, end - self.last_end
        start_moved = self.last_start > self.first_start
        end_stayed = self.last_end - self.first_end < self.last_row - self.first_row
        if start_moves < start_moved or end_moves not in (0, 1 - end_stayed):
            return False
        self.last_row, self.last_start, self.last_end = self.last_row + 1, start, end
        return True

    def as_row(self) -> tuple[int, int, int, int, int, int]:
        """``(q0, q1, k0, k1, lo, hi)``."""
        lo, hi = self.last_start - self.last_row, self.first_end - 1 - self.first_row
        return self.first_row, self.last_row + 1, self.first_start, self.last_end, lo, hi


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
    dense = np.asarray(matrix)
    if dense.ndim != 2:
        raise ValueError(f"matrix must have shape (total_seqlen_q, total_seqlen_k), got shape {dense.shape}")
    if dense.dtype != np.bool_:
        raise TypeError(f"matrix must be boolean, True where a query attends a key, got {dense.dtype}")
    return dense
