"""Attention on one device: tile schedules, engines, and what merges their partial results."""

from magi_attention.kernels.engine import explain

__all__ = ["explain"]
