"""The runs of True in the rows of a boolean matrix: the key intervals of each query."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import IntArray


def true_runs(cells: NDArray[np.bool_], keys: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Row, first key and end of every run of True, row by row.

    Args:
        cells: Boolean, shape ``(rows, columns)``.
        keys: The key of each column, ascending; a gap in them ends a run.
    """
    continued = cells[:, 1:] & cells[:, :-1] & (np.diff(keys) == 1)
    begins, ends = cells.copy(), cells.copy()
    begins[:, 1:] &= ~continued
    ends[:, :-1] &= ~continued
    row, first = np.divmod(np.flatnonzero(begins), len(keys))
    return row, keys[first], keys[np.flatnonzero(ends) % len(keys)] + 1


def split_by_row(row: IntArray, start: IntArray, end: IntArray, num_rows: int) -> Iterator[Iterator[tuple[int, int]]]:
    """The half-open intervals of each row, from all of them, ordered by row."""
    first_of = np.searchsorted(row, np.arange(num_rows + 1)).tolist()
    starts, ends = start.tolist(), end.tolist()
    for a, b in pairwise(first_of):
        yield zip(starts[a:b], ends[a:b], strict=True)
