"""RankPool: processes that stay up and run functions over gloo groups, so that distributed tests cost no start-up."""

import datetime
import itertools
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankPool:
    """``max_size`` processes in one gloo world, with a group of the first n ranks for every n.

    ``pool.run(function, size, *args)`` calls ``function(rank, group, *args)`` on the first ``size`` ranks and returns
    their results in order. The function must be importable, arguments and results picklable. The processes start at
    the first run, and anew after a run in which a rank raised, since that may have left others in a collective.
    """

    def __init__(self, max_size: int, timeout_seconds: float = 20.0) -> None:
        self.max_size = max_size
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
            RuntimeError: If a rank raised; the message holds every such rank's traceback.
        """
        if not self._processes:
            self._start()
        for connection in self._connections[:size]:
            connection.send((function, size, args))
        replies = [connection.recv() for connection in self._connections[:size]]
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(replies) if text is not None]
        if failures:
            self._stop()
            raise RuntimeError("\n".join(failures))
        return [result for _, result in replies]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = f"{self._directory.name}/store{next(self._generation)}"
        for rank in range(self.max_size):
            here, there = context.Pipe()
            args = (rank, self.max_size, store, self.timeout_seconds, there)
            process = context.Process(target=_serve, args=args, daemon=True)
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


def _serve(rank: int, world_size: int, store: str, timeout_seconds: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN, too
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, world_size + 1)}
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
