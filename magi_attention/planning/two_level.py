"""Routing in two levels: a row crosses to a node once, however many of its ranks need it, and is spread inside.

Ranks are numbered node by node: rank = node * ranks_per_node + place. A row that another node needs travels twice:

1. *crossing*: from its owner to the rank with the owner's place in that node, its *relay* there. So a rank exchanges
   rows with one rank of each other node only, over a network card of its own where it has one.
2. *relay*: from there to the ranks of the node that need it.

Rows whose owner is in the node go to who needs them *direct*, while others cross.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from magi_attention.mask.bands import IntArray, merge_runs, ranges_to_indices, run_offsets
from magi_attention.mask.integers import as_int
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.routing import GroupCollectivePlan, Routes, buffer_order, count_rows
from magi_attention.planning.runs import GroupedRuns, cut_at


class MeshShape(NamedTuple):
    """How many nodes there are, and how many ranks in each."""

    nodes: int
    ranks_per_node: int

    @classmethod
    def of(cls, mesh_shape: tuple[int, int], cp_size: int) -> "MeshShape":
        """Check a shape.

        Raises:
            TypeError: If it is no shape, or the sizes are no integers.
            ValueError: If they are not two numbers that multiply to ``cp_size``.
        """
        if not isinstance(mesh_shape, Iterable):
            raise TypeError(f"mesh_shape must be (nodes, ranks in a node), not {mesh_shape!r}")
        sizes = [as_int(size, "mesh_shape") for size in mesh_shape]
        if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != cp_size:
            raise ValueError(
                f"mesh_shape must be (nodes, ranks in a node), with cp_size {cp_size} as their product, not "
                f"{tuple(sizes)}"
            )
        return cls(*sizes)

    @property
    def has_two_levels(self) -> bool:
        """Whether there are several nodes, and several ranks in each."""
        return min(self) > 1


@dataclass(frozen=True, eq=False)
class TwoLevelPlan:
    """What one rank sends and receives in one stage, between nodes and inside its own.

    The buffer of received rows is the one of :class:`~magi_attention.planning.routing.GroupCollectivePlan`.

    Attributes:
        crossing: Among the ranks that have this rank's place, one in each node: its rows to relays, and the rows that
            it is the relay of. Those stay in the order of the wire.
        direct: Among the ranks of the node: its rows to who needs them.
        relay: Among the ranks of the node: the rows that came by ``crossing`` to who needs them.
        recv_order: For each row of the buffer its place among the rows that came by ``direct`` and, behind them, those
            that came by ``relay``; None when they are in the same order.
    """

    crossing: GroupCollectivePlan
    direct: GroupCollectivePlan
    relay: GroupCollectivePlan
    recv_order: IntArray | None

    @property
    def num_recv_rows(self) -> int:
        """Rows in the buffer of received rows."""
        return self.direct.num_recv_rows + self.relay.num_recv_rows

    @property
    def num_send_rows(self) -> int:
        """Rows that the rank sends, a row once for each rank it goes to; also those that it passes on."""
        return sum(plan.num_send_rows for plan in (self.crossing, self.direct, self.relay))

    @cached_property
    def wire_order(self) -> IntArray | None:
        """The inverse of ``recv_order``."""
        return None if self.recv_order is None else np.argsort(self.recv_order)


def route_two_levels(
    routes: Routes, dispatch: DispatchPlan, mesh: MeshShape, rank: int, stage: int
) -> tuple[TwoLevelPlan, IntArray]:
    """One rank's part of one stage, and the ``(start, end)`` runs of global rows in its buffer, ascending."""
    node, place = divmod(rank, mesh.ranks_per_node)
    to_node, to_place = np.divmod(routes.receiver, mesh.ranks_per_node)
    from_node, from_place = np.divmod(routes.owner, mesh.ranks_per_node)
    now, crosses = routes.stage == stage, to_node != from_node

    def union(peer: IntArray, some: IntArray) -> GroupedRuns:
        return GroupedRuns.merge(peer[some], routes.start[some], routes.end[some], dispatch.padded_seqlen + 1)

    def inside(first: IntArray, sent: IntArray, received: IntArray) -> GroupCollectivePlan:
        return GroupCollectivePlan(
            ranges_to_indices(first, routes.rows[sent]),
            count_rows(to_place[sent], routes.rows[sent], mesh.ranks_per_node),
            count_rows(from_place[received], routes.rows[received], mesh.ranks_per_node),
            None,
        )

    # Between nodes, a row that several ranks of a node need is one row.
    leaving = union(to_node, np.flatnonzero(now & crosses & (routes.owner == rank)))
    relayed = np.flatnonzero(now & crosses & (to_node == node) & (from_place == place))
    arriving = union(from_node, relayed)
    crossing = GroupCollectivePlan(
        ranges_to_indices(dispatch.local_start(leaving.runs[:, 0]), leaving.lengths),
        count_rows(leaving.group, leaving.lengths, mesh.nodes),
        count_rows(arriving.group, arriving.lengths, mesh.nodes),
        None,
    )
    sent = np.flatnonzero(now & ~crosses & (routes.owner == rank))
    received = np.flatnonzero(now & (routes.receiver == rank))
    far = crosses[received]
    direct = inside(dispatch.local_start(routes.start[sent]), sent, received[~far])
    relay = inside(_places(arriving, from_node[relayed], routes.start[relayed]), relayed, received[far])
    wire = np.lexsort((from_place[received], far))
    plan = TwoLevelPlan(crossing, direct, relay, buffer_order(wire, routes.rows[received]))
    return plan, merge_runs(np.stack((routes.start[received], routes.end[received]), axis=1))


