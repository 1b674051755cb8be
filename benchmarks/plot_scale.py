"""A plot of what emulate_scale.py stored: TFLOP/s per GPU by number of GPUs.

    python benchmarks/plot_scale.py scale_results/results.json --output scale.png

One row of plots for each mask, forward left and backward right.
"""

import argparse
from pathlib import Path
from typing import Any

from scale_results import (
    FLAT,
    HEADS_IN_NODES,
    NO_NETWORK,
    PUBLISHED,
    PUBLISHED_SIZES,
    TRANSPORTS,
    TWO_LEVEL,
    Report,
    unique,
)

PLANNED, LIMIT, RIVAL, OTHERS = "our plans, network modelled", "our plans, no network", "rivals, modelled", "published"
STYLES: dict[str, dict[str, Any]] = {
    PLANNED: {"linewidth": 2.2, "marker": "o", "markersize": 5, "zorder": 3},
    LIMIT: {"linewidth": 1.6, "linestyle": (0, (1, 1))},
    RIVAL: {"linewidth": 1.2, "linestyle": "--"},
    OTHERS: {"linewidth": 0.8, "linestyle": "-", "marker": "x", "markersize": 6, "alpha": 0.75},
}
COLORS = {
    "native": "#111111",
    "MagiAttention": "#888888",
    HEADS_IN_NODES: "#7b2cbf",
    TWO_LEVEL: "#1f77b4",
    FLAT: "#0b6e4f",
    "ours": "#0b6e4f",
    "Ulysses": "#d1495b",
    "USP": "#c98a00",
    "all-gather": "#8d6b48",
    "ring": "#e377c2",
}
"""Of lines whose name holds a word, the first that it does."""

SHOWN = ("device", "sizes", "plans", "network (modelled)")

Line = tuple[str, str, list[int], tuple[list[float], list[float]]]


def lines_of(report: Report, mask: str) -> list[Line]:
    """Kind, name, numbers of GPUs, and TFLOP/s forward and backward of each line."""
    lines: list[Line] = []
    modelled = [m for m in report.modelled if m.mask == mask]
    for name in unique(m.name for m in modelled):
        points = sorted((m for m in modelled if m.name == name), key=lambda m: m.cp_size)
        transport = points[0].transport
        kind = LIMIT if transport == NO_NETWORK else PLANNED if transport in TRANSPORTS else RIVAL
        speeds = [p.forward for p in points], [p.backward for p in points]
        lines.append((kind, name, [p.cp_size for p in points], speeds))
    for name, (forward, backward) in PUBLISHED.get(mask, {}).items():
        lines.append((OTHERS, name, list(PUBLISHED_SIZES), (list(forward), list(backward))))
    return sorted(lines, key=lambda line: list(STYLES).index(line[0]))


def plot(report: Report, path: Path) -> None:
    """Write the plot; the ending of ``path`` chooses the format."""
    from matplotlib.figure import Figure

    masks = unique(m.mask for m in report.modelled)
    figure = Figure(figsize=(14, 1 + 4.8 * len(masks)), layout="constrained")
    axes = figure.subplots(len(masks), 2, squeeze=False, sharey="row", sharex="row")
    for mask, row in zip(masks, axes, strict=True):
        lines = lines_of(report, mask)
        sizes = sorted({size for line in lines for size in line[2]})
        for which, (axis, direction) in enumerate(zip(row, ("forward", "backward"), strict=True)):
            for kind, name, line_sizes, speeds in lines:
                color = next(color for word, color in COLORS.items() if word in name)
                axis.plot(line_sizes, speeds[which], label=name, color=color, **STYLES[kind])
            axis.set_title(f"{mask}, {direction}")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel("GPUs")
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", linewidth=0.4, alpha=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("TFLOP/s of useful work per GPU")
        row[1].legend(*legend(row[1], lines), loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, frameon=False)
    setting = [report.setting[name] for name in SHOWN if name in report.setting]
    figure.suptitle("\n".join(setting), fontsize=8)
    figure.savefig(path, dpi=120)


def legend(axis: Any, lines: list[Line]) -> tuple[list[Any], list[str]]:
    """Handles and labels, with a heading before each kind of line."""
    from matplotlib.lines import Line2D

    drawn = dict(zip([(line[0], line[1]) for line in lines], axis.get_lines(), strict=True))
    handles, labels = [], []
    for kind in unique(line[0] for line in lines):
        handles.append(Line2D([], [], color="none"))
        labels.append(kind.upper())
        for (of_kind, name), handle in drawn.items():
            if of_kind == kind:
                handles.append(handle)
                labels.append(name)
    return handles, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--output", type=Path, default=Path("scale.png"))
    args = parser.parse_args()
    report = Report.load(args.results)
    if not report.modelled:
        parser.error(f"{args.results} has no results")
    plot(report, args.output)


if __name__ == "__main__":
    main()
