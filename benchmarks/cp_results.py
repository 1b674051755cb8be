"""What bench_cp.py measures, stored as JSON, and its tables."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flex_attn_results import BACKWARD_TO_FORWARD, as_length

ALONE = "alone"
Pair = tuple[float, float]
NO_PAIR = (math.nan, math.nan)


@dataclass(frozen=True)
class Outcome:
    """What became of a contender in a case: median times of the slowest rank, or why there are none.

    Attributes:
        forward_ms: Of the forward pass.
        backward_ms: Of the backward pass alone.
        host_forward_ms: Until the host had launched the forward pass.
        host_backward_ms: The same of the backward pass.
        rounds: Of how many rounds times are the median.
        peak_gib: Most memory that was allocated during both, beyond what was there before.
        errors: Relative errors of out, dq, dk, dv against the first contender of the case.
        first_call_s: Seconds until the first results were there, compilation included.
        failure: Why there are no times.
        supported: False if it has no such mask.
    """

    forward_ms: float = math.nan
    backward_ms: float = math.nan
    host_forward_ms: float = math.nan
    host_backward_ms: float = math.nan
    rounds: int = 0
    peak_gib: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    first_call_s: float = math.nan
    failure: str = ""
    supported: bool = True

    @property
    def ms(self) -> Pair:
        """Forward and backward."""
        return self.forward_ms, self.backward_ms


@dataclass(frozen=True)
class PlanCost:
    """What a plan of ours costs. Where the ranks of a node split heads, these are the node's, beside what that costs.

    Attributes:
        recv_rows: Key/value rows that each rank receives.
        local_rows: Rows of a rank.
        imbalance: Largest area of a rank over the mean.
        stages: Number of stages.
        plan_ms: Time that planning for all ranks took on one host.
    """

    recv_rows: list[int]
    local_rows: int
    imbalance: float
    stages: int
    plan_ms: float


@dataclass(frozen=True)
class Transfer:
    """An all-to-all of equal messages: bytes for each peer, time of the slowest rank, bytes a rank sends to others."""

    bytes_per_peer: int
    ms: float
    gb_per_s: float


@dataclass(frozen=True)
class Result:
    """A case with the outcome of each contender, ours first.

    Attributes:
        mask: Its name.
        tokens: Length of the sequence.
        gpus: Number of ranks.
        heads: Query heads.
        heads_kv: Key and value heads.
        head_dim: Their size.
        forward_flops: Useful work of the forward pass, all ranks together.
        outcomes: By contender.
        plans: What the plan of each of ours costs.
    """

    mask: str
    tokens: int
    gpus: int
    heads: int
    heads_kv: int
    head_dim: int
    forward_flops: int
    outcomes: dict[str, Outcome]
    plans: dict[str, PlanCost] = field(default_factory=dict)

    @property
    def case(self) -> str:
        """Its name among the cases of a run."""
        return case_name(self.mask, self.tokens, self.heads, self.heads_kv)

    def ms(self, contender: str) -> Pair:
        """Milliseconds of the slowest rank, forward and backward; NaN where there is no time."""
        return self.outcomes.get(contender, Outcome()).ms

    def has_time(self, contender: str) -> bool:
        return not math.isnan(self.ms(contender)[0])

    def tflops(self, contender: str) -> Pair:
        """TFLOP/s of useful work a GPU, forward and backward; NaN where there is no time."""
        forward, backward = self.ms(contender)
        work = self.forward_flops / self.gpus / 1e9
        return work / forward, BACKWARD_TO_FORWARD * work / backward

    def best(self, contenders: Sequence[str]) -> Pair:
        """The best speed of any of them, forward and backward; NaN where none has a time."""
        speeds = [self.tflops(contender) for contender in contenders if self.has_time(contender)]
        return tuple(map(max, zip(*speeds, strict=True))) if speeds else NO_PAIR


@dataclass
class Report:
    """All results of a run.

    Attributes:
        setting: What the run was made on and with, name to value.
        ours: The contenders that are this library, the one to compare first.
        rivals: The others, but for :data:`ALONE`.
        results: The cases, as they were run.
        transfers: All-to-alls by size.
    """

    setting: dict[str, str]
    ours: list[str]
    rivals: list[str]
    results: list[Result] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def contenders(self) -> list[str]:
        return [*self.ours, ALONE, *self.rivals]

    def save(self, folder: Path) -> None:
        """Write ``results.json`` and ``results.md``."""
        _replace(folder / "results.json", json.dumps(asdict(self), indent=1) + "\n")
        _replace(folder / "results.md", as_markdown(self))

    @classmethod
    def load(cls, path: Path) -> "Report":
        fields = json.loads(path.read_text())
        for result in fields["results"]:
            result["outcomes"] = {name: Outcome(**outcome) for name, outcome in result["outcomes"].items()}
            result["plans"] = {name: PlanCost(**plan) for name, plan in result["plans"].items()}
        fields["results"] = [Result(**result) for result in fields["results"]]
        fields["transfers"] = [Transfer(**transfer) for transfer in fields["transfers"]]
        return cls(**fields)


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole at any time."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


def case_name(mask: str, tokens: int, heads: int, heads_kv: int) -> str:
    return f"{mask} {as_length(tokens)} {heads}:{heads_kv}"


def as_markdown(report: Report) -> str:
    """The whole report."""
    parts = [
        "# Distributed attention\n",
        "\n".join(f"* {name}: {value}" for name, value in report.setting.items()),
        "\n## TFLOP/s of useful work a GPU, forward / backward\n",
        *speed_lines(report),
        f"\nResults agree to {largest_error(report):.1e}, relative, but for those that failed.",
        "\n## Communication of this library\n",
        *communication_lines(report),
        "\n## Peak memory beyond the inputs, GiB\n",
        *memory_lines(report),
    ]
    if report.transfers:
        parts += ["\n## All-to-all\n", *transfer_lines(report)]
    if failures := failure_lines(report):
        parts += ["\n## Failed\n", *failures]
    return "\n".join(parts) + "\n"


def largest_error(report: Report) -> float:
    """Of any tensor of any contender that did not fail, in any case."""
    outcomes = [outcome for result in report.results for outcome in result.outcomes.values() if not outcome.failure]
    return max((error for outcome in outcomes for error in outcome.errors.values()), default=math.nan)


def speed_lines(report: Report) -> list[str]:
    """Speeds and the two ratios, header, rule and one line a case."""
    ours = report.ours[0]
    header = [*CASE_HEADER, *report.contenders, f"{ours} / {ALONE}", "best rival", f"{ours} / best rival"]
    rows = []
    for result in report.results:
        best, speed = result.best(report.rivals), result.tflops(ours)
        ratios = [_ratio(speed, other) for other in (result.tflops(ALONE), best)]
        cells = [_cell(result, contender, result.tflops) for contender in report.contenders]
        rows.append([*_case(result), *cells, _pair(ratios[0], ".2f"), _pair(best, ".0f"), _pair(ratios[1], ".2f")])
    return _table(header, rows)


def communication_lines(report: Report) -> list[str]:
    """What each of ours receives, and how long it takes beyond the work alone; one line a case and variant."""
    header = [
        *CASE_HEADER,
        "contender",
        "rows received, most / mean",
        "shards",
        "imbalance",
        "stages",
        "plan ms",
        "ms f / b",
        f"beyond {ALONE}, ms f / b",
        "host ms f / b",
    ]
    rows = []
    for result in report.results:
        for name, plan in result.plans.items():
            outcome, most = result.outcomes.get(name, Outcome()), max(plan.recv_rows)
            exposed = tuple(x - y for x, y in zip(outcome.ms, result.ms(ALONE), strict=True))
            rows.append(
                [
                    *_case(result),
                    name,
                    f"{most} / {sum(plan.recv_rows) / len(plan.recv_rows):.0f}",
                    f"{most / plan.local_rows:.2f}",
                    f"{plan.imbalance:.3f}",
                    str(plan.stages),
                    f"{plan.plan_ms:.1f}",
                    _pair(outcome.ms, ".2f"),
                    _pair(exposed, ".2f"),
                    _pair((outcome.host_forward_ms, outcome.host_backward_ms), ".2f"),
                ]
            )
    return _table(header, rows)


def memory_lines(report: Report) -> list[str]:
    """Peak memory of every contender, one line a case."""
    rows = []
    for result in report.results:
        peaks = [result.outcomes.get(contender, Outcome()).peak_gib for contender in report.contenders]
        rows.append([*_case(result), *("" if math.isnan(peak) else f"{peak:.2f}" for peak in peaks)])
    return _table([*CASE_HEADER, *report.contenders], rows)


def transfer_lines(report: Report) -> list[str]:
    """Time and bandwidth of an all-to-all, one line a size."""
    rows = [[as_bytes(t.bytes_per_peer), f"{t.ms:.3f}", f"{t.gb_per_s:.1f}"] for t in report.transfers]
    return _table(["message to each peer", "ms", "GB/s sent to others by a rank"], rows)


def failure_lines(report: Report) -> list[str]:
    """Why contenders failed, each reason once with the first case and the number of cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in report.results:
        for name, outcome in result.outcomes.items():
            if outcome.failure and outcome.supported:
                cases.setdefault((name, outcome.failure), []).append(result.case)
    return [
        f"* {name}, {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {failure}"
        for (name, failure), where in cases.items()
    ]


def as_bytes(count: int) -> str:
    """65536 as 64 KiB."""
    return f"{count >> 20} MiB" if count % (1 << 20) == 0 else f"{count >> 10} KiB"


CASE_HEADER = ["mask", "tokens", "GPUs", "heads"]


def _case(result: Result) -> list[str]:
    return [result.mask, as_length(result.tokens), str(result.gpus), f"{result.heads}:{result.heads_kv}"]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _cell(result: Result, contender: str, value: Callable[[str], Pair]) -> str:
    outcome = result.outcomes.get(contender)
    if outcome is None or not outcome.supported:
        return ""
    return "failed" if outcome.failure else _pair(value(contender), ".0f")


def _ratio(a: Pair, b: Pair) -> Pair:
    return a[0] / b[0], a[1] / b[1]


def _pair(values: Sequence[float], form: str) -> str:
    return " / ".join("-" if math.isnan(x) else f"{x:{form}}" for x in values)
