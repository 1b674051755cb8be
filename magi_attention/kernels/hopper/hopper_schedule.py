"""HopperSchedule: a mask, and the walks that kernels take through it, on the devices where they take them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from magi_attention.kernels.hopper.walk import Walk, build_walk
from magi_attention.kernels.triton.triton_schedule import TritonSchedule, copy_to_device
from magi_attention.mask.bands import IntArray, transpose

ALIGN = 4
"""Tiles of queries begin at multiples of it in a walk over keys: copies of a number a query start at 16 bytes."""


@dataclass(frozen=True, eq=False)
class DeviceWalk:
    """The arrays of a :class:`~magi_attention.kernels.hopper.walk.Walk` on a device.

    Attributes:
        windows: int32 ``(num_windows, 4)``.
        entries: int32 ``(num_entries + 2, 4)``.
        starts: int32 ``(num_layers, padded rows)``.
        ends: The same.
        num_busy: How many windows, all at the front, have tiles.
    """

    windows: torch.Tensor
    entries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    num_busy: int

    @classmethod
    def copy(cls, walk: Walk, device: torch.device) -> "DeviceWalk":
        """Copy to ``device`` without waiting for it."""
        windows, entries, starts, ends = (
            copy_to_device(x, device) for x in (walk.windows, walk.entries, walk.starts, walk.ends)
        )
        return cls(windows, entries, starts, ends, int(np.count_nonzero(walk.windows[:, 3])))


@dataclass(frozen=True, eq=False)
class HopperSchedule:
    """The mask of ``num_rows`` x ``num_keys`` scores.

    The size of tiles depends on head_dim and on how many query heads share a key head, which a schedule is made
    without; so walks are made when they are first asked for, and kept. They are not pickled.
    """

    bands: IntArray
    num_rows: int
    num_keys: int
    _walks: dict[tuple[bool, int, int, torch.device], DeviceWalk] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def by_tiles(self) -> TritonSchedule:
        """The same mask for the kernels of the triton engine."""
        return TritonSchedule(self.bands, self.num_rows, self.num_keys)

    def by_queries(self, block_q: int, block_k: int, device: torch.device) -> DeviceWalk:
        """The walk over windows of queries."""
        return self._walk(False, block_q, block_k, device)

    def by_keys(self, block_k: int, block_q: int, device: torch.device) -> DeviceWalk:
        """The walk over windows of keys, each of which meets tiles of queries."""
        return self._walk(True, block_k, block_q, device)

    def _walk(self, transposed: bool, block_rows: int, block_cols: int, device: torch.device) -> DeviceWalk:
        name = (transposed, block_rows, block_cols, device)
        if name not in self._walks:
            bands, shape = self.bands, (self.num_rows, self.num_keys)
            if transposed:
                bands, shape = transpose(bands), shape[::-1]
            self._walks[name] = DeviceWalk.copy(
                build_walk(bands, *shape, block_rows, block_cols, ALIGN if transposed else 1, ascending=transposed),
                device,
            )
        return self._walks[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return HopperSchedule, (self.bands, self.num_rows, self.num_keys)
