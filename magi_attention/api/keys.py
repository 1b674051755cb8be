"""The functions that make keys: of packed documents, of slices, and of a mask that is a value already."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api.outside_graphs import outside_graphs
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.builders import SeqlensLike
from magi_attention.mask.ranges import RangesLike
from magi_attention.mask.slices import MaskTypesLike
from magi_attention.planning import AttnPlan, RankPlan, Sources
from magi_attention.planning.check_types import check_mask
from magi_attention.runtime.groups import resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import make_key


@outside_graphs
def magi_attn_varlen_key(
    cu_seqlens_q: SeqlensLike,
    cu_seqlens_k: SeqlensLike,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    causal: bool = False,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    *,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    plan: AttnPlan | RankPlan | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of a mask of packed documents: each document attends itself only.

    Every rank of the group calls it with the same arguments. The plan is made here, or found in the cache; nothing
    but a digest of the arguments is exchanged, and its comparison is waited for when the key is first used.

    Args:
        cu_seqlens_q: Where the documents begin, and the total: ``(num_documents + 1,)`` integers from 0 up.
        cu_seqlens_k: The same for keys. In self-attention the total is that of ``cu_seqlens_q``.
        pad_size: Rows of padding at the end of the queries, from
            :func:`~magi_attention.api.functools.compute_pad_size`; with ``DispatchConfig(uneven=True)`` any, also 0.
            Padding attends nothing.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh; all its ranks take part.
        causal: Whether a query attends only the keys up to its own position in its document (aligned at the end
            where the lengths differ).
        dist_attn_config: How to balance the ranks and to split communication into stages.
        is_same_source: See :func:`magi_attn_flex_key`, as for the next two.
        is_q_permutable: Whether any rank may have any chunk of queries.
        is_k_permutable: Whether any rank may have any chunk of keys.
        plan: A plan made ahead with :func:`~magi_attention.planning.plan_attention` from the same arguments.

    Returns:
        The key, to pass to :func:`dispatch`, :func:`calc_attn`, :func:`undispatch` and :func:`get_position_ids`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``cu_seqlens`` are malformed, or of different totals in self-attention; if the padding does not
            fit, not exactly one of ``cp_group`` and ``cp_mesh`` is given, rows must keep their order but
            ``dist_attn_config`` asks for another, or ``plan`` was made from other arguments.
    """
    mask = builders.varlen(cu_seqlens_q, cu_seqlens_k, causal=causal)
    return magi_attn_mask_key(
        mask,
        pad_size,
        chunk_size,
        cp_group,
        cp_mesh,
        dist_attn_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        plan=plan,
    )


@outside_graphs
def magi_attn_flex_key(
    q_ranges: RangesLike,
    k_ranges: RangesLike,
    attn_mask_type: MaskTypesLike,
    total_seqlen_q: int,
    total_seqlen_k: int,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    *,
    plan: AttnPlan | RankPlan | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of any mask made of slices.

    Slice ``n`` lets the queries of ``q_ranges[n]`` attend the keys of ``k_ranges[n]`` as ``attn_mask_type[n]`` says. No
    (query, key) cell may belong to two slices. Every rank of the group calls this with the same arguments.

    Args:
        q_ranges: Half-open ranges of queries; :class:`~magi_attention.mask.AttnRanges` or a sequence of pairs.
        k_ranges: As many ranges of keys.
        attn_mask_type: One mask type for all slices or one each: an :class:`~magi_attention.mask.AttnMaskType`,
            ``"full"``, ``"causal"``, ``"inv_causal"`` or ``"bi_causal"``, or their codes 0 to 3.
        total_seqlen_q: Number of queries, without padding.
        total_seqlen_k: Number of keys; equal to ``total_seqlen_q`` in self-attention.
        pad_size: Rows of padding at the end of the queries, from
            :func:`~magi_attention.api.functools.compute_pad_size`; with ``DispatchConfig(uneven=True)`` any, also 0.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh; all its ranks take part.
        dist_attn_config: How to balance the ranks and to split communication into stages.
        is_same_source: Whether queries and keys come from the same tokens (self-attention). If not (cross-attention),
            keys and values are rows of another tensor: dispatch it with ``dispatch(x, key, side="k")``. They are never
            padded, and numbers of rows differ by one chunk at most between ranks.
        is_q_permutable: Whether any rank may have any chunk of queries. If not, rank r has the r-th of ``cp_size``
            runs, as with ``DispatchConfig(order="contiguous")``.
        is_k_permutable: Whether any rank may have any chunk of keys; a chunk then goes to a rank whose queries attend
            much of it. If not, rank r has the r-th of ``cp_size`` runs. In self-attention, where keys go with their
            queries, rows are permuted only if both may be.
        plan: A plan made ahead with :func:`~magi_attention.planning.plan_attention` from the same arguments; the three
            flags are its ``sources``.

    Returns:
        The key, made of frozen copies: what is appended to the ranges later changes nothing.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ranges are reversed, out of bounds, of different number, or two slices share a cell; if a mask
            type is unknown, the padding does not fit, not exactly one of ``cp_group`` and ``cp_mesh`` is given, rows
            must keep their order but ``dist_attn_config`` asks for another, or ``plan`` was made from other arguments.
    """
    mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)
    return magi_attn_mask_key(
        mask,
        pad_size,
        chunk_size,
        cp_group,
        cp_mesh,
        dist_attn_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        plan=plan,
    )


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
    check_mask(mask)
    sources = Sources(is_same_source, is_q_permutable, is_k_permutable)
    return make_key(mask, pad_size, chunk_size, resolve_group(cp_group, cp_mesh), dist_attn_config, plan, sources)
