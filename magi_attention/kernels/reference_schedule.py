"""TileSchedule: a mask compiled into the tiles that the reference engine goes through.

The GPU engines have schedules of their own, which share the geometry with it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.kernels.mask_geometry import Int32Array, column_runs, cut_rows, layer_intervals, split_layers
from magi_attention.kernels.parts import Part
from magi_attention.mask.bands import K0, K1, Q0, Q1, IntArray, area, crop, ranges_to_indices, row_intervals, tighten


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
