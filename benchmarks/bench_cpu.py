"""Distributed attention over CPU processes: this library against others that run on gloo.

    python benchmarks/bench_cpu.py --output benchmarks/results/cpu.md

Time is that of the slowest rank, from a barrier to the end of its own work, the median of repetitions in which the
contenders take turns. The input is sharded as each contender wants it before the clock starts. A contender's time
counts only if its result and its gradients agree with dense fp64 attention; the error given is the largest of theirs,
relative to the largest value of the tensor. Ratios are its time over ours, plan made before.
"""

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cpu_rivals import (
    Contender,
    Task,
    across_documents,
    document_mask,
    magi,
    magi_replanned,
    ringmaster_distflash,
    ringmaster_gather,
    ringmaster_p2p,
    ringmaster_zigzag,
    torch_ring,
    ulysses_dense_mask,
    ulysses_documents,
)
from document_lengths import HISTOGRAMS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.rank_pool import RankPool

OURS = "magi_attention"
TOLERANCE = 1e-5  # rounding in fp32 stays ten times below; a wrong mask lies far above
CORES = os.cpu_count() or 1
HEADER = ["contender", "how", "forward ms", "ratio", "forward + backward ms", "ratio", "error"]


@dataclass(frozen=True)
class Entry:
    """A line of a table: whose, how, how to make it, and the mask it computes."""

    name: str
    how: str
    make: Callable[[Task], Contender]
    computes: str


@dataclass(frozen=True)
class Outcome:
    """What became of an entry: seconds of the slowest rank, or why there are none."""

    forward: float = math.nan
    both: float = math.nan
    error: float = math.nan
    failure: str = ""


ENTRIES = {
    "causal": [
        Entry(OURS, "plan made before", magi, "causal"),
        Entry(OURS, "plan made in every call", magi_replanned, "causal"),
        Entry("torch ring", "all-gather, flash", partial(torch_ring, rotate_method="allgather"), "causal"),
        Entry("torch ring", "all-to-all, flash", partial(torch_ring, rotate_method="alltoall"), "causal"),
        Entry("DeepSpeed Ulysses", "SDPA", ulysses_documents, "causal"),
        Entry("ringmaster", "all-gather, math", ringmaster_gather, "causal"),
        Entry("ringmaster", "p2p, math", ringmaster_p2p, "causal"),
        Entry("ringmaster", "distflash, math", ringmaster_distflash, "causal"),
        Entry("ringmaster", "zigzag, math", ringmaster_zigzag, "causal"),
    ],
    "packed": [
        Entry(OURS, "plan made before", magi, "packed"),
        Entry(OURS, "plan made in every call", magi_replanned, "packed"),
        Entry(
            "torch ring", "all-gather, one ring a document", partial(torch_ring, rotate_method="allgather"), "packed"
        ),
        Entry("torch ring", "all-to-all, one ring a document", partial(torch_ring, rotate_method="alltoall"), "packed"),
        Entry(
            "torch ring",
            "all-gather; ANOTHER MASK: causal across documents",
            across_documents(partial(torch_ring, rotate_method="allgather")),
            "causal",
        ),
        Entry("DeepSpeed Ulysses", "SDPA, one call a document", ulysses_documents, "packed"),
        Entry("DeepSpeed Ulysses", "SDPA, dense mask", ulysses_dense_mask, "packed"),
        Entry("ringmaster", "all-gather, SDPA, dense mask", ringmaster_gather, "packed"),
        Entry("ringmaster", "distflash, math, dense mask", ringmaster_distflash, "packed"),
        Entry("ringmaster", "zigzag, math, dense mask", ringmaster_zigzag, "packed"),
    ],
}


def entries_of(mask: str, args: argparse.Namespace) -> list[Entry]:
    """A table's entries: ours, and the rivals that were asked for."""
    return [entry for entry in ENTRIES[mask] if entry.name in (OURS, *args.rivals)]


def make_problem(args: argparse.Namespace, masks: dict[str, list[int]]) -> dict[str, dict[str, Tensor]]:
    """Global inputs, and for each mask the out, dq, dk, dv of dense fp64 attention."""
    generator = torch.Generator().manual_seed(args.seed)
    heads = {"q": args.heads, "k": args.heads_kv, "v": args.heads_kv, "dout": args.heads}
    inputs = {
        name: torch.randn(args.tokens, count, args.head_dim, generator=generator) for name, count in heads.items()
    }
    problem = {"inputs": inputs}
    for mask, cu_seqlens in track(masks.items(), "dense attention", transient=True):
        q, k, v = (inputs[name].double().requires_grad_() for name in "qkv")
        dense, outs = document_mask(cu_seqlens), []
        for head in range(args.heads):  # one at a time: memory is quadratic
            kv = slice(head * args.heads_kv // args.heads, head * args.heads_kv // args.heads + 1)
            out, _ = dense_attention(q[:, head : head + 1], k[:, kv], v[:, kv], dense)
            out.backward(inputs["dout"][:, head : head + 1].double())
            outs.append(out.detach())
        assert q.grad is not None and k.grad is not None and v.grad is not None
        problem[mask] = {"out": torch.cat(outs, dim=1), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return problem


class Runner:
    """A contender with its inputs on this rank."""

    def __init__(self, contender: Contender, inputs: dict[str, Tensor]) -> None:
        self.contender = contender
        self.qkv = [contender.local(inputs[name], contender.takes) for name in "qkv"]
        self.dout = contender.local(inputs["dout"], contender.gives)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.contender.attend(*self.qkv)

    def both(self) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in self.qkv]
        out = self.contender.attend(*leaves)
        out.backward(self.dout)
        return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    def error(self, expected: dict[str, Tensor]) -> float:
        out, grads = self.both()
        errors = [self.contender.error(out, self.contender.gives, expected["out"])]
        for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True):
            errors.append(self.contender.error(grad, self.contender.takes, expected[name]))
        return max(errors)


