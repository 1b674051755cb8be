"""A plan as a picture: who computes which part of the mask, how even it is, and who sends to whom."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from magi_attention.mask.drawing import block_areas
from magi_attention.planning import AttnPlan
from magi_attention.planning.load_balance import peak_over_mean, rank_areas


def rank_colors(cp_size: int) -> NDArray[np.float64]:
    """A colour for each rank, ``(cp_size, 3)``; neighbours differ."""
    if cp_size <= 10:
        return colormaps["tab10"](np.arange(cp_size))[:, :3]
    return colormaps["turbo"](np.arange(cp_size) * 0.381966 % 1.0)[:, :3]


def plot_plan(plan: AttnPlan, path: str | Path, title: str | None = None) -> None:
    """Write a picture of a plan.

    Args:
        plan: The plan.
        path: File to write; its ending chooses the format.
        title: Heading; by default what is planned.
    """
    figure = Figure(figsize=(12, 5.6), dpi=140, layout="constrained")
    axes = figure.subplot_mosaic([["mask", "area", "rows"]], width_ratios=[1.35, 1, 1])
    draw_mask_by_rank(axes["mask"], plan)
    draw_balance(axes["area"], plan)
    draw_rows(axes["rows"], plan)
    figure.suptitle(
        title or f"{plan.mask!r} over {plan.cp_size} ranks, chunks of {plan.dispatch.chunk_size}", fontsize=11
    )
    figure.savefig(path)


def draw_mask_by_rank(axes: Axes, plan: AttnPlan) -> None:
    """The mask, each row in the colour of the rank that computes it; darker where more of a block is attended."""
    total, num_keys = plan.dispatch.padded_seqlen, plan.dispatch_k.padded_seqlen
    chunks_a_row = -(-len(plan.dispatch.owner) // 512)
    block_q, block_k = plan.dispatch.chunk_size * chunks_a_row, -(-num_keys // 512)
    rows, cols = -(-total // block_q), -(-num_keys // block_k)
    areas = block_areas(plan.mask.bands, rows * block_q, cols * block_k, rows, cols)
    share = areas / (block_q * block_k)
    owner = plan.dispatch.owner[::chunks_a_row]
    color = rank_colors(plan.cp_size)[owner][:, None, :]
    strength = np.where(areas > 0, 0.35 + 0.65 * share, 0.06)[..., None]
    axes.imshow(
        1 - strength * (1 - color),
        extent=(0, cols * block_k, rows * block_q, 0),
        interpolation="nearest",
        aspect="auto",
    )
    axes.set_xlim(0, num_keys)
    axes.set_ylim(total, 0)
    axes.set_title("mask, coloured by rank")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter(EngFormatter(sep=""))


def draw_balance(axes: Axes, plan: AttnPlan) -> None:
    """Unmasked area of each rank, and the mean."""
    areas = rank_areas(plan.work, plan.dispatch.owner, plan.cp_size)
    axes.bar(np.arange(plan.cp_size), areas, color=rank_colors(plan.cp_size))
    axes.axhline(float(areas.mean()), color="0.3", linewidth=1, linestyle="--")
    axes.set_title(f"unmasked area: peak / mean = {peak_over_mean(areas):.3f}")
    _style_ranks(axes)


def draw_rows(axes: Axes, plan: AttnPlan) -> None:
    """Rows received by each rank, beside what an all-gather would receive."""
    received = plan.routes.rows_received(plan.cp_size)
    axes.bar(np.arange(plan.cp_size), received, color=rank_colors(plan.cp_size))
    everything = plan.dispatch_k.local_seqlen * (plan.cp_size - 1)
    axes.axhline(everything, color="0.3", linewidth=1, linestyle="--")
    if everything:
        axes.annotate("all-gather or ring", (-0.4, everything), xytext=(0, 3), textcoords="offset points", color="0.3")
    axes.set_title("key/value rows received")
    _style_ranks(axes)


def _style_ranks(axes: Axes) -> None:
    axes.set_xlabel("rank")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
