"""The public interface under one name."""

from magi_attention.api.functools import (
    apply_padding,
    compute_pad_size,
    from_mask,
    full_attention_to_varlen_attention,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    infer_varlen_mask_from_batch,
    init_hierarchical_mesh,
    pad_at_dim,
    squash_batch_dim,
    unpad_at_dim,
)
from magi_attention.api.keys import magi_attn_mask_key
from magi_attention.api.magi_attn_interface import (
    calc_attn,
    dispatch,
    get_most_recent_key,
    get_position_ids,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    set_plan_cache_capacity,
    undispatch,
)
from magi_attention.api.new_mask import (
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
)
from magi_attention.api.roll import roll
from magi_attention.config import (
    AttnOverlapMode,
    CostModel,
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    UniformOverlapAlg,
)
from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.mask import AttnMask, AttnMaskType, AttnRange, AttnRanges
from magi_attention.planning import Sources, plan_attention, plan_new_mask
from magi_attention.runtime.key import DistAttnRuntimeKey

__all__ = [
    "AttnMask",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRange",
    "AttnRanges",
    "CostModel",
    "DispatchConfig",
    "DistAttnConfig",
    "DistAttnRuntimeKey",
    "LocalityDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapConfig",
    "Sources",
    "UniformOverlapAlg",
    "apply_padding",
    "calc_attn",
    "compute_pad_size",
    "dispatch",
    "flex_flash_attn_func",
    "from_mask",
    "full_attention_to_varlen_attention",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "init_hierarchical_mesh",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_mask_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "pad_at_dim",
    "plan_attention",
    "plan_new_mask",
    "roll",
    "set_plan_cache_capacity",
    "squash_batch_dim",
    "undispatch",
    "unpad_at_dim",
]
