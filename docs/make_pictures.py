"""Draw the pictures of the documentation with the library itself: `python docs/make_pictures.py` writes docs/pictures.

SVG written by hand, so that the same plan gives the same bytes on every machine; `tests/test_docs.py` compares them.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from magi_attention.config import (
    AttnOverlapMode,
    CostModel,
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.kernels.hopper.records import FLAG_MASK, ROW_BEGINS_INSIDE, ROW_ENDS_INSIDE
from magi_attention.kernels.hopper.walk import Walk, build_walk
from magi_attention.mask import builders
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import K0, Q0, area, crop, transpose
from magi_attention.mask.mask_type import AttnMaskType
from magi_attention.planning import AttnPlan, RankPlan, plan_attention
from magi_attention.planning.load_balance import contiguous
from magi_attention.planning.timeline import predict_timeline

RANK_COLORS = ["#4269d0", "#e8a33d", "#c4507a", "#4d9d6a"]
INK, PALE = "#30363d", "#eceff3"

DOCUMENTS = [300, 1200, 80, 500, 60, 900, 150, 700, 206]
CP_SIZE, CHUNK_SIZE = 4, 64


class Picture:
    """SVG elements on a white sheet."""

    def __init__(self, width: float, height: float) -> None:
        self.size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
        self.elements = [f'<rect width="{width:g}" height="{height:g}" fill="white"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.elements.append(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def polygon(self, points: Iterable[tuple[float, float]], fill: str) -> None:
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        self.elements.append(f'<polygon points="{path}" fill="{fill}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: float = 13, fill: str = INK) -> None:
        self.elements.append(
            f'<text x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}" font-size="{size:g}" fill="{fill}">{text}</text>'
        )

    def svg(self) -> str:
        body = "\n".join(self.elements)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {self.size} font-family="sans-serif">\n{body}\n</svg>\n'


def packed_documents() -> AttnMask:
    """Causal attention inside each document of one packed sequence."""
    borders = np.cumsum([0, *DOCUMENTS])
    ranges = np.stack((borders[:-1], borders[1:]), axis=1)
    return AttnMask.from_slices(ranges, ranges, AttnMaskType.CAUSAL, int(borders[-1]), int(borders[-1]))


def plan_with(alg: LocalityDispatchAlg | MinHeapDispatchAlg, degree: int = 1) -> AttnPlan:
    overlap = OverlapConfig(degree=degree, min_chunk_size=1)
    config = DistAttnConfig(dispatch_config=DispatchConfig(alg=alg), overlap_config=overlap)
    return plan_attention(packed_documents(), CP_SIZE, CHUNK_SIZE, config=config)


def mask_types() -> str:
    """The four types of a slice of 5 queries and 8 keys, and of one with more queries than keys."""
    cell, gap = 15, 34
    picture = Picture(4 * 8 * cell + 5 * gap, 13 * cell + 3 * gap + 24)
    for column, mask_type in enumerate(AttnMaskType):
        left = gap + column * (8 * cell + gap)
        picture.text(left, 24, mask_type.name, size=15)
        for num_q, num_k, top in ((5, 8, gap), (8, 5, gap + 5 * cell + gap)):
            dense = AttnMask.from_slices([(0, num_q)], [(0, num_k)], mask_type, num_q, num_k).to_dense()
            for i, j in np.ndindex(dense.shape):
                color = RANK_COLORS[0] if dense[i, j] else PALE
                picture.box(left + j * cell, top + i * cell, cell - 1.5, cell - 1.5, color)
            picture.text(left, top + num_q * cell + 14, f"{num_q} queries, {num_k} keys", size=11)
    return picture.svg()


def draw_band(picture: Picture, band: np.ndarray, left: float, top: float, scale: float, color: str) -> None:
    """The cells of a band, in a mask whose first cell is at ``left`` and ``top``."""
    q0, q1, k0, k1, lo, hi = band.tolist()
    corners = sorted({q0, q1, *(y for y in (k0 - lo, k1 - hi - 1) if q0 < y < q1)})
    outline = [(max(k0, y + lo), y) for y in corners] + [(min(k1, y + hi + 1), y) for y in reversed(corners)]
    picture.polygon([(left + x * scale, top + y * scale) for x, y in outline], color)


def draw_mask(picture: Picture, plan_mask: AttnMask, owner: np.ndarray, left: float, top: float, side: float) -> None:
    """The mask with each chunk of queries in the colour of its rank."""
    scale = side / plan_mask.total_seqlen_q
    picture.box(left, top, side, side, PALE)
    first = np.flatnonzero(np.diff(owner, prepend=-1))  # chunks of one rank that stand together are drawn as one
    borders = np.append(first, len(owner)) * CHUNK_SIZE
    pieces, run, _ = crop(plan_mask.bands, borders[:-1], borders[1:])
    for band, rank in zip(pieces, owner[first[run]], strict=True):
        draw_band(picture, band, left, top, scale, RANK_COLORS[rank])
    for start, end, rank in zip(borders[:-1], borders[1:], owner[first], strict=True):
        picture.box(left - 12, top + start * scale, 8, (end - start) * scale, RANK_COLORS[rank])


def draw_bars(
    picture: Picture, title: str, values: np.ndarray, left: float, top: float, width: float, most: float
) -> None:
    """One bar a rank, with the value behind it."""
    picture.text(left, top, title, size=12)
    for rank, value in enumerate(values.tolist()):
        y = top + 8 + rank * 16
        picture.box(left, y, max(width * value / most, 0.5), 12, RANK_COLORS[rank])
        picture.text(left + width * value / most + 5, y + 10.5, f"{value:,}", size=11)


def dispatch() -> str:
    """One mask cut in three ways: what each rank computes, and what it must receive."""
    locality, heap = plan_with(LocalityDispatchAlg()), plan_with(MinHeapDispatchAlg())
    work, mask = locality.work, locality.mask
    cuts = [
        ("contiguous", contiguous(work, CP_SIZE)),
        ("area heap", heap.dispatch.owner),
        ("locality (the default)", locality.dispatch.owner),
    ]
    areas = [np.bincount(owner, weights=work.areas, minlength=CP_SIZE).astype(np.int64) for _, owner in cuts]
    rows = [rows_received(locality, owner) for _, owner in cuts]
    side, gap = 230, 62
    picture = Picture(3 * side + 3 * gap, side + 240)
    for column, (title, owner) in enumerate(cuts):
        left = 40 + column * (side + gap)
        picture.text(left - 12, 26, title, size=15)
        draw_mask(picture, mask, owner, left, 40, side)
        draw_bars(picture, "unmasked area of each rank", areas[column], left - 12, side + 66, 170, np.max(areas))
        draw_bars(picture, "rows received by each rank", rows[column], left - 12, side + 160, 170, np.max(rows))
    return picture.svg()


def rows_received(plan: AttnPlan, owner: np.ndarray) -> np.ndarray:
    """Distinct keys that each rank attends and does not own, when `owner[c]` has chunk c."""
    dense = plan.mask.to_dense()
    row_owner = np.repeat(owner, CHUNK_SIZE)[: plan.mask.total_seqlen_q]
    return np.array([dense[row_owner == rank][:, row_owner != rank].any(axis=0).sum() for rank in range(CP_SIZE)])


def group_cast() -> str:
    """Who sends how many rows to whom."""
    plan = plan_with(LocalityDispatchAlg())
    counts = np.array([sum(np.array(s.collective.recv_counts) for s in plan.rank(r).stages) for r in range(CP_SIZE)]).T
    cell, left, top = 62, 110, 62
    picture = Picture(left + CP_SIZE * cell + 30, top + CP_SIZE * cell + 26)
    picture.text(left + CP_SIZE * cell / 2, 24, "rows that travel, to", anchor="middle", size=14)
    for rank in range(CP_SIZE):
        picture.text(left + (rank + 0.5) * cell, top - 10, f"rank {rank}", anchor="middle")
        picture.text(left - 12, top + (rank + 0.5) * cell + 5, f"from rank {rank}", anchor="end")
    for (sender, receiver), count in np.ndenumerate(counts):
        share = count / max(1, counts.max())
        x, y = left + receiver * cell, top + sender * cell
        picture.box(x, y, cell - 3, cell - 3, blend(PALE, RANK_COLORS[0], share))
        label = "" if sender == receiver else f"{count:,}"
        picture.text(x + cell / 2, y + cell / 2 + 5, label, anchor="middle", fill=INK if share < 0.5 else "white")
    return picture.svg()


def blend(first: str, second: str, share: float) -> str:
    """A colour between two, `#rrggbb`."""
    a, b = (np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in (first, second))
    return "#{:02x}{:02x}{:02x}".format(*np.rint(a + (b - a) * share).astype(int).tolist())


def stages() -> str:
    """A rank's forward pass for overlap degrees 0, 1 and 3: each transfer beside the computation that hides it."""
    degrees = [0, 1, 3]
    picture = Picture(720, 20 + 92 * len(degrees))
    for n, degree in enumerate(degrees):
        y = 30 + 92 * n
        picture.text(16, y, f"degree {degree}", size=14)
        picture.text(16, y + 26, "transfer", size=12)
        picture.text(16, y + 54, "compute", size=12)
        draw_timeline(picture, plan_with(LocalityDispatchAlg(), degree).rank(CP_SIZE - 1), y + 10)
    return picture.svg()


