"""Windows: the rows of a mask, cut into runs that a kernel computes one at a time.

A window costs the tiles of columns that its rows attend. Documents share no columns: a window that begins with a
document has none of another. But a window less can be worth a window that straddles::

    documents   aaaaaaaaaabccdddddddeeeeeeeee
    apart       [  ][  ][]|[][  ][ ][  ][  ]|    each document has its own windows
    packed      [  ][  ][][ ][  ][ ][  ][  ]|    documents that fit into one window, b and c, share it
    joined      [  ][  ][][ ][  ][  ][  ][  ]    d and e save a window if one has the columns of both
"""

from collections.abc import Callable

import numpy as np

from magi_attention.kernels.mask_geometry import Int32Array
from magi_attention.mask.bands import Q0, Q1, IntArray, ranges_to_indices

TILE_COST, MASK_COST, WINDOW_COST = 10, 1, 5
"""What a tile takes, what a partial one takes more, and what a window takes beside its tiles: its rows are loaded and
its results stored. Estimates, from numbers of instructions."""

ROUNDS = 4
"""How often to look for documents to join. More rounds find next to none."""


def cut_windows(
    bands: IntArray, starts: Int32Array, ends: Int32Array, num_rows: int, block_rows: int, block_cols: int
) -> IntArray:
    """First row of each window, ascending, and the number of rows.

    Args:
        bands: Tight bands, shape ``(n, 6)``.
        starts: The columns that rows attend, see :func:`~magi_attention.kernels.mask_geometry.layer_intervals`.
        ends: The same.
        num_rows: Number of rows.
        block_rows: Rows of a window. The last one before a cut may have fewer.
        block_cols: Columns of a tile.
    """

    def cost(start: IntArray, end: IntArray) -> IntArray:
        count, row = _windows(start, end, block_rows)
        last = np.minimum(row + block_rows, np.repeat(end, count)) - 1
        return np.add.reduceat(_cost(starts, ends, np.stack((row, last)), block_cols), np.cumsum(count) - count)

    cuts = _join(_pack(_jumps(bands, starts, ends, num_rows), block_rows), cost)
    return np.append(_windows(cuts[:-1], cuts[1:], block_rows)[1], num_rows)


def _windows(start: IntArray, end: IntArray, block_rows: int) -> tuple[IntArray, IntArray]:
    """Number of windows of each run of rows ``[start, end)``, and the first row of each window."""
    count = -(-(end - start) // block_rows)
    return count, np.repeat(start, count) + block_rows * ranges_to_indices(np.zeros_like(count), count)


def _cost(starts: Int32Array, ends: Int32Array, rows: IntArray, block_cols: int) -> IntArray:
    """About what windows cost, judged by the columns of their first and last rows, shape ``(2, n)``."""
    start, end = starts[:, rows], ends[:, rows]
    start = np.where(start < end, start, np.iinfo(np.int32).max)
    tiles = np.maximum(-(-(end.max(axis=1) - start.min(axis=1)) // block_cols), 0)
    full = np.maximum((end.min(axis=1) - start.max(axis=1)) // block_cols, 0)
    return ((TILE_COST + MASK_COST) * tiles - MASK_COST * full).sum(axis=0) + WINDOW_COST


def _jumps(bands: IntArray, starts: Int32Array, ends: Int32Array, num_rows: int) -> IntArray:
    """Rows of which more columns differ from those of the row above than agree; also 0 and ``num_rows``."""
    border = np.sort(bands[:, [Q0, Q1]], axis=None)
    border = border[(np.diff(border, prepend=0) > 0) & (border < num_rows)]
    start, end, start_above, end_above = (x[:, row] for row in (border, border - 1) for x in (starts, ends))
    agree = np.maximum(np.minimum(end, end_above) - np.maximum(start, start_above), 0).sum(axis=0)
    differ = (end - start + end_above - start_above).sum(axis=0) - 2 * agree
    return np.concatenate(([0], border[differ > agree], [num_rows]))


def _pack(jumps: IntArray, block_rows: int) -> IntArray:
    """The jumps that remain cuts when documents share a window as long as they fit into it."""
    fitting = np.searchsorted(jumps, jumps[:-1] + block_rows, side="right") - 1
    following = np.maximum(fitting, np.arange(1, len(jumps))).tolist()
    cut, cuts = 0, [0]
    while cut < len(following):
        cut = following[cut]
        cuts.append(cut)
    return jumps[cuts]


def _join(cuts: IntArray, cost: Callable[[IntArray, IntArray], IntArray]) -> IntArray:
    """The cuts that remain when those are dropped without which windows cost less."""
    if len(cuts) < 3:
        return cuts
    apart = cost(cuts[:-1], cuts[1:])
    for _ in range(ROUNDS):
        joined = cost(cuts[:-2], cuts[2:])
        gain = apart[:-1] + apart[1:] - joined
        # Of neighbours, only the best may be dropped, since each was judged with the other in place.
        rank = np.pad(2 * gain + np.arange(len(gain)) % 2, 1)
        drop = np.flatnonzero((gain > 0) & (rank[1:-1] > rank[:-2]) & (rank[1:-1] > rank[2:]))
        apart[drop] = joined[drop]
        apart, cuts = np.delete(apart, drop + 1), np.delete(cuts, drop + 1)
        if not len(drop) or len(cuts) < 3:
            break
    return cuts
