"""What bench_flex_attn.py measures, stored as JSON, and its tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BACKWARD_TO_FORWARD = 2.5  # five products of tiles against two, if all are as large


@dataclass(frozen=True)
class Outcome:
    """What became of a contender in a case: median times, or why there are none.

    Attributes:
        forward_ms: Of the forward pass.
        backward_ms: Of the backward pass alone.
        rounds: Of how many rounds they are the median.
        error: Largest relative error of out, dq, dk, dv against the first contender of the case.
        first_call_s: Seconds until the first results were there, compilation included; far above the times if it
            compiled, close to them if it was compiled before for an earlier case.
        failure: Why there are no times.
        supported: False if the library has no such mask.
    """

    forward_ms: float = math.nan
    backward_ms: float = math.nan
    rounds: int = 0
    error: float = math.nan
    first_call_s: float = math.nan
    failure: str = ""
    supported: bool = True


@dataclass(frozen=True)
class Result:
    """A case with the outcome of each contender, ours first.

    Attributes:
        forward_flops: Useful work of the forward pass.
        head_dim_v: Dimensions of a head of values; None for those of keys.
    """

    mask: str
    seqlen: int
    heads: int
    heads_kv: int
    head_dim: int
    forward_flops: int
    outcomes: dict[str, Outcome]
    head_dim_v: int | None = None

    @property
    def backward_flops(self) -> float:
        """Useful work of the backward pass: three of its five products are as large as q k^T, two as p v."""
        head_dim_v = self.head_dim_v or self.head_dim
        return self.forward_flops * (3 * self.head_dim + 2 * head_dim_v) / (self.head_dim + head_dim_v)

    @property
    def head_dims(self) -> str:
        """Dimensions of a head, and of one of values where they differ."""
        return str(self.head_dim) if self.head_dim_v is None else f"{self.head_dim}:{self.head_dim_v}"

    def tflops(self, contender: str) -> tuple[float, float]:
        """TFLOP/s of useful work, forward and backward; NaN where there is no time."""
        outcome = self.outcomes.get(contender, Outcome())
        forward, backward = outcome.forward_ms * 1e9, outcome.backward_ms * 1e9
        return self.forward_flops / forward, self.backward_flops / backward

    def best(self, contenders: Sequence[str]) -> tuple[float, float]:
        """The best speed of any of them, forward and backward; NaN where none has a time."""
        speeds = [speed for speed in map(self.tflops, contenders) if not math.isnan(speed[0])]
        return tuple(map(max, zip(*speeds, strict=True))) if speeds else (math.nan, math.nan)


@dataclass
class Report:
    """All results of a run.

    Attributes:
        setting: What the run was made on and with, name to value.
        ours: The contenders that are this library, the one to compare first.
        rivals: The others.
        results: The cases, in order.
    """

    setting: dict[str, str]
    ours: list[str]
    rivals: list[str]
    results: list[Result] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        fields = json.loads(path.read_text())
        for result in fields["results"]:
            result["outcomes"] = {name: Outcome(**outcome) for name, outcome in result["outcomes"].items()}
        fields["results"] = [Result(**result) for result in fields["results"]]
        return cls(**fields)


def as_markdown(report: Report) -> str:
    """The whole report."""
    setting = "\n".join(f"* {name}: {value}" for name, value in report.setting.items())
    title = "# Attention on one GPU\n\nTFLOP/s of useful work, forward / backward.\n\n"
    return title + "\n".join([setting, "", *table_lines(report), "", *failure_lines(report)]).rstrip() + "\n"


def short_table(report: Report, limit: int = 10_500) -> str:
    """The table in at most ``limit`` characters: what does not fit is left out at its start."""
    header, rule, *rows = table_lines(report)
    notes = failure_lines(report)
    left_out = 0
    while True:
        gap = [f"({left_out} rows left out)"] if left_out else []
        text = "\n".join([*gap, header, rule, *rows[left_out:], *notes])
        if len(text) <= limit or left_out == len(rows):
            return text[:limit]
        left_out += 1


def table_lines(report: Report) -> list[str]:
    """Header, rule and one line a case."""
    contenders = [*report.ours, *report.rivals]
    header = ["mask", "seqlen", "heads", "dim", *contenders, "best rival", "ratio f / b"]
    rows = [header, ["---"] * len(header)]
    for result in report.results:
        shape = [as_length(result.seqlen), f"{result.heads}:{result.heads_kv}", result.head_dims]
        cells = [_cell(result, contender) for contender in contenders]
        best = result.best(report.rivals)
        ratio = [ours / rival for ours, rival in zip(result.tflops(report.ours[0]), best, strict=True)]
        rows.append([result.mask, *shape, *cells, _pair(best, ".0f"), _pair(ratio, ".2f")])
    return [f"| {' | '.join(row)} |" for row in rows]


def failure_lines(report: Report) -> list[str]:
    """Why contenders failed, each reason once with the first case and the number of cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in report.results:
        case = f"{result.mask} {as_length(result.seqlen)} {result.heads}:{result.heads_kv} {result.head_dims}"
        for name, outcome in result.outcomes.items():
            if outcome.failure and outcome.supported:
                cases.setdefault((name, outcome.failure[:200]), []).append(case)
    return [
        f"{name}, {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {failure}"
        for (name, failure), where in cases.items()
    ]


def as_length(seqlen: int) -> str:
    """8192 as 8k."""
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _cell(result: Result, contender: str) -> str:
    outcome = result.outcomes.get(contender)
    if outcome is None or not outcome.supported:
        return ""
    return "failed" if outcome.failure else _pair(result.tflops(contender), ".0f")


def _pair(values: Sequence[float], form: str) -> str:
    return " / ".join("-" if math.isnan(x) else f"{x:{form}}" for x in values)
