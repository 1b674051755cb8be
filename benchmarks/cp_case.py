"""One case of bench_cp.py: every contender is checked, then those that passed are timed in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from attention_cases import Case
from bench_flex_attn import TOLERANCE, Budget
from cp_contenders import Contender, Task, Variant, one_gpu, plan_of, shard, tokens_of
from cp_inputs import Inputs, Results, relative_errors
from cp_launch import Job
from cp_ranks import Failed, Ranks
from cp_results import Outcome, PlanCost, Result, case_name
from cp_timing import Runner, Timer, time_in_turn
from flex_attn_results import BACKWARD_TO_FORWARD

Make = Callable[[Task], Contender]

ONE_GPU = "one GPU"
FLOPS_A_SECOND = 350e12  # of a GPU, to tell whether a case ends in time
TOLERANCES = {torch.bfloat16: TOLERANCE, torch.float32: 1e-5}


@dataclass(frozen=True)
class Setup:
    """A case with the heads of its tensors."""

    case: Case
    heads: int
    heads_kv: int
    head_dim: int

    @property
    def name(self) -> str:
        return case_name(self.case.name, self.case.seqlen, self.heads, self.heads_kv)

    @property
    def forward_flops(self) -> int:
        return self.case.forward_flops(self.heads, self.head_dim)

    def seconds(self, gpus: int, contenders: int) -> float:
        """About how long it takes to check and to time so many contenders, compilation aside."""
        once = self.forward_flops * (1 + BACKWARD_TO_FORWARD) / gpus / FLOPS_A_SECOND
        return contenders * (3 * once + 0.5)

    def task(self, ranks: Ranks, variant: Variant) -> Task:
        heads = (self.heads, self.heads_kv, self.head_dim)
        return Task(self.case, *heads, ranks.group, ranks.device, variant)


@dataclass
class Trial:
    """A case under way on this rank.

    Attributes:
        setup: The case.
        ranks: The ranks.
        job: The run that it is part of.
        budget: The run's.
        inputs: q, k, v and dout.
        expected: Results of the first contender that gave any, which the others must agree with.
        runners: Contenders to time.
        outcomes: What became of each so far.
    """

    setup: Setup
    ranks: Ranks
    job: Job
    budget: Budget
    inputs: Inputs
    expected: Results | None = None
    runners: dict[str, Runner] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def check_one_gpu(self, task: Task) -> None:
        """Let each rank attend the whole sequence by itself, and expect what comes out."""
        rows = tokens_of(shard(task, zigzag=False))
        self._check(ONE_GPU, lambda: Runner(one_gpu(task), self.inputs).results().only(rows))

    def check(self, name: str, make: Make, task: Task) -> None:
        """Run a contender for the first time; if it passes, it will be timed."""

        def first_call() -> Results:
            runner = Runner(make(task), self.inputs)
            results = runner.results()
            self.runners[name] = runner
            return results

        self._check(name, first_call)
        if self.outcomes[name].failure:
            self.runners.pop(name, None)

    def _check(self, name: str, first_call: Callable[[], Results]) -> None:
        """Compare a contender's results with those expected."""
        began, errors, title = time.monotonic(), {}, f"{self.setup.name}, {name}"
        self.job.step(self.ranks.rank, self.setup.name, name)
        try:
            if reason := self.job.reason_to_leave_out(self.setup.name, name):
                raise Failed(reason, supported=True)
            if self.ranks.first(self.budget.is_spent):
                raise Failed("no time left", supported=True)
            results = self.ranks.attempt(first_call)
            errors = self._errors(results)
            if not all(error <= TOLERANCES[self.inputs.dtype] for error in errors.values()):  # NaN is none that is
                raise Failed("wrong: " + ", ".join(f"error of {x} {e:.1e}" for x, e in errors.items()), supported=True)
        except Failed as failure:
            if failure.supported:
                self.ranks.say(f"{title}: {failure}")
            self.outcomes[name] = Outcome(errors=errors, failure=str(failure), supported=failure.supported)
            return
        self.expected = self.expected or results
        seconds = time.monotonic() - began
        self.budget.longest = max(self.budget.longest, seconds)
        self.outcomes[name] = Outcome(errors=errors, first_call_s=seconds)
        self.ranks.say(f"{title}: first call {seconds:.1f} s, largest error {max(errors.values()):.1e}")

    def _errors(self, results: Results) -> dict[str, float]:
        expected = self.expected or results
        total = self.setup.case.seqlen
        return self.ranks.attempt(lambda: relative_errors(results, expected, total, self.ranks.group))

    def time(self, timer: Timer) -> None:
        """Time the contenders that passed."""
        self.expected = None
        at_turn = partial(self.job.step, self.ranks.rank, self.setup.name)
        for name, found in time_in_turn(self.runners, self.ranks, timer, self.job.is_late, at_turn).items():
            if isinstance(found, Failed):
                changes = {"failure": str(found), "supported": found.supported}
            else:
                changes = vars(found)
            self.outcomes[name] = replace(self.outcomes[name], **changes)

    def result(self, ours: dict[str, Task]) -> Result:
        """All of it, with what the plans of this library's variants cost."""
        setup = self.setup
        sizes = (setup.case.seqlen, self.ranks.size, setup.heads, setup.heads_kv, setup.head_dim)
        plans = {name: plan_cost(task) for name, task in ours.items() if self.outcomes[name].errors}
        return Result(setup.case.name, *sizes, setup.forward_flops, self.outcomes, plans)


def plan_cost(task: Task) -> PlanCost:
    """What the plan of this library costs, and how long it takes to make."""
    began = time.perf_counter()
    plan = plan_of(task)
    plan_ms = 1e3 * (time.perf_counter() - began)
    parts = [plan.rank(rank) for rank in range(plan.cp_size)]
    areas = np.array([part.area for part in parts])
    rows = [int(part.num_recv_rows) for part in parts]
    imbalance = float(areas.max() / areas.mean())
    return PlanCost(rows, task.total // plan.cp_size, imbalance, len(parts[0].stages), plan_ms)
