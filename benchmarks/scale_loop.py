"""The loop of one rank: timed on a device, recorded as a list of steps, and replayed beside a network.

:class:`magi_attention.runtime.dist_attn.DistAttn` is what runs, with the rank's own plan; see ``scale_record.py``. A
replay adds up the steps of all ranks and lets transfers run beside them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scale_record import Clock, CutGroup, CutWire, HostClock, RecordedEngine, Recorder, Step

from magi_attention.config import DispatchConfig, DistAttnConfig, GradWireDtype, OverlapConfig
from magi_attention.kernels import reference
from magi_attention.kernels.engine import Engine
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders
from magi_attention.planning import RankPlan, plan_attention
from magi_attention.runtime.dist_attn import DistAttn
from magi_attention.runtime.program import RankProgram


@dataclass(frozen=True)
class Heads:
    """Heads of a rank.

    Attributes:
        q: Heads of the queries.
        kv: Heads of the keys.
        dim: Dimensions of a head.
    """

    q: int
    kv: int
    dim: int

    @property
    def row_elements(self) -> int:
        """Of a key and its value, all heads."""
        return 2 * self.kv * self.dim


@dataclass(frozen=True)
class Pass:
    """One direction of a rank's loop.

    Attributes:
        steps: What it does.
        seconds: Of each step; 0 for sends and waits.
        whole: Seconds of all steps together, timed without marks inside.
    """

    steps: tuple[Step, ...]
    seconds: tuple[float, ...]
    whole: float

    @property
    def attend(self) -> float:
        """Seconds of the engine over all parts of the keys."""
        return sum(s for step, s in zip(self.steps, self.seconds, strict=True) if step.kind == "attend")

    @property
    def seconds_in_whole(self) -> tuple[float, ...]:
        """Seconds of each step without marks between them, where kernels may run side by side: attention takes less."""
        other = sum(self.seconds) - self.attend
        factor = max(self.whole - other, 0.0) / self.attend if self.whole and self.attend else 1.0
        times = zip(self.steps, self.seconds, strict=True)
        return tuple(s * factor if step.kind == "attend" else s for step, s in times)


@dataclass(frozen=True)
class Bench:
    """What ranks are measured on and with."""

    engine: Engine
    params: AttnParams
    device: torch.device
    clock: Clock
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, heads: Heads, num_rows: int, num_keys: int) -> tuple[torch.Tensor, ...]:
        """Random q, k, v and dout."""
        shapes = ((num_rows, heads.q), (num_keys, heads.kv), (num_keys, heads.kv), (num_rows, heads.q))
        return tuple(torch.randn(*s, heads.dim, dtype=self.dtype, device=self.device) for s in shapes)


def measure_rank(bench: Bench, plan: RankPlan, heads: Heads, seconds: float, one_host: bool) -> tuple[Pass, Pass]:
    """Time the forward and the backward pass of a rank's loop; medians.

    Args:
        bench: What it runs on.
        plan: The rank's plan.
        heads: Heads of the rank.
        seconds: About how long to time it in all.
        one_host: Whether all ranks are on one host.

    Raises:
        ArithmeticError: If a result is not finite.
    """
    wire = CutWire(plan.rank, plan.dispatch.cp_size, Recorder(bench.clock))
    run = _runner(bench, plan, heads, wire)
    program = RankProgram.prepare(plan, CutGroup(wire), bench.engine, bench.device, one_host)
    recorded = replace(program, engine=RecordedEngine(bench.engine, wire.recorder))
    _check_finite(run(recorded)[1])  # the first run compiles, and makes what is made at first use
    start = time.monotonic()
    rounds = [run(recorded)[0]]
    count = num_rounds(seconds / 2, time.monotonic() - start)
    rounds += [run(recorded)[0] for _ in range(count - 1)]
    wire.fills = False  # or it would be timed, beside own keys that are attended meanwhile
    wholes = [run(program)[0] for _ in range(count)]
    forward, backward = (
        _medians([r[way] for r in rounds], statistics.median(w[way].whole for w in wholes)) for way in (0, 1)
    )
    return forward, backward


def num_rounds(seconds: float, seconds_of_one: float) -> int:
    """How many rounds to time: up to 7, as the time allows; at least 2, or 1 of more than a second."""
    return max(2 if seconds_of_one < 1 else 1, min(7, int(seconds / max(seconds_of_one, 1e-9))))


@dataclass(frozen=True)
class Transfer:
    """What a pass sends.

    Attributes:
        stage: Whose rows.
        homeward: Whether they are gradients on their way home (a group reduce) and not keys and values (a group cast).
        itemsize: Bytes of an element.
    """

    stage: int
    homeward: bool
    itemsize: int


@dataclass(frozen=True)
class Loop:
    """The steps of a pass, and its transfers by number."""

    steps: tuple[Step, ...]
    transfers: tuple[Transfer, ...]


@lru_cache
def loop_of(num_stages: int, grad_wire_dtype: GradWireDtype = "float32") -> tuple[Loop, Loop]:
    """The forward and the backward pass with so many stages, as the library takes them: recorded on a toy problem."""
    rows = max(1, num_stages)  # the second of two contiguous ranks receives that many, and sends none
    overlap = OverlapConfig(degree=rows, min_chunk_size=1)
    config = DistAttnConfig(DispatchConfig(order="contiguous"), overlap, grad_wire_dtype)
    cp_size = 2 if num_stages else 1
    plan = plan_attention(builders.causal(cp_size * rows), cp_size, rows, config=config).rank(cp_size - 1)
    bench = Bench(reference, AttnParams(softmax_scale=1.0), torch.device("cpu"), HostClock())
    wire = CutWire(plan.rank, cp_size, Recorder(bench.clock))
    program = RankProgram.prepare(plan, CutGroup(wire), bench.engine, bench.device, one_host=True)
    recorded = replace(program, engine=RecordedEngine(bench.engine, wire.recorder))
    passes, _ = _runner(bench, plan, Heads(1, 1, 8), wire)(recorded)
    sends = [sum(step.kind == "send" for step in p.steps) for p in passes]
    transfers, seen = [], {True: 0, False: 0}
    for number, (sent, _, itemsize) in enumerate(wire.transfers):
        if number == sends[0]:
            seen = {True: 0, False: 0}
        homeward = sent[0] > 0
        transfers.append(Transfer(seen[homeward], homeward, itemsize))
        seen[homeward] += 1
    forward, backward = tuple(transfers[: sends[0]]), tuple(transfers[sends[0] :])
    return Loop(passes[0].steps, forward), Loop(passes[1].steps, backward)


def replay(
    steps: Sequence[Step],
    seconds: NDArray[np.float64],
    wire_seconds: Sequence[float],
    own_keys_fill: NDArray[np.bool_] | bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How long ranks take, and how much of it they wait.

    A transfer is a collective: it begins when every rank has sent it and the one before has ended, takes equally long
    on all ranks, and runs beside all other steps.

    Args:
        steps: The steps of a pass, the same on every rank.
        seconds: Of each step on each rank, ``(len(steps), num_ranks)``.
        wire_seconds: Of each transfer.
        own_keys_fill: Whether a rank computes with its own keys whenever it would wait, and with what is left of them
            before the engine is done with the pass, ``(num_ranks,)`` or for all. Else it computes with them at once.
    """
    clock, waited, own_left = np.zeros((3, seconds.shape[1]))
    wire_free = 0.0
    arrival: dict[int, float] = {}
    for step, step_seconds in zip(steps, seconds, strict=True):
        if step.kind == "send":
            wire_free = arrival[step.number] = max(float(clock.max()), wire_free) + wire_seconds[step.number]
        elif step.kind == "wait":
            wait = np.maximum(arrival[step.number] - clock, 0)
            filled = np.minimum(wait, own_left)
            clock, waited, own_left = clock + wait, waited + wait - filled, own_left - filled
        elif (step.kind, step.number) == ("attend", 0):
            own_left = np.where(own_keys_fill, step_seconds, 0.0)
            clock = clock + (step_seconds - own_left)
        elif step.kind == "whole":
            clock, own_left = clock + own_left + step_seconds, np.zeros_like(own_left)
        else:
            clock = clock + step_seconds
    return clock, waited


