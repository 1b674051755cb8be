"""The processes of bench_cp.py, one a GPU, and how they agree on what to do next.

A collective that one rank leaves waits for ever on the others. So after each step ranks tell each other, over gloo and
before anybody waits for a device, whether it raised. A step that raised on all of them is a failure to report. One
that raised on some, or left a device broken, ends the processes: :mod:`cp_launch` starts them anew.
"""

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from time import strftime
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from gpu_rivals import NotSupported

T = TypeVar("T")


class Failed(Exception):
    """A step raised on every rank.

    Attributes:
        supported: False if it raised :class:`NotSupported`.
    """

    def __init__(self, reason: str, supported: bool) -> None:
        super().__init__(reason)
        self.supported = supported


class Derailed(Exception):
    """A step raised on some ranks only, or a device is broken: these processes cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: Its device.
        group: All ranks, over NCCL or, on CPUs, gloo. What is measured communicates here.
        control: All ranks over gloo. What they must agree on goes here, whatever their devices are doing.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    @classmethod
    def join(cls, rank: int, size: int, device_type: str, init_method: str, timeout_s: float) -> "Ranks":
        """Meet the other processes. A collective that takes longer than ``timeout_s`` ends its process."""
        device = torch.device("cpu")
        if device_type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=2 * timeout)  # outlasts what it watches
        world = dist.group.WORLD
        assert world is not None
        return cls(rank, size, device, world, control)

    def all_of(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def say(self, text: str) -> None:
        """A line of progress with the time of day, from rank 0."""
        if self.rank == 0:
            print(f"{strftime('%H:%M:%S')} {text}", flush=True)

    def attempt(self, run: Callable[[], T]) -> T:
        """What ``run`` returns on this rank.

        Raises:
            Failed: If it raised on every rank.
            Derailed: If it raised on some, or a device does not work any more.
        """
        result, problem = None, ""
        supported = True
        try:
            result = run()
        except Exception as raised:  # not kept: its trace would keep tensors
            problem, supported = describe(raised), not isinstance(raised, NotSupported)
        problems = self.all_of(problem)
        if not any(problems):
            return result  # type: ignore[return-value]
        reason = next(filter(None, problems))
        if not all(problems):
            which = [rank for rank, text in enumerate(problems) if text]
            raise Derailed(f"on rank {', '.join(map(str, which))} of {self.size} only: {reason}")
        result = None
        self._tidy()
        if not all(self.all_of(self._device_works())):
            raise Derailed(f"left a device broken: {reason}")
        raise Failed(reason, supported)

    def _device_works(self) -> bool:
        with suppress(Exception):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return True
        return False

    def _tidy(self) -> None:
        gc.collect()
        with suppress(Exception):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def describe(raised: Exception) -> str:
    """Its type and the first line of its message."""
    lines = [line.strip() for line in str(raised).splitlines() if line.strip()] or [""]
    return f"{type(raised).__name__}: {lines[0]}"[:300]
