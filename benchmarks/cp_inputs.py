"""Inputs of bench_cp.py, of which no rank ever holds more than its rows, and results compared across ranks."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

TENSORS = ("out", "dq", "dk", "dv")
_BLOCK = 8192  # rows of the sequence made at a time
_HEADS_AT_ONCE = 8  # compared at a time: a whole sequence of these few heads fits on every rank


@dataclass
class Inputs:
    """q, k, v and dout of a sequence, the same numbers for every contender however it shares them out.

    Attributes:
        heads: Query heads, and heads of dout.
        heads_kv: Key and value heads.
        head_dim: Their size.
        dtype: Their type.
        device: Where they are made.
    """

    heads: int
    heads_kv: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    _made: dict[tuple[str, bytes, bool], Tensor] = field(default_factory=dict)

    def rows(self, name: str, rows: Tensor, heads_first: bool = False) -> Tensor:
        """The given rows of a tensor, ``(rows, heads, head_dim)`` or ``(heads, rows, head_dim)``, contiguous.

        Args:
            name: ``"q"``, ``"k"``, ``"v"`` or ``"dout"``.
            rows: Tokens of the sequence, ascending, int64 on the CPU.
            heads_first: Which of the two shapes.
        """
        known_as = (name, rows.numpy().tobytes(), heads_first)
        if known_as not in self._made:
            made = self._make(name, rows)
            self._made[known_as] = made.transpose(0, 1).contiguous() if heads_first else made
        return self._made[known_as]

    def _make(self, name: str, rows: Tensor) -> Tensor:
        heads = self.heads_kv if name in "kv" else self.heads
        made = torch.empty(len(rows), heads, self.head_dim, dtype=self.dtype, device=self.device)
        for block in torch.unique_consecutive(rows // _BLOCK).tolist():
            start = block * _BLOCK
            first, end = torch.searchsorted(rows, torch.tensor([start, start + _BLOCK])).tolist()
            seed = 4 * block + ("q", "k", "v", "dout").index(name)
            generator = torch.Generator(self.device).manual_seed(seed)
            shape = (_BLOCK, heads, self.head_dim)
            values = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
            made[first:end] = values[(rows[first:end] - start).to(self.device)]
        return made


@dataclass(frozen=True)
class Results:
    """A rank's out, dq, dk and dv, and which tokens they belong to.

    Attributes:
        tensors: By name, ``(rows, heads, head_dim)``.
        rows: Tokens of the rows of out and dq, int64 on the CPU.
        key_rows: The same of dk and dv. Where several ranks have gradients of a token, their sum is the gradient.
    """

    tensors: dict[str, Tensor]
    rows: Tensor
    key_rows: Tensor

    def rows_of(self, name: str) -> Tensor:
        """Tokens of a tensor's rows."""
        return self.rows if name in ("out", "dq") else self.key_rows

    def only(self, rows: Tensor) -> "Results":
        """These rows of the results for a whole sequence."""
        tensors = {name: x[rows.to(x.device)] for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, rows=rows, key_rows=rows)


def relative_errors(actual: Results, expected: Results, total: int, group: dist.ProcessGroup) -> dict[str, float]:
    """Of each tensor, over all ranks, the norm of the difference over the norm; the same numbers on every rank.

    Args:
        actual: Results on any rows.
        expected: Results in which each token is on one rank only.
        total: Tokens of the sequence.
        group: The ranks.
    """
    return {name: _relative_error(name, actual, expected, total, group) for name in TENSORS}


def _relative_error(name: str, actual: Results, expected: Results, total: int, group: dist.ProcessGroup) -> float:
    ours, theirs = actual.tensors[name], expected.tensors[name]
    to, wanted_rows = (x.rows_of(name).to(ours.device) for x in (actual, expected))
    squares = torch.zeros(2, dtype=torch.float64, device=ours.device)
    for heads in torch.arange(ours.shape[1]).split(_HEADS_AT_ONCE):
        some = slice(int(heads[0]), int(heads[-1]) + 1)
        whole = torch.zeros(total, len(heads), ours.shape[2], dtype=torch.float32, device=ours.device)
        whole.index_add_(0, to, ours[:, some].float())
        dist.all_reduce(whole, group=group)
        wanted = theirs[:, some].float()
        difference = torch.linalg.vector_norm(whole[wanted_rows] - wanted)
        squares += torch.stack((difference, torch.linalg.vector_norm(wanted))).double() ** 2
    dist.all_reduce(squares, group=group)
    of_difference, of_expected = squares.sqrt().tolist()
    return of_difference / of_expected
