"""Train a small language model on packed documents with context parallelism, and check it against one process.

Run it as it is (it starts four processes) or under torchrun, on NCCL where there are GPUs::

    python examples/train_packed_documents.py
    torchrun --nproc-per-node 4 examples/train_packed_documents.py

Every step packs a few definitions from the Python standard library's sources, of very different lengths, into one
sequence of bytes. A document sees only itself. The ranks share the sequence: each one embeds, attends and predicts
its own rows. Then rank 0 trains the same model alone with plain dense attention, and the two loss curves are laid
over each other.
"""

import argparse
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from magi_attention.api import calc_attn, compute_pad_size, dispatch, get_position_ids, magi_attn_varlen_key, undispatch
from magi_attention.mask import builders
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.report import report
from magi_attention.viz.plan_picture import plot_plan

END_OF_DOCUMENT = 256  # the vocabulary: 256 bytes and this
IGNORE = -100  # label of padding rows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- The batch: documents packed into one sequence
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """One step's documents: bytes, the next byte of each, and where documents begin."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: list[int]

    def position_in_document(self, positions: Tensor) -> Tensor:
        """Positions in the pack to positions in the document, which is what RoPE wants."""
        starts = torch.tensor(self.cu_seqlens, device=positions.device)
        return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]


def read_documents() -> list[bytes]:
    """Top-level definitions of the standard library: from one line to thousands of bytes each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    return [part.encode() for text in sources for part in re.split(r"\n(?=def |class |@)", text) if len(part) > 20]


def pack_documents(documents: list[bytes], seqlen: int, steps: int, seed: int = 0) -> Iterator[Pack]:
    """Random documents, packed to about ``seqlen`` tokens a step; none longer than a quarter of it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens: list[int] = []
        labels: list[int] = []
        cu_seqlens = [0]
        while len(tokens) < seqlen - 32:
            chosen = documents[int(torch.randint(len(documents), (), generator=generator))]
            text = list(chosen[: min(seqlen // 4, seqlen - len(tokens))])
            tokens += text
            labels += [*text[1:], END_OF_DOCUMENT]
            cu_seqlens.append(len(tokens))
        yield Pack(torch.tensor(tokens), torch.tensor(labels), cu_seqlens)


# --- The model: a decoder that is told how to attend
# -------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of ``(tokens, heads, head_dim)``."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** -(torch.arange(half, device=x.device) / half)
    angles = (positions[:, None] * frequencies)[:, None, :].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm. Two query heads share one key/value head."""

    def __init__(self, dim: int = 64, heads_q: int = 4, heads_kv: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim = (heads_q, heads_kv, heads_kv), dim // heads_q
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, dim=1)
        x = x + self.out(attend(rotate(q, positions), rotate(k, positions), v).flatten(1))
        return x + self.feed_forward(self.norm2(x))


class Model(nn.Module):
    """A decoder-only transformer on bytes."""

    def __init__(self, dim: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(END_OF_DOCUMENT + 1, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)  # it is the output layer too
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, positions, attend)
        return F.linear(self.norm(x), self.embedding.weight)


def make_model(device: torch.device) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model().to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


# --- The same training twice
# -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training left behind: the loss of each step, and the first step's logits in global order."""

    losses: list[float]
    first_logits: Tensor


