"""Seconds of the steps that a rank computes, for ranks that were not measured.

:class:`Rates` are given; :class:`Fit` is made from ranks that were measured. Both know the same three things: how long
a rank attends, how long rows take to be moved about in memory, and what a pass does once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scale_loop import Heads, Loop, Pass
from scale_plans import TILE, Work

FORWARD, BACKWARD = 0, 1
FLOPS_OF_CELL = (4, 10)
"""Operations for an unmasked cell, a head and a dimension: two products of tiles forward, five backward."""

Array = NDArray[np.float64]


def flops(cells: float, heads: Heads, way: int) -> float:
    """Useful work of so many unmasked cells."""
    return float(FLOPS_OF_CELL[way] * cells * heads.q * heads.dim)


@dataclass(frozen=True)
class Amounts:
    """What ranks have to do, one number a rank.

    Attributes:
        heads: Their heads.
        num_rows: Queries of each.
        area: Unmasked cells.
        tiles: Tiles that have one.
        received: Rows that it receives.
    """

    heads: Heads
    num_rows: int
    area: Array
    tiles: Array
    received: Array

    @classmethod
    def of(cls, work: Work, heads: Heads, num_rows: int) -> "Amounts":
        """All ranks of a plan."""
        return cls(heads, num_rows, *(x.astype(float) for x in (work.area, work.tiles, work.received.sum(axis=0))))


class Costs(Protocol):
    """How long steps take; ``way`` is ``FORWARD`` or ``BACKWARD``."""

    def attend(self, amounts: Amounts, way: int) -> Array:
        """Seconds of each rank over all parts of its keys."""

    def rows(self, packed: Array, unpacked: Array, way: int) -> Array:
        """Seconds of a step that gathers and packs so many bytes, and puts in order or adds up so many."""

    def whole(self, amounts: Amounts, way: int, number: int) -> float:
        """Seconds of the step of that number that is done once a pass."""


@dataclass(frozen=True)
class Rates:
    """Costs from given rates.

    Attributes:
        forward: Operations a second of the forward kernels, counting useful work.
        backward: Of the backward kernels.
        memory: Bytes a second that memory reads and writes.
    """

    forward: float = 600e12
    backward: float = 480e12
    memory: float = 2000e9

    def attend(self, amounts: Amounts, way: int) -> Array:
        return flops(1, amounts.heads, way) * amounts.area / (self.forward, self.backward)[way]

    def rows(self, packed: Array, unpacked: Array, way: int) -> Array:
        return 2 * (packed + unpacked) / self.memory  # read and written

    def whole(self, amounts: Amounts, way: int, number: int) -> float:
        elements = amounts.num_rows * amounts.heads.q * amounts.heads.dim
        return (8, 6)[number] * elements / self.memory  # out and dout read, dq zeroed; dq read and rounded


@dataclass(frozen=True)
class Measured:
    """A rank that was measured: what it had to do and how long its passes took.

    Attributes:
        num_rows: Its queries.
        heads: Its heads.
        area: Unmasked cells.
        tiles: Tiles that have one.
        received: Rows received in each stage.
        sent: Rows sent in each stage.
        passes: Forward and backward.
    """

    num_rows: int
    heads: Heads
    area: int
    tiles: int
    received: tuple[int, ...]
    sent: tuple[int, ...]
    passes: tuple[Pass, Pass]

    @property
    def amounts(self) -> Amounts:
        """The same for one rank."""
        one = (np.array([float(x)]) for x in (self.area, self.tiles, sum(self.received)))
        return Amounts(self.heads, self.num_rows, *one)

    @property
    def tiles_filled(self) -> float:
        """The share of its tiles' cells that are unmasked."""
        return self.area / max(1, self.tiles * TILE**2)

    def tflops(self, way: int) -> float:
        """Of useful work, over the engine's time alone."""
        return flops(self.area, self.heads, way) / self.passes[way].attend / 1e12


@dataclass(frozen=True)
class Fit:
    """Costs that come nearest to measured ranks, by relative error, with coefficients that are not negative.

    Attributes:
        attend_of: For each way, seconds a cell and head, a tile and head, a received row and key head, and a call.
        rows_of: For each way, seconds a packed byte, an unpacked byte, and a step.
        whole_of: For each way and step of that kind, seconds a query, head and dimension.
        error: For each way, the median and the largest relative error of a rank's attention, predicted from the others.
    """

    attend_of: tuple[Array, Array]
    rows_of: tuple[Array, Array]
    whole_of: tuple[Array, Array]
    error: tuple[tuple[float, float], tuple[float, float]]

    @classmethod
    def to(cls, ranks: Sequence[Measured], loops: Sequence[tuple[Loop, Loop]]) -> "Fit":
        """From measured ranks and the loops that they ran, at least one."""
        per_way = [_fit_way(ranks, [loop[way] for loop in loops], way) for way in (FORWARD, BACKWARD)]
        return cls(*zip(*per_way, strict=True))

    def attend(self, amounts: Amounts, way: int) -> Array:
        return _attend_features(amounts) @ self.attend_of[way]

    def rows(self, packed: Array, unpacked: Array, way: int) -> Array:
        return np.stack((packed, unpacked, np.ones_like(packed)), axis=1) @ self.rows_of[way]

    def whole(self, amounts: Amounts, way: int, number: int) -> float:
        return float(self.whole_of[way][number]) * amounts.num_rows * amounts.heads.q * amounts.heads.dim


