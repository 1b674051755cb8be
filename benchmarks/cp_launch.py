"""Starts the processes of bench_cp.py, watches them, and starts them anew without the contender that ended them."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

STARTS = 6
"""How often the processes are started at the most."""


@dataclass(frozen=True)
class Step:
    """What the processes are at: a case and a contender, both empty before the first; and, if known, why they end."""

    case: str = ""
    contender: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Progress:
    """A file that rank 0 writes at every step, so that whoever finds the processes dead or stuck knows where."""

    path: Path

    def write(self, step: Step) -> None:
        self.path.write_text(json.dumps(vars(step)))

    def read(self) -> Step:
        with suppress(OSError, ValueError):
            return Step(**json.loads(self.path.read_text()))
        return Step()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def seconds_since(self) -> float:
        """Seconds since the last step."""
        with suppress(OSError):
            return time.time() - self.path.stat().st_mtime
        return 0.0


@dataclass(frozen=True)
class Job:
    """What a process needs to know.

    Attributes:
        args: The command line's options.
        progress: Where it writes what it is at.
        deadline: When to come to an end, in seconds since the epoch.
        ended: Contenders that ended the processes before: case and contender to reason.
    """

    args: Any
    progress: Progress
    deadline: float
    ended: dict[tuple[str, str], str] = field(default_factory=dict)

    def is_late(self) -> bool:
        """Whether the deadline is over."""
        return time.time() > self.deadline

    def step(self, rank: int, case: str, contender: str) -> None:
        """Note, on rank 0, what comes next."""
        if rank == 0:
            self.progress.write(Step(case, contender))

    def end_step(self, rank: int, reason: str) -> None:
        """Note, on rank 0, why the step ends the processes."""
        if rank == 0:
            self.progress.write(replace(self.progress.read(), reason=reason))

    def reason_to_leave_out(self, case: str, contender: str) -> str:
        """Why a contender must not run in a case: it ended the processes there, or twice elsewhere. Empty if it may."""
        reasons = [reason for (_, name), reason in self.ended.items() if name == contender]
        return self.ended.get((case, contender), reasons[0] if len(reasons) > 1 else "")


Work = Callable[[int, int, str, Job], None]
"""A process's work, by its rank, the number of ranks, where they meet, and the job."""


def launch(work: Work, size: int, job: Job, stall_s: float) -> None:
    """Run ``work`` in ``size`` processes of this host; in this one if torchrun has started it.

    Args:
        work: A function of a module, so that processes can import it.
        size: How many processes; under torchrun what it says counts.
        job: What they are to do.
        stall_s: Processes that make no step for so long are ended.

    Raises:
        SystemExit: If processes end, and starting anew does not help.
    """
    if started_by_torchrun():
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", job)
        job.progress.remove()
        return
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # hosts without a network have no other
    for _ in range(STARTS):
        job.progress.write(Step())
        fate = _run_processes(work, size, job, stall_s)
        if fate is None:
            job.progress.remove()
            return
        step = job.progress.read()
        reason = f"ended the processes: {step.reason or fate}"
        print(f"{step.case}, {step.contender}: {reason}", file=sys.stderr, flush=True)
        if not step.contender or (step.case, step.contender) in job.ended:
            break
        job = replace(job, ended=job.ended | {(step.case, step.contender): reason})
    raise SystemExit("the processes ended, and starting them anew does not help")


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run_processes(work: Work, size: int, job: Job, stall_s: float) -> str | None:
    """None when all processes end well, else how they did not."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench_cp_") as folder:
        meet = f"file://{folder}/store"
        processes = [context.Process(target=work, args=(rank, size, meet, job)) for rank in range(size)]
        with _ended(processes):
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                time.sleep(0.2)
                codes = [process.exitcode for process in processes]
                if any(codes):
                    _wait(processes, seconds=5)
                    return f"exit codes {', '.join(str(process.exitcode) for process in processes)}"
                if job.progress.seconds_since() > stall_s:
                    return f"no step for {stall_s:.0f} s"
            codes = [process.exitcode for process in processes]
            return f"exit codes {', '.join(map(str, codes))}" if any(codes) else None


def _wait(processes: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


@contextmanager
def _ended(processes: list[Any]) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()
