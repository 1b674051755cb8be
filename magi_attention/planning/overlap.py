"""Choose the stages of a plan: how many, and how large, by the time that a cost model predicts.

A stage has the same share of the rows that each rank gets from each other, so what it takes to send and to attend them
is about that share of the whole. Every way to share out a number of equal parts among a few stages is priced and
replayed, all of them at once. The best of each number of stages are then counted exactly, as far as they may win. All
of it depends on the mask and the configuration only, so all ranks choose the same without a word between them.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import AttnOverlapMode, DistAttnConfig, OverlapConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.cost_model import FloatArray, PassCosts, StageWork, grad_wire_bytes
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.replay import replay
from magi_attention.planning.routing import Routes

PARTS = 16
"""What shares are multiples of. With more parts, planning takes longer and predicted times are hardly shorter."""

logger = logging.getLogger("magi_attention")


@dataclass(frozen=True)
class OverlapCandidate:
    """A way to split the received rows into stages.

    Attributes:
        degree: Number of stages; 0 for one that is waited for before anything is computed.
        parts: The shares of the stages, as parts of their sum; none when no row travels.
        forward_seconds: Predicted time of a forward pass, on the slowest rank.
        backward_seconds: Predicted time of a backward pass.
        cost: Both together, weighted as the cost model says.
    """

    degree: int
    parts: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float
    cost: float

    def __str__(self) -> str:
        """One line of a table."""
        shares = " + ".join(f"{part / sum(self.parts):.0%}" for part in self.parts) or "no row travels"
        blocking = ", waited for first" if self.parts and not self.degree else ""
        times = f"{self.forward_seconds * 1e3:10.3f}  {self.backward_seconds * 1e3:11.3f}"
        return f"{self.degree:6}  {times}  {shares}{blocking}"


@dataclass(frozen=True)
class OverlapChoice:
    """What was chosen, and from what.

    Attributes:
        chosen: The least cost, with rows and areas counted exactly; the fewest stages where costs are equal.
        candidates: The best of each number of stages, ascending; those that could not win are estimates.
    """

    chosen: OverlapCandidate
    candidates: tuple[OverlapCandidate, ...]

    def __str__(self) -> str:
        """A line for each number of stages, with predicted times; the chosen one is marked."""
        lines = [f"{'':8} stages  forward ms  backward ms  share of the received rows in each stage"]
        lines += [f"{'chosen' if candidate == self.chosen else '':8} {candidate}" for candidate in self.candidates]
        return "\n".join(lines)


def is_blocking(overlap: OverlapConfig, choice: OverlapChoice | None) -> bool:
    """Whether rows are waited for before anything is computed: overlap degree 0, given or chosen."""
    return (overlap.degree if choice is None else choice.chosen.degree) == 0


def route_in_stages(
    mask: AttnMask, work: ChunkWork, dispatch: DispatchPlan, dispatch_k: DispatchPlan, config: DistAttnConfig
) -> tuple[Routes, OverlapChoice | None]:
    """Route the rows that ranks need, in as many stages as the configuration says, or as cost least.

    Args:
        mask: The mask.
        work: What each chunk attends.
        dispatch: Who has which queries.
        dispatch_k: Who has which keys.
        config: How to split into stages.

    Returns:
        The routes, and why they have the stages that they have; None where these were given.
    """
    overlap = config.overlap_config
    needs = work.needs_of(dispatch.owner)
    if overlap.mode is AttnOverlapMode.STATIC:
        return Routes.plan(needs, dispatch_k, max(overlap.degree, 1), overlap.min_chunk_size), None
    routes = Routes.plan(needs, dispatch_k, max_stages=1, min_rows=1)
    return choose_stages(routes, lambda routes: StageWork.measure(mask, work, dispatch, routes), config)


def choose_stages(
    routes: Routes, measure: Callable[[Routes], StageWork], config: DistAttnConfig
) -> tuple[Routes, OverlapChoice]:
    """Split what travels into the stages that cost least.

    Args:
        routes: All rows in a single stage; in none, when no row travels.
        measure: What ranks do in the stages of routes.
        config: The cost model, and limits of stages.

    Returns:
        The routes in stages, and why these.
    """
    candidates = estimate_candidates(measure(routes), config)
    chosen, chosen_routes = candidates[0], routes
    for candidate in sorted(candidates, key=_rank):
        if _rank(candidate) >= _rank(chosen):
            break
        stages = routes
        if candidate.degree > 1:
            stages = routes.split(np.array(candidate.parts))
            candidate = candidates[candidate.degree] = count_exactly(candidate, measure(stages), config)
        if _rank(candidate) < _rank(chosen):
            chosen, chosen_routes = candidate, stages
    choice = OverlapChoice(chosen, tuple(candidates))
    logger.debug("stages, with predicted times of the slowest rank:\n%s", choice)
    return chosen_routes, choice


def estimate_candidates(work: StageWork, config: DistAttnConfig) -> list[OverlapCandidate]:
    """The best of each degree from 0 to the most there can be, as far as shares of the whole tell.

    Args:
        work: The work of the only stage, when all rows travel in one; or of none, when no row travels.
        config: The cost model, and most stages.
    """
    overlap = config.overlap_config
    most_rows = int(work.received.max(initial=0))
    num_parts = min(PARTS, max(most_rows // overlap.min_chunk_size, min(most_rows, 1)))
    parts, degree = _ways_to_share(num_parts, overlap.max_degree)
    by_parts = work.split(np.arange(num_parts + 1), num_parts) if num_parts else work
    forward, backward, cost = _predict(by_parts, config, degree == 0, parts)

    def candidate(way: int) -> OverlapCandidate:
        stages = parts[:, way]
        seconds = (float(x[way]) for x in (forward, backward, cost))
        return OverlapCandidate(int(degree[way]), tuple(stages[stages > 0].tolist()), *seconds)

    of_degree = np.searchsorted(degree, np.arange(degree[-1] + 2))
    return [candidate(a + int(np.argmin(cost[a:b]))) for a, b in itertools.pairwise(of_degree.tolist())]


def _rank(candidate: OverlapCandidate) -> tuple[float, int]:
    return candidate.cost, candidate.degree


def count_exactly(candidate: OverlapCandidate, work: StageWork, config: DistAttnConfig) -> OverlapCandidate:
    """A candidate with the times that the work of its own stages takes."""
    forward, backward, cost = map(float, _predict(work, config, blocking=False))
    return replace(candidate, forward_seconds=forward, backward_seconds=backward, cost=cost)


def _predict(
    work: StageWork, config: DistAttnConfig, blocking: NDArray[np.bool_] | bool, ways: IntArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of the forward pass, of the backward pass, and the weighted sum.

    With ``ways``, ``(stages, n)``, for n ways whose stages have the work of ``ways[:, n]``.
    """
    model = config.overlap_config.cost_model
    grad_bytes = grad_wire_bytes(config.grad_wire_dtype, model)
    passes = [PassCosts.forward(work, model), PassCosts.backward(work, model, grad_bytes)]
    if ways is not None:
        passes = [costs.take(ways) for costs in passes]
    forward, backward = (replay(costs.joined(blocking), blocking).ranks.max(axis=-1) for costs in passes)
    return forward, backward, model.forward_weight * forward + model.backward_weight * backward


@lru_cache
def _ways_to_share(num_parts: int, max_degree: int) -> tuple[IntArray, IntArray]:
    """Every way to share out equal parts among a few stages.

    Returns:
        The parts of each stage, ``(stages, n)``, 0 for stages that a way does not have; and the degree of each way,
        ascending, ``(n,)``. The first has one stage and degree 0: that stage is waited for.
    """
    most = min(max_degree, num_parts)
    cuts = [cut for n in range(most) for cut in itertools.combinations(range(1, num_parts), n)]
    borders = [(0, *cut, *[num_parts] * (most - len(cut))) for cut in [(), *cuts]]
    return np.diff(np.array(borders).T, axis=0), np.array([0, *(len(cut) + 1 for cut in cuts)])
