"""``AttnRange`` under its 1.0.x import path."""

from magi_attention.mask.attn_range import AttnRange

__all__ = ["AttnRange"]
