"""The contenders of bench_cpu.py: each shards a packed sequence in its own way and attends it over gloo.

A contender is made by a function of the task. What it cannot import or cannot do, it says by raising; the benchmark
prints that on its line. Libraries are imported when a contender is made, so that one that is missing stops no other.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from magi_attention.api import DistAttnConfig, calc_attn, compute_pad_size, dispatch, magi_attn_varlen_key
from magi_attention.config import DispatchConfig, LocalityDispatchAlg

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Move = Callable[[Tensor], Tensor]

# From (sequence, heads, head_dim) to a layout with a batch of one, and back.
LAYOUTS: dict[str, tuple[Move, Move]] = {
    "shd": (lambda x: x, lambda x: x),
    "bshd": (lambda x: x[None], lambda x: x[0]),
    "bhsd": (lambda x: x.transpose(0, 1)[None].contiguous(), lambda x: x[0].transpose(0, 1)),
}


@dataclass(frozen=True)
class Task:
    """Causal documents packed into one sequence; a single document is the plain causal mask."""

    cu_seqlens: list[int]
    chunk_size: int
    group: dist.ProcessGroup

    @property
    def total(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)


@dataclass(frozen=True)
class Contender:
    """A way to attend.

    Attributes:
        attend: From this rank's q, k and v to its out; differentiable, a collective.
        rows: The token that each local row holds, -1 for padding.
        takes: Layout of q, k and v.
        gives: Layout of out.
    """

    attend: Attend
    rows: Tensor
    takes: str
    gives: str

    def local(self, x: Tensor, layout: str) -> Tensor:
        """This rank's rows of a global ``(sequence, heads, head_dim)``, padding rows zero."""
        rows = x[self.rows.clamp(min=0)].masked_fill((self.rows < 0)[:, None, None], 0)
        return LAYOUTS[layout][0](rows)

    def error(self, local: Tensor, layout: str, expected: Tensor) -> float:
        """Largest difference to a global tensor over this rank's rows, relative to that tensor's largest value."""
        real = self.rows >= 0
        rows = LAYOUTS[layout][1](local)[real]
        return float((rows - expected[self.rows[real]]).abs().max() / expected.abs().max())


def magi(task: Task) -> Contender:
    """This library, its plan made once."""
    pad_size = compute_pad_size(task.total, task.size, task.chunk_size)
    documents = (task.cu_seqlens, task.cu_seqlens, pad_size, task.chunk_size, task.group)
    key = magi_attn_varlen_key(*documents, causal=True)
    rows = dispatch(torch.arange(1, task.total + 1), key) - 1  # padding is dispatched as 0
    return Contender(lambda q, k, v: calc_attn(q, k, v, key)[0], rows, "shd", "shd")


