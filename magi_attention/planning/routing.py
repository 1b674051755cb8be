"""Routing: which rows travel from which rank to which, and in which stage."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.config import OverlapConfig
from magi_attention.mask.bands import IntArray, merge_runs, ranges_to_indices, run_offsets
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.runs import GroupedRuns, cut_at


@dataclass(frozen=True, eq=False)
class Routes:
    """Every run of rows that travels, for all ranks, sorted by receiver and row, so also by receiver and stage.

    Attributes:
        receiver: The rank that attends the rows, ``(n,)``.
        owner: The rank that has them.
        start: First global row.
        end: One past the last.
        stage: The stage in which they travel.
        num_stages: Number of stages, the same on every rank; 0 when nothing travels.
    """

    receiver: IntArray
    owner: IntArray
    start: IntArray
    end: IntArray
    stage: IntArray
    num_stages: int

    @classmethod
    def plan(cls, needs: GroupedRuns, dispatch: DispatchPlan, overlap: OverlapConfig) -> "Routes":
        """Route to each rank the rows that it needs (``needs``, a group is a rank) and does not own."""
        borders, owner_of = dispatch.owner_runs
        runs = needs.runs
        source, start, end, run = cut_at(runs[:, 0], runs[:, 1], borders)
        receiver, owner = needs.group[source], owner_of[run]
        remote = receiver != owner
        receiver, owner, start, end = receiver[remote], owner[remote], start[remote], end[remote]
        if not len(start):
            return cls(receiver, owner, start, end, start, 0)
        borders, num_stages = _stage_borders(receiver, end - start, dispatch.cp_size, overlap)
        offset = run_offsets(np.stack((start, end), axis=1))[:-1]
        source, cut_start, cut_end, interval = cut_at(offset, offset + end - start, borders)
        shift = (start - offset)[source]
        return cls(
            receiver[source], owner[source], cut_start + shift, cut_end + shift, interval % num_stages, num_stages
        )

    @property
    def rows(self) -> IntArray:
        """Rows in each run."""
        return self.end - self.start

    def rows_received(self, cp_size: int) -> IntArray:
        """Rows that each rank receives, ``(cp_size,)``."""
        return np.bincount(self.receiver, weights=self.rows, minlength=cp_size).astype(np.int64)

    def rows_sent(self, cp_size: int) -> IntArray:
        """Rows that each rank sends, a row once for every rank it goes to, ``(cp_size,)``."""
        return np.bincount(self.owner, weights=self.rows, minlength=cp_size).astype(np.int64)


def _stage_borders(receiver: IntArray, rows: IntArray, cp_size: int, overlap: OverlapConfig) -> tuple[IntArray, int]:
    """Where stages begin in the line of all received rows, receiver by receiver, and the number of stages.

    Each rank's rows are split evenly into as many stages as ``min_chunk_size`` allows; it has no rows in later ones.
    """
    received = np.bincount(receiver, weights=rows, minlength=cp_size).astype(np.int64)
    stages = np.clip(received // overlap.min_chunk_size, 1, max(overlap.degree, 1))
    num_stages = int(stages[received > 0].max())
    size = -(-received // stages)
    within = np.minimum(np.arange(num_stages) * size[:, None], received[:, None])
    before = np.cumsum(received) - received
    return np.append((before[:, None] + within).ravel(), received.sum()), num_stages


@dataclass(frozen=True, eq=False)
class GroupCollectivePlan:
    """What one rank sends and receives in one stage.

    On the wire rows are ordered by rank, then by global row; in the buffer of received rows by global row.

    Attributes:
        send_rows: Local rows to send, ordered by the rank they go to; a row appears once for each such rank.
        send_counts: Rows for each rank, ``(cp_size,)``.
        recv_counts: Rows from each rank, ``(cp_size,)``.
        recv_order: For each row of the buffer its place on the wire, or None when they are in the same order.
    """

    send_rows: IntArray
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    recv_order: IntArray | None

    @property
    def num_recv_rows(self) -> int:
        """Rows in the buffer of received rows."""
        return sum(self.recv_counts)

    @cached_property
    def wire_order(self) -> IntArray | None:
        """For each row on the wire its place in the buffer; the inverse of ``recv_order``."""
        return None if self.recv_order is None else np.argsort(self.recv_order)


def route_stage(routes: Routes, dispatch: DispatchPlan, rank: int, stage: int) -> tuple[GroupCollectivePlan, IntArray]:
    """One rank's part of one stage, and the ``(start, end)`` runs of global rows in its buffer, ascending."""
    now = routes.stage == stage
    sent = np.flatnonzero(now & (routes.owner == rank))
    received = np.flatnonzero(now & (routes.receiver == rank))
    send_rows = ranges_to_indices(dispatch.local_start(routes.start[sent]), routes.rows[sent])
    wire = np.argsort(routes.owner[received], kind="stable")
    recv_order = None
    if np.any(np.diff(wire) < 0):
        lengths = routes.rows[received]
        wire_start = np.empty_like(lengths)
        wire_start[wire] = np.cumsum(lengths[wire]) - lengths[wire]
        recv_order = ranges_to_indices(wire_start, lengths)
    plan = GroupCollectivePlan(
        send_rows,
        _counts(routes.receiver[sent], routes.rows[sent], dispatch.cp_size),
        _counts(routes.owner[received], routes.rows[received], dispatch.cp_size),
        recv_order,
    )
    return plan, merge_runs(np.stack((routes.start[received], routes.end[received]), axis=1))


def _counts(rank: IntArray, rows: IntArray, cp_size: int) -> tuple[int, ...]:
    return tuple(np.bincount(rank, weights=rows, minlength=cp_size).astype(np.int64).tolist())
