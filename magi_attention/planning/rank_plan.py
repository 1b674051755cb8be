"""RankPlan: one rank's part of a plan, all that it needs to run."""

from dataclasses import dataclass
from functools import cached_property

from magi_attention.mask.bands import IntArray, area
from magi_attention.planning.routing import GroupCollectivePlan
from magi_attention.planning.shared_plan import SharedPlan
from magi_attention.planning.two_level import TwoLevelPlan


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One stage of remote work on one rank.

    Attributes:
        collective: The rows that travel, straight to who needs them or in two levels.
        runs: ``(start, end)`` of the global rows in the buffer of received rows, ascending.
        bands: What the rank's queries attend in that buffer, in local rows and buffer rows.
    """

    collective: GroupCollectivePlan | TwoLevelPlan
    runs: IntArray
    bands: IntArray


@dataclass(frozen=True, eq=False, kw_only=True)
class RankPlan(SharedPlan):
    """One rank's part of a plan: all that it needs to run. A picklable value without a process group or a device.

    Its attributes are those of :class:`~magi_attention.planning.shared_plan.SharedPlan`, and:

    Attributes:
        rank: This rank.
        local_bands: What the rank's queries attend among its own keys, in local rows.
        stages: The remote work, in order. Every rank has the same number of stages.
        own_keys_fill: Whether own keys fill what stages leave in the backward pass, if the engine allows it.
        first_cast_rows: The most rows that any rank sends or receives in the first stage.
    """

    rank: int
    local_bands: IntArray
    stages: tuple[StagePlan, ...]
    own_keys_fill: bool
    first_cast_rows: int

    @property
    def local_seqlen_q(self) -> int:
        """Rows of queries on this rank."""
        return self.dispatch.local_seqlens[self.rank]

    @property
    def local_seqlen_k(self) -> int:
        """Rows of keys and values on this rank."""
        return self.dispatch_k.local_seqlens[self.rank]

    @property
    def num_recv_rows(self) -> int:
        """Distinct remote rows that the rank receives, all stages together."""
        return sum(stage.collective.num_recv_rows for stage in self.stages)

    @property
    def num_send_rows(self) -> int:
        """Rows that the rank sends, a row once for each rank it goes to."""
        return sum(stage.collective.num_send_rows for stage in self.stages)

    @cached_property
    def area(self) -> int:
        """Unmasked cells that the rank computes."""
        return int(area(self.local_bands).sum()) + sum(int(area(stage.bands).sum()) for stage in self.stages)
