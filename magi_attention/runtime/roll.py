"""Roll: shift a dispatched sequence along itself, with gradients, sending only the rows that change ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from magi_attention.comm.row_exchange import copy_to_device, exchange
from magi_attention.planning.roll_plan import RollPlan

if TYPE_CHECKING:
    from magi_attention.runtime.runtime import DistAttnRuntime


@dataclass(frozen=True, eq=False)
class RollProgram:
    """A :class:`~magi_attention.planning.roll_plan.RollPlan` with its rows on a device, int64."""

    plan: RollPlan
    stay_from: torch.Tensor
    stay_to: torch.Tensor
    send_rows: torch.Tensor
    recv_to: torch.Tensor

    @classmethod
    def on_device(cls, plan: RollPlan, device: torch.device) -> "RollProgram":
        """Copy a plan's rows to a device."""
        rows = (plan.stay_from, plan.stay_to, plan.send_rows, plan.recv_to)
        return cls(plan, *(copy_to_device(r, device) for r in rows))


def roll_rows(x: torch.Tensor, program: RollProgram, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows that stand in this rank's places after the shift; padding rows zero. A collective."""
    plan = program.plan
    transfer = None
    if plan.any_travel:
        transfer = exchange(x.index_select(0, program.send_rows), plan.send_counts, plan.recv_counts, group)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    out.index_copy_(0, program.stay_to, x.index_select(0, program.stay_from))
    if transfer is not None:
        out.index_copy_(0, program.recv_to, transfer.wait())
    return out


class Roll(torch.autograd.Function):
    """Shifted local rows. Where a row went forward, its gradient comes back: a shift the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shift: int, runtime: "DistAttnRuntime") -> torch.Tensor:
        ctx.shift, ctx.runtime = shift, runtime
        return roll_rows(x, runtime.roll(shift, x.device), runtime.group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return Roll.apply(grad, -ctx.shift, ctx.runtime), None, None
