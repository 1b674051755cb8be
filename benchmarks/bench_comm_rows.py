"""Packing rows for the wire and adding them up at home: one pass over memory against a chain of torch functions.

    python benchmarks/bench_comm_rows.py --output benchmarks/results/comm_rows.md

The rows are those that one rank exchanges in one stage: runs of a local sequence go to several ranks, runs from several
ranks arrive, and partial gradients travel the same ways back. A GB/s counts what must be read and written at least
once. On the CPU both are made of torch functions.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from magi_attention.comm.row_exchange import RowRouting, pack, unpack
from magi_attention.comm.row_sums import add_rows
from magi_attention.planning.routing import GroupCollectivePlan

RUN = 128
"""Rows that stay together on their way."""
CALLS = 10
"""Calls in a row that are timed together, so that a GPU does not wait for the host between them."""


@dataclass(frozen=True)
class Step:
    """One of the four passes over rows.

    Attributes:
        name: What it does.
        chain: It, made of torch functions.
        fused: It, as the library does it.
        num_bytes: What must be read and written.
    """

    name: str
    chain: Callable[[], list[Tensor]]
    fused: Callable[[], list[Tensor]]
    num_bytes: int


def make_steps(device: str, num_rows: int, num_ranks: int, heads: int, head_dim: int) -> list[Step]:
    """``num_rows`` rows out and as many in; each of ``num_ranks`` other ranks gets a random half of the local rows."""
    generator = torch.Generator().manual_seed(0)
    num_local = 2 * num_rows // num_ranks

    def runs(count: int, total: int) -> Tensor:
        return torch.randperm(total // RUN, generator=generator)[: count // RUN]

    def rows(run: Tensor) -> Tensor:
        return (run[:, None] * RUN + torch.arange(RUN)).flatten()

    def random(n: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, heads, head_dim, generator=generator).to(device, dtype) for _ in range(2)]

    sent = torch.cat([rows(runs(num_local // 2, num_local).sort().values) for _ in range(num_ranks)])
    counts = (num_local // 2,) * num_ranks
    plan = GroupCollectivePlan(sent.numpy(), counts, counts, rows(runs(num_rows, num_rows)).numpy())
    exchange = RowRouting.on_device(plan, torch.device(device))
    send_rows, recv_order, wire_order, sums = (
        exchange.send_rows,
        exchange.recv_order,
        exchange.wire_order,
        exchange.sums,
    )
    kv, grads = random(num_local, torch.bfloat16), random(num_rows, torch.float32)
    arrived, parts = pack(random(num_rows, torch.bfloat16), None), pack(grads, None)
    totals = random(num_local, torch.float32)
    same_totals = [x.clone() for x in totals]
    shapes = [x.shape[1:] for x in kv]

    def chain_pack(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
        return [torch.cat([x.flatten(1).index_select(0, index) for x in tensors], dim=1)]

    def chain_add() -> list[Tensor]:
        for total, part in zip(totals, unpack(parts, shapes), strict=True):
            total.index_add_(0, send_rows, part)
        return totals

    def fused_add() -> list[Tensor]:
        add_rows(same_totals, parts, sums)
        return same_totals

    low, full = arrived.nbytes, parts.nbytes
    touched = len(sums.rows) * parts[0].nbytes
    return [
        Step("pack k, v", lambda: chain_pack(kv, send_rows), lambda: [pack(kv, send_rows)], 2 * low),
        Step(
            "order received k, v",
            lambda: [arrived.index_select(0, recv_order)],
            lambda: [pack([arrived], recv_order)],
            2 * low,
        ),
        Step("pack dk, dv", lambda: chain_pack(grads, wire_order), lambda: [pack(grads, wire_order)], 2 * full),
        Step(
            "pack dk, dv as bf16",
            lambda: [chain_pack(grads, wire_order)[0].bfloat16()],
            lambda: [pack(grads, wire_order, torch.bfloat16)],
            full + low,
        ),
        Step("add dk, dv", chain_add, fused_add, full + 2 * touched),
    ]


def milliseconds(call: Callable[[], object], device: str, repetitions: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repetitions + 1):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / CALLS)
        else:
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - begin) * 1e3 / CALLS)
    return statistics.median(times[1:])  # the first round warms up


def measure(step: Step, device: str, repetitions: int) -> str:
    """A line of the table, after a check that both compute the same, but for the order of sums."""
    torch.testing.assert_close(step.fused(), step.chain())
    chain, fused = (milliseconds(call, device, repetitions) for call in (step.chain, step.fused))
    cells = (f"{ms:.3f} | {step.num_bytes / ms / 1e6:.0f}" for ms in (chain, fused))
    return f"| {step.name} | {step.num_bytes / 1e6:.0f} | {' | '.join(cells)} | {chain / fused:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768, help="rows that travel, a multiple of 128 times the ranks")
    parser.add_argument("--ranks", type=int, default=4, help="other ranks; each local row goes to half of them")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    if args.rows < 1 or args.ranks < 1 or args.rows % (RUN * args.ranks):
        parser.error(f"--rows must be a multiple of {RUN} times --ranks, not {args.rows} with {args.ranks}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    steps = make_steps(device, args.rows, args.ranks, args.heads, args.head_dim)
    lines = [
        f"{where}, torch {torch.__version__}, {date.today()}; {args.rows} rows of {args.heads} heads, head_dim "
        f"{args.head_dim}, k and v in bf16, dk and dv in fp32",
        "",
        "| | MB | chain, ms | GB/s | fused, ms | GB/s | faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(measure(step, device, args.repetitions) for step in steps),
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
