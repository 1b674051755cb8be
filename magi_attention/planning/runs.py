"""Runs of rows that belong to groups: merge, measure and cut them, all groups at once.

A run is ``[start, end)`` with a group (a rank, a chunk). Groups are kept apart on one number line by an offset of
``group * stride``, so that one sort or one search serves all of them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import IntArray, merge_runs, ranges_to_indices


@dataclass(frozen=True, eq=False)
class GroupedRuns:
    """Disjoint runs, ascending inside each group, groups ascending.

    Attributes:
        stride: More than any end, so that groups do not touch.
        flat: ``(start, end)`` plus ``group * stride``, int64 ``(n, 2)``.
    """

    stride: int
    flat: IntArray

    @classmethod
    def merge(cls, group: IntArray, starts: IntArray, ends: IntArray, stride: int) -> "GroupedRuns":
        """The union of runs, group by group. ``stride`` must exceed every end."""
        offset = group * stride
        return cls(stride, merge_runs(np.stack((starts + offset, ends + offset), axis=1)))

    @cached_property
    def group(self) -> IntArray:
        """The group of each run."""
        return self.flat[:, 0] // self.stride

    @cached_property
    def runs(self) -> IntArray:
        """``(start, end)`` of each run."""
        return self.flat - (self.group * self.stride)[:, None]

    @cached_property
    def lengths(self) -> IntArray:
        """Rows in each run."""
        return self.flat[:, 1] - self.flat[:, 0]

    def covered(self, group: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
        """How many rows of each ``[start, end)`` the runs of its ``group`` hold."""
        if not len(self.flat):
            return np.zeros(len(group), np.int64)
        first, end = np.ascontiguousarray(self.flat.T)
        before = np.concatenate(([0], np.cumsum(self.lengths)))
        end = np.concatenate(([0], end))  # no run stands before the first

        def held_below(x: IntArray) -> IntArray:
            n = np.searchsorted(first, x, side="right")
            return before[n] - np.maximum(end[n] - x, 0)

        offset = group * self.stride
        return held_below(ends + offset) - held_below(starts + offset)


def cut_at(starts: IntArray, ends: IntArray, borders: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Cut runs wherever a border falls inside them.

    Args:
        starts: First row of each run.
        ends: One past its last row; runs are not empty.
        borders: Ascending; the first is at or before every start, the last at or behind every end.

    Returns:
        The run each piece came from, its start, its end, and the interval ``[borders[i], borders[i + 1])`` it lies in.
    """
    first = np.searchsorted(borders, starts, side="right") - 1
    count = np.searchsorted(borders, ends, side="left") - first
    source = np.repeat(np.arange(len(starts)), count)
    interval = ranges_to_indices(first, count)
    return (
        source,
        np.maximum(starts[source], borders[interval]),
        np.minimum(ends[source], borders[interval + 1]),
        interval,
    )


def sum_by_group(group: IntArray, numbers: IntArray, num_groups: int) -> IntArray:
    """The sum of each group's numbers, int64 ``(num_groups,)``; exact up to 2^53."""
    return np.bincount(group, weights=numbers, minlength=num_groups).astype(np.int64)
