"""Group reduce: the way back of a group cast. Partial rows go home to their owner, who adds them up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.comm.row_exchange import RowExchange, Transfer, exchange, pack, unpack


@dataclass(frozen=True)
class GroupReduce:
    """A group reduce under way."""

    transfer: Transfer
    exchange: RowExchange
    row_shapes: tuple[torch.Size, ...]

    def wait(self, into: Sequence[torch.Tensor]) -> None:
        """Add what arrived to the local rows of ``into``, in place, rank by rank in a fixed order."""
        arrived = unpack(self.transfer.wait(), self.row_shapes)
        for total, part in zip(into, arrived, strict=True):
            total.index_add_(0, self.exchange.send_rows, part)


def group_reduce(tensors: Sequence[torch.Tensor], rows: RowExchange, group: dist.ProcessGroup) -> GroupReduce:
    """Start sending rows of the receive buffer back to their owners.

    A collective: every rank of the group calls it, also one that neither sends nor receives.

    Args:
        tensors: Partial sums for the rows that a group cast with ``rows`` received, shape ``(received rows, ...)``,
            of one dtype, the one in which they are to be added.
        rows: The routing of that group cast.
        group: Its process group.
    """
    row_shapes = tuple(t.shape[1:] for t in tensors)
    transfer = exchange(pack(tensors, rows.wire_order), rows.recv_counts, rows.send_counts, group)
    return GroupReduce(transfer, rows, row_shapes)
