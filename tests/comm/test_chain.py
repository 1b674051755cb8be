"""When a chain takes its step: on the CPU when it is waited for, on CUDA at once on a side stream."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from magi_attention.comm.chain import chain
from magi_attention.comm.side_stream import side_stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_on_the_cpu_the_step_is_taken_once_when_it_is_waited_for() -> None:
    taken = []
    pending = chain(lambda: taken.append("step") or len(taken), CPU)
    assert taken == []
    assert pending.wait() == 1 and pending.wait() == 1
    assert taken == ["step"]


class FakeStream:
    """Writes down what is asked of it."""

    current: "FakeStream"
    log: list[str]

    def __init__(self, device: torch.device, priority: int = 0, name: str = "side") -> None:
        self.device, self.priority, self.name = device, priority, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"an event of {self.name}"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStream]]:
    FakeStream.log, FakeStream.current = [], FakeStream(CUDA, name="computing")

    @contextmanager
    def stream(side: FakeStream) -> Iterator[None]:
        outer, FakeStream.current = FakeStream.current, side
        yield
        FakeStream.current = outer

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    side_stream.cache_clear()
    yield FakeStream
    side_stream.cache_clear()


def test_on_cuda_the_step_is_enqueued_at_once_beside_the_computation(streams: type[FakeStream]) -> None:
    enqueued = chain(lambda: streams.log.append(f"step on {streams.current.name}") or "rows", CUDA)
    assert streams.log == ["side waits for computing", "step on side", "side records"]  # the host waits for nothing
    streams.log.clear()
    assert enqueued.wait() == "rows"
    assert streams.log == ["computing waits for an event of side"]


def test_a_computing_stream_has_one_side_stream(streams: type[FakeStream]) -> None:
    used = []
    for _ in range(2):
        chain(lambda: used.append(streams.current), CUDA)
    streams.current = streams(CUDA, name="other")
    chain(lambda: used.append(streams.current), CUDA)
    assert used[0] is used[1] is not used[2]
