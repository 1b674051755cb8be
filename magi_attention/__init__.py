"""MagiAttention: context-parallel attention for very long sequences with any mask made of slices."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``magi_attention.api`` and ``.functional`` after a plain ``import magi_attention``, which loads neither."""
    if name in ("api", "functional"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
