"""RowRouting: one stage's routing as tensors on a device, and the uneven all-to-all both verbs are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from magi_attention.comm.row_sums import RowSums, group_parts
from magi_attention.planning.routing import GroupCollectivePlan, IntArray


@dataclass(frozen=True, eq=False)
class RowRouting:
    """Which local rows go out, and where arriving rows belong. All indices are int32.

    Attributes:
        send_rows: Local rows in the order of the wire.
        send_counts: Rows for each rank of the group.
        recv_counts: Rows from each rank of the group.
        recv_order: For each row of the buffer its place on the wire; None when the order is the same.
        wire_order: The inverse of ``recv_order``.
        sums: Where partial rows belong that come home, in the order of ``send_rows``.
    """

    send_rows: torch.Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    recv_order: torch.Tensor | None
    wire_order: torch.Tensor | None
    sums: RowSums

    @classmethod
    def on_device(cls, plan: GroupCollectivePlan, device: torch.device) -> "RowRouting":
        """Copy a routing to a device, once for all calls."""
        orders = [x for x in (plan.recv_order, plan.wire_order) if x is not None]
        send_rows, rows, offsets, order, *orders_there = copy_indices(
            [plan.send_rows, *group_parts(plan.send_rows), *orders], device
        )
        recv_order, wire_order = orders_there or (None, None)
        sums = RowSums(rows, offsets, order)
        return cls(send_rows, plan.send_counts, plan.recv_counts, recv_order, wire_order, sums)


def copy_indices(indices: Sequence[IntArray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Copy all at once, as int32: no tensor has more rows than that can count."""
    joined = np.concatenate(indices, dtype=np.int32, casting="same_kind")
    return copy_to_device(joined, device).split([len(x) for x in indices])


def copy_to_device(indices: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The same numbers on a device, for which the host does not wait."""
    host = torch.from_numpy(indices)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class Transfer:
    """Rows under way.

    NCCL reads and writes on a stream of its own, of which the caching allocator knows nothing. What keeps it from
    giving the memory away too early: both matrices belong to the stream that was current when the transfer started, for
    which NCCL waits first, and they are held here, and by ``work``, until :meth:`wait` makes that stream wait for NCCL.
    When they are freed later, whatever gets their memory comes after the transfer on that stream. So ``record_stream``
    is not needed, as long as :meth:`wait` is called on the stream on which the transfer was started, or on one that it
    waits for, see :mod:`magi_attention.comm.chain`.

    Attributes:
        sent: The matrix that the transport reads.
        received: The matrix that it writes.
        work: To wait for.
    """

    sent: torch.Tensor
    received: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """The received rows, once they are there: with NCCL, for what is next on the current stream."""
        self.work.wait()
        return self.received


def exchange(
    rows: torch.Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: dist.ProcessGroup,
    received: torch.Tensor | None = None,
) -> Transfer:
    """Start an uneven all-to-all of the rows of a contiguous matrix, ordered by rank on both sides.

    A collective: a rank with nothing to send and nothing to receive takes part, too. Rows arrive in ``received``, a
    contiguous matrix; None for a new one.
    """
    if received is None:
        received = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
    work = dist.all_to_all_single(received, rows, list(recv_counts), list(send_counts), group=group, async_op=True)
    return Transfer(rows, received, work)


def pack(
    tensors: Sequence[torch.Tensor],
    rows: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chosen rows of several tensors side by side in one matrix, so that they travel together.

    Args:
        tensors: Tensors of one dtype and equal numbers of rows, ``(rows, ...)``, with any strides.
        rows: Which rows, int32; None for all.
        dtype: The type of the matrix; None for that of the tensors.
        into: The matrix, contiguous, whose type it is then; None for a new one.
    """
    first, row_shapes = tensors[0], [x.shape[1:] for x in tensors]
    assert all(x.dtype == first.dtype and len(x) == len(first) for x in tensors)
    matrix = into
    if matrix is None:
        size = len(first if rows is None else rows), sum(shape.numel() for shape in row_shapes)
        matrix = torch.empty(size, dtype=dtype or first.dtype, device=first.device)
    if matrix.is_cuda:
        from magi_attention.comm import row_kernels

        row_kernels.pack_rows(tensors, rows, matrix)
    else:
        for x, part in zip(tensors, unpack(matrix, row_shapes), strict=True):
            part.copy_(x if rows is None else x.index_select(0, rows))
    return matrix


def unpack(matrix: torch.Tensor, row_shapes: Sequence[torch.Size]) -> tuple[torch.Tensor, ...]:
    """The tensors that :func:`pack` put side by side, as views."""
    parts = matrix.split([shape.numel() for shape in row_shapes], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, row_shapes, strict=True))
