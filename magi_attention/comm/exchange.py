"""Exchange: the transfers of one stage, there and back, over the process groups that they were planned for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from magi_attention.comm.group_cast import GroupCast, group_cast
from magi_attention.comm.group_reduce import GroupReduce, group_reduce
from magi_attention.comm.row_exchange import RowRouting


class Transit(Protocol):
    """Rows under way."""

    def wait(self) -> object:
        """Come back when they have arrived; with NCCL, let the current stream wait for them."""


class Cast(Protocol):
    """A cast under way."""

    @property
    def transfer(self) -> Transit:
        """The rows under way; waiting for them leaves them to :meth:`wait`."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The rows of the buffer of each tensor, ``(rows, ...)``: those that lie ahead, and those received."""


class Reduce(Protocol):
    """A reduce under way."""

    def wait(self, into: Sequence[torch.Tensor]) -> None:
        """Add what arrived to the local rows of ``into``, in place, in a fixed order."""


class Exchange(Protocol):
    """How the rows of one stage travel. Both verbs are collectives of all ranks."""

    def cast(self, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None = None) -> Cast:
        """Start sending local rows of ``tensors``, ``(local rows, ...)``, to the ranks that need them.

        Args:
            tensors: Tensors of one dtype.
            ahead: Local rows that are copied to the front of the buffer when it is waited for, int32.
        """

    def reduce(self, tensors: Sequence[torch.Tensor], wire_dtype: torch.dtype | None = None) -> Reduce:
        """Start sending partial sums for received rows, ``(received rows, ...)``, home to the rows' owners.

        Args:
            tensors: The partial sums, of one dtype.
            wire_dtype: The type in which they travel; None for that of ``tensors``.
        """


@dataclass(frozen=True, eq=False)
class FlatExchange:
    """An :class:`Exchange` in one level: each row goes from its owner straight to each rank that needs it."""

    rows: RowRouting
    group: dist.ProcessGroup

    def cast(self, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None = None) -> GroupCast:
        """See :class:`Exchange`."""
        return group_cast(tensors, self.rows, self.group, ahead)

    def reduce(self, tensors: Sequence[torch.Tensor], wire_dtype: torch.dtype | None = None) -> GroupReduce:
        """See :class:`Exchange`."""
        return group_reduce(tensors, self.rows, self.group, wire_dtype)
