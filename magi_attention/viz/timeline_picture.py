"""A predicted timeline as a picture: the transfers, and what each rank computes meanwhile."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from magi_attention.planning.timeline import PassTimeline, Span, Timeline

COLORS = {"own": "#4d9d6a", "stage": "#4269d0", "cast": "#e8a33d", "reduce": "#c4507a"}
EXPOSED, IDLE = "#f6d5c3", "#eceff3"
LEGEND = {
    "attention to own keys": COLORS["own"],
    "attention to a stage's keys": COLORS["stage"],
    "cast of a stage's keys and values": COLORS["cast"],
    "reduce of its dK and dV": COLORS["reduce"],
    "waiting while rows are under way": EXPOSED,
    "waiting for a slower rank": IDLE,
}
LEAST_LABELLED = 0.03
"""Boxes that are at least this part of both passes bear the number of their stage."""


def plot_timeline(timeline: Timeline, path: str | Path, title: str | None = None) -> None:
    """Write a picture of a predicted timeline, both passes on one scale.

    Args:
        timeline: The timeline.
        path: File to write; its ending chooses the format.
        title: What it is the timeline of.
    """
    cp_size = timeline.forward.cp_size
    row_height = max(0.17, 0.36 - 0.006 * cp_size)
    figure = Figure(figsize=(13, 1.8 + row_height * (cp_size + 1.5)), dpi=140, layout="constrained")
    passes = {"forward": timeline.forward, "backward": timeline.backward}
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[part.seconds for part in passes.values()])
    for panel, (name, part) in zip(axes, passes.items(), strict=True):
        draw_pass(panel, part, LEAST_LABELLED * timeline.seconds)
        panel.set_title(f"{name}, {EngFormatter('s', places=2)(part.seconds)}", fontsize=11)
    handles = [Patch(color=color, label=label) for label, color in LEGEND.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{f'{title}, ' if title else ''}predicted over {cp_size} ranks", fontsize=11)
    figure.savefig(path)


def draw_pass(axes: Axes, timeline: PassTimeline, least_labelled: float) -> None:
    """What travels, in one row since all ranks take part, and what each rank computes, in a row each.

    Args:
        axes: Where to draw.
        timeline: The pass.
        least_labelled: Seconds from which on a box bears the number of its stage.
    """
    ranks = range(timeline.cp_size)
    transfers = [span for span in timeline.spans if span.lane == "network" and span.rank == 0]
    draw_spans(axes, -1, transfers, least_labelled)
    for rank in ranks:
        axes.broken_barh([(0, timeline.seconds)], (rank - 0.4, 0.8), facecolors=IDLE)
        waits = [(span.start, span.end - span.start) for span in transfers]
        axes.broken_barh(waits, (rank - 0.4, 0.8), facecolors=EXPOSED)
        computed = [span for span in timeline.spans if span.lane == "compute" and span.rank == rank]
        draw_spans(axes, rank, computed, least_labelled)
    axes.set_ylim(timeline.cp_size - 0.4, -1.6)
    axes.set_xlim(0, timeline.seconds)
    axes.set_yticks(
        [-1, *ranks], ["network", *(f"rank {rank}" for rank in ranks)], fontsize=9 if len(ranks) < 24 else 7
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], prune="upper"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds * 1e3:g}"))
    axes.set_xlabel("ms")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_spans(axes: Axes, row: int, spans: Sequence[Span], least_labelled: float) -> None:
    """One row of boxes, coloured by what they are."""
    extents = [(span.start, span.end - span.start) for span in spans]
    colors = [COLORS[span.name.split()[0]] for span in spans]
    edges = [
        "white" if seconds >= least_labelled / 8 else color for (_, seconds), color in zip(extents, colors, strict=True)
    ]
    axes.broken_barh(extents, (row - 0.4, 0.8), facecolors=colors, edgecolors=edges, linewidths=0.6)
    for span in spans:
        if span.stage is not None and span.end - span.start >= least_labelled:
            middle = (span.start + span.end) / 2
            axes.text(middle, row, f"{span.stage}", ha="center", va="center_baseline", color="white", fontsize=8)
