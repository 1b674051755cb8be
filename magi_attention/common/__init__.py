"""The mask types, under the names that users of MagiAttention 1.0.x import."""

from magi_attention.mask.attn_range import AttnRange
from magi_attention.mask.mask_type import AttnMaskType
from magi_attention.mask.ranges import AttnRanges

__all__ = ["AttnMaskType", "AttnRange", "AttnRanges"]
