"""The benchmark of packing and adding rows runs, on the CPU as well, and checks what it times."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_comm_rows.py"
sys.path.append(str(BENCHMARK.parent))

import bench_comm_rows as bench  # noqa: E402


def test_table(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    sizes = ["--rows", "1024", "--ranks", "4", "--heads", "1", "--head-dim", "8", "--repetitions", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *sizes, "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output.read_text()
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [line[0] for line in lines] == [
        "| pack k, v",
        "| order received k, v",
        "| pack dk, dv",
        "| pack dk, dv as bf16",
        "| add dk, dv",
    ]
    assert all(float(line[2]) > 0 and float(line[4]) > 0 for line in lines)


def test_wrong_results_are_seen() -> None:
    step = bench.Step("wrong", lambda: [torch.ones(2)], lambda: [torch.zeros(2)], 1)
    with pytest.raises(AssertionError, match="not close"):
        bench.measure(step, "cpu", 1)


def test_rows_must_fit_the_ranks() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--rows", "1000"], capture_output=True, text=True)
    assert done.returncode == 2 and "--rows must be a multiple of 128 times --ranks, not 1000 with 4" in done.stderr
