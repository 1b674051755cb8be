"""Batches: short windows that one program takes one after the other, and the order in which programs start.

To start a program takes as long as some tiles, and less to go on from one window to the next, whose copies begin before
the end of the one before. But programs that end leave multiprocessors to others, and short ones are shared out evenly.
"""

from collections.abc import Sequence

import numpy as np

from magi_attention.kernels.mask_geometry import Int32Array
from magi_attention.mask.bands import ranges_to_indices

FORWARD_BATCH = 128
"""Most tiles of a batch of several windows in the forward kernel."""

BACKWARD_BATCH = 32
"""The same in the backward kernel, over all query heads of its items."""


def cut_batches(tiles: Int32Array, groups: Sequence[int], most_tiles: int, programs: int) -> Int32Array:
    """Cut the windows of a walk into batches, for one group of heads after the other, whose heads go side by side.

    A batch of several windows has at most a program's share of what is left to do. So batches get smaller towards the
    end, and all programs end at about the same time (guided self-scheduling, Polychronopoulos & Kuck 1987).

    Args:
        tiles: Of each window, most first. Windows without tiles count as having one.
        groups: Number of heads of each group.
        most_tiles: Most tiles of a batch of several windows, at least 1.
        programs: How many programs run at a time.

    Returns:
        Int32 ``(num_batches, 2)``, in the order in which programs start: the first item of each batch and one past the
        last. Items are numbered window after window of the first head, then of the next.
    """
    num_windows, heads_of_group = len(tiles), np.array(groups)
    tiles = np.tile(np.maximum(tiles, 1).astype(np.int64), len(groups))
    heads = np.repeat(heads_of_group, num_windows)
    left = (tiles * heads)[::-1].cumsum()[::-1]
    # Few different bounds, so that many windows one behind the other have the same.
    bounds = np.unique(np.array([[most_tiles], [most_tiles * 3 // 4]]) >> np.arange(most_tiles.bit_length()))
    bound = bounds[np.maximum(np.searchsorted(bounds, left // programs, side="right") - 1, 0)]
    # Each run of windows of a group of which equally many are a batch is cut from its first on.
    number = np.maximum(bound // tiles, 1)
    group = np.repeat(np.arange(len(groups)), num_windows)
    opens = np.flatnonzero((np.diff(number, prepend=0) != 0) | (np.diff(group, prepend=-1) != 0))
    nth = np.arange(len(tiles)) - np.repeat(opens, np.diff(opens, append=len(tiles)))
    begin = np.flatnonzero(nth % number == 0)
    end = np.append(begin[1:], len(tiles))

    batch = np.repeat(np.arange(len(begin)), heads[begin])
    before_group = np.cumsum(heads_of_group) - heads_of_group
    head = before_group[group[begin[batch]]] + ranges_to_indices(np.zeros_like(begin), heads[begin])
    first = (head - group[begin[batch]]) * num_windows
    return np.stack((first + begin[batch], first + end[batch]), axis=1).astype(np.int32)
