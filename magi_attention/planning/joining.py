"""Joining: which queries attend their own keys together with the rows of the first stage, in one call.

A query that attends own keys in one call and received rows in another has its sums written and read once more between
the two, in float32, which takes as long as the whole of some short passes. So queries that attend rows of the first
stage wait for these, and the keys that the rank has itself are copied in front of them: far fewer bytes, where several
query heads share a key head. The other queries are attended before, while rows travel. If that is too little to do
meanwhile, some of those that could wait do not.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import CostModel
from magi_attention.mask.bands import (
    K0,
    K1,
    IntArray,
    area,
    attending_rows,
    crop,
    merge_runs,
    ranges_to_indices,
    relocate,
    shift,
)
from magi_attention.planning.cost_model import HIDDEN, forward_seconds, transfer_seconds
from magi_attention.planning.rank_plan import RankPlan

NETWORK_CARD = 50e9
"""Bytes a second between hosts at the most, whatever the cost model says: 400 Gbit/s."""

GRAIN = 128
"""Queries of which all wait, or none: about as many as a kernel computes at a time, which otherwise would go through
the same keys in both calls."""


@dataclass(frozen=True, eq=False)
class Joined:
    """The first two calls of a forward pass, where some queries wait for the second one.

    Attributes:
        early: What the others attend among the rank's own keys, in local rows.
        ahead: Local rows of keys, ascending, that lie in front of the received ones.
        bands: What all queries attend in that buffer, in local rows and buffer rows.
    """

    early: IntArray
    ahead: IntArray
    bands: IntArray


def join_first_stage(plan: RankPlan, one_host: bool) -> Joined | None:
    """Choose the queries that wait for the first stage.

    Args:
        plan: The rank's plan.
        one_host: Whether the rows travel inside of a host.

    Returns:
        What is attended in which call; None if no query waits.
    """
    if not plan.stages:
        return None
    stage, own, rows = plan.stages[0], plan.local_bands, plan.local_seqlen_q
    model = plan.config.overlap_config.cost_model
    kept = 0 if plan.blocking else cells_meanwhile(plan.first_cast_rows, model, one_host)
    waiting = choose_waiting(own, attending_rows(stage.bands, rows), kept)
    joined, *_ = crop(own, *waiting.T)
    if not len(joined):
        return None
    others = np.concatenate(([0], waiting.ravel(), [rows])).reshape(-1, 2)
    keys = merge_runs(joined[:, [K0, K1]])
    ahead = ranges_to_indices(keys[:, 0], keys[:, 1] - keys[:, 0])
    in_front = relocate(joined, np.array([[0, rows]]), keys)
    return Joined(
        early=crop(own, *others[others[:, 0] < others[:, 1]].T)[0],
        ahead=ahead,
        bands=np.concatenate((in_front, shift(stage.bands, 0, len(ahead)))),
    )


def choose_waiting(own: IntArray, attends_stage: NDArray[np.bool_], kept: float) -> IntArray:
    """The ``(start, end)`` runs of queries that wait.

    Args:
        own: What queries attend among the rank's own keys.
        attends_stage: Which attend rows of the first stage, ``(num_rows,)``.
        kept: Cells that are to be left to the other queries, if there are as many. Queries with the most of them
            are the first that do not wait, so that there are few.
    """
    num_rows = len(attends_stage)
    start = np.arange(0, num_rows, GRAIN)
    start = start[np.logical_or.reduceat(attends_stage, start)] if num_rows else start
    runs = np.stack((start, np.minimum(start + GRAIN, num_rows)), axis=1)
    pieces, run, _ = crop(own, *runs.T)
    cells = np.bincount(run, area(pieces), len(runs))
    missing = kept - (area(own).sum() - cells.sum())
    most_first = np.argsort(-cells / (runs[:, 1] - runs[:, 0]), kind="stable")
    before = np.cumsum(cells[most_first]) - cells[most_first]
    return merge_runs(runs[most_first[before >= missing]])


def cells_meanwhile(first_cast_rows: int, model: CostModel, one_host: bool) -> float:
    """Cells that are computed in the time that is kept for the first cast.

    Args:
        first_cast_rows: The most rows that a rank sends or receives in it.
        model: What it takes.
        one_host: Whether the rows travel inside of a host.
    """
    bandwidth = model.bandwidth if one_host else min(model.bandwidth, NETWORK_CARD)
    rows = np.array(first_cast_rows)
    return HIDDEN * float(transfer_seconds(rows, model, model.element_bytes, bandwidth)) / forward_seconds(model)
