"""Bands: the one shape that every mask is made of, as rows of an int64 array.

A band is a rectangle of queries and keys cut by a diagonal strip::

    (q0, q1, k0, k1, lo, hi)  =  { (i, j) : q0 <= i < q1, k0 <= j < k1, lo <= j - i <= hi }

Bands are closed under all that planning does. Cropping intersects ranges and leaves the strip alone; moving the
rectangle adds one constant to ``lo`` and ``hi``. Row ``i`` attends the one interval
``[max(k0, i + lo), min(k1, i + hi + 1))``.

Every function takes arrays of shape ``(n, 6)`` and works on all bands at once. Bands that they return are *tight*:
each row and each key of a band has at least one cell, and ``lo`` and ``hi`` are the smallest strip that holds the
cells.
"""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

Q0, Q1, K0, K1, LO, HI = range(6)


def tighten(bands: IntArray) -> tuple[IntArray, IntArray]:
    """Shrink every band to the rows, keys and diagonals it uses, and drop those without a cell.

    Returns:
        The tight bands, and for each the row of ``bands`` it came from.
    """
    q0, q1, k0, k1, lo, hi = bands.T
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    keep = np.flatnonzero((q0 < q1) & (k0 < k1) & (lo <= hi))
    if len(keep) < len(bands):
        q0, q1, k0, k1, lo, hi = (x[keep] for x in (q0, q1, k0, k1, lo, hi))
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    out = np.empty((len(q0), 6), np.int64)
    out[:, Q0], out[:, Q1], out[:, K0], out[:, K1] = q0, q1, k0, k1
    out[:, LO], out[:, HI] = np.maximum(lo, k0 - q1 + 1), np.minimum(hi, k1 - 1 - q0)
    return out, keep


def area(bands: IntArray) -> IntArray:
    """The exact number of cells of each band, in closed form."""
    q0, q1, k0, k1, lo, hi = bands.T
    return _cells_up_to(q0, q1, k0, k1, hi) - _cells_up_to(q0, q1, k0, k1, lo - 1)


def _cells_up_to(q0: IntArray, q1: IntArray, k0: IntArray, k1: IntArray, c: IntArray) -> IntArray:
    """Cells of the rectangle with j - i <= c: row i has clip(i + c + 1 - k0, 0, k1 - k0) of them."""

    def triangle(n: IntArray) -> IntArray:
        n = np.maximum(n, 0)
        return n * (n + 1) // 2

    return triangle(q1 + c - k0) - triangle(q0 + c - k0) - triangle(q1 + c - k1) + triangle(q0 + c - k1)


def crop(bands: IntArray, starts: IntArray, ends: IntArray, axis: int = Q0) -> tuple[IntArray, IntArray, IntArray]:
    """Intersect every band with every run of rows (``axis=Q0``) or keys (``axis=K0``) that it meets.

    Args:
        bands: Bands, shape ``(n, 6)``.
        starts: First row (key) of each run, ascending, shape ``(r,)``. Runs are disjoint.
        ends: One past the last row (key) of each run, shape ``(r,)``.
        axis: ``Q0`` to cut rows, ``K0`` to cut keys.

    Returns:
        The pieces, the run of each, and the band each came from. Pieces of one band stand together, in order of their
        runs.
    """
    first = np.searchsorted(ends, bands[:, axis], side="right")
    count = np.maximum(np.searchsorted(starts, bands[:, axis + 1], side="left") - first, 0)
    source = np.repeat(np.arange(len(bands)), count)
    run = ranges_to_indices(first, count)
    pieces = bands[source]
    np.maximum(pieces[:, axis], starts[run], out=pieces[:, axis])
    np.minimum(pieces[:, axis + 1], ends[run], out=pieces[:, axis + 1])
    pieces, keep = tighten(pieces)
    return pieces, run[keep], source[keep]


def shift(bands: IntArray, rows: IntArray | int, keys: IntArray | int) -> IntArray:
    """Move each band by so many rows and keys."""
    out: IntArray = bands.copy()
    out[:, Q0] += rows
    out[:, Q1] += rows
    out[:, K0] += keys
    out[:, K1] += keys
    out[:, LO] += keys - rows
    out[:, HI] += keys - rows
    return out


def transpose(bands: IntArray) -> IntArray:
    """The bands with rows and keys in each other's place: ``lo <= j - i <= hi`` is ``-hi <= i - j <= -lo``."""
    out: IntArray = bands[:, [K0, K1, Q0, Q1, HI, LO]]
    out[:, LO:] *= -1
    return out


def relocate(bands: IntArray, q_runs: IntArray, k_runs: IntArray) -> IntArray:
    """The part of a mask that a buffer of rows and a buffer of keys see, in the buffers' coordinates.

    A buffer is described by the runs of the global sequence that it holds, one behind the other.

    Args:
        bands: Bands in global coordinates.
        q_runs: ``(start, end)`` of each run of rows, ascending and disjoint, shape ``(r, 2)``.
        k_runs: The same of keys.
    """
    pieces, q_run, _ = crop(bands, q_runs[:, 0], q_runs[:, 1], Q0)
    pieces, k_run, source = crop(pieces, k_runs[:, 0], k_runs[:, 1], K0)
    q_offset = run_offsets(q_runs)[:-1] - q_runs[:, 0]
    k_offset = run_offsets(k_runs)[:-1] - k_runs[:, 0]
    return shift(pieces, q_offset[q_run[source]], k_offset[k_run])


def row_intervals(bands: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """First key and end of the interval that row ``rows[n]`` attends in band ``n``."""
    return np.maximum(bands[:, K0], rows + bands[:, LO]), np.minimum(bands[:, K1], rows + bands[:, HI] + 1)


def attending_rows(bands: IntArray, num_rows: int) -> NDArray[np.bool_]:
    """Which rows attend anything."""
    tight = tighten(bands)[0]
    change = np.bincount(tight[:, Q0], minlength=num_rows + 1) - np.bincount(tight[:, Q1], minlength=num_rows + 1)
    return np.cumsum(change[:num_rows]) > 0


def run_offsets(runs: IntArray) -> IntArray:
    """Where each ``(start, end)`` run begins when runs are laid one behind the other; one more entry for the total."""
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(runs[:, 1] - runs[:, 0], out=offsets[1:])
    return offsets


def ranges_to_indices(starts: IntArray, lengths: IntArray) -> IntArray:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`` without the loop."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    indices: IntArray = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return indices


def merge_runs(runs: IntArray) -> IntArray:
    """Sort ``(start, end)`` runs and join those that touch or overlap; empty ones are dropped."""
    runs = runs[runs[:, 0] < runs[:, 1]]
    if not len(runs):
        return np.empty((0, 2), np.int64)
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(runs[:, 1])
    begins = np.concatenate(([True], runs[1:, 0] > reach[:-1]))
    last = np.append(np.flatnonzero(begins)[1:] - 1, len(runs) - 1)
    return np.stack((runs[begins, 0], reach[last]), axis=1)
