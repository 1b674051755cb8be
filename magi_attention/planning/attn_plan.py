"""AttnPlan: who computes what and who sends what, for all ranks."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import DispatchConfig, DistAttnConfig, LocalityDispatchAlg
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, relocate
from magi_attention.mask.integers import as_int, as_size
from magi_attention.planning.check_types import check_config, check_mask, check_plan, check_sources
from magi_attention.planning.chunking import ChunkWork, check_pad_size
from magi_attention.planning.density import own_keys_fill
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.key_dispatch import dispatch_keys
from magi_attention.planning.load_balance import contiguous, min_heap, zigzag
from magi_attention.planning.locality import locality
from magi_attention.planning.overlap import route_in_stages
from magi_attention.planning.rank_plan import RankPlan, StagePlan
from magi_attention.planning.routing import GroupCollectivePlan, Routes, route_stage
from magi_attention.planning.runs import sum_by_group
from magi_attention.planning.shared_plan import SharedPlan
from magi_attention.planning.sources import SELF_ATTENTION, Sources
from magi_attention.planning.two_level import MeshShape, TwoLevelPlan, align_stages, route_two_levels


@dataclass(frozen=True, eq=False, kw_only=True)
class AttnPlan(SharedPlan):
    """The plan of a mask over ``cp_size`` ranks, all of them: a picklable value without a process group or a device.

    It follows from the mask, the sizes and the configuration alone, and not from who plans. So ranks that plan with
    equal arguments, and the same releases of this library and of numpy, have equal plans without a word between them.

    Its attributes are those of :class:`~magi_attention.planning.shared_plan.SharedPlan`, and:

    Attributes:
        work: Area and needed keys of each chunk of queries.
        routes: All rows that travel.
    """

    work: ChunkWork
    routes: Routes

    @cached_property
    def own_keys_fill(self) -> NDArray[np.bool_]:
        """On which ranks own keys fill what stages leave in the backward pass, if the engine allows it, ``(cp_size,)``.

        See :mod:`magi_attention.planning.density`. On none, where rows are waited for before anything is computed.
        """
        return own_keys_fill(self.work, self.dispatch) & (not self.blocking)

    @cached_property
    def first_cast_rows(self) -> int:
        """The most rows that any rank sends or receives in the first stage."""
        first, rows = self.routes.stage == 0, self.routes.rows
        sides = self.routes.owner, self.routes.receiver
        return max(int(sum_by_group(side[first], rows[first], self.cp_size).max()) for side in sides)

    def rank(self, rank: int) -> RankPlan:
        """One rank's part.

        Raises:
            TypeError: If ``rank`` is no integer.
            ValueError: If ``rank`` is not one of the plan's ranks.
        """
        rank = as_int(rank, "rank")
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank {rank} is out of bounds: the plan has ranks 0 to {self.cp_size - 1}")
        own_keys = self.dispatch_k.runs(rank)
        all_keys = np.array([[0, self.mask.total_seqlen_k]])
        rank_bands = relocate(self.mask.bands, self.dispatch.runs(rank), all_keys)
        local_rows = np.array([[0, self.dispatch.local_seqlens[rank]]])
        stages = []
        for stage in range(self.routes.num_stages):
            collective, runs = self._route(rank, stage)
            stages.append(StagePlan(collective, runs, relocate(rank_bands, local_rows, runs)))
        return RankPlan(
            **self.shared(),
            rank=rank,
            local_bands=relocate(rank_bands, local_rows, own_keys),
            stages=tuple(stages),
            own_keys_fill=bool(self.own_keys_fill[rank]),
            first_cast_rows=self.first_cast_rows,
        )

    def on_mesh(self, mesh_shape: tuple[int, int] | None) -> "AttnPlan":
        """This plan for ranks on several nodes: a row crosses to a node once, and is spread inside.

        Args:
            mesh_shape: Nodes, and ranks in each, as the shape of the ``cp_mesh`` of a key. Ranks are numbered node by
                node. With None, one node, or nodes of one rank there is one level only, and the plan stays as it is.

        Raises:
            TypeError: If the sizes are no integers.
            ValueError: If they do not multiply to the number of ranks, or the ranks of a node split heads.
        """
        if mesh_shape is not None and self.config.intra_node == "heads":
            raise ValueError(
                f"a plan with intra_node='heads' is over nodes, here {self.cp_size}, whose rows travel in one level: "
                "hand it over as it is, without on_mesh"
            )
        mesh = None if mesh_shape is None else MeshShape.of(mesh_shape, self.cp_size)
        if mesh is None or not mesh.has_two_levels:
            return self
        return replace(self, routes=align_stages(self.routes, mesh), mesh_shape=mesh)

    def _route(self, rank: int, stage: int) -> tuple[GroupCollectivePlan | TwoLevelPlan, IntArray]:
        if self.mesh_shape is None:
            return route_stage(self.routes, self.dispatch_k, rank, stage)
        return route_two_levels(self.routes, self.dispatch_k, self.mesh_shape, rank, stage)


def plan_attention(
    mask: AttnMask,
    cp_size: int,
    chunk_size: int,
    pad_size: int | None = None,
    config: DistAttnConfig | None = None,
    *,
    sources: Sources = SELF_ATTENTION,
) -> AttnPlan:
    """Plan a mask over ranks: a pure function, so it can run anywhere, also in a data loader's worker.

    Args:
        mask: The global mask.
        cp_size: Number of ranks; of nodes for ``DistAttnConfig(intra_node="heads")``.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        pad_size: Rows of padding at the end of the queries; the padded length must be a multiple of
            ``cp_size * chunk_size``, unless ``config`` has ``DispatchConfig(uneven=True)``. None for the fewest. A plan
            over nodes needs what :func:`~magi_attention.api.functools.compute_pad_size` gives for all ranks.
        config: How to balance and to split into stages; None for the defaults.
        sources: Where queries and keys come from; by default self-attention.

    Returns:
        The plan of all ranks; ``plan.rank(r)`` is one rank's part.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``cp_size`` or ``chunk_size`` is less than 1, the mask is empty, or not square though queries and
            keys are of the same source, or the padding does not fit.
    """
    check_mask(mask)
    cp_size, chunk_size = as_size(cp_size, "cp_size"), as_size(chunk_size, "chunk_size")
    config = DistAttnConfig() if config is None else config
    check_config(config, "config")
    check_sources(sources)
    dispatch_config = sources.dispatch_config(config.dispatch_config)
    total = mask.total_seqlen_q
    if sources.is_same_source and total != mask.total_seqlen_k:
        raise ValueError(
            f"self-attention needs total_seqlen_q == total_seqlen_k, not {total} and {mask.total_seqlen_k}; "
            "for keys of another source pass is_same_source=False"
        )
    if total == 0 or mask.total_seqlen_k == 0:
        name = "q" if total == 0 else "k"
        raise ValueError(f"the mask has no rows: total_seqlen_{name} must be at least 1")
    pad_size = check_pad_size(total, cp_size, chunk_size, pad_size, dispatch_config.uneven)
    num_chunks = -(-(total + pad_size) // chunk_size)
    work = ChunkWork.measure(mask, chunk_size, num_chunks, sources.is_same_source)
    dispatch = DispatchPlan(total, pad_size, chunk_size, cp_size, assign_chunks(work, cp_size, dispatch_config))
    return _plan_keys(mask, config, dispatch, work, sources)


def plan_new_mask(
    mask: AttnMask,
    plan: AttnPlan | RankPlan,
    config: DistAttnConfig | None = None,
    *,
    sources: Sources | None = None,
) -> AttnPlan:
    """Plan another mask over a sequence whose chunks have their ranks already, so that local rows stay what they are.

    For models whose layers have different masks: the input is dispatched once. The plan has its own routing and
    stages; its areas are not balanced anew.

    Args:
        mask: The other mask, of as many queries.
        plan: The plan of self-attention to take the chunks from.
        config: How to split into stages; None for the plan's. Its ``dispatch_config`` must be the plan's.
        sources: None when the keys are those of the plan, too. With ``is_same_source=False``, the plan's queries attend
            keys of another source, which are given to ranks here; ``is_q_permutable`` stays what it was.

    Returns:
        The plan of all ranks, on the same mesh.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``mask`` is over another number of rows, ``config`` would give chunks to ranks otherwise, or
            the plan's own keys are of another source than its queries.
    """
    check_mask(mask)
    check_plan(plan)
    config = plan.config if config is None else config
    check_config(config, "config")
    if sources is not None:
        check_sources(sources)
    sources, dispatch_of = check_new_mask(mask, plan, config, sources)
    dispatch = plan.dispatch
    work = ChunkWork.measure(mask, dispatch.chunk_size, len(dispatch.owner), sources.is_same_source)
    return _plan_keys(mask, config, dispatch, work, sources, dispatch_of).on_mesh(plan.mesh_shape)


def _plan_keys(
    mask: AttnMask,
    config: DistAttnConfig,
    dispatch: DispatchPlan,
    work: ChunkWork,
    sources: Sources,
    dispatch_of: AttnMask | None = None,
) -> AttnPlan:
    """Plan which rank has which keys, and which travel, once the queries have their ranks."""
    dispatch_k = dispatch
    if not sources.is_same_source:
        needs = work.needs_of(dispatch.owner)
        dispatch_k = dispatch_keys(
            needs, mask.total_seqlen_k, dispatch.chunk_size, dispatch.cp_size, sources.is_k_permutable
        )
    routes, choice = route_in_stages(mask, work, dispatch, dispatch_k, config)
    return AttnPlan(
        mask=mask,
        config=config,
        dispatch=dispatch,
        dispatch_k=dispatch_k,
        sources=sources,
        dispatch_of=dispatch_of,
        overlap_choice=choice,
        work=work,
        routes=routes,
    )


def check_new_mask(
    mask: AttnMask, plan: AttnPlan | RankPlan, config: DistAttnConfig, sources: Sources | None
) -> tuple[Sources, AttnMask | None]:
    """Refuse a mask, a configuration or sources that do not go with rows dispatched before.

    Returns:
        ``sources`` and ``dispatch_of`` of the new mask's plan.

    Raises:
        ValueError: See :func:`plan_new_mask`.
    """
    if not plan.sources.is_same_source:
        raise ValueError(
            "the rows were dispatched for cross-attention, whose keys have their ranks for one mask; dispatch with the "
            "key of self-attention over the queries, and make from it the keys of all masks (cross-attention with "
            "is_k_permutable=False then has the same rows of keys for all of them)"
        )
    sources = plan.sources if sources is None else replace(sources, is_q_permutable=plan.sources.is_q_permutable)
    total = plan.dispatch.total_seqlen
    if mask.total_seqlen_q != total or (sources.is_same_source and mask.total_seqlen_k != total):
        raise ValueError(
            f"the new mask is over {mask.total_seqlen_q} queries and {mask.total_seqlen_k} keys, but the rows were "
            f"dispatched for a sequence of {total}"
        )
    if mask.total_seqlen_k == 0:
        raise ValueError("the new mask has no keys: total_seqlen_k must be at least 1")
    if config.dispatch_config != plan.config.dispatch_config:
        raise ValueError(
            f"dist_attn_config has {config.dispatch_config!r}, but the rows were dispatched with "
            f"{plan.config.dispatch_config!r}, which a new mask cannot change"
        )
    if config.intra_node != plan.config.intra_node:
        raise ValueError(
            f"dist_attn_config has intra_node={config.intra_node!r}, but the rows were dispatched with "
            f"{plan.config.intra_node!r}, which a new mask cannot change"
        )
    dispatched_for = plan.mask if plan.dispatch_of is None else plan.dispatch_of
    is_its_own = sources == plan.sources and mask == dispatched_for
    return sources, None if is_its_own else dispatched_for


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
