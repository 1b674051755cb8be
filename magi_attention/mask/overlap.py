"""Find two bands that share a cell."""

import numpy as np

from magi_attention.mask.bands import Q0, Q1, IntArray, crop, row_intervals, tighten


def find_overlap(bands: IntArray) -> tuple[int, int] | None:
    """Indices of two bands that share a cell, or None when every cell belongs to one band at most.

    Rows are cut into segments in which the same bands live throughout. A row's interval moves by at most one key from
    row to row and is never empty in a tight band, so disjoint bands keep their order of keys over a segment, and it is
    enough to compare neighbours in the order of the segment's first row. Cost: (band, segment) pairs, sorted once.

    Args:
        bands: Bands, shape ``(n, 6)``; need not be tight.
    """
    tight, origin = tighten(bands)
    order = np.argsort(tight[:, Q0], kind="stable")
    if np.all(tight[order[1:], Q0] >= np.maximum.accumulate(tight[order, Q1])[:-1]):
        return None  # no two bands share a row
    borders = np.unique(tight[:, [Q0, Q1]])
    pieces, segment, source = crop(tight, borders[:-1], borders[1:])
    first_key, _ = row_intervals(pieces, pieces[:, Q0])
    order = np.lexsort((first_key, segment))
    a, b = order[:-1], order[1:]
    same = segment[a] == segment[b]
    a, b = a[same], b[same]
    common, where = tighten(_intersection(pieces[a], pieces[b]))
    if not len(common):
        return None
    pair = sorted((int(origin[source[a[where[0]]]]), int(origin[source[b[where[0]]]])))
    return pair[0], pair[1]


def _intersection(a: IntArray, b: IntArray) -> IntArray:
    lower, upper = np.maximum(a, b), np.minimum(a, b)
    lower[:, Q0 + 1 :: 2] = upper[:, Q0 + 1 :: 2]  # columns q1, k1, hi end a range; q0, k0, lo begin one
    return lower
