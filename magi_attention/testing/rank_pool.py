"""RankPool: processes that stay up and run functions over process groups: distributed tests without a start-up each."""

import datetime
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Backend = Literal["gloo", "nccl"]


class RankPool:
    """``max_size`` processes in one world, with a group of the first n ranks for every n.

    With NCCL as the backend each process has a GPU, see ``take_gpu``, and gloo for tensors on the CPU.

    ``pool.run(function, size, *args)`` calls ``function(rank, group, *args)`` on the first ``size`` ranks and returns
    their results in order. The function must be importable, arguments and results picklable. The processes start at
    the first run, and anew after a run in which a rank raised, since that may have left others in a collective.
    """

    def __init__(self, max_size: int, timeout_seconds: float = 20.0, backend: Backend = "gloo") -> None:
        self.max_size = max_size
        self.backend = backend
        self.timeout_seconds = timeout_seconds
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._generation = itertools.count()
        self._directory = tempfile.TemporaryDirectory(prefix="rank_pool_")

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._directory.cleanup()

    def run(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """Call ``function(rank, group, *args)`` on the first ``size`` ranks.

        Raises:
            RuntimeError: If a rank raised or its process died; the message holds every such rank's traceback, or the
                exit code.
        """
        if not self._processes:
            self._start()
        for connection in self._connections[:size]:
            connection.send((function, size, args))
        replies = [self._reply(rank) for rank in range(size)]
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(replies) if text is not None]
        if failures:
            self._stop()
            raise RuntimeError("\n".join(failures))
        return [result for _, result in replies]

    def _reply(self, rank: int) -> tuple[str | None, Any]:
        try:
            return self._connections[rank].recv()
        except EOFError:
            self._processes[rank].join()
            return f"its process ended with exit code {self._processes[rank].exitcode}", None

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = f"{self._directory.name}/store{next(self._generation)}"
        for rank in range(self.max_size):
            here, there = context.Pipe()
            world = _World(rank, self.max_size, store, datetime.timedelta(seconds=self.timeout_seconds), self.backend)
            process = context.Process(target=_serve, args=(world, there), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def _stop(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
        self._connections, self._processes = [], []


def take_gpu(rank: int, world_size: int) -> None:
    """Make a GPU the current one of this process, before it joins a world in which all are processes of this host.

    Ranks share GPUs if there are too few. NCCL would refuse that, since it takes two ranks to be a mistake that have
    the same GPU of the same host. So they say that each is on a host of its own, and their rows go through sockets:
    right, in the order of streams, and slow.
    """
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if world_size > gpus:
        os.environ["NCCL_HOSTID"] = f"rank {rank}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


@dataclass(frozen=True)
class _World:
    """A process's place in the world, and how to find the others."""

    rank: int
    size: int
    store: str
    timeout: datetime.timedelta
    backend: Backend


def _serve(world: _World, connection: Connection) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # All are on this host, which may have no network to look for its own name in.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, on_gpu = world.rank, world.backend == "nccl"
    # Fills uninitialised memory with NaN, too. Not all that tests do on a GPU has a deterministic implementation.
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    if on_gpu:
        take_gpu(rank, world.size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{world.store}",
        rank=rank,
        world_size=world.size,
        timeout=world.timeout,
    )
    groups = {size: dist.new_group(list(range(size)), timeout=world.timeout) for size in range(1, world.size + 1)}
    while True:
        try:
            function, size, args = connection.recv()
        except EOFError:
            return
        try:
            reply: tuple[str | None, Any] = (None, function(rank, groups[size], *args))
        except Exception:
            reply = (traceback.format_exc(), None)
        connection.send(reply)
