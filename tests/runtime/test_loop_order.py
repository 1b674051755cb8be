"""Predicted timelines replay the runtime's loop: this is the order in which it posts, waits and computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magi_attention.kernels.params import AttnParams
from magi_attention.runtime.dist_attn import DistAttn

from ..planning.loop_simulator import Op, loop_program


@dataclass
class Recorder:
    """An engine and a transport that do nothing but note when they are asked."""

    ops: list[Op] = field(default_factory=list)

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
        def cast(tensors: Sequence[torch.Tensor]) -> SimpleNamespace:
            self.ops.append(("cast", stage))
            wait = lambda: self.ops.append(("wait cast", stage)) or tensors  # noqa: E731
            return SimpleNamespace(wait=wait, transfer=SimpleNamespace(wait=wait))

        def reduce(*args: Any) -> SimpleNamespace:
            self.ops.append(("reduce", stage))
            return SimpleNamespace(wait=lambda into: self.ops.append(("wait reduce", stage)))

        return SimpleNamespace(cast=cast, reduce=reduce)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("num_stages", [0, 1, 2, 4])
def test_order(num_stages: int, blocking: bool) -> None:
    recorder = Recorder()
    stages = [SimpleNamespace(exchange=recorder.exchange(n), schedule=n) for n in range(num_stages)]
    program = SimpleNamespace(engine=recorder, local=None, stages=stages, blocking=blocking, rounds_grads=False)
    q, k, v = (torch.zeros(4, 2, 8, requires_grad=True) for _ in range(3))
    out, _ = DistAttn.apply(q, k, v, program, AttnParams(1.0))
    assert recorder.ops == loop_program(num_stages, blocking, backward=False)
    recorder.ops.clear()
    out.sum().backward()
    assert recorder.ops == loop_program(num_stages, blocking, backward=True)
