"""Group reduce: the way back of a group cast. Partial rows go home to their owner, who adds them up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.comm.row_exchange import RowRouting, Transfer, exchange, pack
from magi_attention.comm.row_sums import add_rows


@dataclass(frozen=True)
class GroupReduce:
    """A group reduce under way."""

    transfer: Transfer
    routing: RowRouting

    def wait(self, into: Sequence[torch.Tensor]) -> None:
        """Add what arrived to the local rows of ``into``, in place, rank by rank in a fixed order.

        Args:
            into: Contiguous tensors, ``(local rows, ...)``, one for each that was sent; all float32 or all float64,
                which is the type in which rows are added.
        """
        add_rows(into, self.transfer.wait(), self.routing.sums)


def group_reduce(
    tensors: Sequence[torch.Tensor],
    rows: RowRouting,
    group: dist.ProcessGroup,
    wire_dtype: torch.dtype | None = None,
) -> GroupReduce:
    """Start sending rows of the receive buffer back to their owners.

    A collective: every rank of the group calls it, also one that neither sends nor receives.

    Args:
        tensors: Partial sums for the rows that a group cast with ``rows`` received, shape ``(received rows, ...)``,
            of one dtype.
        rows: The routing of that group cast.
        group: Its process group.
        wire_dtype: The type in which rows travel, the same on every rank; None for that of ``tensors``.
    """
    matrix = pack(tensors, rows.wire_order, wire_dtype)
    return GroupReduce(exchange(matrix, rows.recv_counts, rows.send_counts, group), rows)
