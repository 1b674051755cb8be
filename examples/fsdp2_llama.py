"""Train a Llama of transformers with FSDP2 and context parallelism on packed documents.

With mixed precision, recomputed activations, ``torch.compile``, clipped gradients, and checkpoints that any number of
ranks can go on from. It uses NCCL and bfloat16 where there are GPUs, else gloo and float32. The weights are random and
nothing is downloaded::

    torchrun --nproc-per-node 4 examples/fsdp2_llama.py --cp 2
    torchrun --nproc-per-node 2 examples/fsdp2_llama.py --steps 5 --save checkpoints
    torchrun --nproc-per-node 4 examples/fsdp2_llama.py --steps 9 --resume checkpoints/step_5
    torchrun --nproc-per-node 8 examples/fsdp2_llama.py --size 1b --seqlen 131072 --chunk-size 512 --compile

What a loop without context parallelism would not have: ``attn_implementation``, the second axis of the mesh, and the
call of ``dispatch_batch``.
"""

import argparse
import os
import resource
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from magi_attention.integrations.transformers import dispatch_batch

SIZES = {
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
    "1b": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128,
    ),
    "7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--cp", type=int, help="ranks that share a sequence; all of them if not given")
    parser.add_argument("--seqlen", type=int, default=4096, help="tokens in a sequence of packed documents")
    parser.add_argument("--documents", type=int, default=6, help="documents in a sequence")
    parser.add_argument("--chunk-size", type=int, default=128, help="rows in a chunk, the unit that is given to ranks")
    parser.add_argument("--steps", type=int, default=10, help="the step to stop after, counted from the first run on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    default = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", default=default, help="of the computation; weights are float32")
    parser.add_argument(
        "--recompute", choices=["block", "mlp", "none"], default="block",
        help="what the backward pass computes again; mlp spares it the attention, for more memory",
    )  # fmt: skip
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile each block")
    parser.add_argument("--save", metavar="FOLDER", help="where to save a checkpoint after the last step")
    parser.add_argument("--resume", metavar="FOLDER", help="a checkpoint to go on from")
    return parser.parse_args(arguments)


def make_batch(args: argparse.Namespace, step: int, dp_rank: int) -> dict[str, torch.Tensor]:
    """A sequence of packed documents, each of which counts up from a number of its own. In place of a data loader."""
    generator = torch.Generator().manual_seed(1000 * step + dp_rank)
    cuts = torch.randperm(args.seqlen - 1, generator=generator)[: args.documents - 1].sort().values + 1
    lengths = [end - start for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), args.seqlen], strict=True)]
    vocab_size = SIZES[args.size].vocab_size
    starts = torch.randint(vocab_size, (len(lengths),), generator=generator).tolist()
    input_ids = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])[None] % vocab_size
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}


def make_model(args: argparse.Namespace, mesh: DeviceMesh) -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights on every rank, of which it keeps its shard
    config = SIZES[args.size]
    with torch.device(mesh.device_type):
        model = LlamaForCausalLM._from_config(config, attn_implementation="magi_attention")

    # All dp x cp ranks hold the same weights, so they share them in as many shards. The ranks
    # of a cp group have different rows of one sequence, each a part of its gradient, as the dp
    # groups have of the batch's. FSDP's reduce-scatter over the flat mesh takes the mean of all
    # parts, and `loss_group` makes that mean the right one.
    dtype = getattr(torch, args.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    sharding = {"mesh": mesh._flatten("dp_cp"), "mp_policy": policy}
    layers = model.model.layers
    for n, layer in enumerate(layers):
        if args.recompute == "mlp":
            layer.mlp = checkpoint_wrapper(layer.mlp)
        if args.compile:
            layer.compile(backend=args.compile)
        if args.recompute == "block":
            layers[n] = checkpoint_wrapper(layer)
        fully_shard(layers[n], **sharding)
    return fully_shard(model, **sharding)


def save(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder)


def resume(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint, of any number of ranks, and return how many steps were taken."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def peak_memory(device: torch.device) -> float:
    """The most GiB that the GPU held since the last call, or where there is none, that the process ever had."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def train(args: argparse.Namespace, device: torch.device) -> list[float]:
    """Take the steps and return the loss of each."""
    world_size = dist.get_world_size()
    cp_size = args.cp or world_size
    if world_size % cp_size:
        raise ValueError(f"--cp must divide the number of processes, {world_size}, not be {cp_size}")
    mesh = init_device_mesh(device.type, (world_size // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
    model = make_model(args, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    first_step = resume(args.resume, model, optimizer) if args.resume else 0
    if args.steps <= first_step:
        raise ValueError(f"--steps must be more than the {first_step} of {args.resume}, not {args.steps}")

    losses = []
    for step in range(first_step, args.steps):
        start = time.perf_counter()
        batch = make_batch(args, step, mesh.get_local_rank("dp"))  # the same on the ranks of a cp group
        batch = {name: x.to(device) for name, x in batch.items()}
        local = dispatch_batch(batch, model.config, args.chunk_size, cp_mesh=mesh["cp"], loss_group=dist.group.WORLD)
        loss = model(**local).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm).full_tensor()
        optimizer.step()
        optimizer.zero_grad()

        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)  # over all labels: each rank divided by the labels of an average rank
        tokens = args.seqlen * mesh["dp"].size() / (time.perf_counter() - start)
        memory = peak_memory(device)
        if dist.get_rank() == 0:
            print(
                f"step {step + 1:3}: loss {losses[-1]:.6f}, gradient norm {norm.item():.3f}, {tokens:,.0f} tokens/s, "
                f"peak memory {memory:.2f} GiB",
                flush=True,
            )
    if args.save:
        save(f"{args.save}/step_{args.steps}", model, optimizer, args.steps)
    return losses


if __name__ == "__main__":
    args = parse_arguments()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    train(args, device)
    dist.barrier()
    dist.destroy_process_group()
