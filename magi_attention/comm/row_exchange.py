"""RowExchange: one stage's routing as tensors on a device, and the uneven all-to-all both verbs are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from magi_attention.planning.routing import GroupCollectivePlan


@dataclass(frozen=True, eq=False)
class RowExchange:
    """Which local rows go out, and where arriving rows belong.

    Attributes:
        send_rows: Local rows in the order of the wire, int64.
        send_counts: Rows for each rank of the group.
        recv_counts: Rows from each rank of the group.
        recv_order: For each row of the buffer its place on the wire; None when the order is the same.
        wire_order: The inverse of ``recv_order``.
    """

    send_rows: torch.Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    recv_order: torch.Tensor | None
    wire_order: torch.Tensor | None

    @classmethod
    def on_device(cls, plan: GroupCollectivePlan, device: torch.device) -> "RowExchange":
        """Copy a routing to a device."""

        def index(rows: NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(rows).to(device, non_blocking=True)

        return cls(
            send_rows=index(plan.send_rows),
            send_counts=plan.send_counts,
            recv_counts=plan.recv_counts,
            recv_order=None if plan.recv_order is None else index(plan.recv_order),
            wire_order=None if plan.wire_order is None else index(plan.wire_order),
        )


@dataclass(frozen=True)
class Transfer:
    """Rows under way. ``sent`` is kept until they have arrived, since the transport reads it."""

    sent: torch.Tensor
    received: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """The received rows, once they are there."""
        self.work.wait()
        return self.received


def exchange(
    rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: dist.ProcessGroup
) -> Transfer:
    """Start an uneven all-to-all of the rows of a contiguous matrix, ordered by rank on both sides."""
    received = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
    work = dist.all_to_all_single(received, rows, list(recv_counts), list(send_counts), group=group, async_op=True)
    return Transfer(rows, received, work)


def pack(tensors: Sequence[torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
    """Chosen rows of several tensors side by side in one matrix, so that they travel together."""
    chosen = [t.flatten(1) if rows is None else t.flatten(1).index_select(0, rows) for t in tensors]
    return torch.cat(chosen, dim=1)


def unpack(matrix: torch.Tensor, row_shapes: Sequence[torch.Size]) -> tuple[torch.Tensor, ...]:
    """The tensors that :func:`pack` put side by side, as views."""
    parts = matrix.split([shape.numel() for shape in row_shapes], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, row_shapes, strict=True))