def _places(held: GroupedRuns, group: IntArray, rows: IntArray) -> IntArray:
    """Where rows stand when the runs that hold them are laid one behind the other."""
    line = group * held.stride + rows
    run = np.searchsorted(held.flat[:, 0], line, side="right") - 1
    return run_offsets(held.flat)[run] + line - held.flat[run, 0]


def align_stages(routes: Routes, mesh: MeshShape) -> Routes:
    """Let the ranks of a node get a row of another node in one stage, the first in which one of them would.

    Otherwise it would cross again in each further stage, or have to be kept for it. The sums of a node's gradients of
    the row would have to wait for the last.
    """
    if routes.num_stages < 2:
        return routes
    node = routes.receiver // mesh.ranks_per_node
    crosses = node != routes.owner // mesh.ranks_per_node
    # The rows that come to a node lie on one line; those that stay inside lie apart, each receiver's on its own.
    line = np.where(crosses, node, mesh.nodes + routes.receiver) * (routes.end.max() + 1)
    start, end = routes.start + line, routes.end + line
    borders = np.unique(np.concatenate((start, end)))
    source, start, end, piece = cut_at(start, end, borders)
    stage = np.full(len(borders), routes.num_stages)
    np.minimum.at(stage, piece, routes.stage[source])
    aligned = Routes(
        routes.receiver[source],
        routes.owner[source],
        start - line[source],
        end - line[source],
        stage[piece],
        routes.num_stages,
    )
    return aligned.join_stages(np.unique(aligned.stage))


class RowsAcrossNodes(NamedTuple):
    """Rows that ranks get from other nodes, all ranks together.

    Attributes:
        one_level: When each rank gets a row from its owner.
        two_levels: When a row crosses to a node once.
    """

    one_level: int
    two_levels: int


def rows_across_nodes(routes: Routes, mesh: MeshShape) -> RowsAcrossNodes:
    """Count the rows of routes, for whatever mesh they were made, that cross between the nodes of this one."""
    node = routes.receiver // mesh.ranks_per_node
    crosses = node != routes.owner // mesh.ranks_per_node
    start, end = routes.start[crosses], routes.end[crosses]
    once = GroupedRuns.merge(node[crosses], start, end, int(end.max(initial=0)) + 1)
    return RowsAcrossNodes(int(routes.rows[crosses].sum()), int(once.lengths.sum()))
