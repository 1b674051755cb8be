"""The triton engine: attention by walks over the tiles of a mask, on CUDA GPUs.

:class:`magi_attention.kernels.engine.Engine` specifies its functions. Triton is imported at the first call of one that
computes, not with this package.

Nothing is added up by atomic operations, so that results are equal bit by bit from run to run: ``dq`` is computed query
tile by query tile and ``dk`` and ``dv`` key tile by key tile. The price is that both make the probabilities: seven
matrix products for a tile of scores in the backward pass where five would do.

``sm_margin`` has no effect. A program computes one tile and ends, so that a kernel of another stream gets a
multiprocessor as soon as the next program on it does; but no multiprocessor is kept free from the start.
"""

import importlib.util
import math

import torch

from magi_attention.kernels.head_dims import refuse_head_dims
from magi_attention.kernels.lazy_schedule import LazySchedule
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part, State
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.kernels.triton import tuning
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

name = "triton"
parts_side_by_side = False

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
    """See :meth:`magi_attention.kernels.engine.Engine.refusal`."""
    if device.type != "cuda":
        return f"runs on CUDA GPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {dtype}"
    if (reason := refuse_head_dims(head_dim, head_dim_v, tuning.MAX_HEAD_DIM)) is not None:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install 'triton>=3.6'"
    if not torch.cuda.is_available():
        return "finds no CUDA device here"
    if tuning.compute_capability(device) < 8:
        return f"needs compute capability 8.0 or higher, which {torch.cuda.get_device_name(device)} has not"
    return None


def schedule(bands: IntArray, num_rows: int, num_keys: int, part: Part | None = None) -> LazySchedule:
    """A mask for this engine; it is compiled to tiles at the first call with a device and a shape of tiles."""
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
    from magi_attention.kernels.triton.forward_kernel import launch_forward
    from magi_attention.kernels.triton.launch import Launch

    launch, part = Launch.of(q, k, v, schedule, params), schedule.part
    if state is None:
        state = State.empty(q, v.shape[2], part is not None and not part.is_last, params.return_max_logits)
        launch_forward(launch, state, sink, merge=False)
        return state
    assert part is not None
    if state.sums is None:  # no query goes on
        return state
    launch_forward(launch, state, None, merge=True)
    if part.is_last:
        state.out.copy_(state.sums)
    return state


def start_backward(
    out: torch.Tensor,
    dout: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    params: AttnParams,
    head_dim: int,
) -> QueryGrads:
    """See :meth:`magi_attention.kernels.engine.Engine.start_backward`.

    ``lse`` is in units of ``log(2)``. A query that attends nothing has infinity there, which makes its probabilities 0,
    and 0 in ``delta``. ``dq`` is without the softmax scale until :func:`finish_backward`.
    """
    from magi_attention.kernels.triton.backward_kernels import launch_start

    return launch_start(out, torch.zeros_like(out) if dout is None else dout, lse, dlse, head_dim)


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
    from magi_attention.kernels.triton.backward_kernels import launch_dkdv, launch_dq
    from magi_attention.kernels.triton.launch import Launch

    launch = Launch.of(q, k, v, schedule, params)
    dk, dv = (torch.empty(x.shape, dtype=dtype or torch.float32, device=x.device) for x in (k, v))
    launch_dq(launch, grads)
    launch_dkdv(launch, grads, dk, dv)
    return dk, dv


def adds_in_any_order(params: AttnParams) -> bool:
    """See :meth:`magi_attention.kernels.engine.Engine.adds_in_any_order`."""
    return False


def sink_grad(grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.sink_grad`."""
    probs = torch.exp2(sink.float()[:, None] / math.log(2) - grads.lse)
    return -probs.mul_(grads.delta).sum(1).to(sink.dtype)


def finish_backward(grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
    """See :meth:`magi_attention.kernels.engine.Engine.finish_backward`."""
    dq = torch.empty_like(grads.dq, dtype=dtype)
    return torch.mul(grads.dq, params.softmax_scale, out=dq)
