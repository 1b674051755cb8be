"""Attention on one device: engines, the schedules that they make of masks, and what merges their partial results."""

from magi_attention.kernels.engine import explain

__all__ = ["explain"]
