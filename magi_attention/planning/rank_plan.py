"""RankPlan: one rank's part of a plan, all that it needs to run."""

from dataclasses import dataclass
from functools import cached_property

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, area
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.overlap import OverlapChoice, is_blocking
from magi_attention.planning.routing import GroupCollectivePlan
from magi_attention.planning.sources import SELF_ATTENTION, Sources
from magi_attention.planning.two_level import MeshShape, TwoLevelPlan


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


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of a plan: all that it needs to run. A picklable value without a process group or a device.

    Attributes:
        mask: The global mask.
        config: The configuration it was planned with.
        dispatch: The chunks of queries of all ranks.
        dispatch_k: The chunks of keys; ``dispatch`` itself where they are of the same source.
        rank: This rank.
        local_bands: What the rank's queries attend among its own keys, in local rows.
        stages: The remote work, in order. Every rank has the same number of stages.
        own_keys_fill: Whether own keys fill what stages leave in the backward pass, if the engine allows it.
        sources: Where queries and keys come from.
        dispatch_of: The mask that the queries' chunks were given to ranks for; None for ``mask`` itself.
        overlap_choice: Why there are as many stages as there are; None where the configuration says how many.
        mesh_shape: Nodes, and ranks in each, where rows travel in two levels; None where they travel in one.
    """

    mask: AttnMask
    config: DistAttnConfig
    dispatch: DispatchPlan
    dispatch_k: DispatchPlan
    rank: int
    local_bands: IntArray
    stages: tuple[StagePlan, ...]
    own_keys_fill: bool
    sources: Sources = SELF_ATTENTION
    dispatch_of: AttnMask | None = None
    overlap_choice: OverlapChoice | None = None
    mesh_shape: MeshShape | None = None

    @property
    def local_seqlen_q(self) -> int:
        """Rows of queries on this rank."""
        return self.dispatch.local_seqlens[self.rank]

    @property
    def local_seqlen_k(self) -> int:
        """Rows of keys and values on this rank."""
        return self.dispatch_k.local_seqlens[self.rank]

    @property
    def blocking(self) -> bool:
        """Whether rows are waited for before anything is computed (overlap degree 0)."""
        return is_blocking(self.config.overlap_config, self.overlap_choice)

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
