"""What is attended: ranges, slices, masks and the functions that build them. Integers only, no device."""

from magi_attention.mask import builders
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.attn_range import AttnRange
from magi_attention.mask.from_dense import from_dense
from magi_attention.mask.mask_type import AttnMaskType
from magi_attention.mask.ranges import AttnRanges
from magi_attention.mask.slices import AttnSlice

__all__ = ["AttnMask", "AttnMaskType", "AttnRange", "AttnRanges", "AttnSlice", "builders", "from_dense"]
