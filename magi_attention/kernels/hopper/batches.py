"""Batches: short windows that one program takes one after the other.

To start a program takes as long as some tiles, and less to go on from one window to the next, whose copies begin before
the end of the one before. But programs that end leave multiprocessors to others, and short ones are shared out evenly.
"""

import numpy as np

from magi_attention.kernels.hopper.walk import Int32Array

FORWARD_BATCH = 128
"""Most tiles of a batch of several windows in the forward kernel."""

BACKWARD_BATCH = 32
"""The same in the backward kernel, over all query heads of its items."""


def cut_batches(tiles: Int32Array, groups: int, heads: int, most_tiles: int, programs: int) -> Int32Array:
    """Cut the windows of a walk, once for each group of heads, one group after the other, into batches.

    A batch of several windows has at most a program's share of what is left to do. So batches get smaller towards the
    end, and all programs end at about the same time (guided self-scheduling, Polychronopoulos & Kuck 1987).

    Args:
        tiles: Of each window, most first. Windows without tiles count as having one.
        groups: Number of groups of heads.
        heads: Heads of a group, each of which has the batches.
        most_tiles: Most tiles of a batch of several windows, at least 1.
        programs: How many programs run at a time.

    Returns:
        Int32 ``(num_batches + 1,)``: where batches begin among the windows of all groups, and the number of those.
    """
    tiles = np.tile(np.maximum(tiles, 1), groups)
    left = tiles[::-1].cumsum(dtype=np.int64)[::-1] * heads
    # Few different bounds, so that many windows one behind the other have the same.
    bounds = np.unique(np.array([[most_tiles], [most_tiles * 3 // 4]]) >> np.arange(most_tiles.bit_length()))
    bound = bounds[np.maximum(np.searchsorted(bounds, left // programs, side="right") - 1, 0)]
    # Each run of windows of which equally many are a batch is cut from its first on.
    number = np.maximum(bound // tiles, 1)
    opens = np.flatnonzero(np.diff(number, prepend=0))
    nth = np.arange(len(tiles)) - np.repeat(opens, np.diff(opens, append=len(tiles)))
    return np.append(np.flatnonzero(nth % number == 0), len(tiles)).astype(np.int32)
