"""Dispatch and undispatch: between the global sequence and each rank's rows, with gradients.

The gradient of the global tensor is either *replicated*, whole on every rank, or *partial*: what the ranks have adds up
to it. Taking and gathering rows are each other's transposes when it is replicated; when it is partial, the transpose of
taking is to place rows among zeros, and the transpose of gathering is to reduce and scatter.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from magi_attention.comm import all_gather_rows, reduce_scatter_rows
from magi_attention.mask.bands import IntArray
from magi_attention.planning import DispatchPlan

GradOfGlobal = Literal["replicated", "partial"]


def take_local(x: torch.Tensor, plan: DispatchPlan, rank: int) -> torch.Tensor:
    """A rank's rows of the global ``x``, padding rows zero."""
    local = x.index_select(0, _index(plan.position_ids(rank), x))
    local[plan.num_real_rows(rank) :] = 0
    return local


def place_local(local: torch.Tensor, plan: DispatchPlan, rank: int) -> torch.Tensor:
    """A global tensor with a rank's rows in their places, without the padding, and zeros elsewhere."""
    num_rows = plan.num_real_rows(rank)
    placed = local.new_zeros((plan.total_seqlen, *local.shape[1:]))
    return placed.index_copy_(0, _index(plan.position_ids(rank)[:num_rows], local), local[:num_rows])


def gather_global(local: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's rows in their global order, without the padding."""
    gathered = all_gather_rows(local, plan.local_seqlens, group)
    return gathered.index_select(0, _index(plan.places, local))


def reduce_local(x: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's rows of the sum of every rank's ``x``, padding rows zero."""
    by_rank = x.index_select(0, _index(plan.gathered_positions, x))
    local = reduce_scatter_rows(by_rank, plan.local_seqlens, group)
    local[plan.num_real_rows(dist.get_rank(group)) :] = 0
    return local


class Dispatch(torch.autograd.Function):
    """Global rows to local rows."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup, grad_of_global: GradOfGlobal
    ) -> torch.Tensor:
        ctx.plan, ctx.group, ctx.partial = plan, group, grad_of_global == "partial"
        return take_local(x, plan, dist.get_rank(group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.partial:
            return place_local(grad, ctx.plan, dist.get_rank(ctx.group)), None, None, None
        return gather_global(grad, ctx.plan, ctx.group), None, None, None


class Undispatch(torch.autograd.Function):
    """Local rows to global rows."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup, grad_of_global: GradOfGlobal
    ) -> torch.Tensor:
        ctx.plan, ctx.group, ctx.partial = plan, group, grad_of_global == "partial"
        return gather_global(local, plan, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.partial:
            return reduce_local(grad, ctx.plan, ctx.group), None, None, None
        return take_local(grad, ctx.plan, dist.get_rank(ctx.group)), None, None, None


def _index(rows: IntArray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows).to(like.device, non_blocking=True)
