"""``AttnMaskType`` under its 1.0.x import path."""

from magi_attention.mask.mask_type import AttnMaskType

__all__ = ["AttnMaskType"]
