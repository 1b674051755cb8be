"""Chain: a step that needs what transfers bring, such as sending it on, to be taken while the caller computes.

What that takes depends on the device, and this is the only place that knows.

On CUDA, waiting for a transfer holds up a stream and not the host. So the step is enqueued at once, on a stream beside
the one that computes, and runs when the transfers are through and multiprocessors are free. On the CPU waiting holds up
the caller, so the step is taken when its result is asked for, and only the transfers before it run beside the
computation.
"""

from collections.abc import Callable
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch

from magi_attention.comm.side_stream import side_stream

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Chain(Protocol[T_co]):
    """A step that will have been taken."""

    def wait(self) -> T_co:
        """The step's result; with CUDA, for what is next on the current stream. May be asked for again."""


def chain(step: Callable[[], T], device: torch.device) -> Chain[T]:
    """Take a step as soon as it can be taken without holding up the caller.

    Every rank must start and wait for its chains and transfers in the same order, since steps start collectives.

    Args:
        step: Waits for transfers and starts others. It must hold what it reads, handles of transfers included.
        device: Where the rows are.
    """
    return EnqueuedStep(step, device) if device.type == "cuda" else PendingStep(step)


class PendingStep(Generic[T]):
    """Taken when it is waited for."""

    def __init__(self, step: Callable[[], T]) -> None:
        self._step = cache(step)

    def wait(self) -> T:
        """The step's result."""
        return self._step()


class EnqueuedStep(Generic[T]):
    """Enqueued on the stream beside the one that computes.

    What the step reads is held here until that stream has waited for the step; the next step begins behind it. So
    ``record_stream`` is not needed, see :func:`~magi_attention.comm.side_stream.side_stream`, as long as a step is
    waited for on the stream on which it was started.
    """

    def __init__(self, step: Callable[[], T], device: torch.device) -> None:
        computing = torch.cuda.current_stream(device)
        side = side_stream(computing)
        side.wait_stream(computing)
        with torch.cuda.stream(side):
            self._result = step()
        self._done = side.record_event()
        self._held, self._device = step, device

    def wait(self) -> T:
        """The step's result, once the current stream reaches it."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
        return self._result
