"""Attention over the ranks: the staged forward and backward loops."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from magi_attention.comm.exchange import Cast, Exchange
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import State
from magi_attention.kernels.second_derivative import no_second_derivative
from magi_attention.runtime.key_grads import KeyGrads
from magi_attention.runtime.program import PassProgram, RankProgram
from magi_attention.runtime.spans import span
from magi_attention.runtime.stage_lane import StageLane, StageStream


class Stage(NamedTuple):
    """Keys and values to compute with.

    Attributes:
        name: What traces call them.
        exchange: What brought them, behind those of the rank's own that lie ahead; None for its own alone.
        schedule: The engine's, of the rank's queries and these keys.
        k: Keys.
        v: Values.
        alone: Whether no other keys and values are under way meanwhile.
    """

    name: str
    exchange: Exchange | None
    schedule: Any
    k: torch.Tensor
    v: torch.Tensor
    alone: bool


def start_cast(number: int, k: torch.Tensor, v: torch.Tensor, program: PassProgram) -> Cast | None:
    """Start sending keys and values for the ``number``-th stage, counted from 1; None behind the last."""
    if number > len(program.stages):
        return None
    with span(f"cast {number}"):
        stage = program.stages[number - 1]
        return stage.exchange.cast((k, v), stage.ahead)


def all_stages(upcoming: Cast | None, k: torch.Tensor, v: torch.Tensor, program: PassProgram) -> Iterator[Stage]:
    """The rank's own keys and values, then those of each stage as they arrive, the first of which are under way.

    While the caller computes with one stage, the rows of the next travel.
    """
    if program.blocking and upcoming is not None:
        upcoming.transfer.wait()
    yield Stage("own keys", None, program.local, k, v, alone=program.blocking or upcoming is None)
    for number, stage in enumerate(program.stages, 1):
        current, upcoming = upcoming, start_cast(number + 1, k, v, program)
        assert current is not None
        with span(f"wait for cast {number}"):
            stage_k, stage_v = current.wait()
        del current  # and with it the memory of what was sent
        yield Stage(f"stage {number}", stage.exchange, stage.schedule, stage_k, stage_v, alone=upcoming is None)


@functools.lru_cache
def beside_transfers(params: AttnParams, alone: bool) -> AttnParams:
    """The parameters of kernels that have no transfers beside them, or some."""
    return replace(params, sm_margin=0) if alone else replace(params, yields=params.sm_margin == 0)


def forward_lane(q: torch.Tensor, program: RankProgram, params: AttnParams) -> StageLane:
    """Where the stages of a forward pass run."""
    overlaps = program.parts_apart and not program.forward.blocking
    return _lane(q, params, overlaps and program.engine.parts_side_by_side)


def backward_lane(q: torch.Tensor, program: RankProgram, params: AttnParams) -> StageLane:
    """Where the stages of a backward pass run."""
    overlaps = bool(program.backward.stages) and program.own_keys_fill
    return _lane(q, params, overlaps and program.engine.adds_in_any_order(params))


def _lane(q: torch.Tensor, params: AttnParams, overlaps: bool) -> StageLane:
    """A stream for stages, if they may run beside own keys, and programs need not leave room for others."""
    return StageStream(q.device) if overlaps and q.is_cuda and params.sm_margin == 0 else StageLane()


class DistAttn(torch.autograd.Function):
    """``(q, k, v)`` of this rank's rows to ``(out, lse)`` of its rows, attending the rows of all ranks.

    If ``params`` ask for them, the highest scores of these rows come third, one of each head. The gradient of the sink
    is the sum over these rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        program: RankProgram,
        params: AttnParams,
        sink: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        def attend(stage: Stage, state: State | None) -> State:
            with span(f"forward {stage.name}"):
                stage_params = beside_transfers(params, stage.alone)
                return program.engine.forward(q, stage.k, stage.v, stage.schedule, stage_params, state, sink)

        lane = forward_lane(q, program, params)
        with lane.after(lane.now()):
            upcoming = start_cast(1, k, v, program.forward)
        before_own_keys = lane.now()
        stages = all_stages(upcoming, k, v, program.forward)
        del upcoming
        state = attend(next(stages), None)
        with lane.after(before_own_keys):
            for stage in stages:
                state = attend(stage, state)
        out, lse, *_ = state
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.program, ctx.params = program, params
        if not params.return_max_logits:
            return out, lse
        max_logits = state.max_logits()
        ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @no_second_derivative
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        program, params = ctx.program, ctx.params
        engine = program.engine
        lane = backward_lane(q, program, params)
        with lane.after(lane.now()):
            upcoming = start_cast(1, k, v, program.backward)
        query_grads = engine.start_backward(out, dout, lse, dlse, params, q.shape[2])
        dtype = None if program.backward.stages else k.dtype  # parts are added up before rounding
        wire_dtype = k.dtype if program.rounds_grads else None

        def gradients(stage: Stage, alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
            with span(f"backward {stage.name}"):
                stage_params = beside_transfers(params, alone)
                return engine.backward(query_grads, q, stage.k, stage.v, stage.schedule, stage_params, dtype)

        before_own_keys = lane.now()
        stages = all_stages(upcoming, k, v, program.backward)
        del upcoming
        own_keys = next(stages)
        own_grads = gradients(own_keys, own_keys.alone)
        with lane.after(before_own_keys):
            key_grads = KeyGrads(own_grads, apart=lane.overlaps and len(program.backward.stages) > 1)
            for stage in stages:
                part = gradients(stage, stage.alone and not key_grads.under_way)
                assert stage.exchange is not None
                with span(f"reduce {stage.name}"):
                    key_grads.send_home(part, stage.exchange, wire_dtype)
                del part  # before the next one is made
        with span("finish backward"):
            # These read and write memory only, while the last rows are on their way.
            dsink = None if sink is None else engine.sink_grad(query_grads, sink, params)
            dq = engine.finish_backward(query_grads, params, q.dtype)
            with lane.after(lane.now()):
                key_grads.take_in()
            dk, dv = key_grads.total()
            return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, dsink
