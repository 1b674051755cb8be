"""The hopper engine's own backward pass: a :class:`~magi_attention.kernels.backward_pass.BackwardPass` in one kernel.

Gradients of queries are added up by reductions in memory, in whatever order programs come to them, and so are equal
from run to run but for rounding.
"""

import math

import torch

from magi_attention.kernels.hopper.shapes import backward_dims
from magi_attention.kernels.lazy_schedule import LazySchedule
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.query_grads import QueryGrads


def adds_in_any_order(params: AttnParams) -> bool:
    """See :meth:`magi_attention.kernels.backward_pass.BackwardPass.adds_in_any_order`."""
    return True


def start_backward(
    out: torch.Tensor,
    dout: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    params: AttnParams,
    head_dim: int,
) -> QueryGrads:
    """See :meth:`magi_attention.kernels.backward_pass.BackwardPass.start_backward`."""
    from magi_attention.kernels.hopper.row_kernels import launch_start

    dout = torch.zeros_like(out) if dout is None else dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    return launch_start(out, dout, lse, dlse, head_dim, backward_dims(head_dim, out.shape[2]).k)


def backward(
    grads: QueryGrads,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LazySchedule,
    params: AttnParams,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`magi_attention.kernels.backward_pass.BackwardPass.backward`."""
    from magi_attention.kernels.hopper.launch import launch_backward

    dk, dv = (torch.empty(x.shape, dtype=dtype or torch.float32, device=x.device) for x in (k, v))
    launch_backward(grads, q, k, v, schedule, params, (dk, dv))
    return dk, dv


def sink_grad(grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.backward_pass.BackwardPass.sink_grad`."""
    probs = torch.exp2(sink.float()[:, None] / math.log(2) + grads.lse)  # lse and delta are negative here
    return probs.mul_(grads.delta).sum(1).to(sink.dtype)


def finish_backward(grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.backward_pass.BackwardPass.finish_backward`."""
    from magi_attention.kernels.hopper.row_kernels import all_dims, launch_finish

    dq = torch.empty(grads.dq.shape, dtype=dtype, device=grads.dq.device)
    launch_finish(all_dims(grads.dq), dq, params.softmax_scale, shuffled=True)
    return dq
