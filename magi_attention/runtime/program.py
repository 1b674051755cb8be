"""RankProgram: a rank's plan made ready to run on a device with an engine."""

from dataclasses import dataclass
from typing import Any

import torch

from magi_attention.comm import Exchange
from magi_attention.comm.row_exchange import copy_indices
from magi_attention.kernels.engine import Engine
from magi_attention.kernels.parts import make_parts
from magi_attention.planning import RankPlan
from magi_attention.planning.joining import join_first_stage
from magi_attention.runtime.groups import CpGroup


@dataclass(frozen=True, eq=False)
class StageProgram:
    """One stage of a pass, ready to run.

    Attributes:
        exchange: The rows that travel.
        schedule: The engine's, of what to compute with them.
        ahead: Local rows that lie in front of the received ones, int32; None for none.
    """

    exchange: Exchange
    schedule: Any
    ahead: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class PassProgram:
    """A forward or a backward pass, ready to run.

    Attributes:
        local: The engine's schedule of what queries attend among the rank's own keys alone.
        stages: The remote work, in order.
        blocking: Whether to wait for remote rows before computing anything.
    """

    local: Any
    stages: tuple[StageProgram, ...]
    blocking: bool


@dataclass(frozen=True, eq=False)
class RankProgram:
    """A rank's plan, ready to run on a device with an engine.

    Attributes:
        engine: The attention kernels.
        forward: The forward pass, in which queries may wait for the first stage.
        backward: The backward pass, with the same exchanges.
        parts_apart: Whether the calls of the forward pass are apart, see :mod:`magi_attention.kernels.parts`.
        own_keys_fill: Whether own keys fill what stages leave in the backward pass, if the engine allows it.
        rounds_grads: Whether partial gradients of keys travel home in the type of the keys.
    """

    engine: Engine
    forward: PassProgram
    backward: PassProgram
    parts_apart: bool
    own_keys_fill: bool
    rounds_grads: bool

    @classmethod
    def prepare(
        cls, plan: RankPlan, group: CpGroup, engine: Engine, device: torch.device, one_host: bool
    ) -> "RankProgram":
        """Compile a plan's bands into the engine's schedules and copy its routing to ``device``.

        Args:
            plan: The plan.
            group: The ranks that it is over.
            engine: The attention kernels.
            device: Where they run.
            one_host: Whether the rows travel inside of a host, where more queries may wait for the first stage.
        """
        joined = join_first_stage(plan, one_host)
        bands = [plan.local_bands, *(stage.bands for stage in plan.stages)]
        keys = [plan.local_seqlen_k, *(stage.collective.num_recv_rows for stage in plan.stages)]
        exchanges = [group.exchange(stage.collective, device) for stage in plan.stages]
        ahead: list[torch.Tensor | None] = [None] * len(exchanges)
        calls = list(zip(bands, keys, strict=True))
        if joined is not None:
            calls[:2] = (joined.early, keys[0]), (joined.bands, keys[1] + len(joined.ahead))
            (ahead[0],) = copy_indices([joined.ahead], device)
        rows = plan.local_seqlen_q
        parts = make_parts([call_bands for call_bands, _ in calls], rows)
        forward = [engine.schedule(b, rows, n, part) for (b, n), part in zip(calls, parts, strict=True)]
        backward = list(forward)  # in which it does not matter that keys come in parts
        if joined is not None:
            backward[:2] = [engine.schedule(b, rows, n) for b, n in zip(bands[:2], keys[:2], strict=True)]

        def compile_pass(own: Any, schedules: list[Any], ahead: list[torch.Tensor | None]) -> PassProgram:
            stages = tuple(StageProgram(*stage) for stage in zip(exchanges, schedules, ahead, strict=True))
            return PassProgram(own, stages, plan.blocking)

        return cls(
            engine,
            compile_pass(forward[0], forward[1:], ahead),
            compile_pass(backward[0], backward[1:], [None] * len(exchanges)),
            parts[0].apart,
            plan.own_keys_fill,
            plan.config.grad_wire_dtype == "input",
        )
