"""Turns: how busy programs are that go on and on, and how many heads they should have side by side for that.

Such programs deal the items of a walk out among themselves, see
:func:`magi_attention.kernels.hopper.pipeline.find_turns`. If only those heads are side by side whose keys and values
the cache holds, some programs may get the longest windows of each group of heads. Where that matters, there are more.
"""

import numpy as np

from magi_attention.kernels.mask_geometry import Int32Array

NEARLY = 0.01
"""How much less of the time programs may be busy for the sake of fewer heads."""

MANY_ITEMS = 16
"""Of a group of heads for each program: with as many, it matters little who gets which."""

READERS = 8
"""Programs at least that are at a head at a time if all are busy, so that most read keys and values from the cache."""

ITEM_COST = 1
"""To go on to the next item takes about as long as so many tiles."""


def heads_side_by_side(tiles: Int32Array, heads: int, all_heads: int, programs: int) -> int:
    """``heads``, or a multiple of it with which programs have more to do until the last one ends.

    Args:
        tiles: Of each window, most first. Windows without tiles count as having one.
        heads: How many heads fit the cache, a divisor of ``all_heads``.
        all_heads: How many there are.
        programs: How many programs there are.
    """
    most = max(heads, min(all_heads, programs // READERS))
    choices = [n for n in range(heads, most + 1, heads) if all_heads % n == 0]
    if len(choices) == 1 or len(tiles) * heads >= MANY_ITEMS * programs:
        return heads
    busy = [busy_share(tiles, heads, all_heads, programs)]
    if busy[0] >= 1 - NEARLY:
        return heads
    busy += [busy_share(tiles, n, all_heads, programs) for n in choices[1:]]
    return next(n for n, share in zip(choices, busy, strict=True) if share >= max(busy) - NEARLY)


def busy_share(tiles: Int32Array, heads: int, all_heads: int, programs: int) -> float:
    """The share of the time until the last program ends that programs are busy for, on average."""
    num_windows, num_groups = len(tiles), all_heads // heads
    order = np.arange(num_windows).repeat(heads)
    # Every second group of heads begins with its last window; the last group does not.
    windows = np.concatenate([order[::-1] if (num_groups - group) % 2 == 0 else order for group in range(num_groups)])
    turn, program = np.divmod(np.arange(len(windows)), programs)
    program = np.where(turn % 2, programs - 1 - program, program)
    load = np.bincount(program, np.maximum(tiles, 1)[windows] + ITEM_COST, programs)
    return float(load.mean() / load.max())
