"""SharedPlan: what the plan of all ranks and every rank's part of it have in common."""

from dataclasses import dataclass, fields
from typing import Any

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.overlap import OverlapChoice, is_blocking
from magi_attention.planning.sources import SELF_ATTENTION, Sources
from magi_attention.planning.two_level import MeshShape


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedPlan:
    """What is planned, and which rank has which rows.

    Attributes:
        mask: The global mask.
        config: The configuration it was planned with.
        dispatch: The chunks of queries of all ranks.
        dispatch_k: The chunks of keys; ``dispatch`` itself where they are of the same source.
        sources: Where queries and keys come from.
        dispatch_of: The mask that the queries' chunks were given to ranks for; None for ``mask`` itself.
        overlap_choice: Why there are as many stages as there are; None where the configuration says how many.
        mesh_shape: Nodes, and ranks in each, where rows travel in two levels; None where they travel in one.
    """

    mask: AttnMask
    config: DistAttnConfig
    dispatch: DispatchPlan
    dispatch_k: DispatchPlan
    sources: Sources = SELF_ATTENTION
    dispatch_of: AttnMask | None = None
    overlap_choice: OverlapChoice | None = None
    mesh_shape: MeshShape | None = None

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return self.dispatch.cp_size

    @property
    def blocking(self) -> bool:
        """Whether rows are waited for before anything is computed (overlap degree 0)."""
        return is_blocking(self.config.overlap_config, self.overlap_choice)

    def shared(self) -> dict[str, Any]:
        """The attributes above by their names, to make another plan with."""
        return {field.name: getattr(self, field.name) for field in fields(SharedPlan)}
