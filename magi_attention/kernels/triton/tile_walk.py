"""TileWalk: a mask compiled into the tiles that kernels walk, on the device where they do."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from magi_attention.kernels.lazy_schedule import MaskView, copy_to_device
from magi_attention.kernels.mask_geometry import column_runs, cut_rows, layer_intervals, split_layers
from magi_attention.kernels.triton.records import (
    RUN_END,
    RUN_FULL_END,
    RUN_SIZE,
    RUN_START,
    TILE_END,
    TILE_END_RUN,
    TILE_FIRST_RUN,
    TILE_LAYERS,
    TILE_SIZE,
    TILE_START,
)
from magi_attention.mask.bands import Q0, Q1, IntArray, crop, row_intervals, tighten


class Tables(NamedTuple):
    """What a kernel reads of a walk, on a device. Rows are queries and columns keys, or the other way round.

    Of each row tile, one program computes the *runs*, stretches of columns that first have full tiles and then partial
    ones. Of a partial one, a row attends the columns in ``[starts[l], ends[l])`` of any layer ``l``.

    Tiles and runs have the columns that :mod:`magi_attention.kernels.triton.records` names.

    Attributes:
        tiles: int32 ``(num_tiles, TILE_SIZE)``, most columns first: first row, end of the rows, first run, end of the
            runs, most intervals of a row.
        runs: int32 ``(num_runs, RUN_SIZE)``: first column, end of the full tiles, end of the columns.
        starts: int32 ``(num_layers, num_rows)``: first column of each row's ``l``-th interval.
        ends: The same of one past its last column; empty intervals behind a row's last one.
        num_rows: Number of rows.
    """

    tiles: Any  # tensors, but in a kernel these are Triton's pointers
    runs: Any
    starts: Any
    ends: Any
    num_rows: int


@dataclass(frozen=True, eq=False)
class TileWalk:
    """The tiles of a mask in the order and the form in which a kernel computes them.

    Attributes:
        tables: What the kernel reads.
        num_tiles: Number of row tiles.
        num_busy: How many of them have columns; these come first.
        layered: Whether a row has more than one interval.
    """

    tables: Tables
    num_tiles: int
    num_busy: int
    layered: bool


def make_tile_walk(mask: MaskView, block_rows: int, block_cols: int, device: torch.device) -> TileWalk:
    """The walk over row tiles, see :class:`~magi_attention.kernels.lazy_schedule.LazySchedule`."""
    bands, layer = split_layers(tighten(mask.bands)[0])
    starts, ends = layer_intervals(bands, layer, mask.num_rows)
    bounds = cut_rows(bands, mask.num_rows, block_rows)
    runs, run_tile = _runs(bands, bounds, mask.num_cols, block_cols)
    num_tiles = len(bounds) - 1
    offsets = np.searchsorted(run_tile, np.arange(num_tiles + 1))
    steps = np.bincount(run_tile, -(-(runs[:, RUN_END] - runs[:, RUN_START]) // block_cols), num_tiles)
    in_use = np.logical_or.reduceat(ends > starts, bounds[:-1], axis=1)
    tiles = np.empty((num_tiles, TILE_SIZE), np.int64)
    tiles[:, TILE_START], tiles[:, TILE_END] = bounds[:-1], bounds[1:]
    tiles[:, TILE_FIRST_RUN], tiles[:, TILE_END_RUN] = offsets[:-1], offsets[1:]
    tiles[:, TILE_LAYERS] = in_use.sum(0)
    # Programs start in the order of tiles: the longest first, so that none is left to run alone (Graham 1969).
    tiles = tiles[np.argsort(-steps, kind="stable")]
    tables = Tables(
        copy_to_device(tiles, device),
        copy_to_device(runs, device),
        copy_to_device(starts, device),
        copy_to_device(ends, device),
        mask.num_rows,
    )
    return TileWalk(tables, num_tiles, int(np.count_nonzero(steps)), len(starts) > 1)


def _runs(bands: IntArray, bounds: IntArray, num_cols: int, block: int) -> tuple[IntArray, IntArray]:
    """The ``runs`` of row tiles, and the tile of each.

    A stretch of columns is cut into blocks from its first column on. The blocks that all rows of the tile attend are
    full ones. A run begins where full blocks follow partial ones, and at the first block of a stretch.
    """
    pieces, tile, _ = crop(bands, bounds[:-1], bounds[1:])
    stretch = column_runs(pieces, tile, num_cols, block)
    full_tile, full_start, full_end = _full_columns(pieces, tile, np.diff(bounds), num_cols)

    # On one axis for all tiles, to find the stretch of each interval of full columns.
    pitch = num_cols + 1
    source = np.searchsorted(stretch.group * pitch + stretch.start, full_tile * pitch + full_start, side="right") - 1
    origin = stretch.start[source]
    first, last = -((origin - full_start) // block), (full_end - origin) // block
    keep = first < last
    source, full_start, full_end = source[keep], (origin + first * block)[keep], (origin + last * block)[keep]

    starts_full = np.zeros(len(stretch.start), np.bool_)
    starts_full[source[full_start == stretch.start[source]]] = True
    partial = np.flatnonzero(~starts_full)
    source = np.concatenate((source, partial))
    run_start = np.concatenate((full_start, stretch.start[partial]))
    run_full_end = np.concatenate((full_end, stretch.start[partial]))
    order = np.lexsort((run_start, source))
    source, run_start, run_full_end = source[order], run_start[order], run_full_end[order]
    run_end = stretch.end[source]
    goes_on = np.flatnonzero(source[1:] == source[:-1])
    run_end[goes_on] = run_start[goes_on + 1]
    runs = np.empty((len(source), RUN_SIZE), np.int64)
    runs[:, RUN_START], runs[:, RUN_FULL_END], runs[:, RUN_END] = run_start, run_full_end, run_end
    return runs, stretch.group[source]


def _full_columns(
    pieces: IntArray, tile: IntArray, num_rows: IntArray, num_cols: int
) -> tuple[IntArray, IntArray, IntArray]:
    """The intervals of columns that every row of a tile attends: tile, start and end, ascending.

    Pieces share no cell, so a column is one if the pieces that attend it in each of their rows have as many rows as the
    tile. No column is missed for being attended by one piece in some rows and by another in the rest: of pieces with
    the same rows one is before the other in each row, and intervals only move forward from row to row.
    """
    seen_from = row_intervals(pieces, pieces[:, Q1] - 1)[0]
    seen_to = row_intervals(pieces, pieces[:, Q0])[1]
    keep = seen_from < seen_to
    rows, tile = (pieces[:, Q1] - pieces[:, Q0])[keep], tile[keep]
    pitch = num_cols + 1
    position = np.concatenate((tile * pitch + seen_from[keep], tile * pitch + seen_to[keep]))
    position, event = np.unique(position, return_inverse=True)
    rows_from = np.cumsum(np.bincount(event, np.concatenate((rows, -rows)), len(position)))
    at = position // pitch
    is_full = np.append(rows_from == num_rows[at], False)
    begins = np.flatnonzero(is_full[:-1] & ~np.concatenate(([False], is_full[:-2])))
    stops = np.flatnonzero(~is_full[1:] & is_full[:-1]) + 1
    return at[begins], position[begins] % pitch, position[stops] % pitch
