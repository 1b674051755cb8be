"""LazySchedule: a mask, and the walks that the kernels of the GPU engines take through it, on the devices where they
take them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.kernels.parts import Part
from magi_attention.mask.bands import IntArray, transpose

WalkT = TypeVar("WalkT")


class MaskView(NamedTuple):
    """A mask whose rows are queries, or, seen from the other side, keys.

    Attributes:
        bands: Bands inside ``num_rows`` x ``num_cols`` that share no cell, ``(n, 6)``.
        num_rows: Number of rows.
        num_cols: Number of columns.
        part: Which part of the columns these are; None for all.
    """

    bands: IntArray
    num_rows: int
    num_cols: int
    part: Part | None


MakeWalk = Callable[[MaskView, int, int, torch.device], WalkT]
"""Makes the walk through a mask in tiles of so many rows and columns. A function of a module: walks are kept by it."""


@dataclass(frozen=True, eq=False)
class LazySchedule:
    """The mask of ``num_rows`` x ``num_keys`` scores, and which part of the keys these are, if not all.

    What a walk is, is up to the kernels that take it, and the size of their tiles depends on head_dim and on how many
    query heads share a key head. A schedule is made without any of that; so walks are made when they are first asked
    for, and kept. They are not pickled.
    """

    bands: IntArray
    num_rows: int
    num_keys: int
    part: Part | None = None
    _walks: dict[tuple[MakeWalk[Any], bool, int, int, torch.device], Any] = field(
        default_factory=dict, init=False, repr=False
    )

    def by_queries(self, make_walk: MakeWalk[WalkT], block_q: int, block_k: int, device: torch.device) -> WalkT:
        """The walk over tiles of queries, each of which meets tiles of keys."""
        return self._walk(make_walk, False, block_q, block_k, device)

    def by_keys(self, make_walk: MakeWalk[WalkT], block_k: int, block_q: int, device: torch.device) -> WalkT:
        """The walk over tiles of keys, each of which meets tiles of queries."""
        return self._walk(make_walk, True, block_k, block_q, device)

    def _walk(
        self, make_walk: MakeWalk[WalkT], from_keys: bool, block_rows: int, block_cols: int, device: torch.device
    ) -> WalkT:
        name = make_walk, from_keys, block_rows, block_cols, device
        if name not in self._walks:
            self._walks[name] = make_walk(self._view(from_keys), block_rows, block_cols, device)
        return self._walks[name]

    def _view(self, from_keys: bool) -> MaskView:
        if from_keys:  # whose queries are all here
            return MaskView(transpose(self.bands), self.num_keys, self.num_rows, None)
        return MaskView(self.bands, self.num_rows, self.num_keys, self.part)

    def __reduce__(self) -> tuple[Any, ...]:
        return LazySchedule, (self.bands, self.num_rows, self.num_keys, self.part)


def copy_to_device(x: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy a walk's array as int32, without waiting for the device."""
    host = torch.from_numpy(x.astype(np.int32, copy=False))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)  # pinned, so that the host does not wait for the device
