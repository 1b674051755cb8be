"""Pictures of a mask, as text or as an image, at any length: what they show are exact areas of blocks of cells."""

import os

import numpy as np

from magi_attention.mask.bands import K0, Q0, IntArray, area, crop
from magi_attention.mask.integers import as_size

FULL, PARTIAL, EMPTY = "█", "▒", "·"


def block_areas(bands: IntArray, total_seqlen_q: int, total_seqlen_k: int, rows: int, cols: int) -> IntArray:
    """Number of attended cells in each block of a grid laid over the mask.

    Blocks have ``ceil(total_seqlen_q / rows)`` queries and ``ceil(total_seqlen_k / cols)`` keys, the last ones fewer.

    Args:
        bands: Bands that share no cell, shape ``(n, 6)``.
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        rows: Number of blocks along the queries.
        cols: Number of blocks along the keys.

    Returns:
        Areas, shape ``(rows, cols)``.
    """
    q_borders, k_borders = _borders(total_seqlen_q, rows), _borders(total_seqlen_k, cols)
    pieces, row, _ = crop(bands, q_borders[:-1], q_borders[1:], Q0)
    pieces, col, source = crop(pieces, k_borders[:-1], k_borders[1:], K0)
    areas = np.zeros((rows, cols), np.int64)
    np.add.at(areas, (row[source], col), area(pieces))
    return areas


def draw(bands: IntArray, total_seqlen_q: int, total_seqlen_k: int, max_size: int = 64) -> str:
    """The mask as text: queries from top to bottom, keys from left to right.

    A character is one cell where the mask fits, else a block of cells: full, partly attended, or empty.

    Args:
        bands: Bands that share no cell, shape ``(n, 6)``.
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        max_size: Most characters a side.

    Raises:
        TypeError: If ``max_size`` is no integer.
        ValueError: If it is not positive.
    """
    max_size = as_size(max_size, "max_size")
    areas, cells = _coarse(bands, total_seqlen_q, total_seqlen_k, max_size)
    symbols = np.where(areas == 0, EMPTY, np.where(areas == cells, FULL, PARTIAL))
    block_q, block_k = _block_size(total_seqlen_q, max_size), _block_size(total_seqlen_k, max_size)
    margin = max(3, len(str(total_seqlen_q)))
    last_key = str(total_seqlen_k - 1)
    room = symbols.shape[1] - 1
    lines = ["q\\k".rjust(margin) + " 0" + (last_key.rjust(room) if len(last_key) < room else "")]
    lines += [f"{n * block_q:>{margin}} {''.join(row)}" for n, row in enumerate(symbols)]
    if block_q == block_k == 1:
        lines.append(f"{FULL} attended, {EMPTY} masked")
    else:
        lines.append(f"{FULL} attended, {PARTIAL} partly, {EMPTY} masked; one character is {block_q} x {block_k} cells")
    return "\n".join(lines)


def plot(
    bands: IntArray,
    total_seqlen_q: int,
    total_seqlen_k: int,
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Write the mask as an image: queries from top to bottom, keys from left to right, darker where more is attended.

    Args:
        bands: Bands that share no cell, shape ``(n, 6)``.
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        path: File to write; its ending chooses the format, such as ``.png``, ``.svg`` or ``.pdf``.
        title: Heading; by default the numbers of queries and keys and the share of cells that is attended.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
    except ImportError:
        raise ImportError("plotting a mask needs matplotlib: pip install matplotlib") from None

    areas, cells = _coarse(bands, total_seqlen_q, total_seqlen_k, max_size=256)
    share = areas.sum() / max(1, total_seqlen_q * total_seqlen_k)
    figure = Figure(figsize=(6.4, 5.4), dpi=160, layout="constrained")
    axes = figure.add_subplot(facecolor="#f6f7fa")
    image = axes.imshow(
        # Blocks without a cell show the background, so that a strip far thinner than a block is still seen.
        np.ma.masked_array(areas / np.maximum(cells, 1), areas == 0),
        cmap=LinearSegmentedColormap.from_list("attended", ["#b5cdee", "#4f81c7", "#173a75"]),
        vmin=0,
        vmax=1,
        extent=(0, max(1, total_seqlen_k), max(1, total_seqlen_q), 0),
        interpolation="nearest",
        aspect="equal" if 0.5 <= total_seqlen_q / max(1, total_seqlen_k) <= 2 else "auto",
    )
    axes.set_title(title or f"{total_seqlen_q:,} queries × {total_seqlen_k:,} keys, {100 * share:.3g}% attended")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for spine in axes.spines.values():
        spine.set_edgecolor("#9aa4b5")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.03, label="attended share of a block")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    bar.outline.set_visible(False)
    figure.savefig(path)


def _coarse(bands: IntArray, total_seqlen_q: int, total_seqlen_k: int, max_size: int) -> tuple[IntArray, IntArray]:
    """Attended cells, and all cells, of each block of a grid with at most ``max_size`` blocks a side."""
    rows = _ceil_div(total_seqlen_q, _block_size(total_seqlen_q, max_size))
    cols = _ceil_div(total_seqlen_k, _block_size(total_seqlen_k, max_size))
    cells = np.outer(np.diff(_borders(total_seqlen_q, rows)), np.diff(_borders(total_seqlen_k, cols)))
    return block_areas(bands, total_seqlen_q, total_seqlen_k, rows, cols), cells


def _block_size(total: int, max_size: int) -> int:
    return max(1, _ceil_div(total, max_size))


def _borders(total: int, count: int) -> IntArray:
    """Where ``count`` blocks of equal size begin, and where the last one ends."""
    return np.minimum(np.arange(count + 1) * _ceil_div(total, max(1, count)), total)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