def step_seconds(loop: Loop, way: int, work: Work, amounts: Amounts, costs: Costs) -> Array:
    """Seconds of each step on each rank, ``(len(loop.steps), num_ranks)``, by ``costs``."""
    attend = costs.attend(amounts, way) * work.areas(way) / np.maximum(work.area, 1)
    packed, unpacked = moved_bytes(loop, amounts.heads, work.received, work.sent)
    seconds = np.zeros((len(loop.steps), len(work.area)))
    for n, step in enumerate(loop.steps):
        if step.kind == "attend":
            seconds[n] = attend[step.number]
        elif step.kind == "rows" and (packed[n] + unpacked[n]).any():
            seconds[n] = costs.rows(packed[n], unpacked[n], way)
        elif step.kind == "whole":
            seconds[n] = costs.whole(amounts, way, step.number)
    return seconds


def moved_bytes(loop: Loop, heads: Heads, received: NDArray[np.int64], sent: NDArray[np.int64]) -> tuple[Array, Array]:
    """Bytes that each step packs for the transfer behind it, and unpacks of the one before it.

    Args:
        loop: The steps and the transfers.
        heads: Heads of the rank.
        received: Rows that each rank receives in each stage, ``(num_stages, num_ranks)``; when they go home, it sends
            them.
        sent: Rows that it sends.
    """
    packed, unpacked = (np.zeros((len(loop.steps), received.shape[1])) for _ in range(2))
    for n, step in enumerate(loop.steps):
        if step.kind in ("send", "wait"):
            transfer = loop.transfers[step.number]
            row_bytes = heads.row_elements * transfer.itemsize
            if step.kind == "send" and n > 0:
                packed[n - 1] = (received if transfer.homeward else sent)[transfer.stage] * row_bytes
            elif step.kind == "wait" and n + 1 < len(loop.steps):
                unpacked[n + 1] = (sent if transfer.homeward else received)[transfer.stage] * row_bytes
    return packed, unpacked


def _fit_way(
    ranks: Sequence[Measured], loops: Sequence[Loop], way: int
) -> tuple[Array, Array, Array, tuple[float, float]]:
    features = np.concatenate([_attend_features(r.amounts) for r in ranks])
    seconds = np.array([r.passes[way].attend for r in ranks])
    rows_features, rows_seconds = [], []
    whole = []
    for rank, loop in zip(ranks, loops, strict=True):
        received, sent = (np.array(x, np.int64).reshape(-1, 1) for x in (rank.received, rank.sent))
        packed, unpacked = moved_bytes(loop, rank.heads, received, sent)
        kinds = np.array([step.kind for step in loop.steps])
        times = np.array(rank.passes[way].seconds)
        moving = (kinds == "rows") & ((packed + unpacked)[:, 0] > 0)
        rows_features.append(np.stack((packed[moving, 0], unpacked[moving, 0], np.ones(moving.sum())), axis=1))
        rows_seconds.append(times[moving])
        whole.append(times[kinds == "whole"] / (rank.num_rows * rank.heads.q * rank.heads.dim))
    rows_of = least_squares(np.concatenate(rows_features), np.concatenate(rows_seconds))
    return least_squares(features, seconds), rows_of, np.median(whole, axis=0), _error_of_others(features, seconds)


def _attend_features(amounts: Amounts) -> Array:
    heads = amounts.heads
    per_head = amounts.area * heads.q, amounts.tiles * heads.q, amounts.received * heads.kv
    return np.stack((*per_head, np.ones_like(amounts.area)), axis=1)


def least_squares(features: Array, seconds: Array) -> Array:
    """Coefficients, none negative, that give the seconds with the least sum of squared relative errors.

    There are few features: every subset of them is tried.
    """
    best, best_error = np.zeros(features.shape[1]), np.inf
    if not len(seconds):
        return best
    relative = features / np.maximum(seconds, 1e-9)[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-30)
    solve = partial(np.linalg.lstsq, b=np.ones(len(seconds)), rcond=1e-9)
    for size in range(1, features.shape[1] + 1):
        for chosen in map(list, combinations(range(features.shape[1]), size)):
            solution = solve(relative[:, chosen] / scale[chosen])[0]
            error = float(np.square((relative[:, chosen] / scale[chosen]) @ solution - 1).sum())
            if (solution >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(features.shape[1]), error
                best[chosen] = solution / scale[chosen]
    return best


def _error_of_others(features: Array, seconds: Array) -> tuple[float, float]:
    """Median and largest relative error of each rank's seconds, predicted from the other ranks; NaN for one rank."""
    if len(seconds) < 2:
        return float("nan"), float("nan")
    errors = []
    for n in range(len(seconds)):
        others = np.arange(len(seconds)) != n
        errors.append(abs(features[n] @ least_squares(features[others], seconds[others]) / seconds[n] - 1))
    return float(np.median(errors)), float(max(errors))
