"""Cut the sequence into chunks and measure each: its unmasked area and the keys it needs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, area, crop
from magi_attention.planning.runs import GroupedRuns


def compute_pad_size(total_seqlen_q: int, cp_size: int, chunk_size: int) -> int:
    """The fewest rows of padding after which every rank gets the same number of whole chunks.

    Args:
        total_seqlen_q: Rows of the sequence, without padding.
        cp_size: Number of ranks.
        chunk_size: Rows in a chunk.

    Returns:
        Rows to add at the end; the padded length is a multiple of ``cp_size * chunk_size``.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If ``total_seqlen_q`` is negative or another argument less than 1.
    """
    for name, value, least in (
        ("total_seqlen_q", total_seqlen_q, 0),
        ("cp_size", cp_size, 1),
        ("chunk_size", chunk_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    return int(-total_seqlen_q % (cp_size * chunk_size))


@dataclass(frozen=True)
class ChunkWork:
    """What every chunk of queries has to do.

    Attributes:
        chunk_size: Rows in a chunk.
        num_chunks: Number of chunks, padding included.
        total_seqlen_k: Number of keys; more than any key that is needed.
        areas: Unmasked cells in each chunk, int64 ``(num_chunks,)``.
        needs: The keys that each chunk attends; a group is a chunk.
    """

    chunk_size: int
    num_chunks: int
    total_seqlen_k: int
    areas: IntArray
    needs: GroupedRuns

    @classmethod
    def measure(cls, mask: AttnMask, chunk_size: int, num_chunks: int) -> "ChunkWork":
        """Cut ``mask`` at the borders of its chunks of queries."""
        borders = np.arange(num_chunks + 1) * chunk_size
        pieces, chunk, _ = crop(mask.bands, borders[:-1], borders[1:])
        areas = np.zeros(num_chunks, np.int64)
        np.add.at(areas, chunk, area(pieces))
        stride = num_chunks * chunk_size + mask.total_seqlen_k + 1
        needs = GroupedRuns.merge(chunk, pieces[:, 2], pieces[:, 3], stride)
        return cls(chunk_size, num_chunks, mask.total_seqlen_k, areas, needs)

    @cached_property
    def need_rows(self) -> IntArray:
        """How many keys each chunk attends, ``(num_chunks,)``."""
        return self.sum_by_chunk(self.needs.lengths)

    def sum_by_chunk(self, per_run: IntArray) -> IntArray:
        """Add up a number given for each run of ``needs``."""
        return np.bincount(self.needs.group, weights=per_run, minlength=self.num_chunks).astype(np.int64)

    def needs_of(self, owner: IntArray) -> GroupedRuns:
        """The keys that each rank attends when ``owner[c]`` has chunk ``c``; a group is a rank."""
        runs = self.needs.runs
        return GroupedRuns.merge(owner[self.needs.group], runs[:, 0], runs[:, 1], self.needs.stride)

    def rows_moved(self, owner: IntArray) -> int:
        """Rows received by all ranks together: those a rank attends and does not own."""
        needs = self.needs_of(owner)
        starts = np.arange(self.num_chunks) * self.chunk_size
        return int(needs.lengths.sum() - needs.covered(owner, starts, starts + self.chunk_size).sum())
