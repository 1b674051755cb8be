"""Distributed attention on the GPUs of one host: this library against torch's ring, all-gather and Ulysses.

    PYTHONPATH=. python benchmarks/bench_cp.py --gpus 2 --preset table --budget 300 --out results
    PYTHONPATH=. torchrun --nproc-per-node 8 benchmarks/bench_cp.py --preset scaling --out results
    PYTHONPATH=. python benchmarks/bench_cp.py --gpus 4 --variants default nodes=2 intra_node=heads --out results
    PYTHONPATH=. python benchmarks/bench_cp.py --gpus 8 --bandwidth --masks --out results     # all-to-all alone
    PYTHONPATH=. python benchmarks/bench_cp.py --gpus 2 --device cpu --preset smoke           # that it runs at all

bf16, random inputs, one sequence, shared out before as each contender wants it; keys of this library are made before.
In a round each contender runs once, forward and then backward, on all ranks at once. Times are those of the slowest
rank, between events on its stream, from a small collective in which all devices meet, behind a head start for the
hosts, which are timed apart. They are medians of at least 7 rounds; slow calls have 2 or 3. The backward pass is all
of ``torch.autograd.grad``. Useful work is 4 x unmasked cells x heads x head_dim, 2.5 times that backward; a GPU's
share is one in ``gpus`` of it, whatever it computed.

``alone`` is this library's kernel on the work of each rank without any communication: all keys that its rows attend
lie there in the order of the sequence and are attended in one call. All ranks run it side by side, and the slowest
counts. The ratio to it says what distributing costs beyond imbalance; the time beyond it is exposed.

A contender's times count only if its out, dq, dk, dv agree, over all ranks, with those of one GPU for the whole
sequence, at the shortest length, or else with ours. A contender that fails, or ends its process, stops no other; under
torchrun, which starts nothing anew, the latter ends the run. Results are written after every case, the cheapest cases
are run first, and ``--budget`` leaves out what would not end in time. On two GPUs the full mask of 256k tokens takes
7 seconds a contender and round.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention_cases import MASKS, PUBLISHED_KINDS
from cp_contenders import RIVALS, Variant
from cp_launch import Job, Progress, launch, started_by_torchrun
from cp_run import work

from magi_attention.api import DistAttnConfig
from magi_attention.config import AttnOverlapMode, DispatchConfig, OverlapConfig

ONE_GPU_TOKENS = 1 << 17  # for longer ones it takes too long


@dataclass(frozen=True)
class Preset:
    """Which cases to run, all combinations; lengths are of sequences, or of the part of each GPU."""

    masks: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    tokens_per_gpu: tuple[int, ...] = ()
    heads: tuple[str, ...] = ("64:8",)
    head_dim: int = 128
    chunk_size: int = 512
    rivals: tuple[str, ...] = (
        "torch ring all-gather",
        "torch ring all-to-all",
        "all-gather FlexAttention zigzag",
        "Ulysses flash-attn-4",
        "Ulysses cuDNN",
        "Ulysses FlexAttention",
    )


TABLE_MASKS = ("full", "causal", "varlen full", "pack magi", "sliding window", "block causal", "prefix tree")
SCALING_MASKS = ("full", "causal", "sliding window", *(f"published {kind}" for kind in PUBLISHED_KINDS))
ALL_GPU_RIVALS = tuple(name for name in RIVALS if "dense" not in name)
ALL_CPU_RIVALS = tuple(name for name in RIVALS if "dense" in name)
PRESETS = {
    "quick": Preset(("causal", "pack magi"), tokens=(1 << 16,)),
    "table": Preset(TABLE_MASKS, tokens=(1 << 16, 1 << 18)),
    "scaling": Preset(SCALING_MASKS, tokens_per_gpu=(8192, 32768)),
    "full": Preset(
        tuple(MASKS), tokens=tuple(1 << n for n in range(16, 20)), heads=("64:8", "48:8"), rivals=ALL_GPU_RIVALS
    ),
    "smoke": Preset(
        TABLE_MASKS, tokens_per_gpu=(128,), heads=("8:4",), head_dim=16, chunk_size=16, rivals=ALL_CPU_RIVALS
    ),
}


CHOICES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "mode": ("overlap", AttnOverlapMode),
    "degree": ("overlap", int),
    "max_degree": ("overlap", int),
    "min_chunk_size": ("overlap", int),
    "order": ("dispatch", str),
    "grad_wire_dtype": ("config", str),
    "intra_node": ("config", str),
    "nodes": ("variant", int),
    "chunk_size": ("variant", int),
    "sm_margin": ("variant", int),
    "engine": ("variant", str),
}
"""What a variant of this library may choose: which value it is a part of, and how it is read."""


def parse_variant(text: str, plain: Variant) -> Variant:
    """``default``, or choices such as ``degree=2,sm_margin=8``, the others as in ``plain``.

    Raises:
        ValueError: If a choice is unknown or out of bounds.
    """
    if text == "default":
        return plain
    choices = dict(choice.partition("=")[::2] for choice in text.split(","))
    if unknown := choices.keys() - CHOICES:
        raise ValueError(f"unknown choice {', '.join(sorted(unknown))}; there are {', '.join(sorted(CHOICES))}")
    parts: dict[str, dict[str, Any]] = {"overlap": {}, "dispatch": {}, "config": {}, "variant": {}}
    for name, value in choices.items():
        part, read = CHOICES[name]
        parts[part][name] = read(value)
    config = DistAttnConfig(DispatchConfig(**parts["dispatch"]), OverlapConfig(**parts["overlap"]), **parts["config"])
    return replace(plain, name=f"{plain.name} {text}", config=config, **parts["variant"])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="processes to start, one a GPU; all GPUs by default, 2 on CPUs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="table", help="which cases; options below narrow")
    parser.add_argument("--masks", nargs="*", choices=list(MASKS))
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths of the sequence")
    parser.add_argument("--tokens-per-gpu", nargs="+", type=int, help="instead: lengths of each GPU's part")
    parser.add_argument("--heads", nargs="+", metavar="Q:KV")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["default"],
        help="of this library, such as default degree=0 degree=2,sm_margin=8; ratios are of the first. Choices: "
        + ", ".join(CHOICES),
    )
    parser.add_argument("--engine", help="of this library; None chooses")
    parser.add_argument("--chunk-size", type=int, help="of this library's plans")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS))
    parser.add_argument("--bandwidth", action="store_true", help="measure all-to-alls by size before")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a collective counts as stuck")
    parser.add_argument("--out", type=Path, default=Path("cp_results"), help="folder for results.json and .md")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    for name in ("masks", "heads", "head_dim", "chunk_size", "rivals"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    if args.gpus is None:
        args.gpus = torch.cuda.device_count() if args.device == "cuda" else 2
    if started_by_torchrun():
        args.gpus = int(os.environ["WORLD_SIZE"])
    if args.device == "cuda" and args.gpus > torch.cuda.device_count():
        parser.error(
            f"--gpus {args.gpus} is more than torch finds, {torch.cuda.device_count()}; --device cpu needs none"
        )
    if args.gpus < 1:
        parser.error(f"--gpus must be at least 1, not {args.gpus}; torch finds {torch.cuda.device_count()} GPUs")
    if args.tokens and args.tokens_per_gpu:
        parser.error("--tokens and --tokens-per-gpu exclude each other")
    per_gpu = args.tokens_per_gpu or (() if args.tokens else preset.tokens_per_gpu)
    args.tokens = [tokens * args.gpus for tokens in per_gpu] or args.tokens or preset.tokens
    args.one_gpu_tokens = min(ONE_GPU_TOKENS, *args.tokens)
    try:
        args.heads = [tuple(map(int, pair.split(":"))) for pair in args.heads]
        if any(heads % heads_kv for heads, heads_kv in args.heads):
            raise ValueError
    except ValueError:
        parser.error("--heads takes pairs such as 64:8, the first a multiple of the second")
    plain = Variant("magi", chunk_size=args.chunk_size, engine=args.engine)
    try:
        args.variants = [parse_variant(text, plain) for text in args.variants]
    except (TypeError, ValueError) as problem:
        parser.error(f"--variants: {problem}")
    if uneven := [variant.name for variant in args.variants if variant.nodes < 1 or args.gpus % variant.nodes]:
        parser.error(f"--variants: {args.gpus} GPUs do not fill the nodes of {', '.join(uneven)}")
    for variant, tokens in product(args.variants, args.tokens):
        if tokens % (2 * args.gpus * variant.chunk_size):
            multiple = 2 * args.gpus * variant.chunk_size
            parser.error(f"{tokens} tokens are not a multiple of 2 x GPUs x chunk size, {multiple}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").unlink(missing_ok=True)  # of another run
    job = Job(args, Progress(args.out / "progress.json"), deadline=time.time() + args.budget)
    launch(work, args.gpus, job, stall_s=2 * args.timeout)


if __name__ == "__main__":
    main()
