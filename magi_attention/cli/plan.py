"""``magi-attention plan``: what context parallelism would do to a batch, without a GPU or a process group."""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from magi_attention.config import (
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.report import RankReport, area_imbalance, report

MASKS: dict[str, Callable[[argparse.Namespace, list[int]], AttnMask]] = {
    "full": lambda args, cu: builders.full(cu[-1]),
    "causal": lambda args, cu: builders.causal(cu[-1]),
    "varlen-full": lambda args, cu: builders.varlen(cu),
    "varlen-causal": lambda args, cu: builders.varlen(cu, causal=True),
    "sliding-window": lambda args, cu: builders.sliding_window(cu, tuple(args.window)),
    "global-sliding-window": lambda args, cu: builders.global_sliding_window(
        cu, tuple(args.window), args.global_size, causal=args.window[1] == 0
    ),
    "block-causal": lambda args, cu: builders.block_causal(cu, args.block_size),
    "prefix-lm": lambda args, cu: builders.prefix_lm(cu, [min(args.prefix, b - a) for a, b in pairwise(cu)]),
    "shared-prefix": lambda args, cu: builders.shared_prefix(cu[1], [b - a for a, b in pairwise(cu[1:])]),
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    plan = commands.add_parser(
        "plan",
        help="show how a mask is shared among ranks",
        description="Plan a mask over ranks and show each rank's tokens, unmasked area and rows received.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=run)
    plan.add_argument("--mask", choices=sorted(MASKS), default="varlen-causal", help="kind of mask")
    length = plan.add_mutually_exclusive_group(required=True)
    length.add_argument("--lengths", type=Path, metavar="FILE", help="JSON list of document lengths, packed in order")
    length.add_argument("--seqlen", type=int, metavar="N", help="one document of N tokens")
    plan.add_argument("--cp-size", type=int, required=True, metavar="P", help="number of ranks")
    plan.add_argument("--chunk-size", type=int, default=512, metavar="N", help="tokens in a chunk")
    plan.add_argument(
        "--window", type=int, nargs=2, default=(1023, 0), metavar=("LEFT", "RIGHT"), help="sliding window"
    )
    plan.add_argument("--global-size", type=int, default=4, metavar="N", help="first keys that all queries see")
    plan.add_argument("--block-size", type=int, default=2048, metavar="N", help="tokens in a block of block-causal")
    plan.add_argument("--prefix", type=int, default=256, metavar="N", help="bidirectional prefix of each document")
    plan.add_argument(
        "--balance",
        choices=("locality", "heap", "contiguous", "zigzag"),
        default="locality",
        help="how chunks are given to ranks",
    )
    plan.add_argument("--tolerance", type=float, default=0.02, help="allowed imbalance of --balance locality")
    plan.add_argument("--degree", type=int, default=1, metavar="N", help="overlap stages")
    plan.add_argument("--min-stage-rows", type=int, default=512, metavar="N", help="fewest rows in a stage")
    plan.add_argument("--json", type=Path, metavar="OUT", help="write the plan as JSON")
    plan.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the plan")


def run(args: argparse.Namespace) -> int:
    """Plan, print, write and draw."""
    lengths = read_lengths(args.lengths) if args.lengths else [args.seqlen]
    cu_seqlens = builders.cu_seqlens_from_lengths(lengths).tolist()
    overlap = OverlapConfig(degree=args.degree, min_chunk_size=args.min_stage_rows)
    config = DistAttnConfig(dispatch_config(args.balance, args.tolerance), overlap)

    def make_plan() -> AttnPlan:
        return plan_attention(MASKS[args.mask](args, cu_seqlens), args.cp_size, args.chunk_size, config=config)

    plan, plan_ms = make_plan(), time_one_rank(make_plan)
    ranks = report(plan)
    if args.json:
        args.json.write_text(json.dumps(as_json(plan, ranks, plan_ms), indent=1) + "\n")
    print_tables(plan, ranks, plan_ms)
    if args.plot:
        try:
            from magi_attention.viz.plan_picture import plot_plan
        except ImportError:
            raise ImportError("--plot needs matplotlib: pip install magi-attention[viz]") from None
        plot_plan(plan, args.plot)
    return 0


def dispatch_config(balance: str, tolerance: float) -> DispatchConfig:
    """What ``--balance`` and ``--tolerance`` stand for."""
    match balance:
        case "contiguous" | "zigzag":
            return DispatchConfig(order=balance)
        case "heap":
            return DispatchConfig(MinHeapDispatchAlg())
        case _:
            return DispatchConfig(LocalityDispatchAlg(tolerance))


def read_lengths(path: Path) -> list[int]:
    """Document lengths from a JSON list.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        lengths = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--lengths {path} is not JSON: {error}") from None
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError(f"--lengths {path} must hold a JSON list of document lengths, such as [4096, 120, 37]")
    return lengths


def time_one_rank(make_plan: Callable[[], AttnPlan]) -> float:
    """Milliseconds for the mask, the plan, one rank's part and its tile schedules: the median of three cold runs."""
    from magi_attention.kernels import reference

    times = []
    for _ in range(3):
        start = time.perf_counter()
        rank = make_plan().rank(0)
        rows = rank.dispatch.local_seqlen
        reference.schedule(rank.local_bands, rows, rows)
        for stage in rank.stages:
            reference.schedule(stage.bands, rows, stage.collective.num_recv_rows)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def as_json(plan: AttnPlan, ranks: list[RankReport], plan_ms: float) -> dict[str, object]:
    """A plan as plain data."""
    return {
        "cp_size": plan.cp_size,
        "chunk_size": plan.dispatch.chunk_size,
        "total_seqlen": plan.dispatch.total_seqlen,
        "pad_size": plan.dispatch.pad_size,
        "plan_ms": round(plan_ms, 3),
        "imbalance": round(area_imbalance(ranks), 6),
        "ranks": [dataclasses.asdict(rank) for rank in ranks],
    }


def print_tables(plan: AttnPlan, ranks: list[RankReport], plan_ms: float) -> None:
    """Print a plan for people."""
    try:
        from rich.console import Console

        from magi_attention.viz.plan_table import plan_table, rows_table
    except ImportError:
        print("the tables need rich: pip install magi-attention[viz]")
    else:
        console = Console()
        console.print(plan_table(plan, ranks))
        console.print(rows_table(plan))
    print(f"imbalance {area_imbalance(ranks):.3f}: area of the most loaded rank over the mean")
    print(f"planned for one rank in {plan_ms:.2f} ms")
