"""Times of bench_cp.py: contenders take turns, all ranks at once, and the slowest rank's time counts."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from cp_contenders import Contender
from cp_inputs import TENSORS, Inputs, Results
from cp_ranks import Failed, Ranks
from torch import Tensor

T = TypeVar("T")
Reading = Callable[[], tuple[float, float]]

CYCLES_A_SECOND = 2e9  # of a GPU's clock, about
LEAST_HEAD_START_S = 2e-3


class Runner:
    """A contender with this rank's q, k, v and dout, laid out as it wants them."""

    def __init__(self, contender: Contender, inputs: Inputs) -> None:
        self.contender = contender
        rows = contender.rows
        self.key_rows = rows if contender.key_rows is None else contender.key_rows
        take = partial(inputs.rows, heads_first=contender.heads_first)
        qkv = (take("q", rows), take("k", self.key_rows), take("v", self.key_rows))
        self.qkv = [x.detach().requires_grad_() for x in qkv]
        self.dout = take("dout", rows)

    def forward(self) -> Tensor:
        return self.contender.attend(*self.qkv)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.qkv, self.dout)

    def results(self) -> Results:
        """out, dq, dk, dv. Call it once before all else."""
        with self.contender.inside():
            out = self.forward()
            if out.stride() != self.dout.stride():  # so that nobody has to copy it
                self.dout = torch.empty_like(out).copy_(self.dout)
            tensors = out.detach(), *self.backward(out)
        arranged = [x.transpose(0, 1) if self.contender.heads_first else x for x in tensors]
        return Results(dict(zip(TENSORS, arranged, strict=True)), self.contender.rows, self.key_rows)


class Timer(Protocol):
    """Times calls that all ranks make at once."""

    def launch(self, run: Callable[[], T], head_start_s: float) -> tuple[T, Reading]:
        """What the call returns, and a function that waits for its end and gives the milliseconds that it took on the
        device, and on the host until all was launched. The device is kept busy for ``head_start_s`` before."""

    def watch_memory(self) -> Callable[[], float]:
        """A function that gives the GiB that were allocated since, at most, beyond what is allocated now."""


class DeviceTimer:
    """By events on the current CUDA stream, between which nothing waits for a host.

    Before a call every device flushes its L2 cache, sleeps while its host launches the call, and meets the other
    devices in a small collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.cache_sized = torch.empty(256 << 20, dtype=torch.int8, device=ranks.device)
        self.token = torch.zeros(1, device=ranks.device)

    def launch(self, run: Callable[[], T], head_start_s: float) -> tuple[T, Reading]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache_sized.zero_()
        torch.cuda._sleep(int(CYCLES_A_SECOND * max(head_start_s, LEAST_HEAD_START_S)))
        dist.all_reduce(self.token, group=self.ranks.group)
        start.record()
        began = time.perf_counter()
        result = run()
        host_ms = 1e3 * (time.perf_counter() - began)
        end.record()

        def reading() -> tuple[float, float]:
            end.synchronize()
            return start.elapsed_time(end), host_ms

        return result, reading

    def watch_memory(self) -> Callable[[], float]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2**30


class HostTimer:
    """By the host's clock, for CPUs. Memory is not measured."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def launch(self, run: Callable[[], T], head_start_s: float) -> tuple[T, Reading]:
        dist.barrier(self.ranks.group)
        began = time.perf_counter()
        result = run()
        took_ms = 1e3 * (time.perf_counter() - began)
        return result, lambda: (took_ms, took_ms)

    def watch_memory(self) -> Callable[[], float]:
        return lambda: math.nan


def make_timer(ranks: Ranks) -> Timer:
    return DeviceTimer(ranks) if ranks.device.type == "cuda" else HostTimer(ranks)


@dataclass
class Samples:
    """A contender's measurements, one entry a round.

    Attributes:
        ms: Forward, its host, backward, its host.
        peak_gib: Memory allocated beyond what was there before the call.
    """

    ms: list[tuple[float, float, float, float]] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)

    @property
    def head_start_s(self) -> float:
        """Half as much again as the host needed last time."""
        return 1.5e-3 * max(self.ms[-1][1], self.ms[-1][3]) if self.ms else 0.0


@dataclass(frozen=True)
class Times:
    """Medians over rounds of the slowest rank's milliseconds, and the largest memory of any rank in any round."""

    forward_ms: float
    host_forward_ms: float
    backward_ms: float
    host_backward_ms: float
    peak_gib: float
    rounds: int


def time_in_turn(
    runners: dict[str, Runner],
    ranks: Ranks,
    timer: Timer,
    is_late: Callable[[], bool],
    at_turn: Callable[[str], None],
) -> dict[str, Times | Failed]:
    """Time all runners in rounds until there are enough; who fails drops out.

    Args:
        runners: By name.
        ranks: The ranks.
        timer: Theirs.
        is_late: Whether to come to an end; only rank 0's answer counts.
        at_turn: Told whose turn it is.
    """
    samples = {name: Samples() for name in runners}
    failures: dict[str, Failed] = {}
    begun, rounds = time.monotonic(), 0
    while samples:
        names = list(samples)
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            at_turn(name)
            try:
                _take_turn(runners[name], samples[name], ranks, timer)
            except Failed as failure:
                failures[name] = failure
                del samples[name]
        rounds += 1
        seconds = (time.monotonic() - begun) / max(1, len(samples))
        if ranks.first(is_enough(rounds, seconds, is_late())):
            break
    return {name: _slowest_rank(of_one, ranks) for name, of_one in samples.items()} | failures


def _take_turn(runner: Runner, samples: Samples, ranks: Ranks, timer: Timer) -> None:
    """Once forward and once backward, on every rank. Hosts meet in each attempt."""
    launch = partial(timer.launch, head_start_s=samples.head_start_s)
    peak_gib = timer.watch_memory()
    with ExitStack() as stack:
        ranks.attempt(lambda: stack.enter_context(runner.contender.inside()))
        out, forward = ranks.attempt(partial(launch, runner.forward))
        _, backward = ranks.attempt(partial(launch, partial(runner.backward, out)))
        samples.peak_gib.append(peak_gib())
        samples.ms.append(ranks.attempt(lambda: (*forward(), *backward())))


def is_enough(rounds: int, seconds: float, late: bool) -> bool:
    """Whether that many rounds, which took ``seconds`` a contender, will do. Slow calls need fewer: they vary less."""
    return (
        (rounds >= 8 and seconds >= 0.2) or (rounds >= 3 and seconds >= 1) or (rounds >= 2 and (seconds >= 3 or late))
    )


def _slowest_rank(samples: Samples, ranks: Ranks) -> Times:
    """The first of more than three rounds warms up and is left out."""
    of_ranks = torch.tensor(ranks.all_of(samples.ms), dtype=torch.float64)
    slowest = of_ranks.amax(dim=0)[1 if of_ranks.shape[1] > 3 else 0 :]
    forward, host_forward, backward, host_backward = (statistics.median(column) for column in slowest.T.tolist())
    peak = max(map(max, ranks.all_of(samples.peak_gib)))
    return Times(forward, host_forward, backward, host_backward, peak, len(slowest))
