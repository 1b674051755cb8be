"""Planning on real length distributions: rows moved, imbalance and milliseconds, against other ways to share the work.

    python benchmarks/bench_planning.py --output benchmarks/results/planning.md

Rows are key/value rows received, all ranks together, in shards a rank (a shard is one rank's tokens). Ulysses
exchanges heads and not rows; its traffic of q, k, v and out is given in rows of the same size, for 64 query and 8
key/value heads, key/value heads copied where there are more ranks than heads. Times are of one CPU core: the mask
from cu_seqlens, the plan, one rank's routing and bands, and its tile schedules, everything that a new mask costs a
training step; the median of packs.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from document_lengths import HISTOGRAMS
from rich.console import Console
from rich.progress import track

from magi_attention.kernels import reference
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.load_balance import contiguous, imbalance, min_heap, zigzag
from magi_attention.planning.lower_bound import rows_moved_lower_bound

SIZES = ((64 << 10, 8), (128 << 10, 8), (512 << 10, 32), (1 << 20, 64))
HEADS_Q, HEADS_KV = 64, 8
TOLERANCE = 0.02


def time_one_rank(make_mask: Callable[[], AttnMask], cp_size: int, chunk_size: int) -> float:
    """Milliseconds from cu_seqlens to everything one rank needs to run."""
    start = time.perf_counter()
    rank = plan_attention(make_mask(), cp_size, chunk_size).rank(cp_size // 2)
    rows = rank.dispatch.local_seqlen
    reference.schedule(rank.local_bands, rows, rows)
    for stage in rank.stages:
        reference.schedule(stage.bands, rows, stage.collective.num_recv_rows)
    return (time.perf_counter() - start) * 1e3


def ulysses_shards(cp_size: int) -> float:
    """Traffic of the head exchange in key/value rows, in shards a rank."""
    remote = 1 - 1 / cp_size
    q_and_out = 2 * HEADS_Q / (2 * HEADS_KV) * remote
    k_and_v = remote * max(1.0, cp_size / HEADS_KV)
    return q_and_out + k_and_v


def measure(name: str, total: int, cp_size: int, args: argparse.Namespace) -> list[str]:
    """One line of the table."""
    figures: dict[str, list[float]] = {}
    for seed in range(args.packs):
        cu_seqlens = HISTOGRAMS[name].cu_seqlens(total, seed).tolist()

        def make_mask(cu_seqlens: list[int] = cu_seqlens) -> AttnMask:
            return builders.varlen(cu_seqlens, causal=args.causal)

        time_one_rank(make_mask, cp_size, args.chunk_size)
        plan = plan_attention(make_mask(), cp_size, args.chunk_size)
        work = plan.work
        owners = {
            "ours": plan.dispatch.owner,
            "heap": min_heap(work, cp_size),
            "contiguous": contiguous(work, cp_size),
            "zigzag": zigzag(work, cp_size),
        }
        row = {"documents": len(cu_seqlens) - 1, "ms": time_one_rank(make_mask, cp_size, args.chunk_size)}
        row["bound"] = rows_moved_lower_bound(plan.mask, cp_size, args.chunk_size, TOLERANCE) / total
        for rule, owner in owners.items():
            row[f"{rule} rows"] = work.rows_moved(owner) / total
            row[f"{rule} imbalance"] = imbalance(work, owner, cp_size)
        for key, value in row.items():
            figures.setdefault(key, []).append(value)
    mean = {key: float(np.mean(values)) for key, values in figures.items()}
    worst = max(figures["ours imbalance"])
    return [
        name,
        f"{total >> 10}K x {cp_size}",
        f"{mean['documents']:.0f}",
        f"{mean['ours rows']:.2f} @ {mean['ours imbalance']:.3f} (worst {worst:.3f})",
        f"{mean['bound']:.2f}",
        f"{mean['ours rows'] / max(mean['heap rows'], 1e-9):.2f}",
        *(f"{mean[f'{r} rows']:.2f} @ {mean[f'{r} imbalance']:.2f}" for r in ("heap", "contiguous", "zigzag")),
        f"{cp_size - 1}",
        f"{ulysses_shards(cp_size):.1f}",
        f"{statistics.median(figures['ms']):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distributions", nargs="+", choices=sorted(HISTOGRAMS), default=sorted(HISTOGRAMS))
    parser.add_argument("--packs", type=int, default=5, help="packs a line")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    header = [
        "documents of",
        "tokens x ranks",
        "documents",
        "ours, rows @ imbalance",
        "lower bound",
        "ours / heap",
        "heap",
        "contiguous",
        "zigzag",
        "all-gather",
        "Ulysses",
        "plan ms",
    ]
    cases = [(name, *size) for size in SIZES for name in args.distributions]
    lines = [measure(*case, args) for case in track(cases, "planning")]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    kind = "causal" if args.causal else "full"
    title = (
        f"# Planning packed {kind} documents, {date.today()}\n\n"
        f"{platform.machine()}, one core, Python {platform.python_version()}, numpy {np.__version__}; chunk size "
        f"{args.chunk_size}, mean of {args.packs} packs.\n"
        f"{__doc__.split(chr(10) * 2)[2]}\n\n"
    )
    Console().print(table, soft_wrap=True)
    if args.output:
        args.output.write_text(title + table + "\n")


if __name__ == "__main__":
    main()
