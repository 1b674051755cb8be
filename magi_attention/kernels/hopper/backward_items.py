"""What an item of the backward kernel is: a window of keys, or a piece of one, with some of its query heads."""

from typing import NamedTuple

from magi_attention.kernels.hopper.hopper_schedule import DeviceWalk

LEAST_TILES = 16
"""Tiles of a piece at least: to load keys and values and to add up dk and dv takes about as long as two of them."""

LONG_ITEM = 2048
"""Tiles over all query heads from which on even programs with the same number of tiles no longer keep step."""

MOST_IN_STEP = 4
"""Query heads of an item at most where programs do not keep step by themselves."""

BUSY_ENOUGH = 0.75
"""Share of the time that programs must be busy in, or items are made smaller."""


class Items(NamedTuple):
    """How the work is cut.

    Attributes:
        members: Query heads of an item: all that share a key head, or a part of them.
        most_tiles: Windows with more are cut into pieces; None for windows as they are.
    """

    members: int
    most_tiles: int | None = None


def backward_items(walk: DeviceWalk, heads_kv: int, group: int, programs: int) -> Items:
    """Choose what ``programs`` programs are given, of ``heads_kv`` key heads that ``group`` query heads share each.

    With all query heads, dk and dv stay in registers, else they are added up in memory. But programs read the queries
    that they share from the cache only as long as they keep step, and those with more tiles than others fall behind
    from head to head. And few windows of keys, such as those of a stage that few rows travel for, keep few programs
    busy.
    """
    total = walk.num_tiles * heads_kv * group

    def keeps_busy(members: int) -> bool:
        num_items = walk.num_busy * heads_kv * group // members
        rounds = -(-num_items // programs)
        # The programs are busy for `total` tiles, of the time that the longest item or all rounds take.
        return total >= BUSY_ENOUGH * programs * max(walk.longest * members, rounds * total / max(num_items, 1))

    tiles_of_all = walk.longest * group
    if tiles_of_all <= LEAST_TILES:
        return Items(group)
    few = next(members for members in range(min(group, MOST_IN_STEP), 0, -1) if group % members == 0)
    keep_step = not walk.is_uneven and tiles_of_all < LONG_ITEM
    for members in (group, few, 1) if keep_step else (few, 1):
        if keeps_busy(members):
            return Items(members)
    most_tiles = max(LEAST_TILES, -(-total // (4 * programs)))
    return Items(1, most_tiles) if walk.longest > most_tiles else Items(1)
