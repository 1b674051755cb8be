"""TritonSchedule: a mask, and the walks over its tiles that kernels take, on the devices where they take them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.kernels.tile_schedule import TileSchedule, build_tile_schedule
from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, IntArray


class Walk(NamedTuple):
    """A tile schedule on a device, in the order and the form in which a kernel reads it.

    Of each row tile, one program computes the *runs*, stretches of columns that first have full tiles and then partial
    ones. Rows are queries and columns keys, or, in a walk over the transposed mask, the other way round.

    Attributes:
        tiles: int32 ``(num_tiles, 5)``, most columns first: first row, end of the rows, first run, end of the runs,
            most intervals of a row.
        runs: int32 ``(num_runs, 3)``: first column, end of the full tiles, end of the columns.
        starts: int32 ``(num_layers, num_rows)``, as in the tile schedule.
        ends: The same.
        num_rows: Number of rows.
    """

    tiles: Any  # tensors, but in a kernel these are Triton's pointers
    runs: Any
    starts: Any
    ends: Any
    num_rows: int


@dataclass(frozen=True, eq=False)
class TritonSchedule:
    """The mask of ``num_rows`` x ``num_keys`` scores.

    The size of tiles depends on head_dim and on how many query heads share a key head, which a schedule is made
    without; so walks are made when they are first asked for, and kept. They are not pickled.
    """

    bands: IntArray
    num_rows: int
    num_keys: int
    _walks: dict[tuple[bool, int, int, torch.device], Walk] = field(default_factory=dict, init=False, repr=False)

    def by_queries(self, block_q: int, block_k: int, device: torch.device) -> Walk:
        """The walk over query tiles."""
        return self._walk(False, block_q, block_k, device)

    def by_keys(self, block_k: int, block_q: int, device: torch.device) -> Walk:
        """The walk over key tiles, each of which meets runs of queries."""
        return self._walk(True, block_k, block_q, device)

    def _walk(self, transposed: bool, block_rows: int, block_cols: int, device: torch.device) -> Walk:
        name = (transposed, block_rows, block_cols, device)
        if name not in self._walks:
            bands, shape = self.bands, (self.num_rows, self.num_keys)
            if transposed:
                bands, shape = _transpose(bands), shape[::-1]
            tiles = build_tile_schedule(bands, *shape, block_rows, block_cols)
            self._walks[name] = _to_device(tiles, block_cols, device)
        return self._walks[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return TritonSchedule, (self.bands, self.num_rows, self.num_keys)


def _transpose(bands: IntArray) -> IntArray:
    """The bands with rows and keys in each other's place: ``lo <= j - i <= hi`` is ``-hi <= i - j <= -lo``."""
    out: IntArray = bands[:, [K0, K1, Q0, Q1, HI, LO]]
    out[:, LO:] *= -1
    return out


def _to_device(schedule: TileSchedule, block_cols: int, device: torch.device) -> Walk:
    runs, offsets = _runs(schedule, block_cols)
    weight = np.diff(schedule.offsets)
    in_use = np.logical_or.reduceat(schedule.ends > schedule.starts, schedule.q_bounds[:-1], axis=1)
    columns = schedule.q_bounds[:-1], schedule.q_bounds[1:], offsets[:-1], offsets[1:], in_use.sum(0)
    # Programs start in the order of tiles: the longest first, so that none is left to run alone (Graham 1969).
    tiles = np.stack(columns, axis=1)[np.argsort(-weight, kind="stable")]
    copies = [_copy(x, device) for x in (tiles, runs, schedule.starts, schedule.ends)]
    return Walk(copies[0], copies[1], copies[2], copies[3], schedule.num_rows)


def _runs(schedule: TileSchedule, block_cols: int) -> tuple[IntArray, IntArray]:
    """The ``runs`` of a walk, and where those of each tile begin; one more entry for their number.

    A full tile that is not as wide as a kernel's tile counts as a partial one: something must mask its rest.
    """
    whole = schedule.full & (schedule.key_ends - schedule.key_starts == block_cols)
    num_key_tiles = len(whole)
    opens_run = np.ones(num_key_tiles, np.bool_)
    opens_run[1:] = (schedule.key_starts[1:] != schedule.key_ends[:-1]) | (whole[1:] & ~whole[:-1])
    opens_run[schedule.offsets[schedule.offsets < num_key_tiles]] = True
    first = np.flatnonzero(opens_run)
    last = np.append(first[1:], num_key_tiles)[: len(first)] - 1
    num_whole = np.diff(np.concatenate(([0], np.cumsum(whole)))[np.append(first, num_key_tiles)])
    start = schedule.key_starts[first]
    runs = np.stack((start, start + block_cols * num_whole, schedule.key_ends[last]), axis=1)
    return runs, np.searchsorted(first, schedule.offsets)


def _copy(x: NDArray[Any], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(x.astype(np.int32))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)  # pinned, so that the host does not wait for the device
