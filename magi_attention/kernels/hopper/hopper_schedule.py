"""HopperSchedule: a mask, and the walks that kernels take through it, on the devices where they take them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from magi_attention.kernels.hopper.walk import Walk, build_walk, cut_long_windows
from magi_attention.kernels.parts import Part
from magi_attention.kernels.triton.triton_schedule import TritonSchedule, copy_to_device
from magi_attention.mask.bands import IntArray, transpose

ALIGN = 4
"""Tiles of queries begin at multiples of it in a walk over keys: copies of a number a query start at 16 bytes."""


@dataclass(frozen=True, eq=False)
class DeviceWalk:
    """The arrays of a :class:`~magi_attention.kernels.hopper.walk.Walk` on a device.

    Attributes:
        windows: int32 ``(num_windows, 5)``.
        entries: int32 ``(num_entries + 2, 4)``.
        starts: int32 ``(num_layers, padded rows)``.
        ends: The same.
        num_busy: How many windows, all at the front, have tiles.
        num_tiles: Number of tiles of all windows.
        longest: Number of tiles of the first window.
        is_uneven: Whether most windows have another number of tiles than the window behind them.
    """

    windows: torch.Tensor
    entries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    num_busy: int
    num_tiles: int
    longest: int
    is_uneven: bool

    @classmethod
    def copy(cls, walk: Walk, device: torch.device) -> "DeviceWalk":
        """Copy to ``device`` without waiting for it."""
        windows, entries, starts, ends = (
            copy_to_device(x, device) for x in (walk.windows, walk.entries, walk.starts, walk.ends)
        )
        tiles = walk.windows[np.argsort(walk.windows[:, 0]), 3]
        counts = int(np.count_nonzero(tiles)), int(tiles.sum()), int(tiles.max(initial=0))
        return cls(windows, entries, starts, ends, *counts, 2 * np.count_nonzero(np.diff(tiles)) > len(tiles))


@dataclass(frozen=True, eq=False)
class HopperSchedule:
    """The mask of ``num_rows`` x ``num_keys`` scores, and which part of the keys these are, if not all.

    The size of tiles depends on head_dim and on how many query heads share a key head, which a schedule is made
    without; so walks are made when they are first asked for, and kept. They are not pickled.
    """

    bands: IntArray
    num_rows: int
    num_keys: int
    part: Part | None = None
    _walks: dict[tuple[Any, ...], DeviceWalk] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def by_tiles(self) -> TritonSchedule:
        """The same mask for the kernels of the triton engine."""
        return TritonSchedule(self.bands, self.num_rows, self.num_keys, self.part)

    def by_queries(self, block_q: int, block_k: int, device: torch.device) -> DeviceWalk:
        """The walk over windows of queries."""
        return self._walk(False, block_q, block_k, device)

    def by_keys(self, block_k: int, block_q: int, device: torch.device, most_tiles: int | None = None) -> DeviceWalk:
        """The walk over windows of keys, each of which meets tiles of queries; over pieces of at most ``most_tiles``
        tiles, if given."""
        return self._walk(True, block_k, block_q, device, most_tiles)

    def _walk(
        self, transposed: bool, block_rows: int, block_cols: int, device: torch.device, most_tiles: int | None = None
    ) -> DeviceWalk:
        name = transposed, block_rows, block_cols, device, most_tiles
        if name not in self._walks:
            if transposed:
                bands, shape, align, goes_on = transpose(self.bands), (self.num_keys, self.num_rows), ALIGN, None
            else:
                bands, shape, align = self.bands, (self.num_rows, self.num_keys), 1
                goes_on = None if self.part is None else self.part.goes_on
            walk = build_walk(bands, *shape, block_rows, block_cols, align, goes_on)
            if most_tiles is not None:
                walk = cut_long_windows(walk, most_tiles, block_cols)
            self._walks[name] = DeviceWalk.copy(walk, device)
        return self._walks[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return HopperSchedule, (self.bands, self.num_rows, self.num_keys, self.part)
