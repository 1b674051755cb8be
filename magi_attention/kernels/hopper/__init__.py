"""The hopper engine: attention for GPUs of compute capability 9.0 in Gluon, the lower level of Triton.

:class:`magi_attention.kernels.engine.Engine` specifies its functions. Triton is imported at the first call of one that
computes, not with this package.

With ``deterministic`` the backward pass is that of the triton engine, since gradients of queries are added up in
:mod:`~magi_attention.kernels.hopper.unordered_backward` in whatever order programs come to them.
"""

import importlib.util

import torch

from magi_attention.kernels import triton as by_tiles
from magi_attention.kernels.backward_pass import BackwardPass
from magi_attention.kernels.head_dims import refuse_head_dims
from magi_attention.kernels.hopper import unordered_backward
from magi_attention.kernels.lazy_schedule import LazySchedule
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part, State
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.mask.bands import IntArray

__all__ = [
    "adds_in_any_order",
    "backward",
    "finish_backward",
    "forward",
    "name",
    "parts_side_by_side",
    "refusal",
    "schedule",
    "sink_grad",
    "start_backward",
]

name = "hopper"
parts_side_by_side = True

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
    """See :meth:`magi_attention.kernels.engine.Engine.refusal`."""
    if device.type != "cuda":
        return f"runs on GPUs of compute capability 9.0, not on {device.type}"
    if dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {dtype}"
    if (reason := refuse_head_dims(head_dim, head_dim_v, MAX_HEAD_DIM)) is not None:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install 'triton>=3.6'"
    if not torch.cuda.is_available():
        return "finds no CUDA device here"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"runs on GPUs of compute capability 9.0, which {torch.cuda.get_device_name(device)} is not"
    return None


def schedule(bands: IntArray, num_rows: int, num_keys: int, part: Part | None = None) -> LazySchedule:
    """A mask for this engine; it is compiled to walks at the first call with a device and a shape of tiles."""
    return LazySchedule(bands, num_rows, num_keys, part)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LazySchedule,
    params: AttnParams,
    state: State | None = None,
    sink: torch.Tensor | None = None,
) -> State:
    """See :meth:`magi_attention.kernels.engine.Engine.forward`."""
    from magi_attention.kernels.hopper.launch import launch_forward

    part, is_later = schedule.part, state is not None
    if state is None:
        # A query that waits for a later part has nothing to keep, but its part of a sink.
        keeps_sums = part is not None and (part.keeps_sums or (sink is not None and not (part.apart or part.is_last)))
        state = State.empty(q, v.shape[2], keeps_sums, params.return_max_logits)
    elif state.sums is None and part is not None and not (part.apart or part.is_last):
        state = state._replace(sums=torch.empty_like(state.out, dtype=torch.float32))
    launch_forward(q, k, v, schedule, params, state, is_later, sink)
    return state


def _backward_pass(params: AttnParams) -> BackwardPass:
    """Whose kernels make gradients: the triton engine's, if they must be equal bit by bit from run to run."""
    return by_tiles if params.deterministic else unordered_backward


def adds_in_any_order(params: AttnParams) -> bool:
    """See :meth:`magi_attention.kernels.engine.Engine.adds_in_any_order`."""
    return _backward_pass(params).adds_in_any_order(params)


def start_backward(
    out: torch.Tensor,
    dout: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    params: AttnParams,
    head_dim: int,
) -> QueryGrads:
    """See :meth:`magi_attention.kernels.engine.Engine.start_backward`."""
    return _backward_pass(params).start_backward(out, dout, lse, dlse, params, head_dim)


def backward(
    grads: QueryGrads,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LazySchedule,
    params: AttnParams,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`magi_attention.kernels.engine.Engine.backward`."""
    return _backward_pass(params).backward(grads, q, k, v, schedule, params, dtype)


def sink_grad(grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.sink_grad`."""
    return _backward_pass(params).sink_grad(grads, sink, params)


def finish_backward(grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.finish_backward`."""
    return _backward_pass(params).finish_backward(grads, params, dtype)
