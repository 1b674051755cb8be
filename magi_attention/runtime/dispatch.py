"""Dispatch and undispatch: between the global sequence and each rank's rows, with gradients.

The gradient of the global tensor is either *replicated*, whole on every rank, or *partial*: what the ranks have adds up
to it. Taking and gathering rows are each other's transposes when it is replicated; when it is partial, the transpose of
taking is to place rows among zeros, and the transpose of gathering is to reduce and scatter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist

from magi_attention.comm import all_gather_rows, reduce_scatter_rows
from magi_attention.comm.row_exchange import copy_to_device
from magi_attention.planning import DispatchPlan

GradOfGlobal = Literal["replicated", "partial"]


@dataclass(frozen=True, eq=False)
class DispatchProgram:
    """A dispatch plan made ready for a rank and a device. Indices are int64, and copied there at first use.

    Attributes:
        plan: Which rank has which chunks.
        group: The ranks.
        device: Where the rows are.
    """

    plan: DispatchPlan
    group: dist.ProcessGroup
    device: torch.device

    @property
    def num_real_rows(self) -> int:
        """This rank's rows without padding, which is behind them."""
        return self.plan.real_seqlens[self.group.rank()]

    @cached_property
    def positions(self) -> torch.Tensor:
        """The global row of each of this rank's rows."""
        return copy_to_device(self.plan.position_ids(self.group.rank()), self.device)

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each global row is among the rows of all ranks, one rank behind the other."""
        return copy_to_device(self.plan.places, self.device)

    @cached_property
    def gathered_positions(self) -> torch.Tensor:
        """The global row of each row of all ranks."""
        return copy_to_device(self.plan.gathered_positions, self.device)


def dispatch_rows(x: torch.Tensor, program: DispatchProgram, grad_of_global: GradOfGlobal) -> torch.Tensor:
    """Global rows to local rows."""
    return _Linear.apply(x, take, place if grad_of_global == "partial" else gather, program)


def undispatch_rows(local: torch.Tensor, program: DispatchProgram, grad_of_global: GradOfGlobal) -> torch.Tensor:
    """Local rows to global rows."""
    return _Linear.apply(local, gather, reduce if grad_of_global == "partial" else take, program)


def take(x: torch.Tensor, program: DispatchProgram) -> torch.Tensor:
    """A rank's rows of the global ``x``, padding rows zero."""
    local = x.index_select(0, program.positions)
    local[program.num_real_rows :] = 0
    return local


def place(local: torch.Tensor, program: DispatchProgram) -> torch.Tensor:
    """A global tensor with a rank's rows in their places, without the padding, and zeros elsewhere."""
    num_rows = program.num_real_rows
    placed = local.new_zeros((program.plan.total_seqlen, *local.shape[1:]))
    return placed.index_copy_(0, program.positions[:num_rows], local[:num_rows])


def gather(local: torch.Tensor, program: DispatchProgram) -> torch.Tensor:
    """Every rank's rows in their global order, without the padding. A collective."""
    return all_gather_rows(local, program.plan.local_seqlens, program.group).index_select(0, program.places)


def reduce(x: torch.Tensor, program: DispatchProgram) -> torch.Tensor:
    """This rank's rows of the sum of every rank's ``x``, padding rows zero. A collective."""
    by_rank = x.index_select(0, program.gathered_positions)
    local = reduce_scatter_rows(by_rank, program.plan.local_seqlens, program.group)
    local[program.num_real_rows :] = 0
    return local


Map = Callable[[torch.Tensor, DispatchProgram], torch.Tensor]


class _Linear(torch.autograd.Function):
    """A linear map of rows, whose gradient is what its transpose makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forth: Map, back: Map, program: DispatchProgram) -> torch.Tensor:
        ctx.forth, ctx.back, ctx.program = forth, back, program
        return forth(x, program)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Linear.apply(grad, ctx.back, ctx.forth, ctx.program), None, None, None
