"""Other ways to share attention among GPUs, modelled: what they send, and our kernel on what one GPU computes.

All are taken to be better than they are. Work is spread evenly: documents are cut without padding, each into
``2 * ranks`` pieces of which a rank gets two (zigzag), so that every rank has the same area. Their kernels are ours, on
the mask of one rank's shard. A ring hides transfers behind computation wherever it can.

=============  =========================================================================================================
Ulysses        Jacobs et al. 2023, https://arxiv.org/abs/2309.14509: an all-to-all turns rows into heads and back. Where
               ranks outnumber key heads, these are copied; there are no more ranks than query heads.
ring           Liu et al. 2023, https://arxiv.org/abs/2310.01889: keys and values go round, as do their gradients.
all-gather     Llama 3, 2024, https://arxiv.org/abs/2407.21783: keys and values are gathered before, gradients
               reduced and scattered after.
USP            Fang & Zhao 2024, https://arxiv.org/abs/2405.07719: Ulysses inside a node, a ring across nodes.
=============  =========================================================================================================
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from scale_costs import BACKWARD, FORWARD, flops
from scale_loop import Bench, Heads, num_rounds
from scale_network import Network

from magi_attention.mask import AttnMask
from magi_attention.mask.bands import IntArray, area, relocate

RIVALS = ("Ulysses", "ring", "all-gather", "USP")
SHARD_OF = {"Ulysses": "Ulysses", "ring": "all-gather", "all-gather": "all-gather", "USP": "USP"}
"""Whose shard has the same mask."""

GRADIENT_TO_ROW = 2
"""Gradients of keys and values travel in float32, these in bfloat16, as with us."""

WINDOW = 1 << 17
"""Ulysses attends the whole sequence with some of the heads; the kernel is measured on so many tokens of it."""


@dataclass(frozen=True)
class Setting:
    """What rivals have to do.

    Attributes:
        cp_size: Number of GPUs.
        tokens: Tokens of a GPU.
        heads: Heads of the model.
        network: Between the GPUs.
        area: Unmasked cells of all GPUs together.
        itemsize: Bytes of an element of q, k, v and out.
    """

    cp_size: int
    tokens: int
    heads: Heads
    network: Network
    area: int
    itemsize: int = 2

    @property
    def node(self) -> int:
        """GPUs that share a node."""
        return min(self.cp_size, self.network.gpus_per_node)


@dataclass(frozen=True)
class Shard:
    """The attention of one GPU: bands in ``num_rows`` x ``num_keys``."""

    bands: IntArray
    num_rows: int
    num_keys: int
    heads: Heads

    @property
    def area(self) -> int:
        return int(area(self.bands).sum())


def split_heads(heads: Heads, parts: int) -> Heads:
    """Heads of each of so many parts, of equal size: padded queries, copied keys."""
    return Heads(-(-heads.q // parts), max(1, -(-heads.kv // parts)), heads.dim)


def shard_of(rival: str, mask: AttnMask, cu_seqlens: IntArray, setting: Setting) -> Shard | None:
    """What one GPU of a rival computes; None if it cannot have so many GPUs."""
    heads, cp_size, node = setting.heads, setting.cp_size, setting.node
    if rival == "Ulysses":
        if cp_size > heads.q:
            return None
        tokens = min(WINDOW, mask.total_seqlen_q)
        window = np.array([[0, tokens]])
        return Shard(relocate(mask.bands, window, window), tokens, tokens, split_heads(heads, cp_size))
    ranks, heads = (cp_size // node, split_heads(heads, node)) if rival == "USP" else (cp_size, heads)
    runs = zigzag_runs(cu_seqlens, ranks, ranks // 2)
    all_keys = np.array([[0, mask.total_seqlen_k]])
    bands = relocate(mask.bands, runs, all_keys)
    return Shard(bands, int((runs[:, 1] - runs[:, 0]).sum()), mask.total_seqlen_k, heads)


def zigzag_runs(cu_seqlens: IntArray, ranks: int, rank: int) -> IntArray:
    """The rows of a rank when each document is cut into ``2 * ranks`` pieces and it gets one from either end."""
    start, length = cu_seqlens[:-1, None], np.diff(cu_seqlens)[:, None]
    pieces = np.array([rank, 2 * ranks - 1 - rank])
    runs = np.stack((start + length * pieces // (2 * ranks), start + length * (pieces + 1) // (2 * ranks)), axis=2)
    runs = runs.reshape(-1, 2)
    return runs[runs[:, 0] < runs[:, 1]]


def measure_shard(bench: Bench, shard: Shard, seconds: float) -> tuple[float, float]:
    """Operations a second of our kernels, forward and backward, of useful work; medians."""
    q, k, v, dout = bench.inputs(shard.heads, shard.num_rows, shard.num_keys)
    engine, params, clock = bench.engine, bench.params, bench.clock
    schedule = engine.schedule(shard.bands, shard.num_rows, shard.num_keys)

    def run() -> tuple[float, float]:
        clock.begin()
        marks = [clock.now()]
        out, lse = engine.forward(q, k, v, schedule, params)[:2]
        marks.append(clock.now())
        grads = engine.start_backward(out, dout, lse, None, params, q.shape[2])
        engine.backward(grads, q, k, v, schedule, params, q.dtype)
        engine.finish_backward(grads, params, q.dtype)
        marks.append(clock.now())
        return clock.seconds(*marks[:2]), clock.seconds(*marks[1:])

    with torch.no_grad():
        run()
        start = time.monotonic()
        rounds = [run()]
        count = num_rounds(seconds, time.monotonic() - start)
        rounds += [run() for _ in range(count - 1)]
    forward, backward = (statistics.median(times) for times in zip(*rounds, strict=True))
    return flops(shard.area, shard.heads, FORWARD) / forward, flops(shard.area, shard.heads, BACKWARD) / backward


def model_seconds(rival: str, setting: Setting, rates: tuple[float, float]) -> tuple[float, float] | None:
    """Seconds of the forward and the backward pass at these kernel rates; None if it cannot have so many GPUs."""
    kernel = tuple(flops(setting.area / setting.cp_size, setting.heads, way) / rates[way] for way in (0, 1))
    match rival:
        case "Ulysses":
            if setting.cp_size > setting.heads.q:
                return None
            padding = split_heads(setting.heads, setting.cp_size).q * setting.cp_size / setting.heads.q
            exchange = exchange_seconds(setting, setting.cp_size)
            return tuple(exchange[way] + kernel[way] * padding for way in (0, 1))
        case "USP":
            exchange = exchange_seconds(setting, setting.node)
            ring = _ring(setting, setting.cp_size // setting.node, setting.node, kernel)
            return tuple(exchange[way] + ring[way] for way in (0, 1))
        case "ring":
            return _ring(setting, setting.cp_size, 1, kernel)
        case "all-gather":
            shard = setting.tokens * setting.heads.row_elements * setting.itemsize
            gather, scatter = (setting.network.all_gather(n * shard, setting.cp_size) for n in (1, GRADIENT_TO_ROW))
            return gather + kernel[FORWARD], gather + kernel[BACKWARD] + scatter
    raise ValueError(f"rival must be one of {RIVALS}, got {rival!r}")


def exchange_seconds(setting: Setting, parts: int) -> tuple[float, float]:
    """Turning rows into heads of ``parts`` GPUs and back: q, k, v, then out; dout, then dq, dk, dv. None is hidden."""
    split = split_heads(setting.heads, parts)
    element = setting.tokens * setting.heads.dim * setting.itemsize
    queries, keys = element * split.q * parts, element * 2 * split.kv * parts
    one_way, other_way = (setting.network.exchange(n, parts) for n in (queries + keys, queries))
    return one_way + other_way, one_way + other_way


def _ring(setting: Setting, ranks: int, heads_parts: int, kernel: tuple[float, ...]) -> tuple[float, float]:
    """Keys of ``ranks`` shards go round; each of ``heads_parts`` GPUs beside each other has some of the heads."""
    heads = split_heads(setting.heads, heads_parts)
    shard = setting.tokens * heads_parts * heads.row_elements * setting.itemsize
    seconds = []
    for way, num_bytes in ((FORWARD, shard), (BACKWARD, shard * (1 + GRADIENT_TO_ROW))):
        step = kernel[way] / ranks
        transfer = setting.network.ring_step(num_bytes, ranks * heads_parts)
        seconds.append(step + (ranks - 1) * max(step, transfer))
    return seconds[FORWARD], seconds[BACKWARD]
