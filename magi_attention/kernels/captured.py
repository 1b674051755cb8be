"""What CUDA graphs read besides their own memory: kept for good, since nobody tells when one is replayed the last time.

A graph has addresses and no tensors. Schedules and routes lie in caches, from which they would be dropped while a graph
still reads them.
"""

import atexit
from typing import TypeVar

import torch

T = TypeVar("T")

_kept: dict[int, object] = {}
atexit.register(_kept.clear)  # before the interpreter is gone: what holds process groups may abort it then


def keep_if_captured(x: T, device: torch.device) -> T:
    """``x``, which is kept until the process ends if the calls that it is used for are being captured.

    Args:
        x: Holds tensors on ``device``.
        device: Where it is used, on the current stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _kept[id(x)] = x
    return x
