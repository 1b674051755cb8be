"""Tile schedules of the Hopper engine: milliseconds to build one, and the share of computed cells that are attended.

    python benchmarks/bench_tile_schedule.py --output benchmarks/results/tile_schedule.md

Blocks are rows x columns: queries x keys forward, keys x queries in the transposed walk of the backward pass. A time is
of one CPU core, from bands to arrays. A share is the mask's area over the area of all tiles; ``masked``
is the part of the tiles that needs a mask.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from magi_attention.kernels.hopper.records import ENTRY_CODE, ENTRY_TILES, FLAG_MASK
from magi_attention.kernels.hopper.walk import SPARE_ENTRIES, Walk, build_walk
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import area, transpose

BLOCKS = {"64 x 128": (64, 128, False), "128 x 128": (128, 128, False), "128 x 64 transposed": (128, 64, True)}
K = 1 << 10


def few_documents(total: int) -> NDArray[np.int64]:
    """Cumulative lengths of 14 log-normal documents, if ``total`` is 8K or 32K."""
    rng = np.random.default_rng(17)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(min(total - sum(lengths), max(1, rng.lognormal(np.log(total / 12), 1.0)))))
    return builders.cu_seqlens_from_lengths(lengths)


def many_documents(total: int, count: int) -> NDArray[np.int64]:
    """Cumulative lengths of ``count`` log-normal documents."""
    weights = np.random.default_rng(0).lognormal(sigma=1.0, size=count).cumsum()
    inner = np.maximum(np.arange(1, count), (weights[:-1] / weights[-1] * total).astype(np.int64))
    return np.concatenate(([0], inner, [total]))


def tree(num_nodes: int) -> AttnMask:
    """A ternary prefix tree of nodes of 100 to 2,000 tokens."""
    lengths = np.random.default_rng(0).integers(100, 2000, num_nodes).tolist()
    return builders.prefix_tree([((n - 1) // 3 if n else -1, length) for n, length in enumerate(lengths)])


TIMED: dict[str, Callable[[], AttnMask]] = {
    **{f"causal, {n // K}K": lambda n=n: builders.causal(n) for n in (8 * K, 32 * K, 128 * K, K * K)},
    "14 documents, causal, 8K": lambda: builders.varlen(few_documents(8 * K), causal=True),
    "14 documents, causal, 32K": lambda: builders.varlen(few_documents(32 * K), causal=True),
    "1,000 documents, causal, 1M": lambda: builders.varlen(many_documents(K * K, 1000), causal=True),
    "1,000 documents, full, 1M": lambda: builders.varlen(many_documents(K * K, 1000)),
    "10,000 documents, causal, 1M": lambda: builders.varlen(many_documents(K * K, 10000), causal=True),
    "sliding window 1024, 128K": lambda: builders.sliding_window(128 * K, (1023, 0)),
    "prefix tree, 100 nodes": lambda: tree(100),
}


def shares_of(total: int) -> dict[str, AttnMask]:
    cu_seqlens = few_documents(total)
    name = f"{total // K}K, {len(cu_seqlens) - 1} documents"
    return {
        f"{name}, causal": builders.varlen(cu_seqlens, causal=True),
        f"{name}, full": builders.varlen(cu_seqlens),
        f"{name}, block causal 2048": builders.block_causal(cu_seqlens, 2048),
        f"{total // K}K, sliding window 1024": builders.sliding_window(total, (1023, 0)),
    }


def build(mask: AttnMask, block_rows: int, block_cols: int, transposed: bool) -> Walk:
    bands = transpose(mask.bands) if transposed else mask.bands
    return build_walk(bands, mask.total_seqlen_q, mask.total_seqlen_k, block_rows, block_cols)


def milliseconds(mask: AttnMask, block: tuple[int, int, bool], repetitions: int) -> float:
    times = []
    kept = build(mask, *block)  # held as long as a training step holds it: freeing memory has a price
    for _ in range(repetitions):
        start = time.perf_counter()
        walk = build(mask, *block)
        times.append((time.perf_counter() - start) * 1e3)
        kept, walk = walk, kept
    return statistics.median(times)


def share(mask: AttnMask, block: tuple[int, int, bool]) -> str:
    walk = build(mask, *block)
    entries = walk.entries[:-SPARE_ENTRIES]
    num_tiles = entries[:, ENTRY_TILES]
    total, masked = num_tiles.sum(), num_tiles[entries[:, ENTRY_CODE] & FLAG_MASK > 0].sum()
    return f"{area(mask.bands).sum() / (total * block[0] * block[1]):.3f} ({masked / total:.0%})"


def table(*lines: list[str]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--output", type=Path, help="write the tables as Markdown")
    args = parser.parse_args()
    times = [["milliseconds", *BLOCKS]]
    for name, make_mask in track(TIMED.items(), "timing"):
        mask = make_mask()
        times.append([name, *(f"{milliseconds(mask, block, args.repetitions):.2f}" for block in BLOCKS.values())])
    shares = [["attended share (masked)", *BLOCKS]]
    for total in (8 * K, 32 * K):
        shares += [
            [name, *(share(mask, block) for block in BLOCKS.values())] for name, mask in shares_of(total).items()
        ]
    tables = f"{table(*times)}\n\n{table(*shares)}"
    title = (
        f"# Tile schedules of the Hopper engine, {date.today()}\n\n"
        f"{platform.machine()}, one core, Python {platform.python_version()}, numpy {np.__version__}; median of "
        f"{args.repetitions} runs.\n{__doc__.split(chr(10) * 2)[2].strip()}\n\n"
    )
    Console().print(tables, soft_wrap=True)
    if args.output:
        args.output.write_text(title + tables + "\n")


if __name__ == "__main__":
    main()
