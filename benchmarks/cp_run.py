"""What each process of bench_cp.py does: case after case, the cheapest first."""

import os
import sys
import time
from itertools import product

import torch
import torch.distributed as dist
from attention_cases import make_case
from bench_flex_attn import Budget
from cp_bandwidth import SIZES, measure_all_to_all
from cp_case import Make, Setup, Trial
from cp_contenders import RIVALS, alone, magi
from cp_inputs import Inputs
from cp_launch import Job
from cp_ranks import Derailed, Failed, Ranks
from cp_results import (
    ALONE,
    Report,
    Result,
    as_bytes,
    communication_lines,
    failure_lines,
    speed_lines,
    transfer_lines,
)
from cp_setting import describe
from cp_timing import Timer, make_timer

from magi_attention.api import set_plan_cache_capacity


def work(rank: int, size: int, init_method: str, job: Job) -> None:
    """All that a process does; see :data:`cp_launch.Work`."""
    ranks = Ranks.join(rank, size, job.args.device, init_method, job.args.timeout)
    set_plan_cache_capacity(2 * len(job.args.variants))  # plans of cases that are over would keep memory
    try:
        Run(ranks, job).run()
    except Derailed as derailed:
        job.end_step(rank, str(derailed))
        print(f"rank {rank}: {derailed}", file=sys.stderr, flush=True)
        os._exit(3)  # ending in order would wait for what is stuck
    dist.destroy_process_group()


class Run:
    """A process's part of the run."""

    def __init__(self, ranks: Ranks, job: Job) -> None:
        self.ranks, self.job, self.args = ranks, job, job.args
        self.budget = Budget(job.deadline - time.time())
        self.timer: Timer = make_timer(ranks)
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self.others: dict[str, Make] = {ALONE: alone, **{name: RIVALS[name] for name in self.args.rivals}}
        self.report = self._begin_report()

    def run(self) -> None:
        """All-to-alls if asked for, then every case."""
        if self.args.bandwidth and not self.report.transfers:
            self._measure_transfers()
        done = {result.case for result in self.report.results}
        for setup in sorted(self._setups(), key=lambda setup: setup.forward_flops):
            if setup.name not in done and not self._leaves_out(setup):
                self.report.results.append(self._run_case(setup))
                self.ranks.say(speed_lines(self.report)[-1])
                self._save()
        self._save()
        if self.ranks.rank == 0:
            report, tables = self.report, [speed_lines(self.report), communication_lines(self.report)]
            tables += [transfer_lines(report)] if report.transfers else []
            print("\n\n".join("\n".join(lines) for lines in [*tables, failure_lines(report)]), flush=True)

    def _run_case(self, setup: Setup) -> Result:
        inputs = Inputs(setup.heads, setup.heads_kv, setup.head_dim, self.dtype, self.ranks.device)
        trial = Trial(setup, self.ranks, self.job, self.budget, inputs)
        ours = {variant.name: setup.task(self.ranks, variant) for variant in self.args.variants}
        plain = next(iter(ours.values()))
        if setup.case.seqlen <= self.args.one_gpu_tokens:
            trial.check_one_gpu(plain)
        for name, task in ours.items():
            trial.check(name, magi, task)
        for name, make in self.others.items():
            trial.check(name, make, plain)
        trial.time(self.timer)
        return trial.result(ours)

    def _setups(self) -> list[Setup]:
        args = self.args
        return [
            Setup(make_case(mask, tokens), heads, heads_kv, args.head_dim)
            for (heads, heads_kv), tokens, mask in product(args.heads, args.tokens, args.masks)
        ]

    def _leaves_out(self, setup: Setup) -> bool:
        """Whether the case would not end in time."""
        needed = setup.seconds(self.ranks.size, len(self.args.variants) + len(self.others))
        too_long = self.ranks.first(time.time() + needed > self.job.deadline)
        if too_long:
            before = self.report.setting.get("left out")
            self.report.setting["left out"] = f"{before}, {setup.name}" if before else setup.name
            self.ranks.say(f"{setup.name}: left out, needs some {needed:.0f} s")
        return too_long

    def _measure_transfers(self) -> None:
        for size in SIZES if self.ranks.device.type == "cuda" else SIZES[:3]:
            name = f"all-to-all of {as_bytes(size)}"
            self.job.step(self.ranks.rank, "", name)
            try:
                if reason := self.job.reason_to_leave_out("", name):
                    raise Failed(reason, supported=True)
                transfer = measure_all_to_all(self.ranks, self.timer, size)
            except Failed as failure:
                self.ranks.say(f"{name}: {failure}")
                continue
            self.report.transfers.append(transfer)
            self.ranks.say(f"{name}: {transfer.ms:.3f} ms, {transfer.gb_per_s:.1f} GB/s")
        self._save()

    def _begin_report(self) -> Report:
        """A new one, or the one of the processes before this one was started anew."""
        path = self.args.out / "results.json"
        if self.job.ended and path.exists():
            report = Report.load(path)
            report.setting.pop("left out", None)
            return report
        ours = [variant.name for variant in self.args.variants]
        return Report(describe(self.ranks, self.args), ours, list(self.args.rivals))

    def _save(self) -> None:
        if self.ranks.rank == 0:
            self.report.save(self.args.out)
