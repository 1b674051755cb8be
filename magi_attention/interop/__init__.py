"""Masks as other libraries write them."""

from magi_attention.interop.flex_attention import mask_from_block_mask, mask_from_mask_mod

__all__ = ["mask_from_block_mask", "mask_from_mask_mod"]
