"""Predicted timelines replay the runtime's loop: this is the order in which it posts, waits and computes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magi_attention.config import DispatchConfig, DistAttnConfig
from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders
from magi_attention.planning import plan_attention
from magi_attention.runtime import dist_attn
from magi_attention.runtime.dist_attn import DistAttn
from magi_attention.runtime.program import RankProgram
from magi_attention.runtime.stage_lane import StageLane

from ..planning.loop_simulator import Op, loop_program


@dataclass
class Recorder:
    """An engine and a transport that do nothing but note when they are asked."""

    ops: list[Op] = field(default_factory=list)
    parts_side_by_side = True

    def adds_in_any_order(self, params: AttnParams) -> bool:
        return True

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: int | None, *rest: Any) -> Any:
        self.ops.append(("attend", schedule))
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0]), None

    def start_backward(self, *args: Any) -> None:
        pass

    def backward(
        self, grads: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: int | None, *rest: Any
    ) -> Any:
        self.ops.append(("attend", schedule))
        return torch.zeros_like(k), torch.zeros_like(v)

    def finish_backward(self, *args: Any) -> torch.Tensor:
        return torch.zeros(4, 2, 8)

    def exchange(self, stage: int) -> SimpleNamespace:
        def cast(tensors: Sequence[torch.Tensor], ahead: None) -> SimpleNamespace:
            self.ops.append(("cast", stage))
            wait = lambda: self.ops.append(("wait cast", stage)) or tensors  # noqa: E731
            return SimpleNamespace(wait=wait, transfer=SimpleNamespace(wait=wait))

        def reduce(*args: Any) -> SimpleNamespace:
            self.ops.append(("reduce", stage))
            return SimpleNamespace(wait=lambda into: self.ops.append(("wait reduce", stage)))

        return SimpleNamespace(cast=cast, reduce=reduce)


def make_program(recorder: Recorder, num_stages: int, blocking: bool) -> SimpleNamespace:
    stages = [SimpleNamespace(exchange=recorder.exchange(n), schedule=n, ahead=None) for n in range(num_stages)]
    either = SimpleNamespace(local=None, stages=stages, blocking=blocking)
    ways = {"parts_apart": not blocking, "own_keys_fill": not blocking, "rounds_grads": False}
    return SimpleNamespace(engine=recorder, forward=either, backward=either, **ways)


def in_order_of_posting(program: list[Op]) -> list[Op]:
    """What the host does: own keys are begun once, and whatever is left of them is done by itself."""
    return [("attend", None) if op == ("begin", None) else op for op in program if op != ("end", None)]


def attend(recorder: Recorder, program: SimpleNamespace) -> torch.Tensor:
    q, k, v = (torch.zeros(4, 2, 8, requires_grad=True) for _ in range(3))
    out, _ = DistAttn.apply(q, k, v, program, AttnParams(1.0))
    return out


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("num_stages", [0, 1, 2, 4])
def test_order(num_stages: int, blocking: bool) -> None:
    recorder = Recorder()
    out = attend(recorder, make_program(recorder, num_stages, blocking))
    assert recorder.ops == loop_program(num_stages, blocking, backward=False)
    recorder.ops.clear()
    out.sum().backward()
    assert recorder.ops == in_order_of_posting(loop_program(num_stages, blocking, backward=True, own_keys_fill=True))


@dataclass
class RecordingLane(StageLane):
    """Events are the number of operations before them. What runs on the lane is noted with the event behind which."""

    recorder: Recorder
    on_lane: dict[int, int] = field(default_factory=dict)
    overlaps = True

    def now(self) -> Any:
        return len(self.recorder.ops)

    @contextmanager
    def after(self, event: Any) -> Iterator[None]:
        begin = len(self.recorder.ops)
        yield
        self.on_lane |= dict.fromkeys(range(begin, len(self.recorder.ops)), event)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_run_beside_own_keys_forward(num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    lane = RecordingLane(recorder)
    monkeypatch.setattr(dist_attn, "forward_lane", lambda *args: lane)
    attend(recorder, make_program(recorder, num_stages, blocking=False))
    assert recorder.ops == loop_program(num_stages, blocking=False, backward=False)
    own = recorder.ops.index(("attend", None))
    assert set(range(len(recorder.ops))) - lane.on_lane.keys() == {own}
    assert set(lane.on_lane.values()) == {0, own}, "but for the first cast, it follows what was there before own keys"


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_run_beside_own_keys(num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but own keys is on the lane, and but for the last gradients it follows what was there before own keys."""
    recorder = Recorder()
    out = attend(recorder, make_program(recorder, num_stages, blocking=False))
    recorder.ops.clear()
    lane = RecordingLane(recorder)
    monkeypatch.setattr(dist_attn, "backward_lane", lambda *args: lane)
    out.sum().backward()
    assert recorder.ops == in_order_of_posting(
        loop_program(num_stages, blocking=False, backward=True, own_keys_fill=True)
    )
    own, last = recorder.ops.index(("attend", None)), len(recorder.ops) - 1
    assert set(range(len(recorder.ops))) - lane.on_lane.keys() == {own}
    assert {event for n, event in lane.on_lane.items() if n != last} <= {0, own}
    assert recorder.ops[last] == ("wait reduce", num_stages - 1) and lane.on_lane[last] == last


def test_where_stages_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of their own on a GPU, if the engine may have several kernels at a time and none must leave room."""
    monkeypatch.setattr(dist_attn, "StageStream", lambda device: "stream")
    usual = {"is_cuda": True, "params": AttnParams(1.0), "stages": [1], "own_keys_fill": True}
    usual |= {"apart": True, "blocking": False, "parts_side_by_side": True}

    def where(lane: Any, **changes: Any) -> object:
        case = SimpleNamespace(**(usual | changes))
        engine = SimpleNamespace(
            adds_in_any_order=lambda params: not params.deterministic, parts_side_by_side=case.parts_side_by_side
        )
        q = SimpleNamespace(is_cuda=case.is_cuda, device="cuda")
        program = SimpleNamespace(
            forward=SimpleNamespace(blocking=case.blocking),
            parts_apart=case.apart,
            backward=SimpleNamespace(stages=case.stages),
            own_keys_fill=case.own_keys_fill,
            engine=engine,
        )
        return lane(q, program, case.params)

    either = [{"is_cuda": False}, {"params": AttnParams(1.0, sm_margin=8)}]
    of_forward: list[dict[str, Any]] = [{"apart": False}, {"blocking": True}, {"parts_side_by_side": False}]
    of_backward = [{"stages": []}, {"own_keys_fill": False}, {"params": AttnParams(1.0, deterministic=True)}]
    for lane, own, others in (
        (dist_attn.forward_lane, of_forward, of_backward),
        (dist_attn.backward_lane, of_backward, of_forward),
    ):
        assert where(lane) == "stream"
        for change in (*either, *own):
            assert isinstance(where(lane, **change), StageLane), change
        for change in others:
            assert where(lane, **change) == "stream", change


def test_own_keys_fill_where_the_plan_says_so() -> None:
    """One rank has a long document, and one has short ones."""
    config = DistAttnConfig(dispatch_config=DispatchConfig(order="contiguous"))
    plan = plan_attention(builders.varlen([0, 256, *range(272, 513, 16)], causal=True), 2, 32, config=config)
    group: Any = SimpleNamespace(exchange=lambda *args: None)
    programs = [
        RankProgram.prepare(plan.rank(rank), group, reference, torch.device("cpu"), one_host=True) for rank in range(2)
    ]
    assert [program.own_keys_fill for program in programs] == plan.own_keys_fill.tolist() == [False, True]
