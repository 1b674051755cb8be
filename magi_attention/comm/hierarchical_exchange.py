"""HierarchicalExchange: rows cross to a node once and are spread inside; partial sums are added up inside and cross."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.comm.chain import Chain, chain
from magi_attention.comm.group_cast import group_cast
from magi_attention.comm.group_reduce import GroupReduce, group_reduce
from magi_attention.comm.row_buffer import RowBuffer
from magi_attention.comm.row_exchange import RowRouting, copy_indices, exchange, pack
from magi_attention.planning.two_level import TwoLevelPlan


@dataclass(frozen=True)
class HierarchicalCast:
    """A cast under way."""

    transfer: Chain[None]
    buffer: RowBuffer

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The rows of the buffer of each tensor: views into one matrix."""
        self.buffer.copy_ahead()
        self.transfer.wait()
        return self.buffer.rows()


@dataclass(frozen=True)
class HierarchicalReduce:
    """A reduce under way: what ranks of the node send home, and the sums that come from other nodes."""

    direct: GroupReduce
    crossing: Chain[GroupReduce]

    def wait(self, into: Sequence[torch.Tensor]) -> None:
        """Add what arrived to the local rows of ``into``, in place: rank by rank of the node, then node by node."""
        crossing = self.crossing.wait()
        self.direct.wait(into)
        crossing.wait(into)


@dataclass(frozen=True, eq=False)
class HierarchicalExchange:
    """An :class:`~magi_attention.comm.exchange.Exchange` in two levels.

    Attributes:
        crossing: Local rows to relays in other nodes, over ``inter``.
        direct: Local rows to ranks of the node, over ``intra``.
        relay: Rows that came by ``crossing`` to ranks of the node, over ``intra``.
        recv_order: For each row of the buffer its place behind those of ``direct`` and then ``relay``, int32; None when
            the order is the same.
        wire_order: The inverse of ``recv_order``.
        inter: The ranks with this rank's place, one in each node.
        intra: The ranks of the node.
    """

    crossing: RowRouting
    direct: RowRouting
    relay: RowRouting
    recv_order: torch.Tensor | None
    wire_order: torch.Tensor | None
    inter: dist.ProcessGroup
    intra: dist.ProcessGroup

    @classmethod
    def on_device(
        cls, plan: TwoLevelPlan, inter: dist.ProcessGroup, intra: dist.ProcessGroup, device: torch.device
    ) -> "HierarchicalExchange":
        """Copy a routing to a device, once for all calls."""
        crossing, direct, relay = (RowRouting.on_device(x, device) for x in (plan.crossing, plan.direct, plan.relay))
        orders = [x for x in (plan.recv_order, plan.wire_order) if x is not None]
        recv_order, wire_order = copy_indices(orders, device) if orders else (None, None)
        return cls(crossing, direct, relay, recv_order, wire_order, inter, intra)

    def cast(self, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None = None) -> HierarchicalCast:
        """See :class:`~magi_attention.comm.exchange.Exchange`."""
        buffer = RowBuffer.empty(tensors, ahead, sum(self.direct.recv_counts) + sum(self.relay.recv_counts))
        crossing = group_cast(tensors, self.crossing, self.inter)
        direct = group_cast(tensors, self.direct, self.intra)

        def spread() -> None:
            relayed = group_cast((crossing.transfer.wait(),), self.relay, self.intra)
            levels = direct.transfer.wait(), relayed.transfer.wait()
            if self.recv_order is None:
                torch.cat(levels, out=buffer.arriving)
            else:
                pack((torch.cat(levels),), self.recv_order, into=buffer.arriving)

        return HierarchicalCast(chain(spread, tensors[0].device), buffer)

    def reduce(self, tensors: Sequence[torch.Tensor], wire_dtype: torch.dtype | None = None) -> HierarchicalReduce:
        """See :class:`~magi_attention.comm.exchange.Exchange`. Nodes add up in the type of ``tensors``."""
        parts = pack(tensors, self.wire_order, wire_dtype)
        near, far = parts.split((sum(self.direct.recv_counts), sum(self.relay.recv_counts)))
        direct, relay = (
            GroupReduce(exchange(rows, level.recv_counts, level.send_counts, self.intra), level)
            for rows, level in ((near, self.direct), (far, self.relay))
        )

        def cross() -> GroupReduce:
            sums = parts.new_zeros((sum(self.crossing.recv_counts), parts.shape[1]), dtype=tensors[0].dtype)
            relay.wait(into=(sums,))
            return group_reduce((sums,), self.crossing, self.inter, wire_dtype)

        return HierarchicalReduce(direct, chain(cross, parts.device))
