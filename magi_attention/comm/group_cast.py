"""Group cast: every row goes from its owner to each rank that needs it, and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.comm.row_buffer import RowBuffer
from magi_attention.comm.row_exchange import RowRouting, Transfer, exchange, pack


@dataclass(frozen=True)
class GroupCast:
    """A group cast under way."""

    transfer: Transfer
    routing: RowRouting
    buffer: RowBuffer

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The rows of the buffer of each tensor: views into one matrix."""
        self.buffer.copy_ahead()
        received = self.transfer.wait()
        if self.routing.recv_order is not None:
            pack((received,), self.routing.recv_order, into=self.buffer.arriving)
        return self.buffer.rows()


def group_cast(
    tensors: Sequence[torch.Tensor], rows: RowRouting, group: dist.ProcessGroup, ahead: torch.Tensor | None = None
) -> GroupCast:
    """Start sending local rows of ``tensors`` to the ranks that need them.

    A collective: every rank of the group calls it, also one that neither sends nor receives.

    Args:
        tensors: Tensors of one dtype and equal numbers of rows, shape ``(local rows, ...)``. They travel together.
        rows: Which rows go where.
        group: The process group that ``rows`` was planned for.
        ahead: Local rows that are copied to the front of the buffer when it is waited for, int32.
    """
    buffer = RowBuffer.empty(tensors, ahead, sum(rows.recv_counts))
    in_order = buffer.arriving if rows.recv_order is None else None
    transfer = exchange(pack(tensors, rows.send_rows), rows.send_counts, rows.recv_counts, group, in_order)
    return GroupCast(transfer, rows, buffer)
