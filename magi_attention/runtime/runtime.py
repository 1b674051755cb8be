"""DistAttnRuntime: a rank's plan, its process group, and the plan made ready for a device."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist

from magi_attention.comm import Exchange
from magi_attention.comm.row_exchange import copy_indices
from magi_attention.kernels.engine import Engine
from magi_attention.kernels.parts import make_parts
from magi_attention.mask.bands import IntArray
from magi_attention.planning import DispatchPlan, RankPlan
from magi_attention.planning.joining import join_first_stage
from magi_attention.planning.node_shares import cut_among_ranks
from magi_attention.planning.roll_plan import plan_roll
from magi_attention.runtime.agreement import Agreement
from magi_attention.runtime.dispatch import DispatchProgram
from magi_attention.runtime.groups import CpGroup
from magi_attention.runtime.roll import RollProgram

Side = Literal["q", "k"]


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
        apart: Whether no query attends both own keys in ``local`` and rows of a stage, or of two stages.
    """

    local: Any
    stages: tuple[StageProgram, ...]
    blocking: bool
    apart: bool


@dataclass(frozen=True, eq=False)
class RankProgram:
    """A rank's plan, ready to run on a device with an engine.

    Attributes:
        engine: The attention kernels.
        forward: The forward pass, in which queries may wait for the first stage.
        backward: The backward pass, with the same exchanges.
        own_keys_fill: Whether own keys fill what stages leave in the backward pass, if the engine allows it.
        rounds_grads: Whether partial gradients of keys travel home in the type of the keys.
    """

    engine: Engine
    forward: PassProgram
    backward: PassProgram
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
            one_host: Whether the ranks are processes of one host.
        """
        exchanges = [group.exchange(stage.collective, device) for stage in plan.stages]

        def compile_pass(local: IntArray, bands: list[IntArray], ahead: IntArray | None) -> PassProgram:
            parts = make_parts([local, *bands], plan.local_seqlen_q)
            schedules: list[Any] = []
            for stage, stage_bands, part in zip(plan.stages, bands, parts[1:], strict=True):
                num_ahead = 0 if schedules or ahead is None else len(ahead)
                num_keys = num_ahead + stage.collective.num_recv_rows
                schedules.append(engine.schedule(stage_bands, plan.local_seqlen_q, num_keys, part))
            own = engine.schedule(local, plan.local_seqlen_q, plan.local_seqlen_k, parts[0])
            stages = [StageProgram(*stage) for stage in zip(exchanges, schedules, strict=True)]
            if ahead is not None:
                stages[0] = replace(stages[0], ahead=copy_indices([ahead], device)[0])
            return PassProgram(own, tuple(stages), plan.blocking, parts[0].apart)

        bands = [stage.bands for stage in plan.stages]
        forward = backward = compile_pass(plan.local_bands, bands, None)
        if (joined := join_first_stage(plan, one_host)) is not None:
            forward = compile_pass(joined.early, [joined.bands, *bands[1:]], joined.ahead)
        return cls(engine, forward, backward, plan.own_keys_fill, plan.config.grad_wire_dtype == "input")


class DistAttnRuntime:
    """What a key stands for on this rank: its plan, and what is made of it for devices at first use.

    Attributes:
        plan: This rank's plan; its node's where the ranks of a node split heads.
        cp_group: The context-parallel process groups.
        agreement: Whether the ranks agree about the key.
    """

    def __init__(self, plan: RankPlan, cp_group: CpGroup) -> None:
        self.plan = plan
        self.cp_group = cp_group
        self.agreement = Agreement()
        self._programs: dict[tuple[str, torch.device], RankProgram] = {}
        self._dispatches: dict[tuple[Side, torch.device], DispatchProgram] = {}
        self._rolls: dict[tuple[int, torch.device], RollProgram] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of all context-parallel ranks."""
        return self.cp_group.flat

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return self.group.rank()

    @cached_property
    def dispatch(self) -> DispatchPlan:
        """The chunks of queries of all ranks."""
        return self._of_ranks(self.plan.dispatch)

    @cached_property
    def dispatch_k(self) -> DispatchPlan:
        """The chunks of keys of all ranks; ``dispatch`` itself where they are of the same source."""
        return self.dispatch if self.plan.dispatch_k is self.plan.dispatch else self._of_ranks(self.plan.dispatch_k)

    @property
    def splits_heads(self) -> bool:
        """Whether the ranks of a node split heads."""
        return self.plan.config.intra_node == "heads"

    def program(self, engine: Engine, device: torch.device) -> RankProgram:
        """The plan made ready for an engine and a device."""
        name = (engine.name, device)
        if name not in self._programs:
            planned = self.cp_group.planned_for(self.plan.config.intra_node)
            one_host = self.agreement.one_host and not self.splits_heads
            self._programs[name] = RankProgram.prepare(self.plan, planned, engine, device, one_host)
        return self._programs[name]

    def dispatch_of(self, side: Side) -> DispatchPlan:
        """The chunks of queries, ``"q"``, or of keys, ``"k"``.

        Raises:
            ValueError: If ``side`` is neither.
        """
        match side:
            case "q":
                return self.dispatch
            case "k":
                return self.dispatch_k
            case _:
                raise ValueError(f"side must be 'q' or 'k', not {side!r}")

    def dispatch_program(self, side: Side, device: torch.device) -> DispatchProgram:
        """These chunks made ready for a device."""
        plan = self.dispatch_of(side)
        name: tuple[Side, torch.device] = ("q" if plan is self.dispatch else "k", device)
        if name not in self._dispatches:
            self._dispatches[name] = DispatchProgram(plan, self.group, device)
        return self._dispatches[name]

    def roll(self, shift: int, device: torch.device) -> RollProgram:
        """A shift of the sequence made ready for a device."""
        name = (shift % self.dispatch.total_seqlen, device)
        if name not in self._rolls:
            self._rolls[name] = RollProgram.on_device(plan_roll(self.dispatch, self.rank, name[0]), device)
        return self._rolls[name]

    def free_devices(self) -> None:
        """Forget what was made for devices, which is made anew when it is needed again."""
        self._programs.clear()
        self._dispatches.clear()
        self._rolls.clear()

    def _of_ranks(self, dispatch: DispatchPlan) -> DispatchPlan:
        return cut_among_ranks(dispatch, self.cp_group.intra.size()) if self.splits_heads else dispatch
