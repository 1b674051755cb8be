"""DispatchPlan: which rank has which chunk, and the permutation of rows that this means."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import IntArray, ranges_to_indices


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """The sequence cut into chunks, and each chunk's rank.

    A rank's local rows are its chunks in ascending order, laid one behind the other.

    Attributes:
        total_seqlen: Rows of the sequence without padding.
        pad_size: Rows of padding at its end.
        chunk_size: Rows in a chunk.
        cp_size: Number of ranks; each has the same number of chunks.
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

    @property
    def local_seqlen(self) -> int:
        """Rows on every rank."""
        return self.padded_seqlen // self.cp_size

    @cached_property
    def chunk_order(self) -> IntArray:
        """Chunks in the order in which the ranks' rows stand behind each other, rank 0 first, ``(num_chunks,)``."""
        return np.argsort(self.owner, kind="stable")

    @cached_property
    def chunk_position(self) -> IntArray:
        """Where each chunk stands in ``chunk_order``; its inverse."""
        position = np.empty_like(self.chunk_order)
        position[self.chunk_order] = np.arange(len(position))
        return position

    @cached_property
    def owner_runs(self) -> tuple[IntArray, IntArray]:
        """The sequence as maximal runs of one owner: their borders, ``(n + 1,)``, and their owners, ``(n,)``."""
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        return np.append(first, len(self.owner)) * self.chunk_size, self.owner[first]

    def chunks(self, rank: int) -> IntArray:
        """The rank's chunks, ascending."""
        per_rank = len(self.owner) // self.cp_size
        return self.chunk_order[rank * per_rank : (rank + 1) * per_rank]

    def runs(self, rank: int) -> IntArray:
        """``(start, end)`` of the rank's rows in the padded sequence, ascending, adjacent chunks joined."""
        borders, owner = self.owner_runs
        mine = np.flatnonzero(owner == rank)
        return np.stack((borders[mine], borders[mine + 1]), axis=1)

    def local_start(self, rows: IntArray) -> IntArray:
        """Where global rows stand among the local rows of their owner."""
        chunk, offset = np.divmod(rows, self.chunk_size)
        return self.chunk_position[chunk] * self.chunk_size % self.local_seqlen + offset

    def num_real_rows(self, rank: int) -> int:
        """How many of the rank's rows are not padding; they come first."""
        starts = self.chunks(rank) * self.chunk_size
        return int(np.clip(self.total_seqlen - starts, 0, self.chunk_size).sum())

    def position_ids(self, rank: int) -> IntArray:
        """Global position of each of the rank's rows; padding repeats the last real position."""
        chunks = self.chunks(rank)
        rows = ranges_to_indices(chunks * self.chunk_size, np.full(len(chunks), self.chunk_size))
        return np.minimum(rows, self.total_seqlen - 1)
