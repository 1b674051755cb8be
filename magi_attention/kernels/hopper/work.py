"""Which items programs take: in batches or in turns, and what is cut for the backward kernel."""

from typing import NamedTuple

import torch

from magi_attention.kernels.hopper.batches import BACKWARD_BATCH
from magi_attention.kernels.hopper.device_walk import DeviceWalk
from magi_attention.kernels.hopper.pipeline import WalkArgs

CACHED_BYTES = 32 << 20
"""Bytes of k and v, or of q, dout and dq, that are walked at a time: most of the cache that multiprocessors share."""


class BackwardWork(NamedTuple):
    """What programs of a backward kernel are given.

    Attributes:
        members: Query heads of an item.
        adds_up: Whether several items add to the same dk and dv.
        args: The walk, whole or in pieces, and who takes which items.
    """

    members: int
    adds_up: bool
    args: WalkArgs


def backward_work(
    walk: DeviceWalk, heads_kv: int, group: int, row_bytes: int, programs: int, takes_turns: bool
) -> BackwardWork:
    """Cut a walk over keys for ``programs`` programs, which may have to take turns.

    Args:
        walk: Windows of keys, and the tiles of queries that attend them.
        heads_kv: Key heads.
        group: Query heads of each.
        row_bytes: What of a query and head is read and added again and again: q, dout and dq.
        programs: How many programs run at a time.
        takes_turns: Whether there are no more programs than that.
    """
    query_bytes = walk.walk.num_cols * row_bytes  # of a head
    cached = CACHED_BYTES / query_bytes
    members, groups, most_tiles = walk.backward_items(heads_kv, group, programs, cached)
    if most_tiles is not None:
        walk = walk.in_pieces(most_tiles)
    if takes_turns:
        shares = heads_kv * group // members
        args = turn_args(walk, len(walk.windows), heads_at_a_time(shares, query_bytes), shares)
    else:  # a program a batch starts the next batch wherever one ends first; but all multiprocessors get some
        args = batch_args(walk, len(walk.windows), groups, max(1, BACKWARD_BATCH // members), programs)
    return BackwardWork(members, members < group or most_tiles is not None, args)


def turn_args(walk: DeviceWalk, num_windows: int, heads: int, all_heads: int) -> WalkArgs:
    """The first windows of a walk for ``all_heads`` heads, ``heads`` at a time, for programs that take turns."""
    return walk_args(walk, num_windows, walk.windows[:0], heads, num_windows * all_heads)


def batch_args(walk: DeviceWalk, num_windows: int, groups: tuple[int, ...], most_tiles: int, programs: int) -> WalkArgs:
    """The first windows of a walk for one group of heads after the other, in batches of up to ``most_tiles`` tiles."""
    batches = walk.in_batches(num_windows, groups, most_tiles, programs)
    return walk_args(walk, num_windows, batches, 1, num_windows * sum(groups))


def walk_args(walk: DeviceWalk, num_windows: int, batches: torch.Tensor, heads: int, num_items: int) -> WalkArgs:
    """A walk as kernels take it."""
    return WalkArgs(
        walk.windows,
        walk.entries,
        walk.starts,
        walk.ends,
        batches,
        layer_stride=walk.starts.shape[1],
        num_windows=num_windows,
        heads=heads,
        num_items=num_items,
        num_batches=len(batches),
    )


def heads_at_a_time(num_heads: int, bytes_of_head: int) -> int:
    """As many heads as the cache holds, a divisor of their number."""
    fitting = max(1, min(num_heads, CACHED_BYTES // bytes_of_head))
    return next(heads for heads in range(fitting, 0, -1) if num_heads % heads == 0)
