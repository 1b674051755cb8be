"""RollPlan: which rows change places, and ranks, when a dispatched sequence is shifted along itself."""

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import IntArray, ranges_to_indices
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.routing import count_rows


@dataclass(frozen=True, eq=False)
class RollPlan:
    """One rank's part of a shift. On the wire rows are ordered by rank, then by the global row they come from.

    Attributes:
        stay_from: Local rows that stay on the rank.
        stay_to: Their new places among its local rows.
        send_rows: Local rows that move to another rank, in the order of the wire.
        send_counts: Rows for each rank, ``(cp_size,)``.
        recv_counts: Rows from each rank, ``(cp_size,)``.
        recv_to: The places of the arriving rows among the local rows, in the order of the wire.
        any_travel: Whether any rank sends a row; the same on every rank.
    """

    stay_from: IntArray
    stay_to: IntArray
    send_rows: IntArray
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    recv_to: IntArray
    any_travel: bool


def plan_roll(dispatch: DispatchPlan, rank: int, shift: int) -> RollPlan:
    """Plan to move the real row at each global position p to ``(p + shift) % total_seqlen``.

    The sequence is cut into runs that have one owner before and one behind, and stay in one piece.
    """
    total = dispatch.total_seqlen
    borders = dispatch.owner_runs[0]
    borders = borders[borders < total]
    start = np.unique(np.concatenate((borders, (borders - shift) % total)))
    target = (start + shift) % total
    rows = np.diff(start, append=total)
    before, behind = (dispatch.owner[x // dispatch.chunk_size] for x in (start, target))

    def local(global_start: IntArray, runs: IntArray) -> IntArray:
        return ranges_to_indices(dispatch.local_start(global_start[runs]), rows[runs])

    def counts(ranks: IntArray, runs: IntArray) -> tuple[int, ...]:
        return count_rows(ranks[runs], rows[runs], dispatch.cp_size)

    stay = np.flatnonzero((before == rank) & (behind == rank))
    sent = np.flatnonzero((before == rank) & (behind != rank))
    sent = sent[np.argsort(behind[sent], kind="stable")]
    received = np.flatnonzero((before != rank) & (behind == rank))
    received = received[np.argsort(before[received], kind="stable")]
    return RollPlan(
        stay_from=local(start, stay),
        stay_to=local(target, stay),
        send_rows=local(start, sent),
        send_counts=counts(behind, sent),
        recv_counts=counts(before, received),
        recv_to=local(target, received),
        any_travel=bool((before != behind).any()),
    )
