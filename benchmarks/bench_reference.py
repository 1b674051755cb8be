"""The reference engine on one CPU process, beside PyTorch's scaled_dot_product_attention, in one run.

    python benchmarks/bench_reference.py --output benchmarks/results/reference.md

Forward plus backward, float32, contenders in turn, median. On packed documents SDPA gets the dense mask, which is
what it has for them; on causal its own ``is_causal=True``. ``flex_flash_attn_func`` is timed whole, with its checks
and its compiled mask found in the cache.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.mask import AttnMask, builders

LENGTHS = [1700, 900, 600, 400, 300, 150, 46]  # 4096 tokens in 7 documents


def sdpa(q: Tensor, k: Tensor, v: Tensor, **mask: object) -> Tensor:
    """PyTorch's attention on ``(tokens, heads, head_dim)``."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **mask)[0].transpose(0, 1)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: AttnMask) -> Tensor:
    """This library's attention."""
    q_ranges, k_ranges, types = mask.to_ranges()
    codes = torch.tensor([t.to_int_type() for t in types], dtype=torch.int32)
    return flex_flash_attn_func(q, k, v, q_ranges.to_tensor(), k_ranges.to_tensor(), attn_type_map=codes)[0]


def time_in_turn(contenders: dict[str, Callable[[], Tensor]], dout: Tensor, repetitions: int) -> dict[str, float]:
    """Median milliseconds of forward plus backward, contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(repetitions + 1), "timing"):
        for name, attend in contenders.items():
            start = time.perf_counter()
            attend().backward(dout)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(samples[1:]) for name, samples in times.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8:8:64", "8:2:64", "4:4:128"], metavar="HQ:HKV:D")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    cu_seqlens = builders.cu_seqlens_from_lengths(LENGTHS)
    packed, causal = builders.varlen(cu_seqlens, causal=True), builders.causal(sum(LENGTHS))
    dense = torch.from_numpy(packed.to_dense())
    header = [
        "heads q:kv:dim",
        "SDPA dense mask, packed",
        "ours, packed",
        "speed-up",
        "SDPA causal",
        "ours, causal",
        "time",
    ]
    lines = []
    for shape in args.shapes:
        heads_q, heads_kv, dim = map(int, shape.split(":"))
        q, dout = (torch.randn(sum(LENGTHS), heads_q, dim, requires_grad=True) for _ in range(2))
        k, v = (torch.randn(sum(LENGTHS), heads_kv, dim, requires_grad=True) for _ in range(2))
        contenders: dict[str, Callable[[], Tensor]] = {
            "sdpa packed": lambda q=q, k=k, v=v: sdpa(q, k, v, attn_mask=dense),
            "ours packed": lambda q=q, k=k, v=v: flex(q, k, v, packed),
            "sdpa causal": lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True),
            "ours causal": lambda q=q, k=k, v=v: flex(q, k, v, causal),
        }
        torch.testing.assert_close(contenders["ours packed"](), contenders["sdpa packed"]())
        torch.testing.assert_close(contenders["ours causal"](), contenders["sdpa causal"]())
        ms = time_in_turn(contenders, dout.detach(), args.repetitions)
        cells = [f"{ms[name]:.0f} ms" for name in contenders]
        cells.insert(2, f"{ms['sdpa packed'] / ms['ours packed']:.2f} x faster")
        lines.append([shape, *cells, f"{ms['ours causal'] / ms['sdpa causal']:.2f} of SDPA"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    title = (
        f"# The reference engine on a CPU, {date.today()}\n\n{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; 4096 tokens, packed: documents of {LENGTHS}; forward plus backward, float32, "
        f"median of {args.repetitions}.\n\n"
    )
    Console().print(table, soft_wrap=True)
    if args.output:
        args.output.write_text(title + table + "\n")


if __name__ == "__main__":
    main()
