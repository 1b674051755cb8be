"""The examples run, at toy size."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torchrun import torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_alone(program: Path, *arguments: str) -> str:
    return run(sys.executable, str(program), *arguments, "--nproc", "2")


@pytest.mark.parametrize("start", [run_alone, torchrun])
def test_train_packed_documents(start: Callable[..., str], tmp_path: Path) -> None:
    arguments = ("--seqlen", "400", "--steps", "3", "--chunk-size", "16", "--output", str(tmp_path))
    printed = start(EXAMPLES / "train_packed_documents.py", *arguments)
    assert "largest gap between the two curves" in printed
    for picture in ("plan.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_plan_in_data_loader() -> None:
    assert run(sys.executable, str(EXAMPLES / "plan_in_data_loader.py")).count("key made in") == 5
