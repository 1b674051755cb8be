"""The two moves between ranks that all-gather and Ulysses attention are made of, differentiable.

Both wait for their rows at once, on the device: nothing is computed meanwhile.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# One name up to torch 2.12, another, with a warning about the first, from 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GatherRows(torch.autograd.Function):
    """The rows of all ranks behind each other; backward, each rank's rows of the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((dist.get_world_size(group) * len(rows), *rows.shape[1:]))
        _all_gather(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty((len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:]))
        _reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine, None


class ExchangeBlocks(torch.autograd.Function):
    """Block ``n`` of ``(ranks, ...)`` goes to rank ``n``, where it is the block of this rank. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange_blocks(blocks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return exchange_blocks(grad, ctx.group), None


def exchange_blocks(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """An all-to-all of equal blocks, ``(ranks, ...)``."""
    received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, blocks.contiguous(), group=group)
    return received