def _runner(
    bench: Bench, plan: RankPlan, heads: Heads, wire: CutWire
) -> Callable[[RankProgram], tuple[tuple[Pass, Pass], list[torch.Tensor]]]:
    """A function that runs a program forward and backward and returns the passes, and out, dq, dk, dv."""
    rows = plan.dispatch.local_seqlen
    *qkv, dout = bench.inputs(heads, rows, rows)
    for x in qkv:
        x.requires_grad_()

    def finish() -> Pass:
        wire.recorder.end_step("rows")
        seconds = wire.recorder.seconds()
        return Pass(tuple(wire.recorder.steps), tuple(seconds), sum(seconds))

    def run(program: RankProgram) -> tuple[tuple[Pass, Pass], list[torch.Tensor]]:
        wire.recorder.begin()
        out = DistAttn.apply(*qkv, program, bench.params)[0]
        forward = finish()
        wire.recorder.begin()
        grads = torch.autograd.grad(out, qkv, dout)
        return (forward, finish()), [out.detach(), *grads]

    return run


def _check_finite(results: list[torch.Tensor]) -> None:
    for name, x in zip(("out", "dq", "dk", "dv"), results, strict=True):
        if not x.isfinite().all():
            raise ArithmeticError(f"{name} is not finite")


def _medians(rounds: Sequence[Pass], whole: float) -> Pass:
    columns = zip(*(r.seconds for r in rounds), strict=True)
    return Pass(rounds[0].steps, tuple(statistics.median(column) for column in columns), whole)
