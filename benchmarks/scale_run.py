"""A run of emulate_scale.py: plan cases, measure some ranks, model the rest from what there is so far."""

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scale_case import NOMINAL, Case, Pack, Problem
from scale_costs import BACKWARD, FORWARD, Costs, Fit, Measured, Rates, flops
from scale_loop import Bench, Heads, loop_of, measure_rank
from scale_results import (
    HEADS_IN_NODES,
    OURS,
    TRANSPORTS,
    FitError,
    KernelRates,
    Modelled,
    RankTimes,
    Report,
    speed_rows,
    table,
    unique,
)
from scale_rivals import RIVALS, SHARD_OF, measure_shard, model_seconds, shard_of

METHODS = (OURS, HEADS_IN_NODES, *RIVALS)
SHARE_OF_MEMORY = 0.85
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
        masks: Kinds of masks, in order.
        cp_sizes: Numbers of GPUs.
        methods: Which of ``METHODS``; ``OURS`` is among them.
        out: Folder for results.
        ranks: How many ranks of a pack to measure.
        seconds: About how long to measure a rank.
        budget: Seconds after which to measure no more.
        rates: Costs where nothing is measured.
        earlier: Results to take times from.
    """

    masks: Sequence[str]
    cp_sizes: Sequence[int]
    methods: Sequence[str]
    out: Path
    ranks: int = 3
    seconds: float = 0.25
    budget: float = math.inf
    rates: Rates = NOMINAL
    earlier: Report = field(default_factory=lambda: Report({}))


class Emulation:
    """A run: cases are planned, some of their ranks measured, and all is modelled from what there is so far."""

    def __init__(self, options: Options, problem: Problem, bench: Bench | None, setting: dict[str, str]) -> None:
        self.options, self.problem, self.bench = options, problem, bench
        self.start = time.monotonic()
        self.report = Report(setting)
        self.cases: list[Case] = []

    def run(self) -> None:
        """All cases, those that matter most first; results are written after each."""
        for mask in self.options.masks:
            for method in (OURS, HEADS_IN_NODES):
                for cp_size in self.options.cp_sizes:
                    if method in self.options.methods:
                        self.run_case(Case(self.problem, mask, method, cp_size))
                        self.try_to_model(mask)
            for cp_size in self.options.cp_sizes:
                for rival in unique(SHARD_OF[rival] for rival in RIVALS if rival in self.options.methods):
                    self.rate_kernels(mask, rival, cp_size)
            self.try_to_model(mask)
            print(table(speed_rows(self.report, mask)), flush=True)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    @property
    def may_measure(self) -> bool:
        """Whether there is something to measure on, and time left."""
        return self.bench is not None and time.monotonic() - self.start < self.options.budget

    def run_case(self, case: Case) -> None:
        """Plan a case and measure some of its ranks."""
        case.plan()
        self.cases.append(case)
        self.report.planned += case.planned
        worst = max(case.planned, key=lambda p: p.received_max)
        self.say(
            f"{case.mask}, {case.method}, {case.cp_size} GPUs: a plan in "
            f"{np.mean([p.plan_ms for p in case.planned]):.0f} ms, imbalance {worst.imbalance:.3f}, "
            f"up to {worst.received_max:.1f} shards received and {worst.sent_max:.1f} sent, stages: {worst.stages}"
        )
        for number, pack in enumerate(case.packs):
            for rank, reason in pack.measured_as.work.sample(self.options.ranks).items():
                times = self.find(case, number, rank, pack) or self.measure(case, number, rank, reason)
                if times is not None:
                    self.report.measured.append(times)
                    if times.measured is not None:
                        case.measured[number, rank] = times.measured

    def find(self, case: Case, number: int, rank: int, pack: Pack) -> RankTimes | None:
        """The times of a rank in the earlier run, if it moved the same rows, of as many heads, in the same steps."""
        for times in self.options.earlier.measured:
            where = times.mask, times.method, times.cp_size, times.pack, times.rank
            if where == (case.mask, case.method, case.cp_size, number, rank) and times.measured is not None:
                work, done = pack.measured_as.work, times.measured
                rows = tuple(work.received[:, rank].tolist()), tuple(work.sent[:, rank].tolist())
                steps = [loop.steps for loop in pack.measured_as.loops]
                sizes = pack.plan.dispatch.local_seqlen, case.heads
                before = done.num_rows, done.heads, done.received, done.sent, [p.steps for p in done.passes]
                if before == (*sizes, *rows, steps):
                    return times
        return None

    def measure(self, case: Case, number: int, rank: int, reason: str) -> RankTimes | None:
        """Measure a rank; None without a device or time."""
        if not self.may_measure:
            return None
        assert self.bench is not None
        where = case.mask, case.method, case.cp_size, number, rank, reason
        pack, bench = case.packs[number], self.bench
        work = pack.measured_as.work
        received, sent = (tuple(x[:, rank].tolist()) for x in (work.received, work.sent))

        def run() -> Measured:
            most_received, most_sent = (max(rows, default=0) for rows in (received, sent))
            check_size(case.heads, most_received, buffer_bytes(case.heads, most_received, most_sent), bench.device)
            passes = measure_rank(bench, pack.plan.rank(rank), case.heads, self.options.seconds, case.one_host)
            if any(p.steps != loop.steps for p, loop in zip(passes, pack.measured_as.loops, strict=True)):
                raise AssertionError("the loop took other steps than on the toy problem")
            rows, area, tiles = pack.plan.dispatch.local_seqlen, int(work.area[rank]), int(work.tiles[rank])
            return Measured(rows, case.heads, area, tiles, received, sent, passes)

        measured, failure = attempt(run, bench.device)
        if measured is None:
            self.say(f"pack {number} rank {rank}: {failure}")
            return RankTimes(*where, failure=failure)
        speeds = " / ".join(f"{measured.tflops(way):.0f}" for way in (FORWARD, BACKWARD))
        wholes = " / ".join(f"{1e3 * p.whole:.2f}" for p in measured.passes)
        self.say(f"pack {number} rank {rank} ({reason}): {wholes} ms, kernels {speeds} TFLOP/s")
        return RankTimes(*where, measured=measured)

    def rate_kernels(self, mask: str, rival: str, cp_size: int) -> None:
        """Measure our kernels on a rival's shard of the first pack, or find that in the earlier run."""
        where = mask, rival, cp_size
        for rates in self.options.earlier.kernel_rates:
            if (rates.mask, rates.rival, rates.cp_size) == where and not rates.failure:
                self.report.kernel_rates.append(rates)
                return
        case = self.case(mask, OURS, cp_size)
        if not self.may_measure:
            return
        assert self.bench is not None
        bench, setting = self.bench, self.problem.setting(cp_size, case.packs[0].plan.mask.area)
        shard = shard_of(rival, case.packs[0].plan.mask, case.documents[0], setting)
        if shard is None:
            return

        def run() -> tuple[float, float]:
            check_size(shard.heads, shard.num_keys, 4 * shard.heads.row_elements * shard.num_keys, bench.device)
            return measure_shard(bench, shard, self.options.seconds)

        rates, failure = attempt(run, bench.device)
        speeds = (math.nan, math.nan) if rates is None else tuple(x / 1e12 for x in rates)
        self.report.kernel_rates.append(KernelRates(*where, *speeds, failure))
        self.say(f"{mask}, shard of {rival}, {cp_size} GPUs: {failure or ' / '.join(f'{x:.0f}' for x in speeds)}")

    def case(self, mask: str, method: str, cp_size: int) -> Case:
        """A case that was planned."""
        return next(c for c in self.cases if (c.mask, c.method, c.cp_size) == (mask, method, cp_size))

    def try_to_model(self, mask: str) -> None:
        """Model a mask; what was measured is stored before, and a mistake here does not end the measuring."""
        self.report.save(self.options.out)
        try:
            self.model(mask)
        except Exception:
            self.say("modelling failed")
            traceback.print_exc()

    def model(self, mask: str) -> None:
        """Model all speeds of a mask anew, and write the results."""
        report = self.report
        costs, source = self.costs(mask)
        modelled = []
        for case in self.cases:
            if case.mask == mask:
                modelled += case.model(costs, f"measured and {source}" if case.measured else source)
        for rival in RIVALS:
            if rival in self.options.methods:
                for cp_size in (c.cp_size for c in self.cases if (c.mask, c.method) == (mask, OURS)):
                    modelled += self.model_rival(mask, rival, cp_size, costs)
        methods, transports = [*METHODS], [*TRANSPORTS, ""]
        modelled.sort(key=lambda m: (methods.index(m.method), transports.index(m.transport), m.cp_size))
        report.modelled = [m for m in report.modelled if m.mask != mask] + modelled
        report.save(self.options.out)

    def costs(self, mask: str) -> tuple[Costs, str]:
        """Of ranks that were not measured, and where they are from."""
        ranks = [r.measured for r in self.report.measured if r.mask == mask and r.measured is not None]
        if not ranks:
            rates = self.options.rates
            return rates, f"given: {rates.forward / 1e12:g} / {rates.backward / 1e12:g} TFLOP/s"
        fit = Fit.to(ranks, [loop_of(len(rank.received), self.problem.grad_wire_dtype) for rank in ranks])
        errors = [e for e in self.report.fit_errors if e.mask != mask]
        self.report.fit_errors = [*errors, FitError(mask, len(ranks), *fit.error)]
        return fit, "fitted"

    def model_rival(self, mask: str, rival: str, cp_size: int, costs: Costs) -> list[Modelled]:
        """At the speed of our kernels on its shard, else at the best of our ranks, else at the given rates."""
        where = mask, SHARD_OF[rival], cp_size
        measured = [r for r in self.report.kernel_rates if (r.mask, r.rival, r.cp_size) == where]
        ours = [r.measured for r in self.report.measured if r.mask == mask and r.measured is not None]
        if measured and not measured[0].failure:
            rates, kernels = (measured[0].forward * 1e12, measured[0].backward * 1e12), "measured on a shard"
        elif ours:
            forward, backward = (1e12 * max(m.tflops(way) for m in ours) for way in (FORWARD, BACKWARD))
            rates, kernels = (forward, backward), "the best of our ranks"
        else:
            assert isinstance(costs, Rates)
            rates, kernels = (costs.forward, costs.backward), self.costs(mask)[1]
        totals, work = [0.0, 0.0], [0.0, 0.0]
        for pack in self.case(mask, OURS, cp_size).packs:
            seconds = model_seconds(rival, self.problem.setting(cp_size, pack.plan.mask.area), rates)
            if seconds is None:
                return []
            for way in (FORWARD, BACKWARD):
                totals[way] += seconds[way]
                work[way] += flops(pack.plan.mask.area / cp_size, self.problem.heads, way)
        speeds = (work[way] / totals[way] / 1e12 for way in (FORWARD, BACKWARD))
        return [Modelled(mask, rival, "", cp_size, *speeds, math.nan, math.nan, kernels)]


def attempt(work: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """The result, or why there is none; ends the run if the device does not work any more."""
    try:
        return work(), ""
    except Exception as problem:
        lines = [line for line in str(problem).splitlines() if line.strip()] or [""]
        failure = f"{type(problem).__name__}: {lines[0][:200]}"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as broken:
            raise SystemExit(f"the device failed: {failure}") from broken
    return None, failure


def check_size(heads: Heads, num_keys: int, num_bytes: int, device: torch.device) -> None:
    """Refuse what would not fit: the memory, or the 32 bits in which some kernels count elements of keys.

    Raises:
        MemoryError: If so.
    """
    if num_bytes > free_bytes(device) * SHARE_OF_MEMORY:
        raise MemoryError(f"its keys need {num_bytes / 2**30:.0f} GiB")
    if num_keys * heads.row_elements >= 1 << 31:
        raise MemoryError(f"its {num_keys} keys and values have 2**31 elements or more")


def buffer_bytes(heads: Heads, received: int, sent: int) -> int:
    """About what the buffers of a stage and the next take: rows packed, received, put in order, and their gradients."""
    return heads.row_elements * (20 * received + 16 * sent)


def free_bytes(device: torch.device) -> float:
    """What the device could still give."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
