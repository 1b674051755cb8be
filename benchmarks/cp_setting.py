"""What a run of bench_cp.py was made on and with."""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import date

import torch
from cp_ranks import Ranks
from flex_attn_results import BACKWARD_TO_FORWARD


def describe(ranks: Ranks, args: argparse.Namespace) -> dict[str, str]:
    """The setting, name to value. Every rank calls it."""
    on_gpu = ranks.device.type == "cuda"
    devices = ranks.all_of(torch.cuda.get_device_name(ranks.device) if on_gpu else platform.machine())
    versions = {"torch": str(torch.__version__)}
    if on_gpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")]
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": " ".join([nccl, *variables]), "links": links()}
    for package in ("triton", "flash-attn-4"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "devices": ", ".join(f"{devices.count(name)} {name}" for name in dict.fromkeys(devices)),
        **versions,
        "Python": sys.version.split()[0],
        "date": str(date.today()),
        "cases": f"preset {args.preset}, {'bf16' if on_gpu else 'fp32'}, head_dim {args.head_dim}, one sequence",
        "chunk size": str(args.chunk_size),
        "times": "of the slowest rank, medians of rounds in turn, L2 flushed; "
        f"backward counts {BACKWARD_TO_FORWARD} times the forward work",
    }


def links() -> str:
    """How GPUs are connected, as ``nvidia-smi topo -m`` says."""
    try:
        command = ["nvidia-smi", "topo", "-m"]
        topology = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        return f"unknown ({type(problem).__name__})"
    return links_in(topology)


def links_in(topology: str) -> str:
    """The kinds of NVLink in the matrix that ``nvidia-smi topo -m`` prints."""
    words = {word for line in topology.splitlines() if line.startswith("GPU") for word in line.split()}
    nvlink = sorted(word for word in words if re.fullmatch(r"NV\d+", word))
    return f"NVLink ({', '.join(nvlink)})" if nvlink else "no NVLink"
