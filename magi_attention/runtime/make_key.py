"""From a mask to a key whose plan is in the cache, and back from a key to its plan."""

from collections.abc import Callable
from dataclasses import replace

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.integers import as_int
from magi_attention.planning import AttnPlan, RankPlan, Sources, plan_attention, plan_new_mask
from magi_attention.planning.attn_plan import check_new_mask
from magi_attention.planning.check_types import check_config, check_plan
from magi_attention.planning.chunking import check_pad_size
from magi_attention.planning.sources import SELF_ATTENTION
from magi_attention.runtime.cache import runtimes
from magi_attention.runtime.groups import CpGroup
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.runtime import DistAttnRuntime


def make_key(
    mask: AttnMask,
    pad_size: int,
    chunk_size: int,
    group: CpGroup,
    config: DistAttnConfig,
    plan: AttnPlan | RankPlan | None,
    sources: Sources = SELF_ATTENTION,
) -> DistAttnRuntimeKey:
    """Make the key of a mask, plan it unless its plan is in the cache or given, and start comparing it among the ranks.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If sizes don't fit together, ``config`` needs nodes that ``group`` does not have, or ``plan`` was
            made from other arguments.
    """
    _check_types(config, plan)
    pad_size, chunk_size = as_int(pad_size, "pad_size"), as_int(chunk_size, "chunk_size")
    group = group.with_levels_for(config.intra_node)
    mesh_shape, planned = group.mesh_shape, group.planned_for(config.intra_node)
    key = DistAttnRuntimeKey(
        mask, pad_size, chunk_size, group.ranks, group.flat.group_name, config, mesh_shape=mesh_shape, sources=sources
    )
    if planned != group:  # what is enough for nodes need not be for their ranks
        check_pad_size(mask.total_seqlen_q, group.size(), chunk_size, pad_size, config.dispatch_config.uneven)

    def make_plan() -> AttnPlan:
        made = plan_attention(mask, planned.size(), chunk_size, pad_size, config, sources=sources)
        return made.on_mesh(planned.mesh_shape)

    return _enter(key, group, plan, make_plan)


def make_key_after_dispatch(
    mask: AttnMask,
    key: DistAttnRuntimeKey,
    config: DistAttnConfig | None,
    plan: AttnPlan | RankPlan | None,
    sources: Sources | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of another mask over the rows that ``key`` dispatched, which stay where they are.

    ``sources`` is None where the queries attend the keys of these rows, else it tells of keys of another source.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the mask is of another size, the key's plan was evicted, ``config`` would dispatch otherwise, or
            ``plan`` was made from other arguments.
    """
    runtime = runtimes.get(key)
    config = key.config if config is None else config
    _check_types(config, plan)
    base = runtime.plan
    new_sources, dispatch_of = check_new_mask(mask, base, config, sources)
    new_key = replace(key, mask=mask, config=config, dispatch_of=dispatch_of, sources=new_sources)
    return _enter(new_key, runtime.cp_group, plan, lambda: plan_new_mask(mask, base, config, sources=sources))


def _check_types(config: DistAttnConfig, plan: AttnPlan | RankPlan | None) -> None:
    check_config(config, "dist_attn_config")
    if plan is not None:
        check_plan(plan)


def _enter(
    key: DistAttnRuntimeKey,
    group: CpGroup,
    plan: AttnPlan | RankPlan | None,
    make_plan: Callable[[], AttnPlan],
) -> DistAttnRuntimeKey:
    """Put a key's plan into the cache unless it is there, and start comparing the key among the ranks."""
    planned = group.planned_for(key.config.intra_node)
    if plan is not None:  # also where it is not needed, so that a wrong one is refused on all ranks
        _check_plan(plan, key, planned)
    runtime = runtimes.find(key)
    if runtime is None or runtime.cp_group != group:  # a group made anew may bear the name of one that was destroyed
        plan = make_plan() if plan is None else plan
        rank_plan = plan.rank(planned.flat.rank()) if isinstance(plan, AttnPlan) else plan
        runtime = DistAttnRuntime(rank_plan, group)
        runtimes.put(key, runtime)
    if key.cp_size > 1:
        runtime.agreement.ask(key.digest, group.flat)
    return key


def _check_plan(plan: AttnPlan | RankPlan, key: DistAttnRuntimeKey, ranks: CpGroup) -> None:
    """Refuse a plan made ahead from other arguments."""
    for name, planned, wanted in (
        ("mask", plan.mask, key.mask),
        ("cp_size", plan.dispatch.cp_size, ranks.size()),
        ("rank", plan.rank if isinstance(plan, RankPlan) else ranks.flat.rank(), ranks.flat.rank()),
        ("chunk_size", plan.dispatch.chunk_size, key.chunk_size),
        ("pad_size", plan.dispatch.pad_size, key.pad_size),
        ("config", plan.config, key.config),
        ("dispatch_of", plan.dispatch_of, key.dispatch_of),
        ("mesh_shape", plan.mesh_shape, ranks.mesh_shape),
        ("sources", plan.sources, key.sources),
    ):
        if planned != wanted:
            hint = "; magi_attn_mask_key takes the very mask of a plan" if name == "mask" else ""
            raise ValueError(f"plan was made with {name} {planned!r}, but the key has {name} {wanted!r}{hint}")


def ready_runtime(key: DistAttnRuntimeKey) -> DistAttnRuntime:
    """What ``key`` stands for, once it is known that the ranks agree about it.

    Raises:
        TypeError: If ``key`` is no key.
        ValueError: If its plan was evicted, or, on every rank, if the ranks made it from different masks.
    """
    runtime = runtimes.get(key)
    runtime.agreement.settle()
    return runtime
