"""The geometry that all schedules are made of: layers of intervals, cuts between rows, and runs of columns.

Rows are queries and columns keys, or, of a transposed mask, the other way round. *Layers* are for rows that attend
several intervals of columns: the ``l``-th interval of each row is in layer ``l``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, IntArray, crop, ranges_to_indices, row_intervals

Int32Array = NDArray[np.int32]


def split_layers(bands: IntArray) -> tuple[IntArray, IntArray]:
    """Bands whose ``layer`` counts the intervals that their rows have before them, from tight ones.

    Rows are cut into segments in which the same bands live. Over a segment, bands keep their order of keys (see
    :mod:`magi_attention.mask.overlap`), and bands that touch in each of its rows become one band. The gap between two
    neighbours is a convex function of the row, so it is nowhere open when it is closed in the first and the last row.
    """
    order = np.argsort(bands[:, Q0], kind="stable")
    bands = bands[order]
    if np.all(bands[1:, Q0] >= bands[:-1, Q1]):
        return bands, np.zeros(len(bands), np.int64)  # no two bands share a row
    borders = np.unique(bands[:, [Q0, Q1]])
    pieces, segment, _ = crop(bands, borders[:-1], borders[1:])
    order = np.lexsort((row_intervals(pieces, pieces[:, Q0])[0], segment))
    pieces, segment = pieces[order], segment[order]

    left, right, is_next = pieces[:-1], pieces[1:], segment[1:] == segment[:-1]
    touch = is_next.copy()
    for row in (right[:, Q0], right[:, Q1] - 1):
        touch &= row_intervals(left, row)[1] == row_intervals(right, row)[0]
    first = np.flatnonzero(np.concatenate(([True], ~touch)))
    last = np.append(first[1:] - 1, len(pieces) - 1)
    joined = pieces[first]
    joined[:, [K1, HI]] = pieces[last][:, [K1, HI]]
    opens_segment = np.concatenate(([True], ~is_next))[first]
    count = np.arange(len(first))
    return joined, count - np.maximum.accumulate(np.where(opens_segment, count, 0))


def layer_intervals(bands: IntArray, layer: IntArray, num_rows: int) -> tuple[Int32Array, Int32Array]:
    """The columns that rows attend, from what :func:`split_layers` returns.

    Returns:
        ``starts``, int32 ``(num_layers, num_rows)``: first column of each row's ``l``-th interval, in ascending order;
        and ``ends``, the same of one past its last column. A row with fewer intervals than layers has empty ones,
        ``[0, 0)``.
    """
    num_layers = int(layer.max()) + 1 if len(layer) else 1
    # All layers on one axis, one behind the other, where bands and gaps take turns: gap, band, gap, ..., band, gap.
    begin = layer * num_rows + bands[:, Q0]
    order = np.argsort(begin)
    bands, begin, layer = bands[order], begin[order], layer[order]
    bounds = np.zeros(2 * len(bands) + 2, np.int64)
    bounds[1:-1:2], bounds[2:-1:2], bounds[-1] = begin, begin + bands[:, Q1] - bands[:, Q0], num_layers * num_rows
    parts = np.zeros((4, len(bounds) - 1), np.int32)
    parts[2] = -num_layers * num_rows  # keeps the start of a gap's rows at 0
    parts[:, 1::2] = bands[:, K0], bands[:, K1], bands[:, LO] - layer * num_rows, bands[:, HI] + 1 - layer * num_rows
    k0, k1, lo, hi = parts
    length = np.diff(bounds)
    cell = np.arange(num_layers * num_rows, dtype=np.int32)
    starts, ends = np.repeat(k0, length), np.repeat(k1, length)
    if np.any(bands[:, Q1] - 1 + bands[:, LO] > bands[:, K0]):  # else no start depends on the row
        np.maximum(starts, np.repeat(lo, length) + cell, out=starts)
    if np.any(bands[:, Q0] + bands[:, HI] + 1 < bands[:, K1]):
        np.minimum(ends, np.repeat(hi, length) + cell, out=ends)
    return starts.reshape(num_layers, num_rows), ends.reshape(num_layers, num_rows)


def cut_rows(bands: IntArray, num_rows: int, block_rows: int) -> IntArray:
    """Bounds of row tiles: ascending from 0 to ``num_rows``, at most ``block_rows`` apart.

    A tile that begins with a document meets no columns of the one before, so rows are cut where bands begin or end; but
    at most once in ``block_rows`` rows, so that many short documents do not make many short tiles. Between the cuts,
    tiles are as equal as they can be.
    """
    borders = np.unique(np.concatenate((bands[:, Q0], bands[:, Q1], (0, num_rows))))
    block = borders // block_rows
    keep = np.concatenate(([True], block[1:] > block[:-1]))
    start = borders[keep]
    length = np.diff(start, append=num_rows)
    count = -(-length // block_rows)
    part = ranges_to_indices(np.zeros_like(count), count)
    return np.append(np.repeat(start, count) + part * np.repeat(length, count) // np.repeat(count, count), num_rows)


@dataclass(frozen=True, eq=False)
class ColumnRuns:
    """Runs of columns, ascending in each group of bands, that hold the columns of the group's bands.

    Attributes:
        order: The bands, sorted by group and first column, shape ``(n,)``.
        run: The run of each band, in that order.
        group: The group of each run, ascending, shape ``(r,)``.
        start: First column of each run.
        end: One past its last column.
    """

    order: IntArray
    run: IntArray
    group: IntArray
    start: IntArray
    end: IntArray


def column_runs(bands: IntArray, group: IntArray, num_cols: int, block: int) -> ColumnRuns:
    """The runs of tight bands. A run ends before a gap of ``block`` columns or more.

    A smaller gap cannot hold a tile of ``block`` columns, so that every such tile of a run meets a band.
    """
    # On one axis for all groups, a gap before each, so that runs can be found for all at once.
    shift = group * (num_cols + block)
    start = bands[:, K0] + shift
    order = np.argsort(start, kind="stable")
    start = start[order]
    reach = np.maximum.accumulate((bands[:, K1] + shift)[order])
    opens_run = np.ones(len(bands), bool)
    opens_run[1:] = start[1:] >= reach[:-1] + block
    first = np.flatnonzero(opens_run)
    last = np.append(first[1:], len(bands))[: len(first)] - 1
    run_shift = shift[order[first]]
    return ColumnRuns(
        order, np.cumsum(opens_run) - 1, group[order[first]], start[first] - run_shift, reach[last] - run_shift
    )
