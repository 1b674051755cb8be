"""What an item of the backward kernel is: a window of keys, or a piece of one, with some of its query heads."""

import math
from typing import NamedTuple

import numpy as np

from magi_attention.kernels.hopper.records import ENTRY_COLUMN, ENTRY_TILES, WINDOW_ENTRY, WINDOW_TILES
from magi_attention.kernels.hopper.walk import SPARE_ENTRIES, Walk
from magi_attention.mask.bands import IntArray

LEAST_TILES = 16
"""Tiles of a piece at least: to load keys and values and to add up dk and dv takes about as long as two of them."""

LONG_ITEM = 2048
"""Tiles over all query heads from which on even programs with the same number of tiles no longer keep step."""

MOST_OUT_OF_STEP = 4
"""Query heads of an item at most where programs do not keep step."""

SPREAD = 2.5
"""Heads that programs may be at, for each one whose queries the cache holds: of most heads they meet a part."""

BUSY_ENOUGH = 0.85
"""Share of the time that programs must be busy in, or items are made smaller."""

ITEMS_AT_THE_END = 3
"""Items for each program in the last group of heads, if windows differ. They are shared out heavy ones first, so that
all programs end together."""

SAMPLES = 32
"""Tiles of queries by which to judge whether programs keep step."""


class Items(NamedTuple):
    """How the work is cut, and in which order it is done.

    Attributes:
        members: Query heads of an item: all that share a key head, or a part of them.
        groups: Of the shares of heads that items have, how many are walked side by side, one group after the other.
        most_tiles: Windows with more are cut into pieces; None for windows as they are.
    """

    members: int
    groups: tuple[int, ...]
    most_tiles: int | None = None


def backward_items(walk: Walk, heads_kv: int, group: int, programs: int, cached: float) -> Items:
    """Choose what ``programs`` programs are given, of ``heads_kv`` key heads that ``group`` query heads share each.

    With all query heads, dk and dv stay in registers, else they are added up in memory. But programs read the queries
    that they share from the cache only as long as they keep step, and those with more tiles than others fall behind
    from head to head. And few windows of keys, such as those of a stage that few rows travel for, keep few programs
    busy.

    Args:
        walk: Windows of keys, and the tiles of queries that attend them.
        heads_kv: Key heads.
        group: Query heads of each.
        programs: How many programs run at a time.
        cached: Heads whose queries, and all that is read and added with them, fill the cache.
    """
    tiles = walk.windows[:, WINDOW_TILES].astype(np.int64)
    tiles = tiles[tiles > 0]  # most first
    longest, sum_of_tiles = int(tiles.max(initial=0)), int(tiles.sum())
    if longest * group <= LEAST_TILES:
        return Items(group, (heads_kv,))
    few = max(1, round(programs / len(tiles)))
    # The last group is larger the more windows differ, and largest where the average one is half of the longest.
    differ = min(2 - 2 * sum_of_tiles / (longest * len(tiles)), 1)
    last = min(math.ceil(ITEMS_AT_THE_END * differ * programs / len(tiles)), max(math.ceil(cached), 2 * few))

    # Programs that are spread over several heads meet about as many queries of each as an average tile's window has.
    reach = int((tiles * tiles).sum()) / sum_of_tiles * walk.block_cols / walk.num_cols
    spread = SPREAD * max(cached, 1) / reach
    even = keeps_step(walk)
    if even and longest * group < LONG_ITEM and keeps_busy(tiles, group, heads_kv, programs):
        # All groups alike, so that programs keep step from one to the next; where windows differ, as large as the cache
        # allows, so that all programs end together.
        most = int(cached) if few < min(last, cached) else few
        return Items(group, even_groups(heads_kv, most))
    for members in range(min(group, MOST_OUT_OF_STEP), 0, -1):
        shares = heads_kv * group // members
        stays_cached = even or members == 1 or members * few <= spread
        if group % members == 0 and stays_cached and keeps_busy(tiles, members, shares, programs):
            return Items(members, head_groups(shares, few, min(last, int(spread / members))))
    most_tiles = max(LEAST_TILES, -(-sum_of_tiles * heads_kv * group // (4 * programs)))
    groups = head_groups(heads_kv * group, few, last)
    return Items(1, groups, most_tiles if longest > most_tiles else None)


def keeps_busy(tiles: IntArray, members: int, shares: int, programs: int) -> bool:
    """Whether programs have work for most of the time that the longest items take, and rounds of items."""
    # Some program gets a second one of the items up to the (programs + 1)-th, none of which is shorter than that, a
    # third one of those up to the (2 * programs + 1)-th, and so on.
    nth = np.arange(0, len(tiles) * shares, programs)
    least = int((tiles[nth // shares] * np.arange(1, len(nth) + 1)).max())
    return int(tiles.sum()) * shares >= BUSY_ENOUGH * programs * least


def head_groups(shares: int, few: int, last: int) -> tuple[int, ...]:
    """Some shares of heads at a time, and ``last`` of them at the end, if that is more."""
    last = min(max(last, few), shares)
    rest = shares - last
    return (few,) * (rest // few) + (rest % few,) * (rest % few > 0) + (last,)


def even_groups(shares: int, most: int) -> tuple[int, ...]:
    """As few groups of at most ``most`` as can be, of which none has two more than another."""
    number = -(-shares // most)
    return tuple(shares * (n + 1) // number - shares * n // number for n in range(number))


def keeps_step(walk: Walk) -> bool:
    """Whether windows that share columns have about as many tiles as each other. The walk must have tiles.

    Judged by some of them, spread evenly over all: whether, of the windows that have a tile's columns, at least half
    have seven eighths of the tiles that the longest has.
    """
    windows = walk.windows[walk.windows[:, WINDOW_TILES] > 0]
    windows = windows[np.argsort(windows[:, WINDOW_ENTRY])]
    entries = walk.entries[:-SPARE_ENTRIES].astype(np.int64)
    tiles = np.repeat(windows[:, WINDOW_TILES], np.diff(windows[:, WINDOW_ENTRY], append=len(entries)))

    count, end = entries[:, ENTRY_TILES], entries[:, ENTRY_COLUMN] + walk.block_cols
    start = end - count * walk.block_cols
    before = np.cumsum(count) - count
    nth = (2 * np.arange(SAMPLES) + 1) * count.sum() // (2 * SAMPLES)
    sample = np.searchsorted(before, nth, side="right") - 1
    column = (start[sample] + (nth - before[sample]) * walk.block_cols)[:, None]
    sharing = (start <= column) & (column < end)
    longest = np.where(sharing, tiles, 0).max(axis=1, initial=0)[:, None]
    near = sharing & (8 * tiles >= 7 * longest)
    return 2 * np.count_nonzero(2 * near.sum(axis=1) < sharing.sum(axis=1)) <= SAMPLES
