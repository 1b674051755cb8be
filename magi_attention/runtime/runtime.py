"""DistAttnRuntime: a rank's plan, its process group, and the plan made ready for a device."""

from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist

from magi_attention.kernels.captured import keep_if_captured
from magi_attention.kernels.engine import Engine
from magi_attention.planning import DispatchPlan, RankPlan
from magi_attention.planning.node_shares import cut_among_ranks
from magi_attention.planning.roll_plan import plan_roll
from magi_attention.runtime.agreement import Agreement
from magi_attention.runtime.dispatch import DispatchProgram
from magi_attention.runtime.groups import CpGroup
from magi_attention.runtime.program import RankProgram
from magi_attention.runtime.roll import RollProgram

Side = Literal["q", "k"]


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
            self._programs[name] = RankProgram.prepare(self.plan, planned, engine, device, self.agreement.one_host)
        return keep_if_captured(self._programs[name], device)

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
        return keep_if_captured(self._dispatches[name], device)

    def roll(self, shift: int, device: torch.device) -> RollProgram:
        """A shift of the sequence made ready for a device."""
        name = (shift % self.dispatch.total_seqlen, device)
        if name not in self._rolls:
            self._rolls[name] = RollProgram.on_device(plan_roll(self.dispatch, self.rank, name[0]), device)
        return keep_if_captured(self._rolls[name], device)

    def free_devices(self) -> None:
        """Forget what was made for devices and is read by no CUDA graph. It is made anew when it is needed again."""
        self._programs.clear()
        self._dispatches.clear()
        self._rolls.clear()

    def _of_ranks(self, dispatch: DispatchPlan) -> DispatchPlan:
        return cut_among_ranks(dispatch, self.cp_group.intra.size()) if self.splits_heads else dispatch