def draw_timeline(picture: Picture, plan: RankPlan, top: float) -> None:
    """Two lanes to scale, with a row's transfer and a cell's computation at fixed lengths."""
    per_row, per_cell = 0.1, 0.0009
    transfer, compute = top, top + 28

    def block(start: float, length: float, lane: float, fill: str, label: str) -> float:
        picture.box(90 + start, lane, max(length, 1), 22, fill, stroke="white")
        picture.text(90 + start + length / 2, lane + 15, label, anchor="middle", size=11, fill="white")
        return start + length

    arrivals = []
    sent = 0.0
    for n, stage in enumerate(plan.stages, 1):
        sent = block(sent, stage.collective.num_recv_rows * per_row, transfer, RANK_COLORS[1], f"{n}")
        arrivals.append(sent)
    begin = sent if plan.blocking else 0.0
    done = block(begin, int(area(plan.local_bands).sum()) * per_cell, compute, RANK_COLORS[3], "local")
    for n, (stage, arrival) in enumerate(zip(plan.stages, arrivals, strict=True), 1):
        done = block(max(done, arrival), int(area(stage.bands).sum()) * per_cell, compute, RANK_COLORS[0], f"{n}")


EXPOSED = "#f6d5c3"
SPAN_COLORS = {
    "own": (RANK_COLORS[3], "own keys"),
    "stage": (RANK_COLORS[0], "keys of a stage"),
    "cast": (RANK_COLORS[1], "cast of keys and values"),
    "reduce": (RANK_COLORS[2], "reduce of dK and dV"),
}