def magi_replanned(task: Task) -> Contender:
    """This library, planning anew in every call: what the first layer of every step pays when each batch is new."""
    pad_size = compute_pad_size(task.total, task.size, task.chunk_size)
    documents = (task.cu_seqlens, task.cu_seqlens, pad_size, task.chunk_size, task.group)
    calls = itertools.count(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A tolerance that no call had before makes a key that no cache knows, and the same plan.
        unseen = DistAttnConfig(DispatchConfig(LocalityDispatchAlg(tolerance=0.02 + 1e-12 * next(calls))))
        return calc_attn(q, k, v, magi_attn_varlen_key(*documents, causal=True, dist_attn_config=unseen))[0]

    return replace(magi(task), attend=attend)


class TorchRing(torch.autograd.Function):
    """PyTorch's ring template with the flash attention that runs on a CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = _templated_ring_attention(group, 2, flash, q, k, v, is_causal=True, dropout_p=0.0)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from torch.distributed.tensor.experimental._context_parallel._attention import (
            _templated_ring_attention_backward,
        )

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        q, k, v, out, lse = ctx.saved_tensors
        grads = _templated_ring_attention_backward(
            ctx.group, 2, flash, dout, "grad_out", q, k, v, out, lse, is_causal=True, dropout_p=0.0
        )
        return *grads, None


def torch_ring(task: Task, rotate_method: str) -> Contender:
    """PyTorch's ring, once for each document: its template has no other way to keep documents apart.

    Each document is padded so that every rank holds an early and a late piece of it.
    """
    from torch.distributed.tensor.experimental._context_parallel._attention import set_rotate_method

    pieces = []
    for start, end in itertools.pairwise(task.cu_seqlens):
        halves = pad(torch.arange(start, end), (0, (start - end) % (2 * task.size)), value=-1).chunk(2 * task.size)
        pieces.append(torch.cat((halves[task.rank], halves[-1 - task.rank])))
    lengths = [len(piece) for piece in pieces]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        set_rotate_method(rotate_method)
        documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([TorchRing.apply(*document, task.group) for document in documents], dim=2)

    return Contender(attend, torch.cat(pieces), "bhsd", "bhsd")


def contiguous_rows(task: Task) -> Tensor:
    """Equal runs of tokens, in order."""
    if task.total % task.size:
        raise ValueError(f"{task.total} tokens are not a multiple of {task.size} processes")
    return torch.arange(task.total).chunk(task.size)[task.rank]


def ulysses(task: Task, attend_heads: Attend) -> Contender:
    """DeepSpeed Ulysses: all tokens of some heads on each rank. ``attend_heads`` takes and gives bhsd."""
    with contextlib.redirect_stdout(io.StringIO()):  # it announces the accelerator and what it compiles
        import deepspeed.comm
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_heads(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    attention = DistributedAttention(local_attention, task.group, scatter_idx=2, gather_idx=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies = math.ceil(task.size / k.shape[2])  # a rank without a key/value head is refused
        if copies > 1:
            k, v = k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)
        return attention(q, k, v, 0)

    return Contender(attend, contiguous_rows(task), "bshd", "bshd")


def ulysses_documents(task: Task) -> Contender:
    """Ulysses, each document attended by itself."""
    lengths = [end - start for start, end in itertools.pairwise(task.cu_seqlens)]

    def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend_document = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attend_document(*document) for document in documents], dim=2)

    return ulysses(task, attend_heads)


def ulysses_dense_mask(task: Task) -> Contender:
    """Ulysses, the whole pack attended under a dense mask."""
    mask = document_mask(task.cu_seqlens)

    def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return ulysses(task, attend_heads)


def ringmaster_gather(task: Task) -> Contender:
    """ringmaster's ring with all keys and values gathered; a dense mask where there are documents."""
    from ringmaster.config import RotateMethod
    from ringmaster.ring.loop import ring_attention, varlen_ring_attention

    cu_seqlens = torch.tensor(task.cu_seqlens, dtype=torch.int32)

    def attend_pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_ring_attention(q, k, v, group=task.group, scaling=None, cu_seqlens=cu_seqlens)

    def attend_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            q, k, v, group=task.group, causal=True, scaling=None, dropout=0.0,
            provider="math", rotate_method=RotateMethod.ALLGATHER, attn_implementation="math",
        )  # fmt: skip

    attend = attend_pack if len(task.cu_seqlens) > 2 else attend_document
    return Contender(attend, contiguous_rows(task), "bhsd", "bshd")


def ringmaster_p2p(task: Task) -> Contender:
    """ringmaster's ring that passes keys and values on, one document only."""
    from ringmaster.config import RotateMethod
    from ringmaster.ring.loop import ring_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(
            q, k, v, group=task.group, causal=True, scaling=None, dropout=0.0,
            provider="math", rotate_method=RotateMethod.ALLTOALL, attn_implementation="math",
        )  # fmt: skip

    return Contender(attend, contiguous_rows(task), "bhsd", "bshd")


def ringmaster_distflash(task: Task) -> Contender:
    """ringmaster's ring over contiguous rows that hands work to idle ranks."""
    from ringmaster.ring.distflash import distflash_attention

    cu_seqlens = torch.tensor(task.cu_seqlens, dtype=torch.int32) if len(task.cu_seqlens) > 2 else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distflash_attention(
            q, k, v, group=task.group, scaling=None, cu_seqlens=cu_seqlens, attn_implementation="math"
        )

    return Contender(attend, contiguous_rows(task), "bhsd", "bshd")


def ringmaster_zigzag(task: Task) -> Contender:
    """ringmaster's ring over an early and a late piece a rank; on CPUs it is there for packed sequences only."""
    from ringmaster.ring.zigzag import zigzag_ring_attention

    if task.total % (2 * task.size):
        raise ValueError(f"{task.total} tokens are not a multiple of {2 * task.size}, twice the processes")
    halves = torch.arange(task.total).chunk(2 * task.size)
    rows = torch.cat((halves[task.rank], halves[-1 - task.rank]))
    cu_seqlens = torch.tensor(task.cu_seqlens, dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return zigzag_ring_attention(q, k, v, group=task.group, scaling=None, cu_seqlens=cu_seqlens)

    return Contender(attend, rows, "bhsd", "bshd")


def across_documents(make: Callable[[Task], Contender]) -> Callable[[Task], Contender]:
    """The contender as it is when nobody tells it about documents."""
    return lambda task: make(replace(task, cu_seqlens=[0, task.total]))


def document_mask(cu_seqlens: list[int]) -> Tensor:
    """The mask, dense: True where a query attends a key."""
    bounds = torch.tensor(cu_seqlens)
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    return (document[:, None] == document[None, :]).tril()
