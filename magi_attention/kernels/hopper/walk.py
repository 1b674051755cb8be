"""Walk: a mask compiled into what a persistent kernel walks, window by window and tile by tile.

Rows are queries and columns keys, or, for a walk over the transposed mask, the other way round::

    window    a run of at most block_rows rows
    tile      block_cols columns, of which each row of the window attends a part: one interval of a *layer*
    entry     a run of neighbouring tiles of a window that agree on the layer and on what must be masked
"""

from dataclasses import dataclass, replace

import numpy as np

from magi_attention.kernels.hopper.records import (
    ENDS,
    ENTRY_CODE,
    ENTRY_COLUMN,
    ENTRY_SIZE,
    ENTRY_TILES,
    FLAG_BITS,
    GOES_ON,
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    WINDOW_ENTRY,
    WINDOW_FLAGS,
    WINDOW_ROW,
    WINDOW_ROWS,
    WINDOW_SIZE,
    WINDOW_TILES,
)
from magi_attention.kernels.hopper.windows import cut_windows
from magi_attention.kernels.mask_geometry import Int32Array, column_runs, layer_intervals, split_layers
from magi_attention.kernels.parts import Part
from magi_attention.mask.bands import Q0, Q1, IntArray, crop, ranges_to_indices, row_intervals, tighten

READ_AHEAD = 64
"""Rows that a kernel may read behind the ``block_rows`` rows from a window's first."""

SPARE_ENTRIES = 2
"""Entries behind those of all windows."""


@dataclass(frozen=True, eq=False)
class Walk:
    """The tiles of ``num_rows`` x ``num_cols`` scores, and which cells of a tile to keep.

    A tile with first column ``c`` and layer ``l`` stands for the cells of the rows ``i`` of its window, and of the
    columns in ``[c, c + block_cols)`` and ``[starts[l, i], ends[l, i])``. Each attended cell is in one tile, and each
    tile has one. Tiles may end behind the last column.

    Windows and entries have the columns that :mod:`magi_attention.kernels.hopper.records` names.

    Attributes:
        windows: int32 ``(num_windows, WINDOW_SIZE)``, most tiles first: first row, number of rows, first entry, number
            of tiles, flags. Windows share no row and hold every row. Those of which each row has all of its columns in
            later parts come last.
        entries: int32 ``(num_entries + SPARE_ENTRIES, ENTRY_SIZE)``: first column of the last tile, number of tiles, a
            code of their layer and flags, 0. A kernel visits the tiles of an entry at ``block_cols`` columns less each;
            then the next entry, until it has seen the window's number of tiles. Layers and their columns descend
            likewise. The spare entries are a tile each that is masked for rows without columns: windows without tiles
            have the first as theirs, for kernels that compute at least one tile, and read one entry ahead.
        starts: int32 ``(num_layers, num_rows + block_rows + READ_AHEAD)``: first column of each row's ``l``-th
            interval, in ascending order.
        ends: The same of one past its last column. A row with fewer intervals than layers has empty ones, ``[0, 0)``,
            and so have the rows past the last.
        num_rows: Number of rows.
        num_cols: Number of columns.
        block_cols: Columns of a tile.
        num_waiting: Number of windows of which each row has all of its columns in later parts.
    """

    windows: Int32Array
    entries: Int32Array
    starts: Int32Array
    ends: Int32Array
    num_rows: int
    num_cols: int
    block_cols: int
    num_waiting: int = 0


def build_walk(
    bands: IntArray,
    num_rows: int,
    num_cols: int,
    block_rows: int,
    block_cols: int,
    align: int = 1,
    part: Part | None = None,
) -> Walk:
    """Compile bands that share no cell.

    Args:
        bands: Bands inside ``num_rows`` x ``num_cols``, shape ``(n, 6)``, see :mod:`magi_attention.mask.bands`.
        num_rows: Number of rows.
        num_cols: Number of columns.
        block_rows: Most rows of a window.
        block_cols: Columns of a tile, a multiple of ``align``.
        align: Tiles begin at multiples of it.
        part: Which part of the columns these are; None for all.
    """
    bands, layer = split_layers(tighten(bands)[0])
    starts, ends = layer_intervals(bands, layer, num_rows + block_rows + READ_AHEAD)
    bounds = cut_windows(bands, starts, ends, num_rows, block_rows, block_cols)
    if part is not None and part.own is not None:  # a window has only such rows, or none
        bounds = np.union1d(bounds, np.flatnonzero(np.diff(part.own)) + 1)
    entries, window = _entries(bands, layer, bounds, num_cols, block_cols, align)
    entries[:, ENTRY_COLUMN] += (entries[:, ENTRY_TILES] - 1) * block_cols
    entries, window = entries[::-1], window[::-1]

    num_windows = len(bounds) - 1
    weight = np.bincount(window, entries[:, ENTRY_TILES], num_windows).astype(np.int64)
    first_entry = np.searchsorted(-window, -np.arange(num_windows))
    first_entry[weight == 0] = len(entries)
    flags, waits = np.full(num_windows, ENDS), np.zeros(num_windows, np.bool_)
    if part is not None:
        going = np.add.reduceat(part.goes_on, bounds[:-1], dtype=np.int64)
        flags = np.where(going > 0, GOES_ON, 0) | np.where(going < np.diff(bounds), ENDS, 0)
        waits = np.logical_and.reduceat(part.waits, bounds[:-1])
    windows = np.empty((num_windows, WINDOW_SIZE), np.int32)
    windows[:, WINDOW_ROW], windows[:, WINDOW_ROWS] = bounds[:-1], np.diff(bounds)
    windows[:, WINDOW_ENTRY], windows[:, WINDOW_TILES], windows[:, WINDOW_FLAGS] = first_entry, weight, flags
    # The longest first, so that none is left to run alone (Graham 1969).
    windows = windows[np.lexsort((waits, -weight))]
    spare = np.zeros((SPARE_ENTRIES, ENTRY_SIZE), np.int64)
    spare[:, ENTRY_TILES], spare[:, ENTRY_CODE] = 1, ROW_ENDS_INSIDE
    entries = np.concatenate((entries, spare))
    return Walk(windows, entries.astype(np.int32), starts, ends, num_rows, num_cols, block_cols, int(waits.sum()))


