"""Keys of other masks over rows that are dispatched already, for models whose layers have different masks."""

from magi_attention.api.outside_graphs import outside_graphs
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.builders import SeqlensLike
from magi_attention.mask.integers import as_flag, as_window
from magi_attention.mask.ranges import RangesLike
from magi_attention.mask.slices import MaskTypesLike
from magi_attention.planning import AttnPlan, RankPlan, Sources
from magi_attention.runtime.cache import runtimes
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import make_key_after_dispatch


@outside_graphs
def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: SeqlensLike,
    cu_seqlens_k: SeqlensLike,
    key_for_dispatch: DistAttnRuntimeKey,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
    *,
    is_same_source: bool = True,
    is_k_permutable: bool = True,
    plan: AttnPlan | RankPlan | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of another mask of packed documents over rows that are dispatched already.

    For models whose layers have different masks, such as full attention and sliding windows in turn: the input is
    dispatched once, with ``key_for_dispatch``, and every layer calls :func:`.calc_attn` with the key of its own mask.
    The chunks stay on their ranks, and so do the local rows; what is new is which rows travel. The work of the new mask
    is as balanced as the old assignment happens to make it, so dispatch with the mask that costs most.

    A decoder's cross-attention is such a mask, too: its queries are the rows of self-attention. With
    ``is_same_source=False`` its keys and values are dispatched with the new key, ``dispatch(x, key, side="k")``.

    Args:
        cu_seqlens_q: Where the documents begin, and the total, which is that of ``key_for_dispatch``.
        cu_seqlens_k: The same for keys.
        key_for_dispatch: The key of self-attention that the input was dispatched with, or another made for its rows.
        causal: Whether a query attends only the keys up to its own position in its document.
        window_size: Keys seen before (left) and behind (right) the own position, -1 for all. With ``causal`` the right
            one counts as 0.
        dist_attn_config: How to split communication into stages; None for the configuration of ``key_for_dispatch``,
            whose ``dispatch_config`` it must have.
        is_same_source: Whether the keys are made from the dispatched tokens, too. If not, they are rows of another
            tensor, and their ranks are chosen here.
        is_k_permutable: Whether any rank may have any chunk of those. If not, rank r has the r-th of ``cp_size`` runs,
            whatever the mask is.
        plan: A plan made ahead with :func:`~magi_attention.planning.plan_new_mask`.

    Returns:
        The key. It can be used wherever ``key_for_dispatch`` can: its local rows are the same.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``cu_seqlens`` are malformed or of another total, ``window_size`` is no pair of such, the plan of
            ``key_for_dispatch`` was evicted or is one of cross-attention, ``dist_attn_config`` would dispatch
            otherwise, or ``plan`` was made from other arguments.
    """
    left, right = as_window(window_size)
    mask = builders.sliding_window(cu_seqlens_q, (left, 0 if as_flag(causal, "causal") else right), cu_seqlens_k)
    sources = _new_sources(is_same_source, is_k_permutable)
    return make_key_after_dispatch(mask, key_for_dispatch, dist_attn_config, plan, sources)


@outside_graphs
def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: RangesLike,
    k_ranges: RangesLike,
    attn_mask_type: MaskTypesLike,
    key_for_dispatch: DistAttnRuntimeKey,
    dist_attn_config: DistAttnConfig | None = None,
    *,
    total_seqlen_k: int | None = None,
    is_same_source: bool = True,
    is_k_permutable: bool = True,
    plan: AttnPlan | RankPlan | None = None,
) -> DistAttnRuntimeKey:
    """Make the key of any other mask made of slices over rows that are dispatched already.

    See :func:`make_varlen_key_for_new_mask_after_dispatch`.

    Args:
        q_ranges: Half-open ranges of queries, within the sequence of ``key_for_dispatch``.
        k_ranges: As many ranges of keys.
        attn_mask_type: One mask type for all slices or one each.
        key_for_dispatch: The key of self-attention that the input was dispatched with, or another made for its rows.
        dist_attn_config: How to split communication into stages; None for the configuration of ``key_for_dispatch``,
            whose ``dispatch_config`` it must have.
        total_seqlen_k: Number of keys; None for as many as queries.
        is_same_source: Whether the keys are made from the dispatched tokens, too.
        is_k_permutable: Whether any rank may have any chunk of keys of another source.
        plan: A plan made ahead with :func:`~magi_attention.planning.plan_new_mask`.

    Returns:
        The key, with the local rows of ``key_for_dispatch``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the slices are wrong, as for :func:`.magi_attn_flex_key`, the plan of ``key_for_dispatch`` was
            evicted or is one of cross-attention, ``dist_attn_config`` would dispatch otherwise, or ``plan`` was made
            from other arguments.
    """
    runtimes.get(key_for_dispatch)  # raises for what is no key, before its length is asked for
    total = key_for_dispatch.total_seqlen_q
    num_keys = total if total_seqlen_k is None else total_seqlen_k
    mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, total, num_keys)
    sources = _new_sources(is_same_source, is_k_permutable)
    return make_key_after_dispatch(mask, key_for_dispatch, dist_attn_config, plan, sources)


def _new_sources(is_same_source: bool, is_k_permutable: bool) -> Sources | None:
    """The sources of a new mask; None where its keys are those that were dispatched."""
    sources = Sources(is_same_source, is_k_permutable=is_k_permutable)
    if is_same_source and not is_k_permutable:
        raise ValueError(
            "is_k_permutable=False needs is_same_source=False: keys of the same source are where their queries are"
        )
    return None if is_same_source else sources
