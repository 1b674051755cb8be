"""Steps of the library's distributed loop, recorded on one device with the wire cut.

The loop runs as it is, for one rank of many. Its process group is a :class:`CutWire`, on which rows never arrive: the
buffer that they would arrive in is filled with random numbers, outside all times. Steps are recorded in the order in
which the loop takes them::

    attend   the engine, forward or backward, over the rank's own keys or those of a stage
    rows     rows gathered, packed, put in order or added up, between two other steps
    whole    the engine, once a pass: delta and zeros before gradients, their rounding after
    send     a transfer begins    wait    its rows are needed
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from magi_attention.comm import FlatExchange, RowRouting
from magi_attention.kernels.engine import Engine
from magi_attention.planning import GroupCollectivePlan
from magi_attention.runtime.groups import CpGroup

ENGINE_STEPS = {"forward": "attend", "backward": "attend", "start_backward": "whole", "finish_backward": "whole"}


@dataclass(frozen=True)
class Step:
    """One step of a pass.

    Attributes:
        kind: ``"attend"``, ``"rows"``, ``"whole"``, ``"send"`` or ``"wait"``.
        number: Counted from 0 in the order of the pass: which transfer is sent or waited for, which part of the keys
            is attended, which step is done once; 0 for rows.
    """

    kind: str
    number: int = 0


class Clock(Protocol):
    """Tells the time on a device."""

    def begin(self) -> None:
        """Get the device ready for a pass."""

    def now(self) -> Any:
        """A mark."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""


class HostClock:
    """For the CPU."""

    def begin(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """CUDA events. The device gets a head start of work, so that it does not wait for the host inside a pass."""

    HEAD_START = 8_000_000  # cycles, some 4 ms: more than the host needs for a pass of a few stages

    def __init__(self) -> None:
        self.cache_sized = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def begin(self) -> None:
        self.cache_sized.zero_()
        torch.cuda._sleep(self.HEAD_START)

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Recorder:
    """Steps of a pass, each with the marks before and behind it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Forget all, and start a pass."""
        self.steps: list[Step] = []
        self._marks: list[tuple[Any, Any]] = []
        self._counts: dict[str, int] = {}
        self._clock.begin()
        self._last = self._clock.now()

    def end_step(self, kind: str) -> None:
        """What was done since the last mark was a step of this kind."""
        now = self._clock.now()
        self._add(Step(kind, 0 if kind == "rows" else self._count(kind)), self._last, now)
        self._last = now

    def send(self) -> int:
        """A transfer begins now; its number."""
        number = self._count("send")
        self._add(Step("send", number), self._last, self._last)
        return number

    def wait(self, number: int) -> None:
        """A transfer is waited for now."""
        self._add(Step("wait", number), self._last, self._last)

    def skip(self) -> None:
        """What was done since the last mark does not count."""
        self._last = self._clock.now()

    def seconds(self) -> list[float]:
        """Of each step."""
        return [0.0 if start is end else self._clock.seconds(start, end) for start, end in self._marks]

    def _add(self, step: Step, start: Any, end: Any) -> None:
        self.steps.append(step)
        self._marks.append((start, end))

    def _count(self, kind: str) -> int:
        self._counts[kind] = self._counts.get(kind, -1) + 1
        return self._counts[kind]


class CutWire(dist.ProcessGroup):
    """A process group of one process that stands for many: what is sent is lost, what arrives is random."""

    def __init__(self, rank: int, size: int, recorder: Recorder) -> None:
        super().__init__(rank, size)
        self.recorder = recorder
        self.fills = True
        """Whether rows arrive as random numbers, and not as whatever is in the memory."""
        self.transfers: list[tuple[torch.Size, torch.Size, int]] = []

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> "Arrival":
        self.recorder.end_step("rows")
        number = self.recorder.send()
        self.transfers.append((input.shape, output.shape, input.element_size()))
        if self.fills:
            output.normal_()
            self.recorder.skip()
        return Arrival(self.recorder, number)

    all_to_all_single = alltoall_base  # torch calls it by this name from 2.13


@dataclass(frozen=True)
class Arrival:
    """The handle that the loop waits on."""

    recorder: Recorder
    number: int

    def wait(self) -> None:
        self.recorder.end_step("rows")
        self.recorder.wait(self.number)


@dataclass(frozen=True)
class CutGroup(CpGroup):
    """Context-parallel ranks whose rows travel over a :class:`CutWire`."""

    def exchange(self, plan: GroupCollectivePlan, device: torch.device) -> FlatExchange:
        """Make a stage's transfers ready for a device."""
        return FlatExchange(RowRouting.on_device(plan, device), self.flat)


class RecordedEngine:
    """An engine whose calls are recorded."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine, self._recorder = engine, recorder

    parts_side_by_side = False

    def adds_in_any_order(self, *args: Any) -> bool:
        """Whatever the engine may do, its steps are timed one after the other."""
        return False

    def __getattr__(self, name: str) -> Any:
        attribute, kind = getattr(self._engine, name), ENGINE_STEPS.get(name)
        if kind is None:
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self._recorder.end_step("rows")
            result = attribute(*args, **kwargs)
            self._recorder.end_step(kind)
            return result

        return call
