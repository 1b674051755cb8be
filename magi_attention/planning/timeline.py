"""A plan's predicted timeline: what each rank computes when, and what travels meanwhile."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from magi_attention.config import CostModel
from magi_attention.planning.attn_plan import AttnPlan
from magi_attention.planning.cost_model import PassCosts, StageWork, grad_wire_bytes
from magi_attention.planning.replay import Clock, replay

Lane = Literal["compute", "network"]


@dataclass(frozen=True)
class Span:
    """Something that a rank does for a while.

    Attributes:
        rank: The rank.
        lane: ``"compute"``, or ``"network"`` for a transfer, in which all ranks take part.
        stage: The stage that it belongs to, counted from 1; None for the rank's own keys.
        name: ``own keys``, ``stage n``, ``cast n`` or ``reduce n``, as in profiles of the runtime.
        start: Seconds from the beginning of the pass.
        end: Seconds from the beginning of the pass.
    """

    rank: int
    lane: Lane
    stage: int | None
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class PassTimeline:
    """One pass of attention over the ranks, forward or backward.

    Attributes:
        cp_size: Number of ranks.
        seconds: From its beginning to the end on the slowest rank.
        spans: What the ranks do, rank by rank and in order; what takes no time is left out.
    """

    cp_size: int
    seconds: float
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, clock: Clock) -> "PassTimeline":
        """What a clock has seen."""
        spans = (span for rank in range(len(clock.ranks)) for span in _spans(clock, rank))
        return cls(len(clock.ranks), float(clock.ranks.max()), tuple(spans))


@dataclass(frozen=True)
class Timeline:
    """The predicted timeline of a plan.

    Attributes:
        forward: The forward pass.
        backward: The backward pass.
    """

    forward: PassTimeline
    backward: PassTimeline

    @property
    def seconds(self) -> float:
        """Both passes together."""
        return self.forward.seconds + self.backward.seconds


def predict_timeline(plan: AttnPlan, cost_model: CostModel | None = None) -> Timeline:
    """Replay a plan with predicted times. Rows and areas are counted exactly; their prices are the model's.

    Args:
        plan: The plan.
        cost_model: What things cost; None for the model in the plan's configuration.
    """
    model = plan.config.overlap_config.cost_model if cost_model is None else cost_model
    work = StageWork.measure(plan.mask, plan.work, plan.dispatch, plan.routes)
    grad_bytes = grad_wire_bytes(plan.config.grad_wire_dtype, model)
    forward = PassCosts.forward(work, model).joined(plan.blocking)
    backward = PassCosts.backward(work, model, grad_bytes)
    return Timeline(*(PassTimeline.of(replay(costs, plan.blocking)) for costs in (forward, backward)))


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline in the JSON format that Perfetto and chrome://tracing open, the backward pass behind the forward.

    A rank is a process, and each of its lanes a thread. Source: "Trace Event Format", Google, complete events (``X``)
    and metadata events (``M``).
    """
    threads: dict[Lane, int] = {"compute": 0, "network": 1}
    events: list[dict[str, Any]] = []
    for rank in range(timeline.forward.cp_size):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for lane, thread in threads.items():
            event = {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": lane}}
            events.append(event)
    for category, begin, part in (
        ("forward", 0.0, timeline.forward),
        ("backward", timeline.forward.seconds, timeline.backward),
    ):
        for span in part.spans:
            event = {
                "ph": "X",
                "cat": category,
                "name": span.name,
                "pid": span.rank,
                "tid": threads[span.lane],
                "ts": (begin + span.start) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"pass": category, "stage": span.stage},
            }
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _spans(clock: Clock, rank: int) -> Iterator[Span]:
    for step in clock.steps:
        start, end = (float(np.broadcast_to(time, clock.ranks.shape)[rank]) for time in (step.start, step.end))
        if start < end:
            stage = None if step.stage is None else step.stage + 1
            if step.name == "attend":
                yield Span(rank, "compute", stage, "own keys" if stage is None else f"stage {stage}", start, end)
            else:
                yield Span(rank, "network", stage, f"{step.name} {stage}", start, end)
