"""DeviceWalk: a walk with its arrays on a device, and what else is made of it once for many launches."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from magi_attention.kernels.hopper.backward_items import Items, backward_items
from magi_attention.kernels.hopper.batches import cut_batches
from magi_attention.kernels.hopper.records import WINDOW_TILES
from magi_attention.kernels.hopper.turns import heads_side_by_side
from magi_attention.kernels.hopper.walk import Walk, build_walk, cut_long_windows
from magi_attention.kernels.lazy_schedule import MaskView, copy_to_device

ALIGN = 4
"""Tiles of queries begin at multiples of it in a walk over keys: copies of a number a query start at 16 bytes."""


def make_query_walk(mask: MaskView, block_q: int, block_k: int, device: torch.device) -> "DeviceWalk":
    """The walk over windows of queries, see :class:`~magi_attention.kernels.lazy_schedule.LazySchedule`."""
    walk = build_walk(mask.bands, mask.num_rows, mask.num_cols, block_q, block_k, part=mask.part)
    return DeviceWalk.copy(walk, device)


def make_key_walk(mask: MaskView, block_k: int, block_q: int, device: torch.device) -> "DeviceWalk":
    """The walk over windows of keys, each of which meets tiles of queries."""
    return DeviceWalk.copy(build_walk(mask.bands, mask.num_rows, mask.num_cols, block_k, block_q, ALIGN), device)


@dataclass(frozen=True, eq=False)
class DeviceWalk:
    """A :class:`~magi_attention.kernels.hopper.walk.Walk`, and its arrays on a device.

    Attributes:
        walk: The walk, on the host.
        windows: Its windows.
        entries: Its entries.
        starts: Where the columns of its rows start.
        ends: Where they end.
    """

    walk: Walk
    windows: torch.Tensor
    entries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    _pieces: dict[int, "DeviceWalk"] = field(default_factory=dict, init=False, repr=False)
    _batches: dict[tuple[int, tuple[int, ...], int, int], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )
    _items: dict[tuple[int, int, int, float], Items] = field(default_factory=dict, init=False, repr=False)
    _heads: dict[tuple[int, int, int, int], int] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def copy(cls, walk: Walk, device: torch.device) -> "DeviceWalk":
        """Copy to ``device`` without waiting for it."""
        return cls(walk, *(copy_to_device(x, device) for x in (walk.windows, walk.entries, walk.starts, walk.ends)))

    @cached_property
    def num_busy(self) -> int:
        """How many windows, all at the front, have tiles."""
        return int(np.count_nonzero(self.walk.windows[:, WINDOW_TILES]))

    @cached_property
    def num_begun(self) -> int:
        """How many windows, all at the front, have tiles, or a row that has none in any later part of the columns."""
        return len(self.walk.windows) - self.walk.num_waiting

    def in_pieces(self, most_tiles: int) -> "DeviceWalk":
        """The walk with windows of at most ``most_tiles`` tiles."""
        if most_tiles not in self._pieces:
            walk = cut_long_windows(self.walk, most_tiles)
            windows, entries = (copy_to_device(x, self.windows.device) for x in (walk.windows, walk.entries))
            self._pieces[most_tiles] = DeviceWalk(walk, windows, entries, self.starts, self.ends)
        return self._pieces[most_tiles]

    def in_batches(self, num_windows: int, groups: tuple[int, ...], most_tiles: int, programs: int) -> torch.Tensor:
        """:func:`~magi_attention.kernels.hopper.batches.cut_batches` of the first windows, on the device."""
        cut = num_windows, groups, most_tiles, programs
        if cut not in self._batches:
            batches = cut_batches(self.walk.windows[:num_windows, WINDOW_TILES], groups, most_tiles, programs)
            self._batches[cut] = copy_to_device(batches, self.windows.device)
        return self._batches[cut]

    def heads_side_by_side(self, num_windows: int, heads: int, all_heads: int, programs: int) -> int:
        """:func:`~magi_attention.kernels.hopper.turns.heads_side_by_side` of the first windows."""
        cut = num_windows, heads, all_heads, programs
        if cut not in self._heads:
            tiles = self.walk.windows[:num_windows, WINDOW_TILES]
            self._heads[cut] = heads_side_by_side(tiles, heads, all_heads, programs)
        return self._heads[cut]

    def backward_items(self, heads_kv: int, group: int, programs: int, cached: float) -> Items:
        """:func:`~magi_attention.kernels.hopper.backward_items.backward_items` of the walk."""
        cut = heads_kv, group, programs, cached
        if cut not in self._items:
            self._items[cut] = backward_items(self.walk, *cut)
        return self._items[cut]
