"""Routing: which rows travel from which rank to which, and in which stage."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import IntArray as IntArray  # comm, which knows no masks, has it from here
from magi_attention.mask.bands import merge_runs, ranges_to_indices, run_offsets
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.runs import GroupedRuns, cut_at, sum_by_group


@dataclass(frozen=True, eq=False)
class Routes:
    """Every run of rows that travels, for all ranks, sorted by receiver and row.

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
    def plan(cls, needs: GroupedRuns, dispatch: DispatchPlan, max_stages: int, min_rows: int) -> "Routes":
        """Route to each rank the rows that it needs and does not own.

        A rank's rows are split evenly into as many stages as their number allows, ``max_stages`` at most; it has no
        rows in later ones.

        Args:
            needs: The rows that each rank attends; a group is a rank.
            dispatch: Who owns them.
            max_stages: Most stages.
            min_rows: Fewest rows in a stage.
        """
        borders, owner_of = dispatch.owner_runs
        runs = needs.runs
        source, start, end, run = cut_at(runs[:, 0], runs[:, 1], borders)
        receiver, owner = needs.group[source], owner_of[run]
        remote = receiver != owner
        receiver, owner, start, end = receiver[remote], owner[remote], start[remote], end[remote]
        if not len(start):
            return cls(receiver, owner, start, end, start, 0)
        received = sum_by_group(receiver, end - start, dispatch.cp_size)
        borders, num_stages = _stage_borders(received, max_stages, min_rows)
        offset = run_offsets(np.stack((start, end), axis=1))[:-1]
        source, cut_start, cut_end, interval = cut_at(offset, offset + end - start, borders)
        shift = (start - offset)[source]
        return cls(
            receiver[source], owner[source], cut_start + shift, cut_end + shift, interval % num_stages, num_stages
        )

    def split(self, parts: IntArray) -> "Routes":
        """Split what travels in a single stage into several, each with its share of every owner's rows.

        What each rank sends to each other is shared out alike, so a stage takes its share of the time of all. Split
        by their order in the sequence, rows of one stage would come from a few owners, who are the slowest then.

        Args:
            parts: The shares of the stages, as parts of their sum.
        """
        num_stages = len(parts)
        pair = self.receiver * (self.owner.max() + 1) + self.owner
        order = np.argsort(pair, kind="stable")
        begins = np.flatnonzero(np.diff(pair[order], prepend=-1))
        rows = self.rows[order]
        offset = np.cumsum(rows) - rows
        of_pair = np.diff(offset[begins], append=rows.sum())
        cuts = of_pair[:, None] * (np.cumsum(parts) - parts) // parts.sum()
        borders = np.append((offset[begins][:, None] + cuts).ravel(), rows.sum())
        source, cut_start, cut_end, interval = cut_at(offset, offset + rows, borders)
        run = order[source]
        shift = self.start[run] - offset[source]
        start, end = cut_start + shift, cut_end + shift
        keep = np.lexsort((start, self.receiver[run]))
        keep = keep[start[keep] < end[keep]]
        run = run[keep]
        return Routes(
            self.receiver[run], self.owner[run], start[keep], end[keep], interval[keep] % num_stages, num_stages
        )

    def join_stages(self, first: IntArray) -> "Routes":
        """The same rows in fewer stages: the n-th of them holds stages ``first[n]`` to ``first[n + 1] - 1``.

        Args:
            first: Ascending stages that begin a new one, the first of them 0.
        """
        if not len(self.start):
            return self
        stage = np.searchsorted(first, self.stage, side="right") - 1
        follows = (self.start[1:] == self.end[:-1]) & (np.diff(stage) == 0)
        follows &= (np.diff(self.receiver) == 0) & (np.diff(self.owner) == 0)
        begins = np.concatenate(([True], ~follows))
        ends = np.append(begins[1:], True)
        return Routes(
            self.receiver[begins], self.owner[begins], self.start[begins], self.end[ends], stage[begins], len(first)
        )

    @property
    def rows(self) -> IntArray:
        """Rows in each run."""
        return self.end - self.start

    def rows_received(self, cp_size: int) -> IntArray:
        """Rows that each rank receives, ``(cp_size,)``."""
        return sum_by_group(self.receiver, self.rows, cp_size)


def _stage_borders(received: IntArray, max_stages: int, min_rows: int) -> tuple[IntArray, int]:
    """Where stages begin in the line of all received rows, receiver by receiver, and the number of stages."""
    stages = np.clip(received // min_rows, 1, max_stages)
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

    @property
    def num_send_rows(self) -> int:
        """Rows that the rank sends, a row once for each rank it goes to."""
        return len(self.send_rows)

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
    plan = GroupCollectivePlan(
        send_rows,
        count_rows(routes.receiver[sent], routes.rows[sent], dispatch.cp_size),
        count_rows(routes.owner[received], routes.rows[received], dispatch.cp_size),
        buffer_order(wire, routes.rows[received]),
    )
    return plan, merge_runs(np.stack((routes.start[received], routes.end[received]), axis=1))


def count_rows(rank: IntArray, rows: IntArray, num_ranks: int) -> tuple[int, ...]:
    """Rows of each rank, from the rank and the rows of each run."""
    return tuple(sum_by_group(rank, rows, num_ranks).tolist())


def buffer_order(wire: IntArray, rows: IntArray) -> IntArray | None:
    """For each row of a buffer its place on the wire, or None when they are in the same order.

    Args:
        wire: The order in which the buffer's runs come over the wire.
        rows: Rows in each run of the buffer.
    """
    if not np.any(np.diff(wire) < 0):
        return None
    start = np.empty_like(rows)
    start[wire] = np.cumsum(rows[wire]) - rows[wire]
    return ranges_to_indices(start, rows)
