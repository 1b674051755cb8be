"""All-to-all of equal messages by their size: what a model of communication costs can be made from."""

import statistics

import torch
import torch.distributed as dist
from cp_ranks import Ranks
from cp_results import Transfer
from cp_timing import Timer

SIZES = tuple(1 << n for n in range(14, 29, 2))
"""Bytes for each peer: 16 KiB to 256 MiB."""

REPETITIONS = 11


def measure_all_to_all(ranks: Ranks, timer: Timer, bytes_per_peer: int) -> Transfer:
    """Time ``all_to_all_single`` with splits, as this library calls it.

    Raises:
        Failed: If it fails on all ranks, for example for lack of memory.
    """
    count = ranks.size * bytes_per_peer
    sent = ranks.attempt(lambda: torch.ones(count, dtype=torch.uint8, device=ranks.device))
    received = ranks.attempt(lambda: torch.empty_like(sent))
    splits = [bytes_per_peer] * ranks.size

    def run() -> None:
        dist.all_to_all_single(received, sent, splits, splits, group=ranks.group)

    readings = []
    for _ in range(REPETITIONS):
        _, reading = ranks.attempt(lambda: timer.launch(run, head_start_s=0.0))
        readings.append(ranks.attempt(reading)[0])
    slowest = map(max, zip(*ranks.all_of(readings), strict=True))
    ms = statistics.median(list(slowest)[1:])  # the first one may set up connections
    return Transfer(bytes_per_peer, ms, (ranks.size - 1) * bytes_per_peer / ms / 1e6)