def timeline() -> str:
    """The predicted timeline of a batch over four ranks: what travels, and what each rank computes meanwhile."""
    borders = np.cumsum([0, *(16 * n for n in DOCUMENTS)])
    costs = CostModel(bandwidth=50e9)
    config = DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC, cost_model=costs))
    predicted = predict_timeline(plan_attention(builders.varlen(borders, causal=True), CP_SIZE, 512, config=config))
    picture, left, scale = Picture(1000, 250), 76.0, 880 / predicted.seconds
    for row, name in enumerate(["network", *(f"rank {rank}" for rank in range(CP_SIZE))]):
        picture.text(12, 60 + 34 * row, name, size=13)
    for name, part in (("forward", predicted.forward), ("backward", predicted.backward)):
        picture.text(left, 26, f"{name}, {part.seconds * 1e3:.1f} ms", size=14)
        waits = [span for span in part.spans if span.rank == 0 and span.lane == "network"]
        for rank in range(CP_SIZE):
            picture.box(left, 74 + 34 * rank, part.seconds * scale, 24, PALE)
            for span in waits:
                picture.box(left + span.start * scale, 74 + 34 * rank, (span.end - span.start) * scale, 24, EXPOSED)
        for span in part.spans:
            if span.lane == "compute" or span.rank == 0:
                width, y = (span.end - span.start) * scale, 40 if span.lane == "network" else 74 + 34 * span.rank
                kind = span.name.split()[0]
                picture.box(left + span.start * scale, y, width, 24, SPAN_COLORS[kind][0], stroke="white")
                if span.stage and width > 14:
                    middle = left + (span.start + span.end) / 2 * scale
                    picture.text(middle, y + 16, f"{span.stage}", anchor="middle", size=11, fill="white")
        left += part.seconds * scale + 20
    x = 76.0
    for color, text in [*SPAN_COLORS.values(), (EXPOSED, "waiting for rows"), (PALE, "waiting for a rank")]:
        picture.box(x, 222, 14, 14, color)
        picture.text(x + 19, 234, text, size=12)
        x += 30 + 6.6 * len(text)
    return picture.svg()


