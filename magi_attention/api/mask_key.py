"""The key of a mask that is a value already."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api.outside_graphs import outside_graphs
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.planning import AttnPlan, RankPlan, Sources
from magi_attention.runtime.groups import resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import make_key


@outside_graphs
def magi_attn_mask_key(
    mask: AttnMask,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    *,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    plan: AttnPlan | RankPlan | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of an :class:`~magi_attention.mask.AttnMask`, such as the builders make.

    As :func:`~magi_attention.api.magi_attn_interface.magi_attn_flex_key` with the mask's slices, but without spelling
    it in slices, which may take more of them than the mask has bands. Every rank of the group calls it with the same
    arguments.

    Args:
        mask: The mask.
        pad_size: Rows of padding at the end of the queries, from
            :func:`~magi_attention.api.functools.compute_pad_size`; with ``DispatchConfig(uneven=True)`` any, also 0.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh; all its ranks take part.
        dist_attn_config: How to balance the ranks and to split communication into stages.
        is_same_source: Whether queries and keys come from the same tokens (self-attention).
        is_q_permutable: Whether any rank may have any chunk of queries.
        is_k_permutable: Whether any rank may have any chunk of keys.
        plan: A plan of the same mask, made ahead with :func:`~magi_attention.planning.plan_attention`.

    Returns:
        The key.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If sizes don't fit together, not exactly one of ``cp_group`` and ``cp_mesh`` is given, rows must
            keep their order but ``dist_attn_config`` asks for another, or ``plan`` was made from other arguments.
    """
    if not isinstance(mask, AttnMask):
        raise TypeError(f"mask must be an AttnMask, as the builders make, not {mask!r}")
    sources = Sources(is_same_source, is_q_permutable, is_k_permutable)
    return make_key(mask, pad_size, chunk_size, resolve_group(cp_group, cp_mesh), dist_attn_config, plan, sources)
