"""Attention on one device: tile schedules, engines, and what merges their partial results."""
