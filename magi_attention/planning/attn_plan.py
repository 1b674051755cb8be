"""AttnPlan: who computes what and who sends what, for all ranks; RankPlan: one rank's part of it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.config import DispatchConfig, DistAttnConfig, LocalityDispatchAlg
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, area, relocate
from magi_attention.mask.integers import as_int
from magi_attention.planning.chunking import ChunkWork, compute_pad_size
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.load_balance import contiguous, min_heap, zigzag
from magi_attention.planning.locality import locality
from magi_attention.planning.routing import GroupCollectivePlan, Routes, route_stage


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One stage of remote work on one rank.

    Attributes:
        collective: The rows that travel.
        runs: ``(start, end)`` of the global rows in the buffer of received rows, ascending.
        bands: What the rank's queries attend in that buffer, in local rows and buffer rows.
    """

    collective: GroupCollectivePlan
    runs: IntArray
    bands: IntArray


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of a plan: all that it needs to run. A picklable value without a process group or a device.

    Attributes:
        mask: The global mask.
        config: The configuration it was planned with.
        dispatch: The chunks of all ranks.
        rank: This rank.
        local_bands: What the rank's queries attend among its own keys, in local rows.
        stages: The remote work, in order. Every rank has the same number of stages.
        dispatch_of: The mask that the chunks were given to ranks for; None for ``mask`` itself.
    """

    mask: AttnMask
    config: DistAttnConfig
    dispatch: DispatchPlan
    rank: int
    local_bands: IntArray
    stages: tuple[StagePlan, ...]
    dispatch_of: AttnMask | None = None

    @property
    def blocking(self) -> bool:
        """Whether rows are waited for before anything is computed (overlap degree 0)."""
        return self.config.overlap_config.degree == 0

    @property
    def num_recv_rows(self) -> int:
        """Distinct remote rows that the rank receives, all stages together."""
        return sum(stage.collective.num_recv_rows for stage in self.stages)

    @property
    def num_send_rows(self) -> int:
        """Rows that the rank sends, a row once for each rank it goes to."""
        return sum(len(stage.collective.send_rows) for stage in self.stages)

    @cached_property
    def area(self) -> int:
        """Unmasked cells that the rank computes."""
        return int(area(self.local_bands).sum()) + sum(int(area(stage.bands).sum()) for stage in self.stages)


@dataclass(frozen=True, eq=False)
class AttnPlan:
    """The plan of a mask over ``cp_size`` ranks: a picklable value, the same on every rank.

    Attributes:
        mask: The global mask.
        config: The configuration it was planned with.
        dispatch: The chunks of all ranks.
        work: Area and needed keys of each chunk.
        routes: All rows that travel.
        dispatch_of: The mask that the chunks were given to ranks for; None for ``mask`` itself.
    """

    mask: AttnMask
    config: DistAttnConfig
    dispatch: DispatchPlan
    work: ChunkWork
    routes: Routes
    dispatch_of: AttnMask | None = None

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return self.dispatch.cp_size

    def rank(self, rank: int) -> RankPlan:
        """One rank's part.

        Raises:
            ValueError: If ``rank`` is not one of the plan's ranks.
        """
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank {rank} is out of bounds: the plan has ranks 0 to {self.cp_size - 1}")
        own = self.dispatch.runs(rank)
        rank_bands = relocate(self.mask.bands, own, np.array([[0, self.mask.total_seqlen_k]]))
        local_rows = np.array([[0, self.dispatch.local_seqlen]])
        stages = []
        for stage in range(self.routes.num_stages):
            collective, runs = route_stage(self.routes, self.dispatch, rank, stage)
            stages.append(StagePlan(collective, runs, relocate(rank_bands, local_rows, runs)))
        local_bands = relocate(rank_bands, local_rows, own)
        return RankPlan(self.mask, self.config, self.dispatch, rank, local_bands, tuple(stages), self.dispatch_of)


def plan_attention(
    mask: AttnMask,
    cp_size: int,
    chunk_size: int,
    pad_size: int | None = None,
    config: DistAttnConfig | None = None,
) -> AttnPlan:
    """Plan a mask over ranks: a pure function, so it can run anywhere, also in a data loader's worker.

    Args:
        mask: The global mask of a self-attention.
        cp_size: Number of ranks.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        pad_size: Rows of padding at the end; the padded length must be a multiple of ``cp_size * chunk_size``. None
            for the fewest.
        config: How to balance and to split into stages; None for the defaults.

    Returns:
        The plan of all ranks; ``plan.rank(r)`` is one rank's part.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If the mask is empty or not square, or the padding does not fit.
    """
    config = DistAttnConfig() if config is None else config
    if mask.total_seqlen_q != mask.total_seqlen_k:
        raise ValueError(
            "self-attention needs total_seqlen_q == total_seqlen_k, "
            f"not {mask.total_seqlen_q} and {mask.total_seqlen_k}"
        )
    total = mask.total_seqlen_q
    if total == 0:
        raise ValueError("the mask has no rows: total_seqlen_q must be at least 1")
    fitting = compute_pad_size(total, cp_size, chunk_size)
    pad_size = fitting if pad_size is None else as_int(pad_size, "pad_size")
    if pad_size < fitting or (pad_size - fitting) % (cp_size * chunk_size):
        raise ValueError(
            f"pad_size {pad_size} does not fit: total_seqlen {total} + pad_size must be a multiple of "
            f"cp_size * chunk_size = {cp_size} * {chunk_size}; use {fitting}, as compute_pad_size gives"
        )
    num_chunks = (total + pad_size) // chunk_size
    work = ChunkWork.measure(mask, chunk_size, num_chunks)
    dispatch = DispatchPlan(total, pad_size, chunk_size, cp_size, assign_chunks(work, cp_size, config.dispatch_config))
    routes = Routes.plan(work.needs_of(dispatch.owner), dispatch, config.overlap_config)
    return AttnPlan(mask, config, dispatch, work, routes)


def plan_new_mask(mask: AttnMask, plan: AttnPlan | RankPlan, config: DistAttnConfig | None = None) -> AttnPlan:
    """Plan another mask over a sequence whose chunks have their ranks already, so that local rows stay what they are.

    For models whose layers have different masks: the input is dispatched once. The plan has its own routing and
    stages; its areas are not balanced anew.

    Args:
        mask: The other mask, over the same number of rows.
        plan: The plan to take the chunks from.
        config: How to split into stages; None for the plan's. Its ``dispatch_config`` must be the plan's.

    Returns:
        The plan of all ranks.

    Raises:
        ValueError: If ``mask`` is over another number of rows, or ``config`` would give chunks to ranks otherwise.
    """
    config = plan.config if config is None else config
    check_new_mask(mask, plan, config)
    dispatch = plan.dispatch
    dispatched_for = plan.mask if plan.dispatch_of is None else plan.dispatch_of
    work = ChunkWork.measure(mask, dispatch.chunk_size, len(dispatch.owner))
    routes = Routes.plan(work.needs_of(dispatch.owner), dispatch, config.overlap_config)
    return AttnPlan(mask, config, dispatch, work, routes, None if mask == dispatched_for else dispatched_for)


def check_new_mask(mask: AttnMask, plan: AttnPlan | RankPlan, config: DistAttnConfig) -> None:
    """Refuse a mask or a configuration that does not go with rows dispatched before.

    Raises:
        ValueError: If ``mask`` is over another number of rows, or ``config`` would give chunks to ranks otherwise.
    """
    total = plan.dispatch.total_seqlen
    if (mask.total_seqlen_q, mask.total_seqlen_k) != (total, total):
        raise ValueError(
            f"the new mask is over {mask.total_seqlen_q} queries and {mask.total_seqlen_k} keys, but the rows were "
            f"dispatched for a sequence of {total}"
        )
    if config.dispatch_config != plan.config.dispatch_config:
        raise ValueError(
            f"dist_attn_config has {config.dispatch_config!r}, but the rows were dispatched with "
            f"{plan.config.dispatch_config!r}, which a new mask cannot change"
        )


def assign_chunks(work: ChunkWork, cp_size: int, config: DispatchConfig) -> IntArray:
    """The rank of each chunk, by the rule that ``config`` names."""
    match config:
        case DispatchConfig(order="contiguous"):
            return contiguous(work, cp_size)
        case DispatchConfig(order="zigzag"):
            return zigzag(work, cp_size)
        case DispatchConfig(alg=LocalityDispatchAlg(tolerance=tolerance)):
            return locality(work, cp_size, tolerance)
        case _:
            return min_heap(work, cp_size)
