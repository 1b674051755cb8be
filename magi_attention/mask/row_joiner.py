"""RowJoiner: the bands of a mask that is given row by row, as the key intervals of each row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.integers import as_length


@dataclass(slots=True)
class GrowingBand:
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


class RowJoiner:
    """Takes rows from the first to the last. An interval joins the band that ends above it where both are one band.

    Attributes:
        bands: The bands so far, in the order in which they begin.
    """

    def __init__(self) -> None:
        self.bands: list[GrowingBand] = []
        self._next_row = 0
        self._above: dict[int, GrowingBand] = {}  # bands that reach the row before, by the first key of that row

    def add_row(self, intervals: Iterable[tuple[int, int]]) -> None:
        """The half-open key intervals of the next row, ascending; they do not touch."""
        here = {}
        for start, end in intervals:
            band = self._above.get(start) or self._above.get(start - 1)
            if band is None or not band.try_extend(start, end):
                band = GrowingBand(self._next_row, start, end, self._next_row, start, end)
                self.bands.append(band)
            here[start] = band
        self._above = here
        self._next_row += 1

    def mask(self, total_seqlen_q: int, total_seqlen_k: int) -> AttnMask:
        """The mask of the rows so far."""
        bands = np.array([band.as_row() for band in self.bands], np.int64).reshape(-1, 6)
        return AttnMask.from_bands(bands, total_seqlen_q, total_seqlen_k)


def join_rows(
    rows: Iterable[Iterable[tuple[int, int]]],
    total_seqlen_q: int,
    total_seqlen_k: int,
    max_slices: int,
    too_many: Callable[[list[GrowingBand]], ValueError],
) -> AttnMask:
    """The mask of rows, unless it needs too many slices; one without structure is given up after a few rows.

    Args:
        rows: The key intervals of each row, as :meth:`RowJoiner.add_row` takes them.
        total_seqlen_q: Number of rows.
        total_seqlen_k: Number of keys.
        max_slices: Most slices that the mask may need.
        too_many: The error to raise where it needs more, made of the bands so far.

    Raises:
        TypeError: If ``max_slices`` is no integer.
        ValueError: If it is negative, or the mask needs more slices.
    """
    max_slices = as_length(max_slices, "max_slices")
    joiner = RowJoiner()
    for intervals in rows:
        joiner.add_row(intervals)
        if len(joiner.bands) > max_slices:  # a band is a slice at least
            raise too_many(joiner.bands)
    mask = joiner.mask(total_seqlen_q, total_seqlen_k)
    if len(mask.slices) > max_slices:
        raise too_many(joiner.bands)
    return mask
