"""How few rows any balanced assignment could move: a bound to hold an assignment against."""

import numpy as np

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import K0, K1, Q0, Q1, IntArray, area, crop, merge_runs
from magi_attention.planning.runs import GroupedRuns


def rows_moved_lower_bound(mask: AttnMask, cp_size: int, chunk_size: int, tolerance: float) -> int:
    """Rows that all ranks together must receive when no rank exceeds ``(1 + tolerance)`` times the mean area.

    Take the bands whose keys overlap as one document, and order the chunks that it has a part in by the keys they
    need of it, most first. The first rank of the document needs at least as many keys as the first chunk; n ranks
    have no more area and rows than n shares, so rank n + 1 needs at least the keys of the chunk at which n shares are
    full. The sum, less the keys themselves (each may be at home on one rank that needs it), must travel. Ranks are
    taken to spend all they have on every document, so the true minimum is higher, but no assignment is lower.

    Args:
        mask: The mask. Its keys may be of another source than its queries.
        cp_size: Number of ranks.
        chunk_size: Rows in a chunk; no rank has more of them than the least padding makes.
        tolerance: Allowed imbalance, as a fraction of the mean area.
    """
    if cp_size == 1 or not len(mask.bands):
        return 0
    num_chunks = -(-mask.total_seqlen_q // (chunk_size * cp_size)) * cp_size
    borders = np.arange(num_chunks + 1) * chunk_size
    pieces, chunk, source = crop(mask.bands, borders[:-1], borders[1:])
    keys = mask.bands[:, [K0, K1]]
    documents = (merge_runs(keys * 2 - np.array([0, 1])) + 1) // 2  # doubled and shortened: touching keys stay apart
    document = np.searchsorted(documents[:, 0], mask.bands[source, K0], side="right") - 1

    part, of = np.unique(document * num_chunks + chunk, return_inverse=True)  # a part: what a chunk has of a document
    stride = int(borders[-1]) + mask.total_seqlen_k + 1
    needed = _union_sizes(of, pieces[:, K0], pieces[:, K1], stride)
    rows = _union_sizes(of, pieces[:, Q0], pieces[:, Q1], stride)
    areas = np.bincount(of, weights=area(pieces)).astype(np.int64)

    order = np.lexsort((-needed, part // num_chunks))
    needed, areas, rows = needed[order], areas[order], rows[order]
    first_part = np.searchsorted(part // num_chunks, np.arange(len(documents) + 1))
    shares = np.arange(cp_size)
    area_shares = shares * ((1 + tolerance) * mask.area / cp_size)
    row_shares = shares * (num_chunks // cp_size * chunk_size)
    total = 0
    for first, end in zip(first_part[:-1].tolist(), first_part[1:].tolist(), strict=True):
        full = np.minimum(
            np.searchsorted(np.cumsum(areas[first:end]), area_shares, side="right"),
            np.searchsorted(np.cumsum(rows[first:end]), row_shares, side="right"),
        )
        total += int(needed[first:end][full[full < end - first]].sum())
    return max(0, total - int((documents[:, 1] - documents[:, 0]).sum()))


def _union_sizes(group: IntArray, starts: IntArray, ends: IntArray, stride: int) -> IntArray:
    """How many numbers the ranges of each group hold together."""
    runs = GroupedRuns.merge(group, starts, ends, stride)
    return np.bincount(runs.group, weights=runs.lengths).astype(np.int64)
