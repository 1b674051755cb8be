"""Attention on one GPU under many masks: this library against cuDNN, FlexAttention and flash-attn-4, in one process.

    PYTHONPATH=. python benchmarks/bench_flex_attn.py --preset table --budget 360 --out results

bf16, random inputs, one sequence. In a round each contender runs once, forward and then backward, each between two
CUDA events; before, the L2 cache is flushed and the device kept busy for HEAD_START cycles, so that it never waits
for the host, whose time ``bench_host_time.py`` measures. The order of contenders changes from round to round. Times are
medians: of at least 7 rounds and 0.3 s a contender, or of 3 rounds that took longer than 3 s a contender. The backward
pass is all of ``torch.autograd.grad``: delta, zeroed buffers and casts too. Useful work is
4 x unmasked cells x heads x head_dim, 2.5 times that backward; where values have another head_dim than keys, as in
``--head-dims 192:128``, half of the forward pass counts with either, and two fifths of the backward pass with that of
values. A contender's times count only if its out, dq, dk, dv
agree with those of the first contender that ran, which is ours unless it failed.

Results are written after every case. Compiling takes most of a short run: FlexAttention does it for each shape and
kind of mask, flash-attn-4 for each kind of mask; ``first_call_s`` in the JSON tells where that happened.
"""

import argparse
import importlib.metadata
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from attention_cases import MASKS, Case, make_case
from flex_attn_results import BACKWARD_TO_FORWARD, Outcome, Report, Result, as_markdown, short_table, table_lines
from gpu_rivals import RIVALS, Contender, NotSupported, magi
from torch import Tensor

TOLERANCE = 0.01  # two results in bf16 differ by at most 0.008; one with a window off by one token, by 0.012 or more
TENSORS = ("out", "dq", "dk", "dv")
T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """Which cases to run, all combinations."""

    masks: tuple[str, ...]
    seqlens: tuple[int, ...]
    heads: tuple[str, ...] = ("48:8",)
    head_dims: tuple[str, ...] = ("128",)


PRESETS = {
    "quick": Preset(("causal", "varlen causal", "prefix tree"), (8192,)),
    "table": Preset(tuple(MASKS), (8192, 32768)),
    "full": Preset(tuple(MASKS), (8192, 32768, 131072), ("48:8", "64:8", "16:16"), ("128", "64")),
}


class Budget:
    """The time a run may take; a step is not begun when the longest one so far would not end in time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.longest = 0.0

    @property
    def is_spent(self) -> bool:
        return time.monotonic() + self.longest > self.end

    def step(self, run: Callable[[], T]) -> tuple[T, float]:
        """The step's result and its seconds."""
        start = time.monotonic()
        try:
            result = run()
        finally:
            seconds = time.monotonic() - start
            self.longest = max(self.longest, seconds)
        return result, seconds


