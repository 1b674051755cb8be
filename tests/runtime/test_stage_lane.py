"""The lane of stages: streams and events, which are told apart by name here."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from magi_attention.runtime import stage_lane
from magi_attention.runtime.stage_lane import StageLane, StageStream


def test_without_another_stream_nothing_is_done() -> None:
    lane = StageLane()
    with lane.after(lane.now()):
        pass
    assert not lane.overlaps


class Stream:
    """Notes what it is told."""

    def __init__(self, device: str, priority: int = 0, log: list[str] | None = None) -> None:
        self.device, self.priority, self.name = device, priority, "lane" if priority else "current"
        self.log = [] if log is None else log

    def record_event(self) -> str:
        self.log.append(f"event of {self.name}")
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for event of {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_stream_beside_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current = Stream("cuda:0", log=log)
    made: list[Stream] = []

    def make(device: str, priority: int) -> Stream:
        made.append(Stream(device, priority, log))
        return made[-1]

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        log.append(f"enter {stream.name}")
        try:
            yield
        finally:
            log.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(stage_lane, "side_stream", stage_lane.side_stream.__wrapped__)
    lane = StageStream(torch.device("cuda:0"))
    event = lane.now()
    log.append("own keys")
    with lane.after(event):
        log.append("stages")
    assert lane.overlaps and [(s.device, s.priority) for s in made] == [("cuda:0", -1)]
    assert log == [
        *("event of current", "own keys", "lane waits for event of current", "enter lane", "stages", "leave lane"),
        "current waits for lane",
    ]
    log.clear()
    with pytest.raises(RuntimeError, match="no memory"), lane.after(event):
        raise RuntimeError("no memory")
    assert log[-2:] == ["leave lane", "current waits for lane"]
