"""Names for what a profiler sees."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A span of that name in the trace of a profiler that is on, such as ``torch.profiler.profile``."""
    # Entering a span takes the host as long as launching a kernel, also when nobody listens.
    return (
        torch.profiler.record_function(f"magi_attention: {name}")
        if torch._C._autograd._profiler_enabled()
        else _NOTHING
    )
