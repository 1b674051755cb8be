"""From a mask to a key whose plan is in the cache, and back from a key to its plan."""

import torch.distributed as dist

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.integers import as_int
from magi_attention.planning import AttnPlan, RankPlan, plan_attention
from magi_attention.runtime.agreement import start_agreement
from magi_attention.runtime.cache import runtimes
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.runtime import DistAttnRuntime


def make_key(
    mask: AttnMask,
    pad_size: int,
    chunk_size: int,
    group: dist.ProcessGroup,
    config: DistAttnConfig,
    plan: AttnPlan | RankPlan | None,
) -> DistAttnRuntimeKey:
    """Make the key of a mask, plan it unless its plan is in the cache or given, and start comparing it among the ranks.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If sizes don't fit together, or ``plan`` was made from other arguments.
    """
    if not isinstance(config, DistAttnConfig):
        raise TypeError(f"dist_attn_config must be a DistAttnConfig, not {config!r}")
    if plan is not None and not isinstance(plan, (AttnPlan, RankPlan)):
        raise TypeError(f"plan must be what plan_attention returns, or one rank's part of it, not {plan!r}")
    pad_size, chunk_size = as_int(pad_size, "pad_size"), as_int(chunk_size, "chunk_size")
    ranks = tuple(dist.get_process_group_ranks(group))
    key = DistAttnRuntimeKey(mask, pad_size, chunk_size, ranks, group.group_name, config)
    runtime = runtimes.find(key)
    if runtime is None or runtime.group is not group:  # a group made anew may bear the name of one that was destroyed
        rank = dist.get_rank(group)
        plan = plan_attention(mask, len(ranks), chunk_size, pad_size, config) if plan is None else plan
        rank_plan = plan.rank(rank) if isinstance(plan, AttnPlan) else plan
        _check_plan(rank_plan, key, rank)
        runtime = DistAttnRuntime(rank_plan, group)
        runtimes.put(key, runtime)
    if len(ranks) > 1:
        runtime.agreements.append(start_agreement(key.digest, group))
    return key


def _check_plan(plan: RankPlan, key: DistAttnRuntimeKey, rank: int) -> None:
    """Refuse a plan made ahead from other arguments."""
    for name, planned, wanted in (
        ("mask", plan.mask, key.mask),
        ("cp_size", plan.dispatch.cp_size, key.cp_size),
        ("rank", plan.rank, rank),
        ("chunk_size", plan.dispatch.chunk_size, key.chunk_size),
        ("pad_size", plan.dispatch.pad_size, key.pad_size),
        ("config", plan.config, key.config),
    ):
        if planned != wanted:
            raise ValueError(f"plan was made with {name} {planned!r}, but the key has {name} {wanted!r}")


def ready_runtime(key: DistAttnRuntimeKey) -> DistAttnRuntime:
    """What ``key`` stands for, once it is known that the ranks agree about it.

    Raises:
        TypeError: If ``key`` is no key.
        ValueError: If its plan was evicted, or, on every rank, if the ranks made it from different masks.
    """
    runtime = runtimes.get(key)
    runtime.settle_agreements()
    return runtime
