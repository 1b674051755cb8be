"""HopperSchedule: a mask, and the walks that kernels take through it, on the devices where they take them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch

from magi_attention.kernels.hopper.batches import cut_batches
from magi_attention.kernels.hopper.walk import Walk, build_walk, cut_long_windows
from magi_attention.kernels.parts import Part
from magi_attention.kernels.triton.triton_schedule import TritonSchedule, copy_to_device
from magi_attention.mask.bands import IntArray, transpose

T = TypeVar("T")

ALIGN = 4
"""Tiles of queries begin at multiples of it in a walk over keys: copies of a number a query start at 16 bytes."""


@dataclass(frozen=True, eq=False)
class DeviceWalk:
    """A :class:`~magi_attention.kernels.hopper.walk.Walk`, and its arrays on a device.

    Attributes:
        walk: The walk, on the host.
        windows: int32 ``(num_windows, 5)``.
        entries: int32 ``(num_entries + 2, 4)``.
        starts: int32 ``(num_layers, padded rows)``.
        ends: The same.
    """

    walk: Walk
    windows: torch.Tensor
    entries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    _made: dict[tuple[object, ...], object] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def copy(cls, walk: Walk, device: torch.device) -> "DeviceWalk":
        """Copy to ``device`` without waiting for it."""
        return cls(walk, *(copy_to_device(x, device) for x in (walk.windows, walk.entries, walk.starts, walk.ends)))

    @cached_property
    def num_busy(self) -> int:
        """How many windows, all at the front, have tiles."""
        return int(np.count_nonzero(self.walk.windows[:, 3]))

    def once(self, name: tuple[object, ...], make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first asked for by this name."""
        if name not in self._made:
            self._made[name] = make()
        return cast(T, self._made[name])

    def in_pieces(self, most_tiles: int) -> "DeviceWalk":
        """The walk with windows of at most ``most_tiles`` tiles."""

        def pieces() -> DeviceWalk:
            walk = cut_long_windows(self.walk, most_tiles)
            windows, entries = (copy_to_device(x, self.windows.device) for x in (walk.windows, walk.entries))
            return DeviceWalk(walk, windows, entries, self.starts, self.ends)

        return self.once(("pieces", most_tiles), pieces)

    def in_batches(self, num_windows: int, groups: tuple[int, ...], most_tiles: int, programs: int) -> torch.Tensor:
        """:func:`~magi_attention.kernels.hopper.batches.cut_batches` of the first windows, on the device."""
        cut = groups, most_tiles, programs
        return self.once(
            ("batches", num_windows, *cut),
            lambda: copy_to_device(cut_batches(self.walk.windows[:num_windows, 3], *cut), self.windows.device),
        )


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
    _walks: dict[tuple[bool, int, int, torch.device], DeviceWalk] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def by_tiles(self) -> TritonSchedule:
        """The same mask for the kernels of the triton engine."""
        return TritonSchedule(self.bands, self.num_rows, self.num_keys, self.part)

    def by_queries(self, block_q: int, block_k: int, device: torch.device) -> DeviceWalk:
        """The walk over windows of queries."""
        return self._walk(False, block_q, block_k, device)

    def by_keys(self, block_k: int, block_q: int, device: torch.device) -> DeviceWalk:
        """The walk over windows of keys, each of which meets tiles of queries."""
        return self._walk(True, block_k, block_q, device)

    def _walk(self, transposed: bool, block_rows: int, block_cols: int, device: torch.device) -> DeviceWalk:
        name = (transposed, block_rows, block_cols, device)
        if name not in self._walks:
            if transposed:
                bands, shape, align, goes_on = transpose(self.bands), (self.num_keys, self.num_rows), ALIGN, None
            else:
                bands, shape, align = self.bands, (self.num_rows, self.num_keys), 1
                goes_on = None if self.part is None else self.part.goes_on
            walk = build_walk(bands, *shape, block_rows, block_cols, align, goes_on)
            self._walks[name] = DeviceWalk.copy(walk, device)
        return self._walks[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return HopperSchedule, (self.bands, self.num_rows, self.num_keys, self.part)
