"""Cut the sequence into chunks and measure each: its unmasked area and the keys it needs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, area, crop
from magi_attention.mask.integers import as_int, as_length, as_size
from magi_attention.planning.runs import GroupedRuns, sum_by_group


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
    total_seqlen_q = as_length(total_seqlen_q, "total_seqlen_q")
    cp_size, chunk_size = as_size(cp_size, "cp_size"), as_size(chunk_size, "chunk_size")
    return -total_seqlen_q % (cp_size * chunk_size)


def check_pad_size(total_seqlen: int, cp_size: int, chunk_size: int, pad_size: int | None, uneven: bool) -> int:
    """The padding that was asked for, if it fits; the least that does for None.

    Args:
        total_seqlen: Rows of the sequence, without padding.
        cp_size: Number of ranks.
        chunk_size: Rows in a chunk.
        pad_size: Rows to add at the end, or None.
        uneven: Whether ranks may have different numbers of rows.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If a size is out of bounds, or the padded sequence cannot be cut as it must be.
    """
    cp_size, chunk_size = as_size(cp_size, "cp_size"), as_size(chunk_size, "chunk_size")
    fitting = compute_pad_size(total_seqlen, cp_size, chunk_size)
    if pad_size is None:
        pad_size = 0 if uneven else fitting
    pad_size = as_int(pad_size, "pad_size")
    if not uneven and (pad_size < fitting or (pad_size - fitting) % (cp_size * chunk_size)):
        raise ValueError(
            f"pad_size {pad_size} does not fit: total_seqlen {total_seqlen} + pad_size must be a multiple of "
            f"cp_size * chunk_size = {cp_size} * {chunk_size}; use {fitting}, as compute_pad_size gives, or "
            "DispatchConfig(uneven=True)"
        )
    if pad_size < 0:
        raise ValueError(f"pad_size must not be negative, got {pad_size}")
    num_chunks = -(-(total_seqlen + pad_size) // chunk_size)
    if num_chunks < cp_size:
        raise ValueError(
            f"total_seqlen {total_seqlen} + pad_size {pad_size} makes {num_chunks} chunks of chunk_size {chunk_size}, "
            f"but each of {cp_size} ranks needs one: use a smaller chunk_size, or padding"
        )
    return pad_size


@dataclass(frozen=True, eq=False)
class ChunkWork:
    """What every chunk of queries has to do.

    Attributes:
        chunk_size: Rows in a chunk.
        num_chunks: Number of chunks, padding included.
        total_seqlen_k: Number of keys; more than any key that is needed.
        areas: Unmasked cells in each chunk, int64 ``(num_chunks,)``.
        needs: The keys that each chunk attends; a group is a chunk.
        is_same_source: Whether who has a chunk of queries has the keys of the same rows, too.
    """

    chunk_size: int
    num_chunks: int
    total_seqlen_k: int
    areas: IntArray
    needs: GroupedRuns
    is_same_source: bool = True

    @classmethod
    def measure(cls, mask: AttnMask, chunk_size: int, num_chunks: int, is_same_source: bool = True) -> "ChunkWork":
        """Cut ``mask`` at the borders of its chunks of queries."""
        borders = np.arange(num_chunks + 1) * chunk_size
        pieces, chunk, _ = crop(mask.bands, borders[:-1], borders[1:])
        areas = np.zeros(num_chunks, np.int64)
        np.add.at(areas, chunk, area(pieces))
        stride = num_chunks * chunk_size + mask.total_seqlen_k + 1
        needs = GroupedRuns.merge(chunk, pieces[:, 2], pieces[:, 3], stride)
        return cls(chunk_size, num_chunks, mask.total_seqlen_k, areas, needs, is_same_source)

    @cached_property
    def need_rows(self) -> IntArray:
        """How many keys each chunk attends, ``(num_chunks,)``."""
        return self.sum_by_chunk(self.needs.lengths)

    def sum_by_chunk(self, per_run: IntArray) -> IntArray:
        """Add up a number given for each run of ``needs``."""
        return sum_by_group(self.needs.group, per_run, self.num_chunks)

    def needs_of(self, owner: IntArray) -> GroupedRuns:
        """The keys that each rank attends when ``owner[c]`` has chunk ``c``; a group is a rank."""
        runs = self.needs.runs
        return GroupedRuns.merge(owner[self.needs.group], runs[:, 0], runs[:, 1], self.needs.stride)

    def rows_moved(self, owner: IntArray) -> int:
        """Rows received by all ranks together: those a rank attends and does not own.

        Keys of another source have no owner yet; then it is the rows that ranks attend. To choose an assignment of
        queries that is as good: wherever a key will be, one rank that attends it can have it.
        """
        needs = self.needs_of(owner)
        if not self.is_same_source:
            return int(needs.lengths.sum())
        starts = np.arange(self.num_chunks) * self.chunk_size
        return int(needs.lengths.sum() - needs.covered(owner, starts, starts + self.chunk_size).sum())
