"""The command line: what it prints and writes, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_attention.cli import doctor, main
from magi_attention.cli.plan import FURTHER_OPTIONS, MASKS
from magi_attention.mask import builders

LENGTHS = [700, 1, 333, 40, 150]


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(LENGTHS))
    return path


def plan(*arguments: object) -> int:
    return main(["plan", *(str(a) for a in arguments)])


def test_json_is_exact(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ("--lengths", lengths, "--cp-size", 4, "--chunk-size", 16, "--degree", 2, "--min-stage-rows", 8)
    assert plan(*arguments, "--json", out) == 0
    assert "padding: 56 of 1,280 tokens" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert (result["cp_size"], result["chunk_size"], result["total_seqlen"], result["pad_size"]) == (4, 16, 1224, 56)
    assert result["plan_ms"] > 0
    ranks = result["ranks"]
    areas = [r["area"] for r in ranks]
    assert result["imbalance"] == pytest.approx(max(areas) / (sum(areas) / 4), abs=1e-6)
    assert [r["rank"] for r in ranks] == [0, 1, 2, 3]
    assert {r["tokens"] for r in ranks} == {320}
    assert sorted(c for r in ranks for c in r["chunks"]) == list(range(80))

    dense = builders.varlen(builders.cu_seqlens_from_lengths(LENGTHS), causal=True).to_dense()
    for r in ranks:
        own = {row for chunk in r["chunks"] for row in range(chunk * 16, chunk * 16 + 16) if row < 1224}
        mine = dense[sorted(own)]
        assert r["area"] == mine.sum() == r["local_area"] + sum(s["area"] for s in r["stages"])
        remote = set(mine.any(axis=0).nonzero()[0].tolist()) - own
        assert r["recv_rows"] == len(remote) == sum(s["recv_rows"] for s in r["stages"])
        assert r["send_rows"] == sum(s["send_rows"] for s in r["stages"])
    assert sum(r["send_rows"] for r in ranks) == sum(r["recv_rows"] for r in ranks)


@pytest.mark.parametrize("mask", sorted(MASKS))
def test_every_mask(mask: str, lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ["--mask", mask, "--lengths", lengths, "--cp-size", 2, "--chunk-size", 32, "--json", out]
    options = {"window": (99, 0), "global_size": (2,), "block_size": (64,), "prefix": (100,)}
    for name, (_, other, masks) in FURTHER_OPTIONS.items():
        if other == "mask" and mask in masks:
            arguments += (f"--{name.replace('_', '-')}", *options[name])
    assert plan(*arguments) == 0
    printed = capsys.readouterr().out
    assert "rows received" in printed and "lower bound" in printed
    assert json.loads(out.read_text())["total_seqlen"] == sum(LENGTHS)


def test_plot_and_heap(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert plan("--mask", "causal", "--seqlen", 5000, "--cp-size", 12, "--balance", "heap", "--plot", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("balance", "chunks", "imbalance"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]], 1.5),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]], 1.0),
    ],
)
def test_orders_that_keep_neighbours(
    balance: str, chunks: list[list[int]], imbalance: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    arguments = ("--mask", "causal", "--seqlen", 8000, "--cp-size", 2, "--chunk-size", 1000, "--json", out)
    assert plan(*arguments, "--balance", balance) == 0
    result = json.loads(out.read_text())
    assert [r["chunks"] for r in result["ranks"]] == chunks
    assert result["imbalance"] == pytest.approx(imbalance, abs=1e-3)
    assert f"imbalance {imbalance:.3f}: area of the most loaded rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, -2]", "JSON list of document lengths"), ("[]", "JSON list"), ("{}", "JSON list"), ("[1", "is not JSON")],
)
def test_bad_lengths(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(text)
    assert plan("--lengths", path, "--cp-size", 2) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", 9, 0), "--window is for --mask sliding-window or global-sliding-window, not for --mask causal"),
        (
            ("--balance", "zigzag", "--tolerance", 0.5),
            "--tolerance is for --balance locality, not for --balance zigzag",
        ),
        (("--degree", 2, "--max-degree", 3), "--max-degree is for --degree dynamic, not for --degree 2"),
    ],
)
def test_options_without_use(options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--mask", "causal", "--seqlen", 100, "--cp-size", 2, *options) == 2
    assert message in capsys.readouterr().err


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--lengths", tmp_path / "missing.json", "--cp-size", 2) == 2
    assert "missing.json" in capsys.readouterr().err
    assert plan("--seqlen", 100, "--cp-size", 0) == 2
    assert "cp_size must be at least 1" in capsys.readouterr().err
    assert plan("--seqlen", 100, "--cp-size", 2, "--tolerance", 3) == 2
    assert "tolerance must lie in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan("--cp-size", 2)


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "magi_attention", "plan", "--seqlen", "4096", "--cp-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "planned for one rank in" in done.stdout


def test_doctor_on_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in printed
    assert "on cpu, bfloat16 head_dim 64, " in printed and "float32 head_dim 256:" in printed
    assert "  reference: chosen" in printed
    assert "cpu, bfloat16 head_dim 64: ok" in printed and printed.endswith("all is well\n")


@pytest.mark.parametrize("name", doctor.RESULTS)
def test_doctor_sees_a_wrong_result(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of one result is off by 0.1."""
    sound = doctor.with_gradients
    calls = []

    def lossy(*args: object) -> tuple[torch.Tensor, ...]:
        results = list(sound(*args))  # type: ignore[arg-type]
        calls.append(None)
        if len(calls) == 1:  # the library's, before the two dense ones
            results[doctor.RESULTS.index(name)][3] += 0.1
        return tuple(results)

    monkeypatch.setattr(doctor, "with_gradients", lossy)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"cpu, bfloat16 head_dim 64: FAILED, {name}: error" in printed
    assert "attention does not work here" in printed


def test_doctor_survives_an_engine_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(doctor, "flex_flash_attn_func", broken)
    assert main(["doctor"]) == 1
    assert "FAILED, RuntimeError: no such instruction" in capsys.readouterr().out


def test_doctor_tests_float32_where_it_is_another_path() -> None:
    cases = doctor.cases_to_test(torch.device("cuda"))
    assert (torch.float32, (64, 64)) in cases
    assert doctor.self_test(torch.device("cpu"), torch.float32, (64, 48)) is None
