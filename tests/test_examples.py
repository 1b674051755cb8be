"""The examples run, at toy size."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_packed_documents(tmp_path: Path) -> None:
    program = str(EXAMPLES / "train_packed_documents.py")
    arguments = ("--seqlen", "400", "--steps", "3", "--chunk-size", "16", "--output", str(tmp_path))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    for launcher, options in (((sys.executable,), ("--nproc", "2")), (torchrun, ())):
        printed = run(*launcher, program, *arguments, *options)
        assert "largest gap between the two curves" in printed
        for picture in ("plan.png", "loss.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
            (tmp_path / picture).unlink()


def test_plan_in_data_loader() -> None:
    assert run(sys.executable, str(EXAMPLES / "plan_in_data_loader.py")).count("key made in") == 5
