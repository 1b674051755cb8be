"""``magi-attention plan``: what context parallelism would do to a batch, without a GPU or a process group."""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from magi_attention.config import (
    AttnOverlapMode,
    CostModel,
    DispatchConfig,
    DistAttnConfig,
    GradWireDtype,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.report import RankReport, area_imbalance, report, report_times
from magi_attention.planning.timeline import Timeline, chrome_trace, predict_timeline

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

FURTHER_OPTIONS: dict[str, tuple[object, str, tuple[str, ...]]] = {
    "window": ((1023, 0), "mask", ("sliding-window", "global-sliding-window")),
    "global_size": (4, "mask", ("global-sliding-window",)),
    "block_size": (2048, "mask", ("block-causal",)),
    "prefix": (256, "mask", ("prefix-lm",)),
    "tolerance": (0.02, "balance", ("locality",)),
    "max_degree": (4, "degree", ("dynamic",)),
}
"""What options are if they are not given, and which values of which other option have them."""

COLUMNS = """\
columns of the table:
  tokens          rows of queries, and of keys and values, that the rank has
  area, / mean    unmasked cells that it computes, and over the mean of all ranks
  local           the share of them with keys that are its own
  received, / all key/value rows that come to it, and over those that an all-gather would bring
  sent            rows that it sends, once for each rank that they go to
  compute, exposed, idle
                  milliseconds in which it computes, waits for rows, and waits for slower ranks (--timeline)
"""

COSTS: dict[str, str] = {
    "heads_q": "heads of the queries",
    "heads_kv": "heads of the keys and values",
    "head_dim": "dimensions of a head of the queries and keys",
    "head_dim_v": "dimensions of a head of the values, if these are others",
    "element_bytes": "bytes of an element of q, k and v",
    "forward_tflops": "TFLOP/s of the forward kernel",
    "backward_tflops": "TFLOP/s of the backward kernel",
    "bandwidth": "bytes/s that a rank sends and receives",
    "latency": "seconds of an all-to-all, however little travels",
    "hbm_bandwidth": "bytes/s of a GPU's memory",
    "stage_overhead": "seconds a stage costs beside its work",
    "forward_weight": "how much the forward pass counts for --degree dynamic",
    "backward_weight": "how much the backward pass counts",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    plan = commands.add_parser(
        "plan",
        help="show how a mask is shared among ranks",
        description="Plan a mask over ranks and show each rank's tokens, unmasked area and rows received.",
        epilog=COLUMNS,
        formatter_class=Formatter,
    )
    plan.set_defaults(run=run)
    plan.add_argument("--mask", choices=sorted(MASKS), default="varlen-causal", help="kind of mask")
    length = plan.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="JSON list of document lengths, packed in order; full and causal masks join them into one document, and "
        "of shared-prefix the first is the prefix",
    )
    length.add_argument("--seqlen", type=int, metavar="N", help="one document of N tokens")
    plan.add_argument("--cp-size", type=int, required=True, metavar="P", help="number of ranks")
    plan.add_argument("--chunk-size", type=int, default=512, metavar="N", help="tokens in a chunk")
    add_further_option(
        plan, "window", nargs=2, metavar=("LEFT", "RIGHT"), help="tokens before and after that a query sees"
    )
    add_further_option(plan, "global_size", metavar="N", help="first keys that all queries see")
    add_further_option(plan, "block_size", metavar="N", help="tokens in a block")
    add_further_option(plan, "prefix", metavar="N", help="bidirectional prefix of each document")
    plan.add_argument(
        "--balance",
        choices=("locality", "heap", "contiguous", "zigzag"),
        default="locality",
        help="how chunks are given to ranks",
    )
    add_further_option(plan, "tolerance", metavar="X", help="allowed imbalance")
    plan.add_argument(
        "--degree", type=degree, default=1, metavar="N", help="overlap stages, or dynamic: as predicted times say"
    )
    add_further_option(plan, "max_degree", metavar="N", help="most stages")
    plan.add_argument("--min-stage-rows", type=int, default=512, metavar="N", help="fewest rows in a stage")
    plan.add_argument("--json", type=Path, metavar="OUT", help="write the plan as JSON")
    plan.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the plan")
    plan.add_argument("--timeline", action="store_true", help="show where each rank's predicted time goes")
    plan.add_argument("--timeline-plot", type=Path, metavar="OUT.png", help="draw the predicted timeline")
    plan.add_argument("--trace", type=Path, metavar="OUT.json", help="write it for Perfetto or chrome://tracing")
    costs = plan.add_argument_group("what times are predicted with")
    costs.add_argument(
        "--grad-wire-dtype", choices=get_args(GradWireDtype), default="float32", help="type of dK and dV that travel"
    )
    for cost in dataclasses.fields(CostModel):
        name = "--" + cost.name.replace("_", "-")
        kind = int if cost.default is None else type(cost.default)
        costs.add_argument(name, type=kind, default=cost.default, metavar="X", help=COSTS[cost.name])


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and with the columns one below the other."""


def add_further_option(parser: argparse.ArgumentParser, name: str, help: str, **options: Any) -> None:
    """Add one of ``FURTHER_OPTIONS``; left out, it is not there, so that it can be told from its default."""
    default, other, values = FURTHER_OPTIONS[name]
    defaults = default if isinstance(default, tuple) else (default,)
    text, kind = " ".join(map(str, defaults)), type(defaults[0])
    help = f"{help}; for --{other} {' and '.join(values)} (default: {text})"
    parser.add_argument("--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=help, **options)


def complete_options(args: argparse.Namespace) -> None:
    """Give ``FURTHER_OPTIONS`` their defaults.

    Raises:
        ValueError: If one was given that another option leaves no use for.
    """
    for name, (default, other, values) in FURTHER_OPTIONS.items():
        if hasattr(args, name) and (given := getattr(args, other)) not in values:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for --{other} {' or '.join(values)}, not for --{other} {given}")
        setattr(args, name, getattr(args, name, default))


def run(args: argparse.Namespace) -> int:
    """Plan, print, write and draw."""
    complete_options(args)
    lengths = read_lengths(args.lengths) if args.lengths else [args.seqlen]
    cu_seqlens = builders.cu_seqlens_from_lengths(lengths).tolist()
    config = DistAttnConfig(
        dispatch_config(args.balance, args.tolerance), overlap_config(args), grad_wire_dtype=args.grad_wire_dtype
    )

    def make_plan() -> AttnPlan:
        return plan_attention(MASKS[args.mask](args, cu_seqlens), args.cp_size, args.chunk_size, config=config)

    plan, plan_ms = make_plan(), time_one_rank(make_plan)
    ranks, timeline = report(plan), predict_timeline(plan)
    if args.json:
        args.json.write_text(json.dumps(as_json(plan, ranks, plan_ms, timeline), indent=1) + "\n")
    if args.trace:
        args.trace.write_text(json.dumps(chrome_trace(timeline)) + "\n")
    print_tables(plan, ranks, plan_ms, timeline if args.timeline else None)
    if args.plot or args.timeline_plot:
        draw(plan, timeline, args)
    return 0


def draw(plan: AttnPlan, timeline: Timeline, args: argparse.Namespace) -> None:
    """Write the pictures that were asked for."""
    try:
        from magi_attention.viz.plan_picture import plot_plan
        from magi_attention.viz.timeline_picture import plot_timeline
    except ImportError:
        raise ImportError("--plot and --timeline-plot need matplotlib: pip install matplotlib") from None
    if args.plot:
        plot_plan(plan, args.plot)
    if args.timeline_plot:
        plot_timeline(timeline, args.timeline_plot, title=repr(plan.mask))


def degree(text: str) -> int | str:
    """What ``--degree`` stands for."""
    return text if text == "dynamic" else int(text)


def overlap_config(args: argparse.Namespace) -> OverlapConfig:
    """What the options about stages and costs stand for."""
    costs = CostModel(**{cost.name: getattr(args, cost.name) for cost in dataclasses.fields(CostModel)})
    options = {"min_chunk_size": args.min_stage_rows, "max_degree": args.max_degree, "cost_model": costs}
    if args.degree == "dynamic":
        return OverlapConfig(AttnOverlapMode.DYNAMIC, **options)
    return OverlapConfig(degree=args.degree, **options)


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


def as_json(plan: AttnPlan, ranks: list[RankReport], plan_ms: float, timeline: Timeline) -> dict[str, object]:
    """A plan as plain data."""
    passes = {"forward": timeline.forward, "backward": timeline.backward}
    return {
        "cp_size": plan.cp_size,
        "chunk_size": plan.dispatch.chunk_size,
        "total_seqlen": plan.dispatch.total_seqlen,
        "pad_size": plan.dispatch.pad_size,
        "plan_ms": round(plan_ms, 3),
        "imbalance": round(area_imbalance(ranks), 6),
        "ranks": [dataclasses.asdict(rank) for rank in ranks],
        "overlap_choice": dataclasses.asdict(plan.overlap_choice) if plan.overlap_choice else None,
        "predicted_seconds": {
            name: {"total": part.seconds, "ranks": [dataclasses.asdict(times) for times in report_times(part)]}
            for name, part in passes.items()
        },
    }


def print_tables(plan: AttnPlan, ranks: list[RankReport], plan_ms: float, timeline: Timeline | None) -> None:
    """Print a plan for people, and its timeline."""
    try:
        from rich.console import Console

        from magi_attention.viz.plan_table import plan_table, rows_table
        from magi_attention.viz.timeline_table import timeline_table
    except ImportError:
        print("the tables need rich: pip install rich")
    else:
        console = Console()
        console.print(plan_table(plan, ranks))
        console.print(rows_table(plan))
        if timeline:
            console.print(timeline_table(timeline))
    if plan.dispatch.pad_size:
        padding, total = plan.dispatch.pad_size, plan.dispatch.padded_seqlen
        print(f"padding: {padding:,} of {total:,} tokens, so that all ranks have as many whole chunks")
    if plan.overlap_choice:
        print(f"stages, with predicted times of the slowest rank:\n{plan.overlap_choice}\n")
    print(f"imbalance {area_imbalance(ranks):.3f}: area of the most loaded rank over the mean")
    print(f"planned for one rank in {plan_ms:.2f} ms")
