"""`magi-attention plan`: chosen stages and predicted times, as text, JSON, a trace and a picture."""

import json
import re
from pathlib import Path

import pytest

from magi_attention.cli import main
from magi_attention.config import AttnOverlapMode, CostModel, DistAttnConfig, OverlapConfig
from magi_attention.mask import builders
from magi_attention.planning import plan_attention
from magi_attention.planning.report import report_times
from magi_attention.planning.timeline import chrome_trace, predict_timeline

CAUSAL = ("--mask", "causal", "--seqlen", 40000, "--cp-size", 4)
SLOW_NETWORK = ("--bandwidth", "10e9")


def plan(*arguments: object) -> int:
    return main(["plan", *(str(a) for a in arguments)])


def expected_plan(**overlap: object):
    model = CostModel(bandwidth=10e9)
    config = DistAttnConfig(overlap_config=OverlapConfig(cost_model=model, **overlap))
    return plan_attention(builders.causal(40000), 4, 512, config=config)


def test_dynamic_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert plan(*CAUSAL, *SLOW_NETWORK, "--degree", "dynamic", "--json", out) == 0
    choice = expected_plan(mode=AttnOverlapMode.DYNAMIC).overlap_choice
    assert choice is not None and choice.chosen.degree > 1
    assert str(choice) in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["overlap_choice"]["chosen"]["degree"] == choice.chosen.degree
    assert {len(rank["stages"]) for rank in found["ranks"]} == {choice.chosen.degree}
    assert [c["cost"] for c in found["overlap_choice"]["candidates"]] == [c.cost for c in choice.candidates]


def test_max_degree(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*CAUSAL, *SLOW_NETWORK, "--degree", "dynamic", "--max-degree", 1) == 0
    assert re.search(r"^chosen +1 ", capsys.readouterr().out, re.MULTILINE)


def test_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert plan(*CAUSAL, *SLOW_NETWORK, "--degree", 2, "--timeline", "--json", out) == 0
    timeline = predict_timeline(expected_plan(degree=2))
    printed = capsys.readouterr().out
    assert f"forward {timeline.forward.seconds * 1e3:.3f} ms" in printed
    assert f"backward {timeline.backward.seconds * 1e3:.3f} ms" in printed
    assert "stages, with predicted times" not in printed, "the number of stages was given"
    forward, backward = report_times(timeline.forward), report_times(timeline.backward)
    slowest = max(range(4), key=lambda rank: forward[rank].compute + backward[rank].compute)
    lines = [line for line in printed.splitlines() if re.match(r" +(\* )?\d( +\d+\.\d{3}){6} *$", line)]
    assert [line.lstrip().startswith("*") for line in lines] == [rank == slowest for rank in range(4)]
    for line, f, b in zip(lines, forward, backward, strict=True):
        numbers = [float(x) for x in line.split()[-6:]]
        assert numbers == pytest.approx([x * 1e3 for t in (f, b) for x in (t.compute, t.exposed, t.idle)], abs=1e-3)
    found = json.loads(out.read_text())
    assert found["overlap_choice"] is None
    assert found["predicted_seconds"]["backward"]["total"] == timeline.backward.seconds
    assert found["predicted_seconds"]["forward"]["ranks"][3] == vars(forward[3])


def test_without_timeline_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*CAUSAL) == 0
    assert "predicted" not in capsys.readouterr().out


def test_trace(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    assert plan(*CAUSAL, *SLOW_NETWORK, "--degree", 2, "--trace", out) == 0
    assert json.loads(out.read_text()) == chrome_trace(predict_timeline(expected_plan(degree=2)))


@pytest.mark.parametrize("cp_size", [1, 4, 32])
def test_picture(cp_size: int, tmp_path: Path) -> None:
    out = tmp_path / "timeline.png"
    assert plan("--seqlen", 40000, "--cp-size", cp_size, "--degree", "dynamic", "--timeline-plot", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_every_cost_is_an_option(tmp_path: Path) -> None:
    def seconds(*options: object) -> float:
        out = tmp_path / "plan.json"
        assert plan(*CAUSAL, "--degree", 0, "--json", out, *options) == 0  # nothing is hidden
        predicted = json.loads(out.read_text())["predicted_seconds"]
        return predicted["forward"]["total"] + predicted["backward"]["total"]

    default = seconds()
    slower = [
        "heads-q=128",
        "head-dim=256",
        "head-dim-v=256",
        "forward-tflops=300",
        "backward-tflops=300",
        "latency=1",
        "stage-overhead=1",
    ]
    for option in (*slower, "bandwidth=1e9", "heads-kv=64", "element-bytes=4"):
        assert seconds(f"--{option}") > default, option
    stages = "--degree", 2  # of which the second is merged
    assert seconds(*stages, "--hbm-bandwidth=1e11") > seconds(*stages)
    assert seconds("--bandwidth=1e9", "--grad-wire-dtype=input") < seconds("--bandwidth=1e9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bandwidth", -1), "bandwidth must be above 0"),
        (("--heads-q", 7), "heads_q must be a multiple of heads_kv"),
        (("--degree", "dynamic", "--max-degree", 99), "max_degree must be at most 8"),
    ],
)
def test_bad_costs(options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*CAUSAL, *options) == 2
    assert message in capsys.readouterr().err


def test_bad_degree(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan(*CAUSAL, "--degree", "many")
    assert "invalid degree value: 'many'" in capsys.readouterr().err