def measure_on_rank(
    rank: int, group: dist.ProcessGroup, mask: str, cu_seqlens: list[int], problem_file: str, args: argparse.Namespace
) -> list[Outcome]:
    """Check every entry of a table, then time those that passed, in turn."""
    size = dist.get_world_size(group)
    torch.set_num_threads(max(1, CORES // size))
    problem = torch.load(problem_file, mmap=True)
    outcomes: list[Outcome] = []
    runners: dict[int, Runner] = {}
    for number, entry in enumerate(entries_of(mask, args)):
        # Its own group: what a failure leaves on the wire stays there, and ranks that did not fail wait minutes only.
        own_group = dist.new_group(list(range(size)), timeout=timedelta(minutes=2), backend="gloo")
        error, failure = math.nan, ""
        try:
            runners[number] = Runner(entry.make(Task(cu_seqlens, args.chunk_size, own_group)), problem["inputs"])
            error = runners[number].error(problem[entry.computes])
        except Exception as problem_found:
            failure = f"{type(problem_found).__name__}: {problem_found}".splitlines()[0]
        replies: list[tuple[float, str]] = [(math.nan, "")] * size
        dist.all_gather_object(replies, (error, failure), group=group)
        error, failure = max(e for e, _ in replies), next((f for _, f in replies if f), "")
        if not failure and not error <= TOLERANCE:
            failure = f"wrong: error {error:.1e}"
        if failure:
            runners.pop(number, None)
        outcomes.append(Outcome(error=error, failure=failure))

    seconds = torch.zeros(args.repetitions, len(outcomes), 2, dtype=torch.float64)
    for repetition in range(args.repetitions):
        for number, runner in runners.items():
            for which, run in enumerate((runner.forward, runner.both)):
                dist.barrier(group)
                start = time.perf_counter()
                run()
                seconds[repetition, number, which] = time.perf_counter() - start
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    for number in runners:
        forward, both = (statistics.median(seconds[:, number, which].tolist()) for which in range(2))
        outcomes[number] = Outcome(forward, both, outcomes[number].error)
    return outcomes


def lines_of(entries: list[Entry], outcomes: list[Outcome]) -> list[list[str]]:
    """A table's lines."""
    ours = outcomes[0]
    lines = []
    for entry, outcome in zip(entries, outcomes, strict=True):
        if outcome.failure:
            lines.append([entry.name, f"{entry.how}: {outcome.failure}", "-", "-", "-", "-", "-"])
            continue
        figures = [
            f"{outcome.forward * 1e3:.0f}",
            as_ratio(outcome.forward / ours.forward),
            f"{outcome.both * 1e3:.0f}",
            as_ratio(outcome.both / ours.both),
            f"{outcome.error:.0e}",
        ]
        lines.append([entry.name, entry.how, *figures])
    return lines


def as_ratio(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def show(title: str, lines: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for n, name in enumerate(HEADER):
        table.add_column(name, justify="left" if n < 2 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=max(120, Console().width), markup=False).print(table)  # errors may hold what looks like markup


def as_markdown(title: str, lines: list[list[str]]) -> str:
    rows = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)], *lines]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--heads-kv", type=int, default=8, help="key and value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--masks", nargs="+", choices=sorted(ENTRIES), default=sorted(ENTRIES))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    rivals = sorted({entry.name for table in ENTRIES.values() for entry in table} - {OURS})
    parser.add_argument("--rivals", nargs="+", choices=rivals, default=rivals)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=256, help="chunk size of this library's plans")
    parser.add_argument("--distribution", choices=sorted(HISTOGRAMS), default="magi", help="of the documents' lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the tables as Markdown")
    args = parser.parse_args()
    if args.heads % args.heads_kv:
        parser.error(f"--heads must be a multiple of --heads-kv, not {args.heads} and {args.heads_kv}")
    return args


def main() -> None:
    args = parse_arguments()
    load = os.getloadavg()[0]
    masks = {
        "causal": [0, args.tokens],
        "packed": HISTOGRAMS[args.distribution].cu_seqlens(args.tokens, args.seed).tolist(),
    }
    lengths = [end - start for start, end in zip(masks["packed"], masks["packed"][1:], strict=False)]
    setting = (
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {CORES} cores shared by the processes, at "
        f"least one thread each; load average {load:.1f} before the run; Python {platform.python_version()}, "
        f"torch {torch.__version__}.\n"
        f"{args.tokens} tokens, {args.heads} query and {args.heads_kv} key/value heads, head_dim {args.head_dim}, "
        f"fp32; chunk size {args.chunk_size}; median of {args.repetitions} repetitions.\n"
        f"Documents of the packed mask: {', '.join(map(str, lengths))} tokens.\n"
    )
    Console().print(setting, soft_wrap=True)
    report = [f"# Distributed attention over CPU processes, {date.today()}\n", setting, __doc__.split("\n\n", 2)[2]]
    with tempfile.TemporaryDirectory() as directory:
        problem_file = f"{directory}/problem.pt"
        torch.save(make_problem(args, masks), problem_file)
        for mask in args.masks:
            for size in args.processes:
                with RankPool(size, timeout_seconds=300) as pool:
                    outcomes = pool.run(measure_on_rank, size, mask, masks[mask], problem_file, args)[0]
                title = f"{mask}, {size} processes"
                lines = lines_of(entries_of(mask, args), outcomes)
                show(title, lines)
                report.append(as_markdown(title, lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(report))


if __name__ == "__main__":
    main()
