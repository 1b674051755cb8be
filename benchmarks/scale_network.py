"""A network as emulate_scale.py models it: latency and bandwidth of two kinds of links, and what crosses each.

Nodes have ``gpus_per_node`` GPUs, joined all to all (NVLink); each GPU has a link of its own to other nodes (one
network card a GPU). A collective takes as long as its busiest GPU: the larger of what it sends and what it receives.
Nothing is said of congestion inside the network, nor of what transfers take from kernels that run beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import IntArray
from magi_attention.planning.routing import Routes
from magi_attention.planning.runs import GroupedRuns

NVLINK_POINTS = ((16 << 20, (16 << 20) / 198e9), (64 << 20, (64 << 20) / 255e9), (256 << 20, (256 << 20) / 295e9))
"""Bytes that a GPU sends and seconds that it takes: all-to-all of two H200 of one host over NVLink, measured."""


@dataclass(frozen=True)
class Link:
    """What a GPU has towards others: seconds that a collective takes at least, and bytes a second each way."""

    latency: float
    bandwidth: float

    @classmethod
    def fit(cls, points: Sequence[Sequence[float]]) -> "Link":
        """Latency and bandwidth that come nearest to measured ``(bytes, seconds)``, by relative error.

        Raises:
            ValueError: If there are fewer than two sizes, or more bytes do not take longer.
        """
        size, seconds = np.array(points, float).reshape(-1, 2).T
        if len(np.unique(size)) < 2:
            raise ValueError(f"points must have at least two sizes of transfers, got {points}")
        features = np.stack((np.ones_like(size), size), axis=1) / seconds[:, None]
        latency, per_byte = np.linalg.lstsq(features, np.ones_like(size), rcond=None)[0]
        if per_byte <= 0:
            raise ValueError(f"points must take longer for more bytes, got {points}")
        return cls(max(float(latency), 0.0), 1 / float(per_byte))

    def seconds(self, num_bytes: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Of transfers of so many bytes; nothing takes no time."""
        num_bytes = np.asarray(num_bytes, float)
        return np.where(num_bytes > 0, self.latency + num_bytes / self.bandwidth, 0.0)


PACKING = Link(latency=10e-6, bandwidth=1e12)
"""Rows put in another order in memory before or after they travel: a kernel, and bytes read and written. An estimate,
which came within 7 % of what exchanges of heads took on four H200."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """Rows that each GPU moves in a stage, the larger of out and in, ``(cp_size,)``.

    Attributes:
        inside: Between GPUs of a node, while others cross.
        across: Between nodes.
        packed: Of rows that came from another node, those that the GPU sends on; all 0 in one level.
        spread: The same rows between GPUs of a node, afterwards.
    """

    inside: IntArray
    across: IntArray
    packed: IntArray
    spread: IntArray


@dataclass(frozen=True)
class Network:
    """GPUs in nodes, the links that a GPU has inside its node and across nodes, and what it is to its own memory."""

    gpus_per_node: int
    inside: Link
    across: Link
    packing: Link = PACKING

    def num_nodes(self, ranks: int) -> int:
        """Nodes that so many ranks fill.

        Raises:
            ValueError: If they fill one in part, beside others.
        """
        if ranks > self.gpus_per_node and ranks % self.gpus_per_node:
            raise ValueError(f"ranks must fill nodes of {self.gpus_per_node} GPUs, got {ranks}")
        return max(1, ranks // self.gpus_per_node)

    def stage(self, traffic: Traffic, row_bytes: float) -> float:
        """Seconds of one stage of a group cast or, the other way round, of a group reduce."""
        across, inside = (
            self.across.seconds(traffic.across * row_bytes),
            self.inside.seconds(traffic.inside * row_bytes),
        )
        packed, spread = (
            link.seconds(rows * row_bytes)
            for link, rows in ((self.packing, traffic.packed), (self.inside, traffic.spread))
        )
        return float(np.maximum(across, inside).max() + packed.max() + spread.max())

    def exchange(self, bytes_of_rank: float, ranks: int) -> float:
        """Seconds of turning rows into heads, or back, in an even all-to-all.

        Each rank keeps ``1 / ranks`` of its bytes, and as many go to each other. Where rows have all heads, those that
        go to each rank are put side by side before, or taken apart after.
        """
        if ranks == 1:
            return 0.0
        near = min(ranks, self.gpus_per_node)
        share = bytes_of_rank / ranks
        wire = max(self.inside.seconds(share * (near - 1)), self.across.seconds(share * (ranks - near)))
        return float(wire + self.packing.seconds(bytes_of_rank))

    def all_gather(self, bytes_of_rank: float, ranks: int) -> float:
        """Seconds of an all-gather (or a reduce-scatter): a shard enters a node once and is spread inside it."""
        crossing = bytes_of_rank * (self.num_nodes(ranks) - 1)
        return float(max(self.inside.seconds(bytes_of_rank * (ranks - 1)), self.across.seconds(crossing)))

    def ring_step(self, num_bytes: float, ranks: int) -> float:
        """Seconds in which every rank sends so much to the next; the slowest link counts."""
        return float((self.inside if self.num_nodes(ranks) == 1 else self.across).seconds(num_bytes))


def traffic(routes: Routes, cp_size: int, stage: int, gpus_per_node: int, two_level: bool) -> Traffic:
    """What a stage moves where.

    Args:
        routes: All rows that travel.
        cp_size: Number of ranks.
        stage: The stage.
        gpus_per_node: Ranks of a node; ranks are numbered node by node.
        two_level: Whether a row crosses once to each node that needs it, to the GPU that has its owner's place there
            and hands it on; else once to each rank.
    """
    now = routes.stage == stage
    owner, receiver, start, end = (x[now] for x in (routes.owner, routes.receiver, routes.start, routes.end))
    rows, node = end - start, receiver // gpus_per_node
    crosses = owner // gpus_per_node != node
    inside = _busiest(owner[~crosses], receiver[~crosses], rows[~crosses], cp_size)
    if not two_level:
        across = _busiest(owner[crosses], receiver[crosses], rows[crosses], cp_size)
        return Traffic(inside, across, np.zeros_like(inside), np.zeros_like(inside))
    owner, receiver, start, end, rows, node = (x[crosses] for x in (owner, receiver, start, end, rows, node))
    once = GroupedRuns.merge(node * cp_size + owner, start, end, int(end.max(initial=0)) + 1)
    to_node, sender = np.divmod(once.group, cp_size)
    across = _busiest(sender, to_node * gpus_per_node + sender % gpus_per_node, once.lengths, cp_size)
    relay = node * gpus_per_node + owner % gpus_per_node
    sent_on = relay != receiver
    packed = np.bincount(relay, rows, cp_size).astype(np.int64)
    return Traffic(inside, across, packed, _busiest(relay[sent_on], receiver[sent_on], rows[sent_on], cp_size))


def _busiest(sender: IntArray, receiver: IntArray, rows: IntArray, cp_size: int) -> IntArray:
    """The larger of the rows that each rank sends and receives."""
    out, into = (np.bincount(rank, rows, cp_size) for rank in (sender, receiver))
    return np.maximum(out, into).astype(np.int64)
