"""The hopper engine: attention for GPUs of compute capability 9.0 in Gluon, the lower level of Triton.

:class:`magi_attention.kernels.engine.Engine` specifies its functions. Triton is imported at the first call of one that
computes, not with this package.

With ``deterministic`` the backward pass is that of the triton engine, since gradients of queries are added up here by
reductions in memory, in whatever order programs come to them.
"""

import importlib.util
import math

import torch

from magi_attention.kernels import triton as by_tiles
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
    "refusal",
    "schedule",
    "sink_grad",
    "start_backward",
]

name = "hopper"

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See :meth:`magi_attention.kernels.engine.Engine.refusal`."""
    if device.type != "cuda":
        return f"runs on GPUs of compute capability 9.0, not on {device.type}"
    if dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {dtype}"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"takes a head_dim up to {MAX_HEAD_DIM} that is a multiple of 8, not {head_dim}"
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

    is_later = state is not None
    if state is None:
        state = State.empty(q, schedule.part, params.return_max_logits)
    launch_forward(q, k, v, schedule, params, state, is_later, sink)
    return state


def adds_in_any_order(params: AttnParams) -> bool:
    """See :meth:`magi_attention.kernels.engine.Engine.adds_in_any_order`."""
    return not params.deterministic


def start_backward(
    out: torch.Tensor,
    dout: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    params: AttnParams,
) -> QueryGrads:
    """See :meth:`magi_attention.kernels.engine.Engine.start_backward`."""
    if params.deterministic:
        return by_tiles.start_backward(out, dout, lse, dlse, params)
    from magi_attention.kernels.hopper.launch import tile_dim
    from magi_attention.kernels.hopper.row_kernels import launch_start

    dout = torch.zeros_like(out) if dout is None else dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    return launch_start(out, dout, lse, dlse, tile_dim(out.shape[2]))


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
    if params.deterministic:
        return by_tiles.backward(grads, q, k, v, schedule, params, dtype)
    from magi_attention.kernels.hopper.launch import launch_backward

    dk, dv = (torch.empty(x.shape, dtype=dtype or torch.float32, device=x.device) for x in (k, v))
    launch_backward(grads, q, k, v, schedule, params, (dk, dv))
    return dk, dv


def sink_grad(grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.sink_grad`."""
    if params.deterministic:
        return by_tiles.sink_grad(grads, sink, params)
    probs = torch.exp2(sink.float()[:, None] / math.log(2) + grads.lse)  # lse and delta are negative here
    return probs.mul_(grads.delta).sum(1).to(sink.dtype)


def finish_backward(grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.finish_backward`."""
    if params.deterministic:
        return by_tiles.finish_backward(grads, params, dtype)
    from magi_attention.kernels.hopper.row_kernels import launch_finish

    dq = torch.empty(grads.dout.shape, dtype=dtype, device=grads.dq.device)
    launch_finish(grads.dq, dq, float(params.softmax_scale), shuffled=True)
    return dq