def train_context_parallel(packs: list[Pack], chunk_size: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    """Each rank works on its own rows; attention is the only layer that knows of the others."""
    model, optimizer = make_model(device)
    run = Run([], torch.empty(0))
    rank, cp_size = dist.get_rank(group), dist.get_world_size(group)
    for pack in track(packs, f"training on {cp_size} ranks", disable=rank != 0):
        pad_size = compute_pad_size(len(pack.tokens), cp_size, chunk_size)
        key = magi_attn_varlen_key(pack.cu_seqlens, pack.cu_seqlens, pad_size, chunk_size, group, causal=True)
        tokens = dispatch(pack.tokens.to(device), key)
        # Padding rows must not count: shift labels by one so that the zeros that dispatch pads with can be told apart.
        labels = dispatch(pack.labels.to(device) + 1, key) - 1
        labels = labels.masked_fill(labels < 0, IGNORE)
        positions = pack.position_in_document(get_position_ids(key))

        logits = model(tokens, positions, lambda q, k, v, key=key: calc_attn(q, k, v, key)[0])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / len(pack.tokens)
        loss.backward()
        for parameter in model.parameters():  # each rank has the gradient of its own rows' loss; they add up
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()

        if not run.losses:
            run.first_logits = undispatch(logits.detach(), key)
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        run.losses.append(float(total))
    return run


def train_alone(packs: list[Pack], device: torch.device) -> Run:
    """The same model on the whole sequence, with the mask as a dense matrix."""
    model, optimizer = make_model(device)
    run = Run([], torch.empty(0))
    for pack in track(packs, "training on one, dense"):
        tokens, labels = pack.tokens.to(device), pack.labels.to(device)
        mask = torch.from_numpy(builders.varlen(pack.cu_seqlens, causal=True).to_dense()).to(device)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        positions = pack.position_in_document(torch.arange(len(tokens), device=device))
        logits = model(tokens, positions, attend)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not run.losses:
            run.first_logits = logits.detach()
        run.losses.append(float(loss.detach()))
    return run


# --- What is shown
# -----------------------------------------------------------------------------------------------------


def show(plan: AttnPlan, parallel: Run, alone: Run, output: Path) -> None:
    """Print the table and save the pictures."""
    console = Console()
    everything = plan.dispatch.local_seqlen * (plan.cp_size - 1)
    error = (parallel.first_logits - alone.first_logits).abs().amax(dim=1).cpu()
    documents = f"{plan.mask.total_seqlen_q:,} tokens in {len(plan.mask.bands)} documents"
    table = Table(title=f"first step: {documents}; error of the logits")
    for name in ("rank", "tokens", "unmasked area", "rows received", "all-gather", "ring", "largest error"):
        table.add_column(name, justify="right")
    for rank in report(plan):
        positions = torch.from_numpy(plan.dispatch.position_ids(rank.rank))
        table.add_row(
            str(rank.rank),
            f"{rank.tokens:,}",
            f"{rank.area:,}",
            f"{rank.recv_rows:,}",
            f"{everything:,}",
            f"{everything:,}",
            f"{error[positions].max():.1e}",
        )
    console.print(table)
    gap = max(abs(a - b) for a, b in zip(parallel.losses, alone.losses, strict=True))
    console.print(
        f"loss {alone.losses[0]:.4f} -> {alone.losses[-1]:.4f}; largest gap between the two curves: {gap:.1e}"
    )

    output.mkdir(parents=True, exist_ok=True)
    plot_plan(plan, output / "plan.png")
    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.plot(alone.losses, color="0.75", linewidth=6, label="one process, dense attention")
    axes.plot(parallel.losses, color="tab:red", linewidth=1.5, label=f"{plan.cp_size} ranks, context parallel")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a byte)")
    axes.set_title(f"largest gap {gap:.1e}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output / "loss.png")
    console.print(f"pictures: {output / 'plan.png'}, {output / 'loss.png'}")
    if gap > 1e-4:
        raise SystemExit(f"the curves differ by {gap:.1e}, more than rounding explains")


def main(rank: int, world_size: int, args: argparse.Namespace) -> None:
    """One rank of the demo."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    init_method = f"file://{args.rendezvous}" if args.rendezvous else "env://"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=init_method, rank=rank, world_size=world_size)
    group = dist.group.WORLD
    packs = list(pack_documents(read_documents(), args.seqlen, args.steps))
    parallel = train_context_parallel(packs, args.chunk_size, group, device)
    if rank == 0:
        if not cuda:
            torch.set_num_threads(args.threads)
        alone = train_alone(packs, device)
        mask = builders.varlen(packs[0].cu_seqlens, causal=True)
        show(plan_attention(mask, world_size, args.chunk_size), parallel, alone, args.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=2560, help="tokens in a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--nproc", type=int, default=4, help="processes to start when not run by torchrun")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    arguments.threads, arguments.rendezvous = torch.get_num_threads(), None
    if dist.is_torchelastic_launched():
        main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), arguments)
    else:
        with tempfile.TemporaryDirectory() as directory:
            arguments.rendezvous = f"{directory}/rendezvous"
            mp.spawn(main, (arguments.nproc, arguments), nprocs=arguments.nproc)
