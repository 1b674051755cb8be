"""Stage lane: where stages run, beside the rank's own keys.

Gradients over different keys add to the same dq, in whatever order, and need nothing from each other; and no more do
results of a forward pass in which no query attends both own keys and those of a stage. So a GPU may have all of them at
once: own keys on the stream that computes, and stages on one that is served first. A stage begins when its rows are
there, on the multiprocessors that become free; own keys take all others, while rows are under way, where a stage ends
with fewer programs than multiprocessors, and while the last gradients go home. Which ranks gain by it in the backward
pass is in :mod:`magi_attention.planning.density`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from magi_attention.comm.side_stream import side_stream


class StageLane:
    """On the CPU, or where one kernel must not run beside another: the lane is the current stream itself."""

    overlaps = False
    """Whether the lane is another stream."""

    def now(self) -> torch.cuda.Event | None:
        """What the current stream has been given so far."""
        return None

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """What is inside runs on the lane, behind an event of the current stream, which goes on when it is done."""
        yield


class StageStream(StageLane):
    """A stream beside the current one: see :func:`~magi_attention.comm.side_stream.side_stream`."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._current = torch.cuda.current_stream(device)
        self._lane = side_stream(self._current)

    def now(self) -> torch.cuda.Event:
        """See :meth:`StageLane.now`."""
        return self._current.record_event()

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """See :meth:`StageLane.after`."""
        assert event is not None
        self._lane.wait_event(event)
        try:
            with torch.cuda.stream(self._lane):
                yield
        finally:
            # Behind an error, too: what the lane still does must not meet memory that is given away.
            self._current.wait_stream(self._lane)
