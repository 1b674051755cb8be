"""What distributed attention does on 8 to 1,024 GPUs, from pieces measured on one, and a model of the network.

    PYTHONPATH=. python benchmarks/emulate_scale.py --budget 60 --out scale
    PYTHONPATH=. python benchmarks/emulate_scale.py --masks "varlen causal" causal --cp-sizes 8 16 32 64 --out scale
    PYTHONPATH=. python benchmarks/emulate_scale.py --rates forward=600,backward=480 --cp-sizes 8 64 1024
    PYTHONPATH=. python benchmarks/emulate_scale.py --reuse scale/results.json --links links.json --out scale_2

Every plan is the library's own. Some of its ranks run on this machine's GPU, in the library's own loop, with their
wire cut; see ``scale_record.py``. Other ranks are estimated from these, and the network is modelled: results.md tells
which number is which. With ``--rates`` nothing is measured and no GPU is needed; with ``--reuse`` neither, and times of
ranks are those of an earlier run, with the same masks and sizes.

The documents are those of MagiAttention's published distributed benchmark, whose numbers stand beside ours.
"""

import argparse
import json
import math
import platform
import sys
from datetime import date
from pathlib import Path
from typing import get_args

import torch
from scale_case import NOMINAL, Problem
from scale_costs import Rates
from scale_loop import Bench, Heads
from scale_masks import MASKS
from scale_network import NVLINK_POINTS, Link, Network
from scale_record import CudaClock, HostClock
from scale_results import OURS, Report
from scale_run import METHODS, Emulation, Options

from magi_attention.config import DispatchConfig, GradWireDtype, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.kernels.engine import choose_engine
from magi_attention.kernels.params import AttnParams

DISPATCH = {"locality": LocalityDispatchAlg(), "heap": MinHeapDispatchAlg()}


def describe(args: argparse.Namespace, problem: Problem) -> dict[str, str]:
    """The setting of a run."""
    heads, network = problem.heads, problem.network
    if args.rates:
        rates = args.rates.forward / 1e12, args.rates.backward / 1e12, args.rates.memory / 1e9
        device = "none; kernels at {:g} TFLOP/s forward and {:g} backward, memory at {:g} GB/s".format(*rates)
    elif args.reuse:
        device = f"times of ranks from {args.reuse.name}"
    else:
        device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()

    def link(link: Link) -> str:
        return f"{link.bandwidth / 1e9:.0f} GB/s a GPU each way, {1e6 * link.latency:.0f} us"

    return {
        "device": device,
        "torch": torch.__version__,
        "Python": sys.version.split()[0],
        "date": str(date.today()),
        "tokens a GPU": str(problem.tokens),
        "sizes": f"{heads.q}:{heads.kv} heads, head_dim {heads.dim}, bf16",
        "plans": f"{args.dispatch}, chunk size {problem.chunk_size}, one of {list(problem.degrees)} stages, "
        f"gradients travel as {problem.grad_wire_dtype}, seed {problem.seed}",
        "network (modelled)": f"nodes of {network.gpus_per_node} GPUs; inside: {link(network.inside)}; "
        f"across: {link(network.across)}",
    }


def parse_rates(text: str) -> Rates:
    """``forward=600,backward=480,memory=2000``: TFLOP/s, TFLOP/s, GB/s; those left out are the nominal ones."""
    units = {"forward": 1e12, "backward": 1e12, "memory": 1e9}
    pairs = dict(pair.split("=") for pair in text.split(","))
    if not pairs.keys() <= units.keys():
        raise ValueError(text)
    return Rates(**{name: float(value) * units[name] for name, value in pairs.items()})


