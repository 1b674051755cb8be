"""A bar plot of what bench_cp.py stored, and its tables.

    python benchmarks/plot_cp.py results/results.json --output cp.png

One row of plots for each number of GPUs, head count and length, forward left and backward right, a group of bars for
each mask.
"""

import argparse
from pathlib import Path

from cp_results import Report, Result, as_markdown
from flex_attn_results import as_length
from plot_flex_attn import draw_groups

Shape = tuple[int, int, int, int]


def by_shape(results: list[Result]) -> dict[Shape, list[Result]]:
    """The results of each ``(gpus, heads, heads_kv, tokens)``, ascending."""
    shapes: dict[Shape, list[Result]] = {}
    for result in results:
        shapes.setdefault((result.gpus, result.heads, result.heads_kv, result.tokens), []).append(result)
    return dict(sorted(shapes.items()))


def plot(report: Report, path: Path) -> None:
    """Write the plot; the ending of ``path`` chooses the format. A contender without any time has no bars."""
    from matplotlib.figure import Figure

    shapes = by_shape(report.results)
    timed = [name for name in report.contenders if any(result.has_time(name) for result in report.results)]
    widest = max(map(len, shapes.values()))
    bars = 2 * widest * (len(timed) + 2)
    figure = Figure(figsize=(max(10, 3 + 0.12 * bars), 1 + 3.2 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False, sharey="row")
    for ((gpus, heads, heads_kv, tokens), results), row in zip(shapes.items(), axes, strict=True):
        for which, (axis, direction) in enumerate(zip(row, ("forward", "backward"), strict=True)):
            draw_groups(axis, results, timed, which)
            axis.set_title(f"{direction}, {as_length(tokens)} tokens on {gpus} GPUs, {heads}:{heads_kv} heads")
        row[0].set_ylabel("TFLOP/s of useful work a GPU")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(timed), 5), frameon=False)
    setting = ", ".join(report.setting[name] for name in ("devices", "date") if name in report.setting)
    figure.suptitle(setting, fontsize="small", y=0.0, va="bottom")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--output", type=Path, default=Path("cp.png"))
    args = parser.parse_args(argv)
    report = Report.load(args.results)
    if not any(result.has_time(name) for result in report.results for name in report.contenders):
        parser.error(f"{args.results} has no times")
    print(as_markdown(report))
    plot(report, args.output)


if __name__ == "__main__":
    main()