class Runner:
    """A contender with its own q, k, v and dout, laid out as it wants them."""

    def __init__(self, contender: Contender, inputs: dict[str, Tensor]) -> None:
        self.contender = contender
        self.qkv = [self._arranged(inputs[name]).contiguous().detach().requires_grad_() for name in "qkv"]
        self.dout = self._arranged(inputs["dout"])

    def forward(self) -> Tensor:
        return self.contender.attend(*self.qkv)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.qkv, self.dout)

    def results(self) -> list[Tensor]:
        """out, dq, dk, dv as ``(tokens, heads, head_dim)``. Call it once before all else."""
        out = self.forward()
        self.dout = torch.empty_like(out).copy_(self.dout)  # with the strides of out, so that nobody copies it
        return [self._arranged(x) for x in (out.detach(), *self.backward(out))]

    def _arranged(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.contender.heads_first else x


HEAD_START = 4_000_000  # cycles, some 2 ms: more than any contender's host needs for a call


class EventTimer:
    """Times calls on the current CUDA stream."""

    def __init__(self) -> None:
        self.cache_sized = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def time(self, run: Callable[[], T]) -> tuple[T, Callable[[], float]]:
        """What the call returns, and a function that waits for it to end and gives its milliseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache_sized.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        result = run()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return result, milliseconds


def make_inputs(
    case: Case, heads: tuple[int, int], head_dims: tuple[int, int], device: str = "cuda"
) -> dict[str, Tensor]:
    """q, k, v and dout, ``(tokens, heads, head_dim)``.

    Args:
        case: What to attend.
        heads: Heads of queries and of keys.
        head_dims: Dimensions of a head of keys and of values.
        device: Where to make them.
    """
    torch.manual_seed(0)
    (heads_q, heads_kv), (head_dim, head_dim_v) = heads, head_dims
    sizes = {
        "q": (heads_q, head_dim),
        "k": (heads_kv, head_dim),
        "v": (heads_kv, head_dim_v),
        "dout": (heads_q, head_dim_v),
    }
    return {name: torch.randn(case.seqlen, *x, dtype=torch.bfloat16, device=device) for name, x in sizes.items()}


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Of each tensor, the norm of the difference over the norm."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return {name: float(norm(a - b) / norm(b)) for name, a, b in zip(TENSORS, actual, expected, strict=True)}


def run_case(
    case: Case,
    inputs: dict[str, Tensor],
    makers: dict[str, Callable[[Case, str], Contender]],
    budget: Budget,
    timer: EventTimer,
) -> dict[str, Outcome]:
    """Check every contender, then time those that passed, in turn."""
    outcomes: dict[str, Outcome] = {}
    runners: dict[str, Runner] = {}
    expected: list[Tensor] = []
    for name, make in makers.items():
        try:
            if budget.is_spent:
                raise TimeoutError("no time left")
            (runners[name], error), seconds = budget.step(partial(first_call, make, case, inputs, expected))
            outcomes[name] = Outcome(error=error, first_call_s=seconds)
        except Exception as problem:
            outcomes[name] = failed(problem)
    expected.clear()
    for name, (forward, backward) in time_in_turn(runners, outcomes, budget, timer).items():
        outcomes[name] = replace(
            outcomes[name],
            forward_ms=statistics.median(forward),
            backward_ms=statistics.median(backward),
            rounds=len(forward),
        )
    return outcomes


def first_call(
    make: Callable[[Case, str], Contender], case: Case, inputs: dict[str, Tensor], expected: list[Tensor]
) -> tuple[Runner, float]:
    """A runner, with all that is compiled on the way, and its error against ``expected``, which the first one fills.

    Raises:
        ArithmeticError: If the error is too large.
    """
    runner = Runner(make(case, inputs["q"].device.type), inputs)
    results = runner.results()
    errors = relative_errors(results, expected or results)
    if not all(error <= TOLERANCE for error in errors.values()):  # NaN is no error that is small enough
        raise ArithmeticError("wrong: " + ", ".join(f"error of {name} {error:.1e}" for name, error in errors.items()))
    if not expected:
        expected += results
    return runner, max(errors.values())


def failed(problem: Exception) -> Outcome:
    """The outcome of a contender that raised; ends the run if the device does not work any more."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as broken:
        raise SystemExit(f"the device failed: {problem}") from broken
    lines = [line for line in str(problem).splitlines() if line.strip()] or [""]
    return Outcome(failure=f"{type(problem).__name__}: {lines[0]}", supported=not isinstance(problem, NotSupported))


def time_in_turn(
    runners: dict[str, Runner], outcomes: dict[str, Outcome], budget: Budget, timer: EventTimer
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds forward and backward of every round. Who fails drops out, with that as its outcome."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    start, rounds = time.monotonic(), -1  # the first round warms up
    order = random.Random(0)  # the chip's clock depends on who was before, which must not be the same one each time
    while times and not is_enough(rounds, (time.monotonic() - start) / len(times), budget):
        names = list(times)
        order.shuffle(names)
        for name in names:
            runner = runners[name]
            try:
                out, forward_ms = timer.time(runner.forward)
                _, backward_ms = timer.time(partial(runner.backward, out))
                sample = forward_ms(), backward_ms()
            except Exception as problem:
                outcomes[name] = failed(problem)
                del times[name]
                continue
            if rounds >= 0:
                for samples, milliseconds in zip(times[name], sample, strict=True):
                    samples.append(milliseconds)
        rounds += 1
    return {name: samples for name, samples in times.items() if samples[0]}


def is_enough(rounds: int, seconds: float, budget: Budget) -> bool:
    """Whether that many rounds, which took ``seconds`` a contender, will do."""
    late = seconds >= 3 or time.monotonic() > budget.end
    return (rounds >= 7 and seconds >= 0.3) or (rounds >= 3 and late)


def describe(args: argparse.Namespace) -> dict[str, str]:
    """The setting of a run."""
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for package in ("triton", "flash-attn-4"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": torch.cuda.get_device_name(),
        **versions,
        "Python": sys.version.split()[0],
        "date": str(date.today()),
        "cases": f"preset {args.preset}, bf16, one sequence",
        "times": f"medians, order changing, L2 flushed; backward counts {BACKWARD_TO_FORWARD} times the forward work, "
        "2.6 times for keys of 192 and values of 128",
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="table", help="which cases; options below narrow")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS))
    parser.add_argument("--seqlens", nargs="+", type=int)
    parser.add_argument("--heads", nargs="+", metavar="Q:KV")
    parser.add_argument("--head-dims", nargs="+", metavar="D[:DV]")
    parser.add_argument("--engines", nargs="+", default=["hopper"], help="of this library; ratios are of the first")
    parser.add_argument("--deterministic", action="store_true", help="time each of them so, too")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--out", type=Path, default=Path("flex_attn_results"), help="folder for results.json and .md")
    args = parser.parse_args(argv)
    for name in ("masks", "seqlens", "heads", "head_dims"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(PRESETS[args.preset], name))
    try:
        args.heads = [tuple(map(int, pair.split(":"))) for pair in args.heads]
        if any(heads % heads_kv for heads, heads_kv in args.heads):
            raise ValueError
    except ValueError:
        parser.error("--heads takes pairs such as 48:8, the first a multiple of the second")
    try:
        dims = [tuple(map(int, x.split(":"))) for x in args.head_dims]
        if any(len(x) > 2 for x in dims):
            raise ValueError
        args.head_dims = [(x[0], x[-1]) for x in dims]
    except ValueError:
        parser.error("--head-dims takes numbers such as 128, or pairs such as 192:128, of keys and of values")
    return args


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_flex_attn.py needs a CUDA GPU, and torch finds none")
    budget, timer = Budget(args.budget), EventTimer()
    ours = {f"magi {engine}": partial(magi, engine=engine) for engine in args.engines}
    if args.deterministic:
        ours |= {f"{name} deterministic": partial(make, deterministic=True) for name, make in ours.items()}
    makers = ours | {name: RIVALS[name] for name in args.rivals}
    report = Report(describe(args), list(ours), args.rivals)
    args.out.mkdir(parents=True, exist_ok=True)
    for head_dims, heads, seqlen, name in product(args.head_dims, args.heads, args.seqlens, args.masks):
        if budget.is_spent:
            report.setting["stopped"] = f"after {len(report.results)} cases, out of time"
            break
        case = make_case(name, seqlen)
        outcomes = run_case(case, make_inputs(case, heads, head_dims), makers, budget, timer)
        flops = case.forward_flops(heads[0], *head_dims)
        head_dim_v = None if head_dims[0] == head_dims[1] else head_dims[1]
        report.results.append(Result(name, seqlen, *heads, head_dims[0], flops, outcomes, head_dim_v))
        print(table_lines(report)[-1], flush=True)
        report.save(args.out / "results.json")
        (args.out / "results.md").write_text(as_markdown(report))
    print("\n" + ", ".join(f"{name} {value}" for name, value in report.setting.items()) + "\n" + short_table(report))


if __name__ == "__main__":
    main()
