"""TileSchedule: a mask compiled into what a kernel can walk without knowing masks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.kernels.parts import Part
from magi_attention.mask.bands import (
    HI,
    K0,
    K1,
    LO,
    Q0,
    Q1,
    IntArray,
    area,
    crop,
    ranges_to_indices,
    row_intervals,
    tighten,
)

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TileSchedule:
    """Which tiles of the score matrix to compute, and which cells of a tile to keep.

    A *query tile* is a run of rows; tile ``t`` has the rows ``q_bounds[t]`` to ``q_bounds[t + 1]``. It meets the key
    tiles ``offsets[t]`` to ``offsets[t + 1]``; key tile ``n`` has the keys ``key_starts[n]`` to ``key_ends[n]``. They
    ascend, do not overlap, and hold every key that a row of the query tile attends. A *full* key tile is attended
    cell by cell; of a partial one, row ``i`` attends the keys in ``[starts[l, i], ends[l, i])`` of any layer ``l``.

    Attributes:
        num_rows: Number of queries.
        num_keys: Number of keys.
        starts: int32 ``(num_layers, num_rows)``: first key of each row's ``l``-th interval, in ascending order.
        ends: The same of one past its last key. A row with fewer intervals than layers has empty ones, ``[0, 0)``.
        q_bounds: int32 ``(num_q_tiles + 1,)``, ascending from 0 to ``num_rows``, at most ``block_q`` apart.
        offsets: int32 ``(num_q_tiles + 1,)``.
        key_starts: int32 ``(num_key_tiles,)``.
        key_ends: int32 ``(num_key_tiles,)``, at most ``block_k`` behind ``key_starts``.
        full: bool ``(num_key_tiles,)``: whether every row of the query tile attends every key of the key tile.
        part: Which part of the keys these are; None for all keys.
    """

    num_rows: int
    num_keys: int
    starts: Int32Array
    ends: Int32Array
    q_bounds: Int32Array
    offsets: Int32Array
    key_starts: Int32Array
    key_ends: Int32Array
    full: NDArray[np.bool_]
    part: Part | None = None


def build_tile_schedule(
    bands: IntArray, num_rows: int, num_keys: int, block_q: int, block_k: int, part: Part | None = None
) -> TileSchedule:
    """Compile bands that share no cell.

    Args:
        bands: Bands inside ``num_rows`` x ``num_keys``, shape ``(n, 6)``, see :mod:`magi_attention.mask.bands`.
        num_rows: Number of queries.
        num_keys: Number of keys.
        block_q: Most rows of a query tile.
        block_k: Most keys of a key tile.
        part: Which part of the keys these are; None for all keys.
    """
    bands, layer = split_layers(tighten(bands)[0])
    starts, ends = layer_intervals(bands, layer, num_rows)
    q_bounds = cut_rows(bands, num_rows, block_q)
    offsets, key_starts, key_ends, full = _key_tiles(bands, q_bounds, num_keys, block_k)
    q_bounds32, offsets32, starts32, ends32 = (x.astype(np.int32) for x in (q_bounds, offsets, key_starts, key_ends))
    return TileSchedule(num_rows, num_keys, starts, ends, q_bounds32, offsets32, starts32, ends32, full, part)


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
    """``starts`` and ``ends`` of a schedule, from what :func:`split_layers` returns."""
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


def cut_rows(bands: IntArray, num_rows: int, block_q: int) -> IntArray:
    """Bounds of the query tiles.

    A tile that begins with a document meets no keys of the one before, so rows are cut where bands begin or end; but at
    most once in ``block_q`` rows, so that many short documents do not make many short tiles. Between the cuts, tiles
    are as equal as they can be.
    """
    borders = np.unique(np.concatenate((bands[:, Q0], bands[:, Q1], (0, num_rows))))
    block = borders // block_q
    keep = np.concatenate(([True], block[1:] > block[:-1]))
    start = borders[keep]
    length = np.diff(start, append=num_rows)
    count = -(-length // block_q)
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


def _key_tiles(
    bands: IntArray, q_bounds: IntArray, num_keys: int, block_k: int
) -> tuple[IntArray, IntArray, IntArray, NDArray[np.bool_]]:
    """``offsets``, ``key_starts``, ``key_ends`` and ``full`` of a schedule.

    The keys of a query tile are cut into tiles from its first key on, and anew behind each gap of ``block_k`` keys or
    more.
    """
    num_tiles = len(q_bounds) - 1
    pieces, tile, _ = crop(bands, q_bounds[:-1], q_bounds[1:])
    runs = column_runs(pieces, tile, num_keys, block_k)
    pieces, run, run_start, run_end = pieces[runs.order], runs.run, runs.start, runs.end
    count = -(-(run_end - run_start) // block_k)
    key_starts = np.repeat(run_start, count) + block_k * ranges_to_indices(np.zeros_like(count), count)
    key_ends = np.minimum(key_starts + block_k, np.repeat(run_end, count))
    key_q_tile = np.repeat(runs.group, count)
    offsets = np.searchsorted(key_q_tile, np.arange(num_tiles + 1))

    begin = (pieces[:, K0] - run_start[run]) // block_k
    length = (pieces[:, K1] - 1 - run_start[run]) // block_k + 1 - begin
    key_tile = ranges_to_indices((np.cumsum(count) - count)[run] + begin, length)
    source = np.repeat(np.arange(len(pieces)), length)
    k0 = np.maximum(pieces[:, K0][source], key_starts[key_tile])
    k1 = np.minimum(pieces[:, K1][source], key_ends[key_tile])
    cells = (pieces[:, Q1] - pieces[:, Q0])[source] * (k1 - k0)
    seen_from = row_intervals(pieces, pieces[:, Q1] - 1)[0]  # the keys that every row of the piece attends
    seen_to = row_intervals(pieces, pieces[:, Q0])[1]
    banded = np.flatnonzero((k0 < seen_from[source]) | (k1 > seen_to[source]))
    cut = pieces[source[banded]]
    cut[:, K0], cut[:, K1] = k0[banded], k1[banded]
    cells[banded] = area(cut)
    attended = np.bincount(key_tile, cells, len(key_starts))
    full = attended == np.diff(q_bounds)[key_q_tile] * (key_ends - key_starts)
    return offsets, key_starts, key_ends, full