TILE_COLORS = {
    0: (RANK_COLORS[0], "whole: no mask"),
    ROW_ENDS_INSIDE: (RANK_COLORS[1], "a row ends inside"),
    ROW_BEGINS_INSIDE: (RANK_COLORS[3], "a row begins inside"),
    ROW_BEGINS_INSIDE | ROW_ENDS_INSIDE: (RANK_COLORS[2], "both"),
}


def tiles() -> str:
    """The walks of the forward and of the backward kernel through one mask."""
    cu_seqlens = builders.cu_seqlens_from_lengths([200, 20, 40, 640])
    mask = builders.global_sliding_window(cu_seqlens, (319, 0), 128, causal=True)
    side, gap, top = 430, 56, 62
    picture = Picture(2 * side + 2 * gap + 16, top + side + 44)
    size, bands = mask.total_seqlen_q, mask.bands
    forward = build_walk(bands, size, size, 64, 128)
    picture.text(gap, 24, "forward: windows of 64 queries, tiles of 128 keys", size=15)
    draw_walk(picture, mask, forward, -128, gap, top, side / size, transposed=False)
    backward = build_walk(transpose(bands), size, size, 128, 64, align=4)
    left = 2 * gap + side
    picture.text(left, 24, "backward: windows of 128 keys, tiles of 64 queries", size=15)
    draw_walk(picture, mask, backward, -64, left, top, side / size, transposed=True)
    x = float(gap)
    for color, text in TILE_COLORS.values():
        picture.box(x, top + side + 20, 14, 14, color)
        picture.text(x + 20, top + side + 32, text)
        x += 170
    return picture.svg()


def draw_walk(
    picture: Picture,
    mask: AttnMask,
    walk: Walk,
    step: int,
    left: float,
    top: float,
    scale: float,
    transposed: bool,
) -> None:
    """Every tile with its cells, numbered as a program visits them, ``step`` columns from one to the next of an entry;
    windows are numbered from the heaviest to the lightest."""
    picture.box(left, top, walk.num_cols * scale, walk.num_rows * scale, PALE)
    for number, (row, num_rows, entry, num_tiles, _) in enumerate(walk.windows.tolist()):
        run = 0
        for visit in range(num_tiles):
            if run == 0:
                col, run, code, _ = walk.entries[entry].tolist()
                entry += 1
            rows, cols = (row, row + num_rows), (col, min(col + abs(step), walk.num_cols))
            queries, keys = (cols, rows) if transposed else (rows, cols)
            color, _ = TILE_COLORS[code & FLAG_MASK]
            x, y = left + keys[0] * scale, top + queries[0] * scale
            width, height = (keys[1] - keys[0]) * scale, (queries[1] - queries[0]) * scale
            picture.box(x, y, width, height, blend("#ffffff", color, 0.3), stroke="white")
            pieces, _, _ = crop(mask.bands, *(np.array([bound]) for bound in queries), Q0)
            pieces, _, _ = crop(pieces, *(np.array([bound]) for bound in keys), K0)
            for band in pieces:
                draw_band(picture, band, left, top, scale, color)
            if num_rows > 20:
                ink = INK if code & FLAG_MASK else "white"
                picture.text(x + width / 2, y + height / 2 + 4, f"{visit}", anchor="middle", size=11, fill=ink)
            run, col = run - 1, col + step
        middle = (row + num_rows / 2) * scale
        if transposed:
            picture.text(left + middle, top - 8, f"{number}", anchor="middle", size=11)
        else:
            picture.text(left - 8, top + middle + 4, f"{number}", anchor="end", size=11)


PICTURES: dict[str, Callable[[], str]] = {
    "mask_types.svg": mask_types,
    "dispatch.svg": dispatch,
    "group_cast.svg": group_cast,
    "stages.svg": stages,
    "timeline.svg": timeline,
    "tiles.svg": tiles,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (out / name).write_text(draw())


if __name__ == "__main__":
    main()
