"""Train a transformers model with sliding-window and full layers on packed documents, with context parallelism.

Run it as it is (it starts two processes) or under torchrun, on NCCL where there are GPUs::

    python examples/transformers_packed.py
    torchrun --nproc-per-node 4 examples/transformers_packed.py

The model is a small Gemma 3 with random weights; nothing is downloaded. What a loop of one process would not have: the
``attn_implementation``, the call of ``dispatch_batch``, and the averaging over ranks that DistributedDataParallel does.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Gemma3TextConfig

from magi_attention.integrations.transformers import dispatch_batch

STEPS, CHUNK_SIZE, VOCABULARY = 15, 16, 64

CONFIG = Gemma3TextConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=16,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
)  # fmt: skip


def make_documents(generator: torch.Generator) -> list[dict[str, list[int]]]:
    """Documents of very different lengths, each of which counts upwards from a number of its own."""
    lengths = torch.tensor([150, 20, 90, 60, 5])[torch.randperm(5, generator=generator)].tolist()
    starts = torch.randint(VOCABULARY, (5,), generator=generator).tolist()
    return [
        {"input_ids": [(start + n) % VOCABULARY for n in range(length)]}
        for start, length in zip(starts, lengths, strict=True)
    ]


def main(rank: int, world_size: int, init_method: str) -> None:
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    dist.init_process_group("nccl" if cuda else "gloo", init_method=init_method, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="magi_attention").to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = DataCollatorWithFlattening()  # one row, documents told apart by position_ids
    generator = torch.Generator().manual_seed(0)  # the same batches on every rank
    for step in range(STEPS):
        batch = {name: x.to(device) for name, x in collate(make_documents(generator)).items()}
        local = dispatch_batch(batch, CONFIG, CHUNK_SIZE, dist.group.WORLD)
        loss = model(**local).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and step % 7 == 0:
            rows = f"{local['input_ids'].shape[1]} of {batch['input_ids'].shape[1]} tokens on each rank"
            print(f"step {step:2}: {rows}, {len(local['magi_keys'])} masks, loss {mean / world_size:.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(main, (2, f"file://{directory}/rendezvous"), nprocs=2)
