"""Group cast: every row goes from its owner to each rank that needs it, and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.comm.row_exchange import RowRouting, Transfer, exchange, pack, unpack


@dataclass(frozen=True)
class GroupCast:
    """A group cast under way."""

    transfer: Transfer
    routing: RowRouting
    row_shapes: tuple[torch.Size, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The received rows of each tensor, in the order of the buffer: views into one matrix."""
        matrix = self.transfer.wait()
        if self.routing.recv_order is not None:
            matrix = pack((matrix,), self.routing.recv_order)
        return unpack(matrix, self.row_shapes)


def group_cast(tensors: Sequence[torch.Tensor], rows: RowRouting, group: dist.ProcessGroup) -> GroupCast:
    """Start sending local rows of ``tensors`` to the ranks that need them.

    A collective: every rank of the group calls it, also one that neither sends nor receives.

    Args:
        tensors: Tensors of one dtype and equal numbers of rows, shape ``(local rows, ...)``. They travel together.
        rows: Which rows go where.
        group: The process group that ``rows`` was planned for.
    """
    row_shapes = tuple(t.shape[1:] for t in tensors)
    transfer = exchange(pack(tensors, rows.send_rows), rows.send_counts, rows.recv_counts, group)
    return GroupCast(transfer, rows, row_shapes)
