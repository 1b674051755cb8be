"""What emulate_scale.py finds, stored as JSON, and its tables. Measured and modelled numbers are kept apart."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scale_costs import BACKWARD, FORWARD, Measured
from scale_loop import Heads, Pass
from scale_record import Step

PUBLISHED_SIZES = (8, 16, 32, 64)
PUBLISHED: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "varlen causal": {
        "MagiAttention, native transport": ((459, 427, 317, 239), (361, 372, 334, 266)),
        "MagiAttention, all-to-all-v": ((387, 307, 276, 208), (336, 353, 326, 244)),
        "Ulysses": ((278, 201, 186, 164), (332, 295, 277, 249)),
        "USP": ((261, 251, 255, 193), (325, 309, 285, 197)),
        "ring all-gather": ((289, 293, 242, 181), (179, 156, 105, 56)),
    },
    "causal": {
        "MagiAttention, native transport": ((646, 649, 622, 595), (530, 532, 540, 529)),
        "MagiAttention, all-to-all-v": ((610, 588, 579, 572), (502, 510, 501, 497)),
        "Ulysses": ((602, 560, 581, 586), (582, 562, 574, 585)),
        "USP": ((594, 590, 595, 587), (572, 570, 575, 571)),
        "ring all-gather": ((602, 593, 592, 581), (517, 525, 523, 523)),
    },
}
"""MagiAttention's published distributed benchmark: TFLOP/s per H100 at PUBLISHED_SIZES GPUs, forward and backward; 8K
tokens a GPU, 64:8 heads, head_dim 128, bf16, time of the slowest rank."""

OURS, HEADS_IN_NODES = "ours", "ours, heads inside nodes"
FLAT, TWO_LEVEL, NO_NETWORK = "all-to-all", "two-level", "no network"
TRANSPORTS = (FLAT, TWO_LEVEL, NO_NETWORK)

WHAT_IS_MEASURED = """\
## What is measured, what is modelled

**Planned**: every plan is the library's own, for all ranks, with its planning time on one CPU core.

**Measured**, on one device: for some ranks of a plan, the library's own loop with that rank's own schedules, buffers
and routing. Its process group is replaced by one that sends nothing and fills receive buffers with random numbers;
that is not counted. Each step is timed between two marks on the device, and the whole pass again without marks
in between. The device never waits for the host, so the host's time is not in it; nor is planning.

**Fitted**: ranks that were not measured, by cells, tiles and rows; a table gives the error of predicting each measured
rank from the others.

**Modelled**: the network, by latency and bandwidth of two kinds of links. A transfer is a collective: it begins when
every rank has reached it, takes as long as its busiest GPU, runs beside the steps of the ranks, and slows no kernel.
`all-to-all` sends a row to each rank that needs it; `two-level` sends it once to each node and spreads it there, with
the steps of a rank as measured with `all-to-all`; with `no network` rows take no time, which is what kernels, copies
and balance alone allow. **Rivals are modelled altogether**, at the speed of our kernels on their shards, with perfect
balance and without padding of documents: their own kernels and placements can only be slower.

The step takes as long as its slowest rank. TFLOP/s are useful work of all packs over the time of all packs.
"""


@dataclass(frozen=True)
class Planned:
    """A plan. Rows are in shards, a shard is the rows of one rank; imbalance is the largest area over the mean."""

    mask: str
    method: str
    cp_size: int
    pack: int
    documents: int
    stages: int
    imbalance: float
    received_mean: float
    received_max: float
    sent_max: float
    across_flat: float
    across_two_level: float
    plan_ms: float
    rank_ms: float


@dataclass(frozen=True)
class RankTimes:
    """A rank that was measured, or why it was not."""

    mask: str
    method: str
    cp_size: int
    pack: int
    rank: int
    reason: str
    measured: Measured | None = None
    failure: str = ""


@dataclass(frozen=True)
class KernelRates:
    """TFLOP/s of our kernels on the shard of a rival, or why they were not measured."""

    mask: str
    rival: str
    cp_size: int
    forward: float = math.nan
    backward: float = math.nan
    failure: str = ""


@dataclass(frozen=True)
class FitError:
    """Median and largest relative error of a rank's attention, predicted from the other ranks of the mask."""

    mask: str
    num_ranks: int
    forward: tuple[float, float]
    backward: tuple[float, float]


