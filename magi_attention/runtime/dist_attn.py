"""Attention over the ranks: the staged forward and backward loops."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from magi_attention.comm import GroupReduce, RowExchange, group_cast, group_reduce
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import State
from magi_attention.runtime.runtime import RankProgram

Stage = tuple[RowExchange | None, Any, torch.Tensor, torch.Tensor]


def attended_stages(
    k: torch.Tensor, v: torch.Tensor, program: RankProgram, group: dist.ProcessGroup
) -> Iterator[Stage]:
    """The rank's own keys and values, then those of each stage as they arrive.

    While the caller computes with one stage, the rows of the next are under way.

    Yields:
        The exchange that brought the rows (None for the rank's own), the engine's schedule, keys and values.
    """
    casts = (group_cast((k, v), stage.exchange, group) for stage in program.stages)
    upcoming = next(casts, None)
    if program.blocking and upcoming is not None:
        upcoming.transfer.wait()
    yield None, program.local, k, v
    for stage in program.stages:
        current, upcoming = upcoming, next(casts, None)
        assert current is not None
        stage_k, stage_v = current.wait()
        yield stage.exchange, stage.schedule, stage_k, stage_v


class DistAttn(torch.autograd.Function):
    """``(q, k, v)`` of this rank's rows to ``(out, lse)`` of its rows, attending the rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        program: RankProgram,
        group: dist.ProcessGroup,
        params: AttnParams,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        engine = program.engine
        state: State | None = None
        for _, schedule, stage_k, stage_v in attended_stages(k, v, program, group):
            state = engine.forward(q, stage_k, stage_v, schedule, params, state)
        assert state is not None
        out, lse, _ = state
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.program, ctx.group, ctx.params = program, group, params
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        program, group, params = ctx.program, ctx.group, ctx.params
        engine = program.engine
        query_grads = engine.start_backward(out, dout, lse, dlse, params)
        dtype = None if program.stages else k.dtype  # as in the forward pass, parts are added up before rounding
        key_grads: tuple[torch.Tensor, torch.Tensor] | None = None
        homeward: GroupReduce | None = None
        for exchange, schedule, stage_k, stage_v in attended_stages(k, v, program, group):
            part = engine.backward(query_grads, q, stage_k, stage_v, schedule, params, dtype)
            if exchange is None or key_grads is None:
                key_grads = part
                continue
            previous, homeward = homeward, group_reduce(part, exchange, group)
            if previous is not None:
                previous.wait(into=key_grads)
        assert key_grads is not None
        if homeward is not None:
            homeward.wait(into=key_grads)
        dk, dv = key_grads
        return engine.finish_backward(query_grads, params, q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
