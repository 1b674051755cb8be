"""Give chunks to ranks: rules that look at areas and order only.

An assignment is ``owner``, int64 ``(num_chunks,)``: the rank of each chunk. Every rank gets the same number of chunks.
Where they don't divide, some ranks get one more, and the last chunk, which may have fewer rows than others, is one of
theirs: so the ranks' rows differ by a chunk at most. The rule that also looks at the rows moved is in
:mod:`magi_attention.planning.locality`.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork


def chunks_a_rank(num_chunks: int, cp_size: int) -> IntArray:
    """How many chunks each rank gets, ``(cp_size,)``; the last ranks get one more where they don't divide."""
    return (num_chunks + np.arange(cp_size)) // cp_size


def last_chunk_is_pinned(num_chunks: int, cp_size: int) -> bool:
    """Whether only some ranks may have the last chunk: those that get one more."""
    return num_chunks % cp_size > 0


def min_heap(work: ChunkWork, cp_size: int) -> IntArray:
    """Chunks in order of falling area, each to the least loaded rank that has room (longest processing time first)."""
    pinned = last_chunk_is_pinned(work.num_chunks, cp_size)
    return deal_by_heap(work.areas, chunks_a_rank(work.num_chunks, cp_size), pinned)


def deal_by_heap(areas: IntArray, room: IntArray, last_is_pinned: bool) -> IntArray:
    """:func:`min_heap` for chunks of which only the areas are known.

    Args:
        areas: Unmasked cells of each chunk.
        room: How many chunks each rank gets.
        last_is_pinned: Whether the last chunk is the last rank's, before any other is dealt.
    """
    area_of, left = areas.tolist(), room.tolist()
    order = np.argsort(-areas, kind="stable")
    owner = [len(left) - 1] * len(area_of)
    loads = [0] * len(left)
    if last_is_pinned:
        order = order[order != len(area_of) - 1]
        left[-1] -= 1
        loads[-1] = area_of[-1]
    heap = [(load, rank) for rank, load in enumerate(loads) if left[rank]]
    heapq.heapify(heap)
    for chunk in order.tolist():
        load, rank = heap[0]
        owner[chunk] = rank
        left[rank] -= 1
        if left[rank]:
            heapq.heapreplace(heap, (load + area_of[chunk], rank))
        else:
            heapq.heappop(heap)
    return np.array(owner, np.int64)


def contiguous(work: ChunkWork, cp_size: int) -> IntArray:
    """The sequence cut into ``cp_size`` equal parts."""
    return np.repeat(np.arange(cp_size), chunks_a_rank(work.num_chunks, cp_size))


def zigzag(work: ChunkWork, cp_size: int) -> IntArray:
    """The sequence cut into ``2 * cp_size`` parts; rank r gets the r-th and the r-th from the end.

    With an odd number m of chunks a rank, parts have (m + 1) / 2 and (m - 1) / 2 chunks in turn; those of a rank, one
    at an even place and one at an odd one, have m together.
    """
    ranks = np.arange(cp_size)
    chunks = chunks_a_rank(work.num_chunks, cp_size)[::-1]  # rank 0 has the last chunk
    first_part = (chunks + (ranks % 2 == 0)) // 2
    second_part = chunks - first_part
    return np.concatenate((np.repeat(ranks, first_part), np.repeat(ranks[::-1], second_part[::-1])))


def imbalance(work: ChunkWork, owner: IntArray, cp_size: int) -> float:
    """Largest area of a rank over the mean; 1 is perfect."""
    return peak_over_mean(rank_areas(work, owner, cp_size))


def peak_over_mean(areas: Sequence[int] | IntArray) -> float:
    """:func:`imbalance` of ranks with these areas; 1 also where nothing is attended."""
    total = int(np.sum(areas))
    return int(np.max(areas)) * len(areas) / total if total else 1.0


def rank_areas(work: ChunkWork, owner: IntArray, cp_size: int) -> IntArray:
    """Unmasked cells of each rank, ``(cp_size,)``."""
    areas = np.zeros(cp_size, np.int64)
    np.add.at(areas, owner, work.areas)
    return areas