@dataclass(frozen=True)
class Modelled:
    """The speed of a method: TFLOP/s per GPU, and the share of the slowest rank's time that it waits for rows.

    Attributes:
        kernels: Where kernel times are from.
    """

    mask: str
    method: str
    transport: str
    cp_size: int
    forward: float
    backward: float
    forward_waits: float
    backward_waits: float
    kernels: str

    @property
    def name(self) -> str:
        """Method and transport."""
        return f"{self.method}, {self.transport}" if self.transport else self.method


@dataclass
class Report:
    """All results of a run."""

    setting: dict[str, str]
    planned: list[Planned] = field(default_factory=list)
    measured: list[RankTimes] = field(default_factory=list)
    kernel_rates: list[KernelRates] = field(default_factory=list)
    fit_errors: list[FitError] = field(default_factory=list)
    modelled: list[Modelled] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write results.json and results.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "results.md").write_text(as_markdown(self))

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read results.json."""
        fields = json.loads(path.read_text())
        kinds = {"planned": Planned, "kernel_rates": KernelRates, "fit_errors": FitError, "modelled": Modelled}
        lists = {name: [kind(**item) for item in fields[name]] for name, kind in kinds.items()}
        measured = [RankTimes(**item | {"measured": _measured(item["measured"])}) for item in fields["measured"]]
        return cls(fields["setting"], measured=measured, **lists)


def _measured(fields: dict[str, Any] | None) -> Measured | None:
    if fields is None:
        return None
    passes = (
        Pass(tuple(Step(**step) for step in p["steps"]), tuple(p["seconds"]), p["whole"]) for p in fields["passes"]
    )
    rows = {name: tuple(fields[name]) for name in ("received", "sent")}
    return Measured(**fields | rows | {"heads": Heads(**fields["heads"]), "passes": tuple(passes)})


def as_markdown(report: Report) -> str:
    """The whole report."""
    sections = [
        "# Distributed attention at scale\n",
        "\n".join(f"* {k}: {v}" for k, v in report.setting.items()) + "\n",
    ]
    for mask in unique(m.mask for m in report.modelled):
        sections.append(f"## {mask}\n\nTFLOP/s per GPU, forward / backward, by number of GPUs\n")
        sections.append(table(speed_rows(report, mask)))
        sections.append("Share of the slowest rank's time that it waits for rows, in percent, forward / backward\n")
        sections.append(table(waiting_rows(report, mask)))
    sections.append("## Plans\n\nMeans over packs. Rows are in shards; a shard is the rows of one rank.\n")
    sections.append(table(plan_rows(report)))
    if report.measured:
        sections.append("## Measured ranks\n")
        sections.append(table(measured_rows(report)))
    if report.fit_errors:
        sections.append("Error of a rank's attention when it is predicted from the others, median and largest\n")
        sections.append(table(fit_rows(report)))
    if report.kernel_rates:
        sections.append("## Our kernels on the shards of rivals\n\nTFLOP/s, forward / backward\n")
        sections.append(table(kernel_rows(report)))
    failures = failure_lines(report)
    if failures:
        sections.append("\n".join(failures) + "\n")
    return "\n".join([*sections, WHAT_IS_MEASURED])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the header first, as Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def speed_rows(report: Report, mask: str) -> list[list[str]]:
    """A row for each method, then the published ones."""
    published = PUBLISHED.get(mask, {})
    sizes = sorted({m.cp_size for m in report.modelled if m.mask == mask} | set(PUBLISHED_SIZES if published else ()))
    rows = _by_size(report, mask, sizes, lambda m: _pair(m.forward, m.backward, ".0f"))
    rows[0].append("kernel times")
    for row in rows[1:]:
        kernels = unique(m.kernels for m in report.modelled if m.mask == mask and m.name == row[0])
        row.append("; ".join(kernels))
    for name, (forward, backward) in published.items():
        cells = dict(zip(PUBLISHED_SIZES, zip(forward, backward, strict=True), strict=True))
        speeds = [_pair(*cells[size], ".0f") if size in cells else "" for size in sizes]
        rows.append([f"*published: {name}*", *speeds, "their own"])
    return rows


def waiting_rows(report: Report, mask: str) -> list[list[str]]:
    """A row for each of our methods that has a network."""
    sizes = sorted({m.cp_size for m in report.modelled if m.mask == mask})
    rows = _by_size(report, mask, sizes, lambda m: _pair(100 * m.forward_waits, 100 * m.backward_waits, ".0f"))
    with_network = {m.name for m in report.modelled if m.transport and m.transport != NO_NETWORK}
    return [rows[0], *(row for row in rows[1:] if row[0] in with_network)]


def plan_rows(report: Report) -> list[list[str]]:
    """A row for each mask, method and size: means over packs, and the largest where it says so."""
    names = ["mask", "method", "GPUs", "packs", "documents", "stages", "imbalance (worst)", "received mean"]
    names += ["received max", "sent max", "across nodes max, all-to-all", "two-level", "plan ms", "one rank ms"]
    rows = [names]
    for mask, method, cp_size in unique((p.mask, p.method, p.cp_size) for p in report.planned):
        plans = [p for p in report.planned if (p.mask, p.method, p.cp_size) == (mask, method, cp_size)]

        def mean(name: str, plans: list[Planned] = plans) -> float:
            return sum(getattr(p, name) for p in plans) / len(plans)

        worst = max(p.imbalance for p in plans)
        shards = ("received_mean", "received_max", "sent_max", "across_flat", "across_two_level")
        rows.append(
            [mask, method, str(cp_size), str(len(plans)), f"{mean('documents'):.0f}", f"{mean('stages'):.1f}"]
            + [f"{mean('imbalance'):.3f} ({worst:.3f})", *(f"{mean(name):.2f}" for name in shards)]
            + [f"{mean('plan_ms'):.1f}", f"{mean('rank_ms'):.1f}"]
        )
    return rows


def measured_rows(report: Report) -> list[list[str]]:
    """A row for each measured rank."""
    rows = [["mask", "method", "GPUs", "pack", "rank", "chosen for", "cells a row", "tiles filled", "shards received"]]
    rows[0] += ["attention TFLOP/s f / b", "pass ms f / b", "without marks inside f / b"]
    for r in report.measured:
        if r.measured is not None:
            m = r.measured
            speeds = [m.tflops(way) for way in (FORWARD, BACKWARD)]
            sums, wholes = (
                [1e3 * x for x in xs] for xs in ([sum(p.seconds) for p in m.passes], [p.whole for p in m.passes])
            )
            rows.append(
                [r.mask, r.method, str(r.cp_size), str(r.pack), str(r.rank), r.reason, f"{m.area / m.num_rows:.0f}"]
                + [f"{m.tiles_filled:.2f}", f"{sum(m.received) / m.num_rows:.2f}"]
                + [_pair(*speeds, ".0f"), _pair(*sums, ".2f"), _pair(*wholes, ".2f")]
            )
    return rows


def failure_lines(report: Report) -> list[str]:
    """Ranks and shards that could not be measured."""
    ranks = [(f"{r.mask}, {r.method}, {r.cp_size} GPUs, rank {r.rank}", r.failure) for r in report.measured]
    shards = [(f"{r.mask}, {r.rival}, {r.cp_size} GPUs", r.failure) for r in report.kernel_rates]
    return [f"* not measured: {where}: {failure}" for where, failure in ranks + shards if failure]


def fit_rows(report: Report) -> list[list[str]]:
    """A row for each mask."""
    rows = [["mask", "measured ranks", "forward", "backward"]]
    for fit in report.fit_errors:
        errors = [" / ".join(f"{100 * x:.1f} %" for x in way) for way in (fit.forward, fit.backward)]
        rows.append([fit.mask, str(fit.num_ranks), *errors])
    return rows


def kernel_rows(report: Report) -> list[list[str]]:
    """A row for each mask and size, a column for each rival."""
    rivals = unique(r.rival for r in report.kernel_rates)
    rows = [["mask", "GPUs", *rivals]]
    for mask, cp_size in unique((r.mask, r.cp_size) for r in report.kernel_rates):
        rates = {r.rival: r for r in report.kernel_rates if (r.mask, r.cp_size) == (mask, cp_size)}
        cells = [_pair(rates[n].forward, rates[n].backward, ".0f") if n in rates else "" for n in rivals]
        rows.append([mask, str(cp_size), *cells])
    return rows


def unique(items: Iterable[Any]) -> list[Any]:
    """Each item once, in the order of the first."""
    return list(dict.fromkeys(items))


def _by_size(report: Report, mask: str, sizes: list[int], cell: Callable[[Modelled], str]) -> list[list[str]]:
    modelled = {(m.name, m.cp_size): m for m in report.modelled if m.mask == mask}
    rows = [["", *map(str, sizes)]]
    for name in unique(name for name, _ in modelled):
        rows.append([name, *(cell(modelled[name, n]) if (name, n) in modelled else "" for n in sizes)])
    return rows


def _pair(first: float, second: float, form: str) -> str:
    return " / ".join("-" if math.isnan(x) else f"{x:{form}}" for x in (first, second))
