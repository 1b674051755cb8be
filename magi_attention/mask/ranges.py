"""AttnRanges: a list of half-open ranges of token positions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Union, overload

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.attn_range import AttnRange, RangeLike
from magi_attention.mask.bands import IntArray, merge_runs, run_offsets
from magi_attention.mask.integers import IntegersLike, as_cu_seqlens, as_int_array

if TYPE_CHECKING:
    import torch

RangesLike = Union["AttnRanges", Sequence[RangeLike], NDArray[Any], "torch.Tensor"]


def check_within(ranges: IntArray, name: str, total: int, what: str) -> None:
    """Refuse ranges, ``(n, 2)``, that end behind ``total``; ``what`` says in the message what that is.

    Raises:
        ValueError: If one does.
    """
    beyond = np.flatnonzero(ranges[:, 1] > total)
    if len(beyond):
        start, end = ranges[beyond[0]].tolist()
        raise ValueError(f"{name}[{beyond[0]}] = [{start}, {end}) is out of bounds: {what}")


class AttnRanges:
    """A list of ranges, in the order in which they were added; it can grow by :meth:`append` and :meth:`extend`.

    Every other method leaves the list as it is and returns a new value. Two lists are equal when they hold the same
    ranges in the same order.
    """

    __slots__ = ("_ranges",)
    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __init__(self) -> None:
        self._ranges: list[AttnRange] = []

    @classmethod
    def from_ranges(cls, ranges: RangesLike) -> "AttnRanges":
        """A list of its own from another AttnRanges, AttnRange objects, or ``(start, end)`` pairs."""
        return cls._from_array(cls.as_array(ranges, "ranges"))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: IntegersLike, seqlen: int | None = None) -> "AttnRanges":
        """One range for each document of ``cu_seqlens``.

        Args:
            cu_seqlens: Cumulative document lengths: 0, then the end of each document.
            seqlen: If given, where the last document has to end.

        Raises:
            ValueError: If ``cu_seqlens`` does not begin at 0, decreases, or does not end at ``seqlen``.
        """
        borders = as_cu_seqlens(cu_seqlens, "cu_seqlens")
        if seqlen is not None and borders[-1] != seqlen:
            raise ValueError(f"cu_seqlens ends at {borders[-1]}, not at seqlen {seqlen}")
        return cls._from_array(np.stack((borders[:-1], borders[1:]), axis=1))

    @classmethod
    def _from_array(cls, ranges: IntArray) -> "AttnRanges":
        out = cls()
        out._ranges = [AttnRange(start, end) for start, end in ranges.tolist()]
        return out

    @staticmethod
    def as_array(ranges: RangesLike, name: str = "ranges") -> IntArray:
        """Ranges in any accepted form as an int64 array of shape ``(n, 2)``.

        Args:
            ranges: AttnRanges, a sequence of AttnRange objects or pairs, or an integer array or tensor ``(n, 2)``.
            name: What error messages call it.

        Raises:
            TypeError: If it is no such thing, or the borders are not integers.
            ValueError: If something is not a pair, or a range is reversed or negative.
        """
        if isinstance(ranges, (AttnRange, str, Set, Mapping)) or not hasattr(ranges, "__iter__"):
            raise TypeError(f"{name} must be AttnRanges, or a sequence of ranges or pairs, got {ranges!r}")
        if not isinstance(ranges, AttnRanges) and hasattr(ranges, "dtype"):
            array = as_int_array(ranges, name)
        else:
            array = as_int_array([(r.start, r.end) if isinstance(r, AttnRange) else r for r in ranges], name)
        if array.ndim == 1 and not len(array):
            return np.empty((0, 2), np.int64)
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"{name} must be pairs (start, end), shape (n, 2), got shape {array.shape}")
        bad = np.flatnonzero((array[:, 0] < 0) | (array[:, 0] > array[:, 1]))
        if len(bad):
            start, end = array[bad[0]].tolist()
            raise ValueError(f"{name}[{bad[0]}] = [{start}, {end}): a range needs 0 <= start <= end")
        return array

    def append(self, attn_range: RangeLike) -> None:
        """Add one range at the end."""
        self._ranges.append(AttnRange.from_range(attn_range))

    def extend(self, ranges: "AttnRanges | Iterable[RangeLike]") -> None:
        """Add ranges at the end."""
        self._ranges.extend([AttnRange.from_range(r) for r in ranges])

    def sort(self) -> "AttnRanges":
        """The ranges ordered by start, then end."""
        out = AttnRanges()
        out._ranges = sorted(self._ranges)
        return out

    def merge(self) -> "AttnRanges":
        """The same positions as few ranges as possible: sorted, joined where they touch or overlap, none empty."""
        return self._from_array(self._merged())

    def _merged(self) -> IntArray:
        return merge_runs(self.as_array(self))

    def is_sorted(self) -> bool:
        """Whether the ranges are ordered by start, then end."""
        return all(a <= b for a, b in pairwise(self._ranges))

    def is_merged(self) -> bool:
        """Whether :meth:`merge` would change nothing."""
        return self == self.merge()

    def is_non_overlap(self) -> bool:
        """Whether no position is in two of the ranges."""
        return self.intersect_size() == 0

    def is_cu_seqlens(self, seqlen: int) -> bool:
        """Whether the ranges, in their order, cut ``[0, seqlen)`` into consecutive documents."""
        starts = [r.start for r in self._ranges] + [seqlen]
        ends = [0] + [r.end for r in self._ranges]
        return starts == ends

    def to_cu_seqlens(self, seqlen: int) -> list[int]:
        """The cumulative lengths of ranges that cut ``[0, seqlen)`` into consecutive documents.

        Raises:
            ValueError: If they do not.
        """
        if not self.is_cu_seqlens(seqlen):
            raise ValueError(f"the ranges do not cut [0, {seqlen}) into consecutive documents: {self}")
        return [0] + [r.end for r in self._ranges]

    def to_naive_ranges(self) -> list[tuple[int, int]]:
        """The ranges as ``(start, end)`` tuples."""
        return [r.to_naive_range() for r in self._ranges]

    def to_tensor(self, device: "torch.device | str | int" = "cpu") -> "torch.Tensor":
        """The ranges as an int32 tensor of shape ``(n, 2)``, as ``flex_flash_attn_func`` takes them."""
        import torch

        return torch.tensor(self.to_naive_ranges(), dtype=torch.int32, device=device).reshape(-1, 2)

    def make_range_local(self, attn_range: RangeLike) -> AttnRange:
        """Where a range lies in a buffer that holds these ranges, merged, one behind the other.

        Raises:
            ValueError: If one merged range does not hold it whole.
        """
        return self.make_ranges_local([attn_range])[0]

    def make_ranges_local(self, ranges: "AttnRanges | Iterable[RangeLike]") -> "AttnRanges":
        """:meth:`make_range_local` of each range."""
        runs = self._merged()
        offsets = run_offsets(runs)
        local = AttnRanges()
        for r in map(AttnRange.from_range, ranges):
            n = int(np.searchsorted(runs[:, 0], r.start, side="right")) - 1
            if n < 0 or r.end > runs[n, 1]:
                raise ValueError(f"the range {r} is not inside one of the merged ranges {self.merge()}")
            local.append(r.offset(int(offsets[n] - runs[n, 0])))
        return local

    def find_hole_ranges(self, other: "AttnRanges") -> "AttnRanges":
        """The positions of these ranges that ``other`` does not cover, merged."""
        return self._from_array(self._select(other, in_other=False))

    def find_overlap_ranges(self, other: "AttnRanges") -> "AttnRanges":
        """The positions that both cover, merged."""
        return self._from_array(self._select(other, in_other=True))

    def _select(self, other: "AttnRanges", in_other: bool) -> IntArray:
        mine, others = self._merged(), other._merged()
        borders = np.unique(np.concatenate((mine, others)))
        segments = np.stack((borders[:-1], borders[1:]), axis=1)
        chosen = _covers(mine, segments[:, 0]) & (_covers(others, segments[:, 0]) == in_other)
        return merge_runs(segments[chosen])

    def intersect_size(self) -> int:
        """How many positions are counted twice: the total length minus the length of the union."""
        return self.total_seqlen - self.union_size()

    def intersect_size_with(self, other: "AttnRanges") -> int:
        """Number of positions that both cover."""
        return int(run_offsets(self._select(other, in_other=True))[-1])

    def union_size(self) -> int:
        """Number of positions that are in any of the ranges."""
        return int(run_offsets(self._merged())[-1])

    def union_size_with(self, other: "AttnRanges") -> int:
        """Number of positions that either covers."""
        return self.union_size() + other.union_size() - self.intersect_size_with(other)

    @property
    def total_seqlen(self) -> int:
        """Sum of the lengths."""
        return sum(r.seqlen for r in self._ranges)

    @property
    def max_seqlen(self) -> int:
        """The longest length, 0 when there is no range."""
        return max((r.seqlen for r in self._ranges), default=0)

    @property
    def start(self) -> int:
        """The smallest start.

        Raises:
            ValueError: If there is no range.
        """
        self._require_ranges("start")
        return min(r.start for r in self._ranges)

    @property
    def end(self) -> int:
        """The largest end.

        Raises:
            ValueError: If there is no range.
        """
        self._require_ranges("end")
        return max(r.end for r in self._ranges)

    def _require_ranges(self, what: str) -> None:
        if not self._ranges:
            raise ValueError(f"an empty AttnRanges has no {what}")

    @property
    def size(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def points(self) -> list[int]:
        """Every start and end, sorted, each once."""
        return sorted({x for r in self._ranges for x in (r.start, r.end)})

    @overload
    def __getitem__(self, index: int) -> AttnRange: ...

    @overload
    def __getitem__(self, index: slice) -> "AttnRanges": ...

    def __getitem__(self, index: int | slice) -> "AttnRange | AttnRanges":
        if isinstance(index, slice):
            out = AttnRanges()
            out._ranges = self._ranges[index]
            return out
        return self._ranges[index]

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnRanges) and self._ranges == other._ranges

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self._ranges)) + "]"

    def __repr__(self) -> str:
        return f"AttnRanges({self})"


def _covers(runs: IntArray, points: IntArray) -> NDArray[np.bool_]:
    """Whether each point is in one of the merged runs."""
    n = np.searchsorted(runs[:, 0], points, side="right") - 1
    inside = n >= 0
    inside[inside] = points[inside] < runs[n[inside], 1]
    return inside