def cut_long_windows(walk: Walk, most_tiles: int) -> Walk:
    """The same tiles in windows of at most ``most_tiles`` each: several for the same rows, whose results add up."""
    tiles = walk.windows[:, WINDOW_TILES].astype(np.int64)
    number = np.maximum(-(-tiles // most_tiles), 1)
    window = np.repeat(np.arange(len(tiles)), number)
    nth = ranges_to_indices(np.zeros_like(number), number)
    begin, end = (tiles[window] * n // number[window] for n in (nth, nth + 1))

    # Entries lie window by window; here in the order of the windows, by the number of tiles before each.
    first = walk.windows[tiles > 0, WINDOW_ENTRY].astype(np.int64)
    bounds = np.append(np.sort(first), len(walk.entries) - SPARE_ENTRIES)
    entries = walk.entries[ranges_to_indices(first, np.diff(bounds)[np.searchsorted(bounds, first)])]
    before = np.cumsum(entries[:, ENTRY_TILES]) - entries[:, ENTRY_TILES]
    begin_of_all = begin + (np.cumsum(tiles) - tiles)[window]
    cuts = np.union1d(before, begin_of_all[end > begin])
    source = np.searchsorted(before, cuts, side="right") - 1
    pieces = entries[source]
    pieces[:, ENTRY_COLUMN] -= (cuts - before[source]) * walk.block_cols
    pieces[:, ENTRY_TILES] = np.diff(cuts, append=tiles.sum())

    windows = walk.windows[window]
    windows[:, WINDOW_ENTRY] = np.where(end > begin, np.searchsorted(cuts, begin_of_all), len(pieces))
    windows[:, WINDOW_TILES] = end - begin
    windows = windows[np.argsort(-windows[:, WINDOW_TILES], kind="stable")]
    return replace(walk, windows=windows, entries=np.concatenate((pieces, walk.entries[-SPARE_ENTRIES:])))


def _entries(
    bands: IntArray, layer: IntArray, bounds: IntArray, num_cols: int, block_cols: int, align: int
) -> tuple[IntArray, IntArray]:
    """Entries with the column of their first tile, without the spare ones, and the window of each, all ascending."""
    num_layers = int(layer.max()) + 1 if len(layer) else 1
    pieces, window, source = crop(bands, bounds[:-1], bounds[1:])
    group = window * num_layers + layer[source]
    runs = column_runs(pieces, group, num_cols, block_cols)
    pieces, group = pieces[runs.order], group[runs.order]

    # Of each group, the last column where a row starts and the first where one ends.
    opens_group = np.flatnonzero(np.diff(group, prepend=-1))
    last_start = np.maximum.reduceat(row_intervals(pieces, pieces[:, Q1] - 1)[0], opens_group)
    first_end = np.minimum.reduceat(row_intervals(pieces, pieces[:, Q0])[1], opens_group)
    rows = np.add.reduceat(pieces[:, Q1] - pieces[:, Q0], opens_group)
    first_end[rows < np.diff(bounds)[group[opens_group] // num_layers]] = 0  # some row has no columns

    # Of each run, tiles before the `low`-th are cut by a start, and those from the `high`-th on by an end.
    nth = np.searchsorted(group[opens_group], runs.group)
    start = runs.start - runs.start % align
    count = -(-(runs.end - start) // block_cols)
    low = np.clip(-((start - last_start[nth]) // block_cols), 0, count)
    high = np.clip((first_end[nth] - start) // block_cols, 0, count)
    stops = np.stack((np.minimum(low, high), np.maximum(low, high), count), axis=1)
    flags = np.zeros_like(stops)
    flags[:, 0], flags[:, 2] = ROW_BEGINS_INSIDE, ROW_ENDS_INSIDE
    flags[high < low, 1] = ROW_BEGINS_INSIDE | ROW_ENDS_INSIDE

    entries = np.zeros((3 * len(stops), ENTRY_SIZE), np.int64)
    number = np.diff(stops, prepend=0, axis=1)
    entries[:, ENTRY_COLUMN] = (start[:, None] + (stops - number) * block_cols).ravel()
    entries[:, ENTRY_TILES] = number.ravel()
    entries[:, ENTRY_CODE] = ((runs.group % num_layers)[:, None] << FLAG_BITS | flags).ravel()
    window = np.repeat(runs.group // num_layers, 3)
    used = np.flatnonzero(entries[:, ENTRY_TILES])
    return entries[used], window[used]
