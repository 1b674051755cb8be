"""A bar plot of what bench_flex_attn.py stored, and its table.

    python benchmarks/plot_flex_attn.py results/results.json --output flex_attn.png

One row of plots for each sequence length, head count and head_dim, forward left and backward right, a group of bars
for each mask.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from flex_attn_results import Report, Result, as_length, as_markdown

Shape = tuple[str, int, int, int]


def by_shape(results: list[Result]) -> dict[Shape, list[Result]]:
    """The results of each ``(head_dims, heads, heads_kv, seqlen)``, in the order they have."""
    shapes: dict[Shape, list[Result]] = {}
    for result in results:
        shapes.setdefault((result.head_dims, result.heads, result.heads_kv, result.seqlen), []).append(result)
    return shapes


def plot(report: Report, path: Path) -> None:
    """Write the plot; the ending of ``path`` chooses the format."""
    from matplotlib.figure import Figure

    shapes = by_shape(report.results)
    contenders = [*report.ours, *report.rivals]
    widest = max(map(len, shapes.values()))
    figure = Figure(figsize=(max(10, 3 + 1.8 * widest), 0.8 + 3.2 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False, sharey="row")
    for (shape, results), row in zip(shapes.items(), axes, strict=True):
        for which, (axis, direction) in enumerate(zip(row, ("forward", "backward"), strict=True)):
            draw_groups(axis, results, contenders, which)
            head_dims, heads, heads_kv, seqlen = shape
            axis.set_title(f"{direction}, {as_length(seqlen)} tokens, {heads}:{heads_kv} heads, head_dim {head_dims}")
        row[0].set_ylabel("TFLOP/s of useful work")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(contenders), frameon=False)
    setting = ", ".join(report.setting[name] for name in ("device", "date") if name in report.setting)
    figure.suptitle(setting, fontsize="small", y=0.0, va="bottom")
    figure.savefig(path, dpi=120)


def draw_groups(axis: Any, results: list[Result], contenders: list[str], which: int) -> None:
    """A group of bars for each mask; no bar where a contender has no time."""
    width = 0.84 / len(contenders)
    for n, contender in enumerate(contenders):
        speeds = [result.tflops(contender)[which] for result in results]
        places = [group + (n + 0.5) * width - 0.42 for group in range(len(results))]
        heights = [0 if math.isnan(speed) else speed for speed in speeds]
        bars = axis.bar(places, heights, width, label=contender, color=f"C{n}")
        labels = ["" if math.isnan(speed) else f"{speed:.0f}" for speed in speeds]
        axis.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(results)), [result.mask for result in results], rotation=20, ha="right", fontsize=8)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--output", type=Path, default=Path("flex_attn.png"))
    args = parser.parse_args()
    report = Report.load(args.results)
    if not report.results:
        parser.error(f"{args.results} has no results")
    print(as_markdown(report))
    plot(report, args.output)


if __name__ == "__main__":
    main()
