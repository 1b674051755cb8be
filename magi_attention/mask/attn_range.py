"""AttnRange: a half-open range of token positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

from numpy.typing import NDArray

from magi_attention.mask.integers import as_int

RangeLike = Union["AttnRange", Sequence[int], NDArray[Any]]


@dataclass(frozen=True, order=True, slots=True)
class AttnRange:
    """The token positions ``start <= i < end``. A value: immutable, hashable, ordered by start, then end.

    All methods treat a range as the set of its positions, so an empty range overlaps nothing, lies inside everything,
    and is left out of lists that a method returns.

    Attributes:
        start: First position.
        end: One past the last position.

    Raises:
        TypeError: If ``start`` or ``end`` is not an integer.
        ValueError: If not ``0 <= start <= end``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if type(value) is not int:
                object.__setattr__(self, name, as_int(value, name))
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a range needs 0 <= start <= end, got start {self.start} and end {self.end}")

    @classmethod
    def from_range(cls, attn_range: RangeLike, name: str = "a range") -> "AttnRange":
        """An AttnRange as it is, or one made of a ``(start, end)`` pair; error messages call it ``name``."""
        if isinstance(attn_range, cls):
            return attn_range
        try:
            start, end = attn_range  # type: ignore[misc]
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be an AttnRange or a pair (start, end), got {attn_range!r}") from None
        return cls(start, end)

    @property
    def seqlen(self) -> int:
        """Number of positions."""
        return self.end - self.start

    def to_naive_range(self) -> tuple[int, int]:
        """``(start, end)``."""
        return self.start, self.end

    def offset(self, offset: int) -> "AttnRange":
        """The range moved by so many positions."""
        offset = as_int(offset, "offset")
        return AttnRange(self.start + offset, self.end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> "AttnRange":
        """The part between ``start`` and ``end``; None leaves that side as it is."""
        first = self.start if start is None else max(self.start, as_int(start, "start"))
        last = self.end if end is None else min(self.end, as_int(end, "end"))
        return AttnRange(first, max(first, last))

    def intersect(self, other: "AttnRange") -> "AttnRange":
        """The positions in both; an empty range when there are none."""
        start = max(self.start, other.start)
        return AttnRange(start, max(start, min(self.end, other.end)))

    def intersect_size(self, other: "AttnRange") -> int:
        """Number of positions in both."""
        return self.intersect(other).seqlen

    def union(self, other: "AttnRange") -> "list[AttnRange]":
        """The positions in either: one range when the two touch or overlap, else both in order."""
        parts = sorted(r for r in (self, other) if not r.is_empty())
        if len(parts) == 2 and parts[1].start <= parts[0].end:
            return [AttnRange(parts[0].start, max(self.end, other.end))]
        return parts

    def union_size(self, other: "AttnRange") -> int:
        """Number of positions in either."""
        return self.seqlen + other.seqlen - self.intersect_size(other)

    def diff_by(self, other: "AttnRange") -> "list[AttnRange]":
        """The positions of ``other`` that are not in this range: ``other`` minus ``self``, up to two ranges."""
        if not self.is_overlap_with(other):
            return [] if other.is_empty() else [other]
        sides = (other.start, self.start), (self.end, other.end)
        return [AttnRange(start, end) for start, end in sides if start < end]

    def is_subrange_of(self, other: "AttnRange") -> bool:
        """Whether every position is also one of ``other``."""
        return self.is_empty() or (other.start <= self.start and self.end <= other.end)

    def is_overlap_with(self, other: "AttnRange") -> bool:
        """Whether the two share a position."""
        return max(self.start, other.start) < min(self.end, other.end)

    def is_empty(self) -> bool:
        """Whether the range has no position."""
        return self.start == self.end

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"
