"""Swap chunks between ranks so that no rank sends much more than others.

A collective takes as long as its busiest rank, and rows sent are shared out worse than rows received: the first chunks
of a long document are attended by every rank that has a later one, and the rule of
:mod:`magi_attention.planning.locality`, for which they are free, puts a stretch of them on one rank. Where every query
sees itself, who owns a chunk matters little to the rows that ranks need: not at all where both ranks need both chunks
anyway. So the rank that sends most gives away the chunk that is wanted most, for another rank's of about the same
area, until it is no busier than the busiest receiver.
"""

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.load_balance import last_chunk_is_pinned, rank_areas
from magi_attention.planning.runs import GroupedRuns, sum_by_group


def balance_sends(work: ChunkWork, owner: IntArray, cp_size: int, area_limit: float, rows_limit: int) -> IntArray:
    """Lower the rows that the busiest sender sends, by one swap of chunks a rank at most.

    Neither the largest number of rows sent nor that of rows sent or received grows.

    Args:
        work: The chunks. With keys of another source there is nothing to swap: keys have their ranks later.
        owner: The rank of each chunk.
        cp_size: Number of ranks.
        area_limit: Most unmasked cells of a rank that a swap may make.
        rows_limit: Most rows that may move, all ranks together.

    Returns:
        The rank of each chunk; every rank has as many as before.
    """
    if not work.is_same_source:
        return owner
    now = _Traffic.measure(work, owner, cp_size)
    for _ in range(cp_size):
        if now.sent.max() <= now.received.max():
            break
        swapped = _relieve(work, owner, now, area_limit)
        if swapped is None:
            break
        then = _Traffic.measure(work, swapped, cp_size)
        if not then.is_lighter(now) or then.received.sum() > rows_limit:
            break
        owner, now = swapped, then
    return owner


@dataclass(frozen=True, eq=False)
class _Traffic:
    """Rows that travel under an assignment.

    Attributes:
        needs: The keys that each rank attends; a group is a rank.
        wanted: Rows of each chunk that are sent, once for each rank that they go to, ``(num_chunks,)``.
        sent: The same of each rank, ``(cp_size,)``.
        received: Rows that each rank receives, ``(cp_size,)``.
    """

    needs: GroupedRuns
    wanted: IntArray
    sent: IntArray
    received: IntArray

    @classmethod
    def measure(cls, work: ChunkWork, owner: IntArray, cp_size: int) -> "_Traffic":
        needs = work.needs_of(owner)
        borders = np.arange(work.num_chunks + 1) * work.chunk_size
        first, end = needs.runs.T
        attended = np.diff(_rows_behind(first, borders) - _rows_behind(end, borders))
        at_home = needs.covered(owner, borders[:-1], borders[1:])
        wanted = attended - at_home
        return cls(
            needs,
            wanted,
            sum_by_group(owner, wanted, cp_size),
            sum_by_group(needs.group, needs.lengths, cp_size) - sum_by_group(owner, at_home, cp_size),
        )

    def is_lighter(self, other: "_Traffic") -> bool:
        """Whether fewer ranks send as much as the busiest sender of ``other``, and none sends or receives more."""
        peak = other.sent.max()
        busiest = max(self.sent.max(), self.received.max())
        return bool(busiest <= peak and np.sum(self.sent == peak) < np.sum(other.sent == peak))


def _relieve(work: ChunkWork, owner: IntArray, traffic: _Traffic, area_limit: float) -> IntArray | None:
    """Swap the busiest sender's most wanted chunk for the one that leaves both ranks least to send and to fetch."""
    cp_size = len(traffic.sent)
    busiest = int(np.argmax(traffic.sent))
    movable = np.arange(work.num_chunks - last_chunk_is_pinned(work.num_chunks, cp_size))
    mine = movable[owner[movable] == busiest]
    given = int(mine[np.argmax(traffic.wanted[mine])])
    other = owner[movable]
    areas = rank_areas(work, owner, cp_size)
    relief = work.areas[given] - work.areas[movable]
    allowed = np.maximum(areas[busiest] - relief, areas[other] + relief) <= area_limit
    fewer = traffic.wanted[given] - traffic.wanted[movable]
    peak = np.maximum(traffic.sent[busiest] - fewer, traffic.sent[other] + fewer)  # its own chunks don't lower it
    fetched = _beyond_ranks(work, traffic.needs, given, cp_size)[other]
    fetched += _beyond_rank(work, traffic.needs, busiest)[movable]
    cost = np.where(allowed, peak + fetched, traffic.sent[busiest])
    best = int(np.argmin(cost))
    if cost[best] >= traffic.sent[busiest]:
        return None
    swapped = owner.copy()
    swapped[given], swapped[best] = owner[best], busiest
    return swapped


def _rows_behind(starts: IntArray, borders: IntArray) -> IntArray:
    """Rows from each start to a border, where it lies behind the start, added up: one sum for each border."""
    starts = np.sort(starts)
    count = np.searchsorted(starts, borders)
    return count * borders - np.concatenate(([0], np.cumsum(starts)))[count]


def _beyond_ranks(work: ChunkWork, needs: GroupedRuns, chunk: int, cp_size: int) -> IntArray:
    """Keys that a chunk needs and each rank does not, ``(cp_size,)``."""
    runs = work.needs.runs[work.needs.group == chunk]
    rank = np.repeat(np.arange(cp_size), len(runs))
    starts, ends = np.tile(runs, (cp_size, 1)).T
    return work.need_rows[chunk] - sum_by_group(rank, needs.covered(rank, starts, ends), cp_size)


def _beyond_rank(work: ChunkWork, needs: GroupedRuns, rank: int) -> IntArray:
    """Keys that each chunk needs and a rank does not, ``(num_chunks,)``."""
    starts, ends = work.needs.runs.T
    return work.need_rows - work.sum_by_chunk(needs.covered(np.full(len(starts), rank), starts, ends))
