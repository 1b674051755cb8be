"""DispatchPlan: which rank has which chunk, and the permutation of rows that this means."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import IntArray, ranges_to_indices
from magi_attention.planning.runs import sum_by_group


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """The sequence cut into chunks, and each chunk's rank.

    A rank's local rows are its chunks in ascending order, laid one behind the other. Laid behind each other in turn,
    rank 0 first, they are the *gathered* rows.

    Attributes:
        total_seqlen: Rows of the sequence without padding.
        pad_size: Rows of padding at its end.
        chunk_size: Rows in a chunk; the last one may have fewer.
        cp_size: Number of ranks.
        owner: The rank of each chunk, int64 ``(num_chunks,)``.
    """

    total_seqlen: int
    pad_size: int
    chunk_size: int
    cp_size: int
    owner: IntArray

    @property
    def padded_seqlen(self) -> int:
        """Rows of the sequence with padding."""
        return self.total_seqlen + self.pad_size

    @cached_property
    def local_seqlens(self) -> tuple[int, ...]:
        """Rows on each rank, ``(cp_size,)``."""
        return tuple(sum_by_group(self.owner, self._chunk_rows, self.cp_size).tolist())

    @cached_property
    def real_seqlens(self) -> tuple[int, ...]:
        """Rows on each rank that are not padding and come before it, ``(cp_size,)``."""
        first = np.arange(len(self.owner)) * self.chunk_size
        real = np.clip(self.total_seqlen - first, 0, self.chunk_size)
        return tuple(sum_by_group(self.owner, real, self.cp_size).tolist())

    @property
    def local_seqlen(self) -> int:
        """Rows on every rank; where they differ, on the rank that has most."""
        return max(self.local_seqlens)

    @cached_property
    def gathered_positions(self) -> IntArray:
        """Global position of each gathered row, ``(padded_seqlen,)``; padding repeats the last real position."""
        order = np.argsort(self.owner, kind="stable")
        rows = ranges_to_indices(order * self.chunk_size, self._chunk_rows[order])
        return np.minimum(rows, self.total_seqlen - 1)

    @cached_property
    def places(self) -> IntArray:
        """Where each row of the sequence stands among the gathered rows, ``(total_seqlen,)``."""
        return ranges_to_indices(self._gathered_start, self._chunk_rows)[: self.total_seqlen]

    @cached_property
    def owner_runs(self) -> tuple[IntArray, IntArray]:
        """The sequence as maximal runs of one owner: their borders, ``(n + 1,)``, and their owners, ``(n,)``."""
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        return np.append(first * self.chunk_size, self.padded_seqlen), self.owner[first]

    def chunks(self, rank: int) -> IntArray:
        """The rank's chunks, ascending."""
        return np.flatnonzero(self.owner == rank)

    def runs(self, rank: int) -> IntArray:
        """``(start, end)`` of the rank's rows in the padded sequence, ascending, adjacent chunks joined."""
        borders, owner = self.owner_runs
        mine = np.flatnonzero(owner == rank)
        return np.stack((borders[mine], borders[mine + 1]), axis=1)

    def local_start(self, rows: IntArray) -> IntArray:
        """Where global rows stand among the local rows of their owner."""
        chunk, offset = np.divmod(rows, self.chunk_size)
        return self._local_chunk_start[chunk] + offset

    def position_ids(self, rank: int) -> IntArray:
        """Global position of each of the rank's rows; padding repeats the last real position."""
        chunks = self.chunks(rank)
        rows = ranges_to_indices(chunks * self.chunk_size, self._chunk_rows[chunks])
        return np.minimum(rows, self.total_seqlen - 1)

    @cached_property
    def _chunk_rows(self) -> IntArray:
        rows = np.full(len(self.owner), self.chunk_size)
        rows[-1:] -= len(self.owner) * self.chunk_size - self.padded_seqlen
        return rows

    @cached_property
    def _gathered_start(self) -> IntArray:
        """Where each chunk begins among the gathered rows."""
        order = np.argsort(self.owner, kind="stable")
        start = np.empty_like(order)
        start[order] = np.cumsum(self._chunk_rows[order]) - self._chunk_rows[order]
        return start

    @cached_property
    def _local_chunk_start(self) -> IntArray:
        """Where each chunk begins among the local rows of its owner."""
        rows = np.array(self.local_seqlens)
        return self._gathered_start - (np.cumsum(rows) - rows)[self.owner]
