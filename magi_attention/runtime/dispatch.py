"""Dispatch and undispatch: between the global sequence and each rank's rows, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from magi_attention.comm import all_gather_rows
from magi_attention.planning import DispatchPlan


def take_local(x: torch.Tensor, plan: DispatchPlan, rank: int) -> torch.Tensor:
    """A rank's rows of the global ``x``, padding rows zero."""
    rows = torch.from_numpy(plan.position_ids(rank)).to(x.device, non_blocking=True)
    local = x.index_select(0, rows)
    local[plan.num_real_rows(rank) :] = 0
    return local


def gather_global(local: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's rows in their global order, without the padding."""
    chunks = all_gather_rows(local, group).unflatten(0, (-1, plan.chunk_size))
    order = torch.from_numpy(plan.chunk_position).to(local.device, non_blocking=True)
    return chunks.index_select(0, order).flatten(0, 1)[: plan.total_seqlen]


class Dispatch(torch.autograd.Function):
    """Global rows to local rows. The gradient of the global rows is gathered from all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.plan, ctx.group = plan, group
        return take_local(x, plan, dist.get_rank(group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_global(grad, ctx.plan, ctx.group), None, None


class Undispatch(torch.autograd.Function):
    """Local rows to global rows. The gradient of the global rows is the same on every rank; each takes its own rows."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, plan: DispatchPlan, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.plan, ctx.group = plan, group
        return gather_global(local, plan, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return take_local(grad, ctx.plan, dist.get_rank(ctx.group)), None, None
