"""Engines, the implementations of attention on one device, and the rule that chooses one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.tile_schedule import TileSchedule
from magi_attention.mask.bands import IntArray

__all__ = ["ENGINES", "AttnParams", "Engine", "choose_engine", "explain"]

Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, TileSchedule, AttnParams], tuple[torch.Tensor, torch.Tensor]
]
Backward = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        TileSchedule,
        AttnParams,
    ],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True)
class Engine:
    """One implementation of attention. :mod:`magi_attention.kernels.reference` specifies the three functions.

    Attributes:
        name: What :func:`explain` calls it.
        schedule: ``(bands, num_rows, num_keys)`` to the tile schedule that the other two take; made once for a mask.
        forward: ``(q, k, v, schedule, params)`` to ``(out, lse)``.
        backward: ``(dout, q, k, v, lse, delta, schedule, params)`` to ``(dq, dk, dv)``.
        dtypes: The types of q, k and v that it takes.
        device_types: The ``torch.device.type`` that it runs on; None for all.
        max_head_dim: The largest head_dim that it takes; None for any.
    """

    name: str
    schedule: Callable[[IntArray, int, int], TileSchedule]
    forward: Forward
    backward: Backward
    dtypes: frozenset[torch.dtype]
    device_types: frozenset[str] | None = None
    max_head_dim: int | None = None

    def refusal(self, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the engine cannot compute such attention; None when it can."""
        if self.device_types is not None and device_type not in self.device_types:
            return f"does not run on {device_type}"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"does not take a head_dim above {self.max_head_dim}"
        return None


ENGINES = (
    Engine(
        name="reference",
        schedule=reference.schedule,
        forward=reference.forward,
        backward=reference.backward,
        dtypes=frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    ),
)
"""All engines, the one to prefer first."""


def choose_engine(q: torch.Tensor) -> Engine:
    """The first engine that takes the device, dtype and head_dim of ``q``.

    Raises:
        ValueError: If none does; the message has the reason of each.
    """
    for engine in ENGINES:
        if engine.refusal(q.device.type, q.dtype, q.shape[-1]) is None:
            return engine
    raise ValueError(f"no engine for q:\n{explain(q.device.type, q.dtype, q.shape[-1])}")


def explain(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Which engine :func:`choose_engine` chooses for such attention and why, one line for each engine in their
    order.
    """
    lines, chosen = [], False
    for engine in ENGINES:
        reason = engine.refusal(device_type, dtype, head_dim)
        if reason is None:
            reason = "takes it too, but comes later" if chosen else "chosen"
            chosen = True
        lines.append(f"{engine.name}: {reason}")
    return "\n".join(lines)
