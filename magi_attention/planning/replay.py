"""The distributed loop with a clock instead of kernels: when ranks compute, and when rows travel.

:func:`replay` is the loop of ``runtime/dist_attn.py``; a change there is a change here. What it assumes:

* A rank computes one thing after the other. But on some ranks in the backward pass, unless rows are waited for before
  anything is computed, own keys fill the time in which the rank would wait, and come last for the rest. In the forward
  pass they have enough to do for that time, or all that there is.
* A transfer is a collective of all ranks. It starts when every rank has reached it, since rows are packed where a rank
  computes, and ends, on all ranks alike, when the slowest has sent and received its rows.
* Transfers run one after the other, in the order in which the loop posts them.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_attention.planning.cost_model import FloatArray, PassCosts

StepName = Literal["attend", "cast", "reduce"]


class Step(NamedTuple):
    """One line of the loop. Times of attending have an entry a rank; transfers take as long on all."""

    name: StepName
    stage: int | None
    start: FloatArray
    end: FloatArray


class Clock:
    """The time on every rank, and in the network that they share, in seconds.

    Attributes:
        ranks: When each rank is free to compute, ``(..., cp_size)``.
        network: When the last transfer posted ends, ``(...)``.
        own_left: How long each rank has still to compute with own keys, whenever it would wait, ``(..., cp_size)``.
        steps: What has happened.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.ranks = np.zeros(shape)
        self.network = np.zeros(shape[:-1])
        self.own_left = np.zeros(shape)
        self.steps: list[Step] = []

    def attend(self, stage: int | None, seconds: FloatArray) -> None:
        """Every rank computes for so long, with the rows of a stage, or with its own."""
        start, self.ranks = self.ranks, self.ranks + seconds
        self.steps.append(Step("attend", stage, start, self.ranks))

    def transfer(self, name: StepName, stage: int, seconds: FloatArray) -> FloatArray:
        """Every rank posts a transfer that takes so long; returns when it ends."""
        start = np.maximum(self.network, self.ranks.max(axis=-1))
        self.network = start + seconds
        self.steps.append(Step(name, stage, start, self.network))
        return self.network

    def wait(self, until: FloatArray) -> None:
        """No rank goes on before a time; meanwhile it computes with own keys that are left."""
        arrival = np.maximum(self.ranks, until[..., None])
        if self.own_left.any():
            self.attend_own(np.minimum(self.own_left, arrival - self.ranks))
        self.ranks = arrival

    def attend_own(self, seconds: FloatArray) -> None:
        """Every rank computes for so long with own keys that are left."""
        self.own_left = self.own_left - seconds
        self.attend(None, seconds)


def replay(costs: PassCosts, blocking: NDArray[np.bool_] | bool) -> Clock:
    """Run one pass of the loop, in all ways at once that ``costs`` has prices for.

    Args:
        costs: Seconds of its parts.
        blocking: Whether the first rows are waited for before anything is computed, ``(...)``.

    Returns:
        The clock at the end of the pass.
    """
    num_stages = len(costs.casts)
    clock = Clock(costs.stages.shape[1:])
    if num_stages:
        upcoming = clock.transfer("cast", 0, costs.casts[0])
        clock.wait(np.where(blocking, upcoming, 0.0))
    clock.own_left += costs.local
    at_once = np.asarray(blocking)[..., None] | ~np.asarray(costs.own_keys_fill) | (num_stages == 0)
    clock.attend_own(np.where(at_once, clock.own_left, 0.0))
    homeward: FloatArray | None = None
    for stage in range(num_stages):
        current = upcoming
        if stage + 1 < num_stages:
            upcoming = clock.transfer("cast", stage + 1, costs.casts[stage + 1])
        clock.wait(current)
        clock.attend(stage, costs.stages[stage])
        if costs.reduces is not None:
            previous, homeward = homeward, clock.transfer("reduce", stage, costs.reduces[stage])
            if previous is not None:
                clock.wait(previous)
    clock.attend_own(clock.own_left)
    if homeward is not None:
        clock.wait(homeward)
    return clock
