"""RowBuffer: where rows arrive, behind local rows that are attended together with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from magi_attention.comm.row_exchange import pack, unpack


@dataclass(frozen=True)
class RowBuffer:
    """A matrix in which the rows of several tensors stand side by side.

    Attributes:
        matrix: The rows that lie ahead, and those that arrive.
        num_ahead: Number of rows that lie ahead.
        row_shapes: The shape of a row of each tensor.
    """

    matrix: torch.Tensor
    num_ahead: int
    row_shapes: tuple[torch.Size, ...]

    @classmethod
    def empty(cls, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None, num_arriving: int) -> "RowBuffer":
        """Memory for rows of ``tensors``, those of the local rows ``ahead``, if any, before those that arrive."""
        num_ahead = 0 if ahead is None else len(ahead)
        shapes = tuple(x.shape[1:] for x in tensors)
        size = num_ahead + num_arriving, sum(shape.numel() for shape in shapes)
        return cls(tensors[0].new_empty(size), num_ahead, shapes)

    @property
    def arriving(self) -> torch.Tensor:
        """The part in which rows arrive."""
        return self.matrix[self.num_ahead :]

    def copy_ahead(self, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None) -> None:
        """Fill the part before it."""
        if ahead is not None:
            pack(tensors, ahead, into=self.matrix[: self.num_ahead])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that stand in it, as views."""
        return unpack(self.matrix, self.row_shapes)