def parse_heads(text: str) -> tuple[int, int]:
    """``64:8``."""
    heads_q, heads_kv = map(int, text.split(":"))
    if heads_kv < 1 or heads_q % heads_kv:
        raise ValueError(text)
    return heads_q, heads_kv


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=["varlen causal"])
    parser.add_argument("--cp-sizes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help=f"{OURS} is always there")
    parser.add_argument("--packs", type=int, default=5, help="packs of documents a mask")
    parser.add_argument("--ranks", type=int, default=3, help="ranks to measure a pack, the heaviest first")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--dispatch", choices=list(DISPATCH), default="locality", help="how chunks are given to ranks")
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of stages to choose from")
    parser.add_argument("--grad-wire-dtype", choices=get_args(GradWireDtype), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a GPU")
    parser.add_argument("--heads", type=parse_heads, default=(64, 8), metavar="Q:KV")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--links", type=Path, help="JSON: measured [[bytes, seconds], ...] of a GPU inside a node")
    parser.add_argument("--across-bandwidth", type=float, default=50, help="GB/s of a GPU between nodes, each way")
    parser.add_argument("--across-latency", type=float, default=20, help="microseconds of a transfer between nodes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--engine", help="of this library; chosen for the device by default")
    parser.add_argument("--sm-margin", type=int, default=0, help="multiprocessors left to communication")
    parser.add_argument(
        "--rates", type=parse_rates, help="forward=600,backward=480: measure nothing, take these TFLOP/s"
    )
    parser.add_argument("--reuse", type=Path, help="results.json of an earlier run: measure nothing, take its times")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which to measure no more")
    parser.add_argument("--seconds", type=float, default=0.25, help="time to spend on a rank, once it is compiled")
    parser.add_argument("--out", type=Path, default=Path("scale_results"), help="folder for results.json and .md")
    args = parser.parse_args(argv)
    args.methods = [OURS, *(m for m in args.methods if m != OURS)]
    uneven = [n for n in args.cp_sizes if n < 2 or (n > args.gpus_per_node and n % args.gpus_per_node)]
    if uneven:
        parser.error(f"--cp-sizes must be at least 2 and fill nodes of {args.gpus_per_node} GPUs, got {uneven}")
    if min(args.degrees) < 1:
        parser.error(f"--degrees must be at least 1, so that rows travel beside computation, got {args.degrees}")
    if args.tokens % args.chunk_size:
        parser.error(f"--tokens must be a multiple of --chunk-size {args.chunk_size}, got {args.tokens}")
    if args.rates and args.reuse:
        parser.error("--rates and --reuse exclude each other")
    return args


def make_problem(args: argparse.Namespace) -> Problem:
    """Sizes and network."""
    points = json.loads(args.links.read_text()) if args.links else NVLINK_POINTS
    across = Link(args.across_latency * 1e-6, args.across_bandwidth * 1e9)
    network = Network(args.gpus_per_node, Link.fit(points), across)
    heads = Heads(*args.heads, args.head_dim)
    dispatch = DispatchConfig(alg=DISPATCH[args.dispatch])
    plans = args.chunk_size, args.degrees, dispatch, args.grad_wire_dtype
    return Problem(args.tokens, heads, network, *plans, args.packs, args.seed)


def make_bench(args: argparse.Namespace) -> Bench | None:
    """What to measure on, unless nothing is to be measured."""
    if args.rates or args.reuse:
        return None
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    engine = choose_engine(device, torch.bfloat16, (args.head_dim, args.head_dim), args.engine)
    params = AttnParams(softmax_scale=args.head_dim**-0.5, sm_margin=args.sm_margin)
    return Bench(engine, params, device, CudaClock() if args.device == "cuda" else HostClock())


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda" and not (args.rates or args.reuse or torch.cuda.is_available()):
        raise SystemExit("emulate_scale.py needs a CUDA GPU, or --device cpu, --rates or --reuse, and torch finds none")
    problem = make_problem(args)
    options = Options(
        masks=args.masks,
        cp_sizes=args.cp_sizes,
        methods=args.methods,
        out=args.out,
        ranks=args.ranks,
        seconds=args.seconds,
        budget=args.budget,
        rates=args.rates or NOMINAL,
        earlier=Report.load(args.reuse) if args.reuse else Report({}),
    )
    Emulation(options, problem, make_bench(args), describe(args, problem)).run()


if __name__ == "__main__":
    main()
