"""Runs programs over several processes as ``torchrun`` does."""

import os
import subprocess
import sys
from pathlib import Path

ABORTED_BY_GLOO = "terminate called without an active exception"


def torchrun(program: Path, *arguments: str, num_processes: int = 2) -> str:
    """What a program prints.

    Once in hundreds of runs a thread of gloo, cut off with a tensor when Python ends, aborts a process that has done
    all its work: see docs/troubleshooting.md. That tells nothing of the program, which is run again then.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(
            [*launcher, str(program), *arguments], capture_output=True, text=True, timeout=200, env=environment
        )
        if ABORTED_BY_GLOO not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
