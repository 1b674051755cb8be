"""Give chunks to ranks: rules that look at areas and order only.

An assignment is ``owner``, int64 ``(num_chunks,)``: the rank of each chunk. Every rank gets the same number of chunks.
The rule that also looks at the rows moved is in :mod:`magi_attention.planning.locality`.
"""

import heapq

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork


def min_heap(work: ChunkWork, cp_size: int) -> IntArray:
    """Chunks in order of falling area, each to the least loaded rank that has room (longest processing time first)."""
    return deal_by_heap(work.areas, cp_size)


def deal_by_heap(areas: IntArray, cp_size: int) -> IntArray:
    """:func:`min_heap` for chunks of which only the areas are known."""
    room = [len(areas) // cp_size] * cp_size
    heap = [(0, rank) for rank in range(cp_size)]
    owner = [0] * len(areas)
    area_of = areas.tolist()
    for chunk in np.argsort(-areas, kind="stable").tolist():
        load, rank = heap[0]
        owner[chunk] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heapreplace(heap, (load + area_of[chunk], rank))
        else:
            heapq.heappop(heap)
    return np.array(owner, np.int64)


def contiguous(work: ChunkWork, cp_size: int) -> IntArray:
    """The sequence cut into ``cp_size`` equal parts."""
    return np.arange(work.num_chunks) * cp_size // work.num_chunks


def zigzag(work: ChunkWork, cp_size: int) -> IntArray:
    """The sequence cut into ``2 * cp_size`` parts; rank r gets the r-th and the r-th from the end.

    With an odd number m of chunks a rank, parts have (m + 1) / 2 and (m - 1) / 2 chunks in turn; those of a rank, one
    at an even place and one at an odd one, have m together.
    """
    part = np.arange(work.num_chunks) * 2 * cp_size // work.num_chunks
    return np.minimum(part, 2 * cp_size - 1 - part)


def imbalance(work: ChunkWork, owner: IntArray, cp_size: int) -> float:
    """Largest area of a rank over the mean; 1 is perfect."""
    total = int(work.areas.sum())
    return float(rank_areas(work, owner, cp_size).max() * cp_size / total) if total else 1.0


def rank_areas(work: ChunkWork, owner: IntArray, cp_size: int) -> IntArray:
    """Unmasked cells of each rank, ``(cp_size,)``."""
    areas = np.zeros(cp_size, np.int64)
    np.add.at(areas, owner, work.areas)
    return areas
