"""Plan the next batches in data loader workers, so that a training step finds its plan ready.

    python examples/plan_in_data_loader.py
    torchrun --nproc-per-node 2 examples/plan_in_data_loader.py

With packed documents every batch has a new mask, so its plan is always cold. Planning is a pure function of mask,
number of ranks and configuration, and a plan is a picklable value: a worker process makes it while earlier batches
are trained on.
"""

import os
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, IterableDataset

from magi_attention.api import calc_attn, compute_pad_size, dispatch, magi_attn_varlen_key
from magi_attention.mask import builders
from magi_attention.planning import RankPlan, plan_attention

SEQLEN, CHUNK_SIZE, STEPS = 16384, 256, 5

Batch = tuple[torch.Tensor, list[int], RankPlan]


class PackedDocuments(IterableDataset[Batch]):
    """Random packs, each with this rank's part of its plan."""

    def __init__(self, rank: int, cp_size: int) -> None:
        self.rank, self.cp_size = rank, cp_size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)  # the same packs on every rank
        for _ in range(STEPS):
            cuts = torch.randint(1, SEQLEN, (15,), generator=generator).unique().tolist()
            cu_seqlens = [0, *cuts, SEQLEN]
            plan = plan_attention(builders.varlen(cu_seqlens, causal=True), self.cp_size, CHUNK_SIZE)
            yield torch.randn(SEQLEN, 2, 32, generator=generator), cu_seqlens, plan.rank(self.rank)


def main(rank: int, world_size: int, init_method: str) -> None:
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    group = dist.group.WORLD
    pad_size = compute_pad_size(SEQLEN, world_size, CHUNK_SIZE)
    loader = DataLoader(PackedDocuments(rank, world_size), batch_size=None, num_workers=1)
    for step, (x, cu_seqlens, plan) in enumerate(loader):
        start = time.perf_counter()
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, pad_size, CHUNK_SIZE, group, causal=True, plan=plan)
        key_ms = (time.perf_counter() - start) * 1e3
        local_x = dispatch(x, key)
        out, _ = calc_attn(local_x, local_x, local_x, key)
        if rank == 0:
            print(
                f"step {step}: {len(cu_seqlens) - 1} documents, {plan.num_recv_rows:,} of "
                f"{SEQLEN - len(local_x):,} remote rows received, key made in {key_ms:.2f} ms, |out| {out.norm():.1f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(main, (2, f"file://{directory}/rendezvous"), nprocs=2)
