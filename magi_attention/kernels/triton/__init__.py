"""The triton engine: attention over a tile schedule on any GPU that Triton compiles for.

It is not among :data:`magi_attention.kernels.engine.ENGINES` yet: it passes its tests under Triton's interpreter and
compiles for sm_80 and sm_90, but has not run on a GPU.

:mod:`magi_attention.kernels.reference` specifies the three functions. Triton is imported at the first call of
:func:`forward` or :func:`backward`, not with this package.

Nothing is added up by atomic operations, so that results are equal bit by bit from run to run: ``dq`` is computed query
tile by query tile and ``dk`` and ``dv`` key tile by key tile. The price is that both make the probabilities: seven
matrix products for a tile of scores in the backward pass where five would do.
"""

import torch

from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.triton.triton_schedule import TritonSchedule
from magi_attention.mask.bands import IntArray

__all__ = ["backward", "forward", "schedule"]


def schedule(bands: IntArray, num_rows: int, num_keys: int) -> TritonSchedule:
    """A mask for this engine; it is compiled to tiles at the first call with a device and a shape of tiles."""
    return TritonSchedule(bands, num_rows, num_keys)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TritonSchedule, params: AttnParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`magi_attention.kernels.reference.forward`."""
    from magi_attention.kernels.triton.forward_kernel import launch

    return launch(q, k, v, schedule, params)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    schedule: TritonSchedule,
    params: AttnParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`magi_attention.kernels.reference.backward`."""
    from magi_attention.kernels.triton.backward_kernels import launch

    return launch(dout, q, k, v, lse, delta, schedule, params)
