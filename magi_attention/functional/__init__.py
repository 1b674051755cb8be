"""Attention on one device, without context parallelism."""

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func

__all__ = ["flex_flash_attn_func"]
