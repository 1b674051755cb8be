"""What the host does for a call of the hopper engine: microseconds until all kernels are launched.

    PYTHONPATH=. python benchmarks/bench_host_time.py --output benchmarks/results/host_time.md

On an H100 or H200 the GPU is kept waiting, so that it never limits. Elsewhere kernels are compiled for an H100 and go
to a driver that launches nothing: then all is counted but the CUDA driver's own work. Tensors are small: the host does
the same for larger ones.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import triton

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.kernels import hopper
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders

CALLS = 100
"""Calls in a row: no more launches than a CUDA stream takes before it makes the host wait."""

SLEEP_CYCLES = 1 << 29
"""How long the GPU waits before it runs the first of them, about 0.3 seconds."""


def make_calls(device: str, tokens: int, heads: tuple[int, int], head_dim: int) -> dict[str, Callable[[], object]]:
    """The engine's functions and the public one, each with all that it needs made before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, n, head_dim, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    mask = builders.causal(tokens)
    schedule, params = hopper.schedule(mask.bands, tokens, tokens), AttnParams(head_dim**-0.5)
    ranges = torch.tensor([[0, tokens]], dtype=torch.int32, device=device)
    types = torch.tensor([1], dtype=torch.int32, device=device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return flex_flash_attn_func(q, k, v, ranges, ranges, attn_type_map=types, engine="hopper")

    out, lse = call()
    dout = torch.ones_like(out)
    plain = [x.detach() for x in (q, k, v)]
    result = out.detach()
    grads = hopper.start_backward(result, dout, lse.detach(), None, params, head_dim)
    return {
        "engine: forward": lambda: hopper.forward(*plain, schedule, params),
        "engine: start_backward": lambda: hopper.start_backward(result, dout, lse.detach(), None, params, head_dim),
        "engine: backward": lambda: hopper.backward(grads, *plain, schedule, params, torch.bfloat16),
        "engine: finish_backward": lambda: hopper.finish_backward(grads, params, torch.bfloat16),
        "flex_flash_attn_func": call,
        "its backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    }


def host_time(call: Callable[[], object], repetitions: int) -> float:
    """Microseconds of a call, the median."""
    times = []
    for _ in range(repetitions + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times[CALLS:]) * 1e6  # the first round warms up


@contextmanager
def gpu_or_none() -> Iterator[str]:
    """The device to make tensors on."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    from tests.kernels.fake_cuda_driver import fake_h100

    with fake_h100(keep=0):
        yield "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--heads", default="8:2", metavar="HQ:HKV")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads_q, heads_kv = map(int, args.heads.split(":"))
    with gpu_or_none() as device:
        calls = make_calls(device, args.tokens, (heads_q, heads_kv), args.head_dim)
        times = {name: host_time(call, args.repetitions) for name, call in calls.items()}
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU, a driver that launches nothing"
    lines = [
        f"{where}; {platform.processor() or platform.machine()}, torch {torch.__version__}, Triton "
        f"{triton.__version__}, {date.today()}; {args.tokens} tokens, {args.heads} heads, head_dim {args.head_dim}",
        "",
        "| | host time, us |",
        "| --- | ---: |",
        *(f"| {name} | {us:.1f} |" for name, us in times.items()),
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
