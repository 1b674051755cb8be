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
        tensors: Rows of these lie ahead, and rows shaped as theirs arrive.
        ahead: These local rows, int32; None for none.
    """

    matrix: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    ahead: torch.Tensor | None

    @classmethod
    def empty(cls, tensors: Sequence[torch.Tensor], ahead: torch.Tensor | None, num_arriving: int) -> "RowBuffer":
        """Memory for rows of ``tensors``, those of the local rows ``ahead``, if any, before those that arrive."""
        num_ahead = 0 if ahead is None else len(ahead)
        size = num_ahead + num_arriving, sum(x.shape[1:].numel() for x in tensors)
        return cls(tensors[0].new_empty(size), tuple(tensors), ahead)

    @property
    def arriving(self) -> torch.Tensor:
        """The part in which rows arrive."""
        return self.matrix if self.ahead is None else self.matrix[len(self.ahead) :]

    def copy_ahead(self) -> None:
        """Fill the part before it."""
        if self.ahead is not None:
            pack(self.tensors, self.ahead, into=self.matrix[: len(self.ahead)])

    def rows(self) -> tuple[torch.Tensor, ...]:
        """The rows of each tensor that stand in it, as views."""
        return unpack(self.matrix, [x.shape[1:] for x in self.tensors])
