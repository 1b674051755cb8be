"""MagiAttention: context-parallel attention for very long sequences with any mask made of slices."""

__version__ = "0.1.0"
