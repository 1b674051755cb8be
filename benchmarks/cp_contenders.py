"""The contenders of bench_cp.py: each shares a sequence out among the ranks in its own way and attends it.

A contender is made by a function of the task. What it cannot do it says by raising
:class:`~gpu_rivals.NotSupported`; anything else it raises is a failure. Libraries are imported when a contender is
made, so that one that is missing stops no other.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import gpu_rivals
import numpy as np
import torch
import torch.distributed as dist
from attention_cases import Case
from cp_collectives import ExchangeBlocks, GatherRows
from cp_kernels import RECTANGULAR, WHOLE
from gpu_rivals import Attend, NotSupported
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from magi_attention.api import (
    DistAttnConfig,
    calc_attn,
    get_position_ids,
    init_hierarchical_mesh,
    magi_attn_mask_key,
)
from magi_attention.config import AttnOverlapMode
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import IntArray, merge_runs, ranges_to_indices, relocate
from magi_attention.planning import AttnPlan, plan_attention


@dataclass(frozen=True)
class Variant:
    """This library with some of its choices.

    Attributes:
        name: What the tables call it.
        config: The plan's configuration.
        chunk_size: Rows in a chunk.
        sm_margin: Multiprocessors that kernels leave to communication; None for the library's choice.
        engine: The kernels; None for the library's choice.
        nodes: Nodes that the ranks are said to be in.
    """

    name: str
    config: DistAttnConfig = field(default_factory=DistAttnConfig)
    chunk_size: int = 512
    sm_margin: int | None = None
    engine: str | None = None
    nodes: int = 1

    @property
    def has_mesh(self) -> bool:
        """Whether nodes make a difference."""
        return self.nodes > 1 or self.config.intra_node == "heads"


@dataclass(frozen=True)
class Task:
    """A mask to attend over the ranks of a group.

    Attributes:
        case: The mask.
        heads: Query heads.
        heads_kv: Key and value heads.
        head_dim: Their size.
        group: The ranks.
        device: This rank's device.
        variant: This library's choices; for rivals they mean nothing.
    """

    case: Case
    heads: int
    heads_kv: int
    head_dim: int
    group: dist.ProcessGroup
    device: torch.device
    variant: Variant

    @property
    def config(self) -> DistAttnConfig:
        """The variant's; where stages are chosen by their predicted time, for these heads."""
        config, overlap = self.variant.config, self.variant.config.overlap_config
        if overlap.mode is not AttnOverlapMode.DYNAMIC:
            return config
        parts = self.size // self.variant.nodes if config.intra_node == "heads" else 1
        sizes = {
            "heads_q": self.heads // parts,
            "heads_kv": max(1, self.heads_kv // parts),
            "head_dim": self.head_dim,
        }
        return replace(config, overlap_config=replace(overlap, cost_model=replace(overlap.cost_model, **sizes)))

    @property
    def total(self) -> int:
        return self.case.seqlen

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
        attend: From this rank's q, k, v to its out; differentiable, and a collective.
        rows: Tokens of this rank's queries, ascending, int64 on the CPU.
        key_rows: Tokens of its keys and values; None for those of the queries.
        heads_first: Whether tensors are ``(heads, rows, head_dim)`` and not ``(rows, heads, head_dim)``.
        inside: A context that the calls, forward and backward, need.
    """

    attend: Attend
    rows: Tensor
    key_rows: Tensor | None = None
    heads_first: bool = False
    inside: Callable[[], AbstractContextManager[None]] = nullcontext


def plan_of(task: Task) -> AttnPlan:
    """The plan that this library's key is made with; over nodes, where their ranks split heads."""
    nodes, by_heads = task.variant.nodes, task.config.intra_node == "heads"
    plan = plan_attention(task.case.mask, nodes if by_heads else task.size, task.variant.chunk_size, 0, task.config)
    return plan if by_heads else plan.on_mesh((nodes, task.size // nodes))


def magi(task: Task) -> Contender:
    """This library; the key is made before."""
    variant = task.variant
    key = magi_attn_mask_key(
        task.case.mask,
        0,
        variant.chunk_size,
        None if variant.has_mesh else task.group,
        nodes_of(task.size, variant.nodes, task.device.type) if variant.has_mesh else None,
        dist_attn_config=task.config,
        plan=plan_of(task),
    )

    options = {} if variant.sm_margin is None else {"sm_margin": variant.sm_margin}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return calc_attn(q, k, v, key, engine=variant.engine, **options)[0]

    return Contender(attend, get_position_ids(key).cpu())


def alone(task: Task) -> Contender:
    """The rank's part of the work without the others: one call of its rows over all keys that they attend.

    The keys are there, in the order of the sequence, as if nothing had ever been distributed: the fewest tiles that
    the mask cuts, no stages, no merging.
    """
    part = plan_of(task).rank(task.rank)
    own = part.dispatch.runs(task.rank)
    keys = merge_runs(np.concatenate([own, *(stage.runs for stage in part.stages)]))
    rows, key_rows = tokens_of(own), tokens_of(keys)
    bands = relocate(part.mask.bands, own, keys)
    case = Case("alone", AttnMask.from_bands(bands, len(rows), len(key_rows)), None)
    attend = gpu_rivals.magi(case, str(task.device), task.variant.engine).attend
    return Contender(attend, rows, key_rows)


def one_gpu(task: Task) -> Contender:
    """The whole sequence on every rank by itself, to check the others against."""
    attend = gpu_rivals.magi(task.case, str(task.device), task.variant.engine).attend
    return Contender(attend, torch.arange(task.total))


def tokens_of(runs: IntArray) -> Tensor:
    """The tokens of ``(start, end)`` runs, one behind the other."""
    return torch.from_numpy(ranges_to_indices(runs[:, 0], runs[:, 1] - runs[:, 0]))


def shard(task: Task, zigzag: bool) -> IntArray:
    """``(start, end)`` of this rank's runs: one in ``size``, or an early and a late one in twice as many.

    Raises:
        NotSupported: If the runs would not be equally long.
    """
    count = task.size * (2 if zigzag else 1)
    if task.total % count:
        raise NotSupported(f"{task.total} tokens are not a multiple of {count}")
    length = task.total // count
    pieces = [task.rank, count - 1 - task.rank] if zigzag else [task.rank]
    return np.array([(piece * length, (piece + 1) * length) for piece in pieces], np.int64)


def all_gather(task: Task, kernel: str, zigzag: bool) -> Contender:
    """All keys and values on every rank, each of which attends them with its own queries."""
    own = shard(task, zigzag)
    mask = AttnMask.from_bands(
        relocate(task.case.mask.bands, own, np.array([[0, task.total]])), len_of(own), task.total
    )
    attend_rows = RECTANGULAR[kernel](mask, task.device)
    gathered = [n for rank in range(task.size) for n in (rank, 2 * task.size - 1 - rank)]  # which piece comes where
    in_order = np.argsort(gathered)

    def whole(rows: Tensor) -> Tensor:
        everyones = GatherRows.apply(rows, task.group)
        pieces = everyones.chunk(2 * task.size)
        return torch.cat([pieces[n] for n in in_order]) if zigzag else everyones

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(q, whole(k), whole(v))

    return Contender(attend, tokens_of(own))


def ulysses(task: Task, kernel: str) -> Contender:
    """All tokens of some heads on each rank: all-to-alls of q, k and v before, one of out behind (arXiv:2309.14509)."""
    if task.heads_kv % task.size:
        raise NotSupported(f"{task.heads_kv} key/value heads are not a multiple of {task.size} ranks")
    attend_heads = WHOLE[kernel](task.case, task.device)

    def all_tokens(rows: Tensor) -> Tensor:
        blocks = rows.unflatten(1, (task.size, -1)).transpose(0, 1)
        return ExchangeBlocks.apply(blocks, task.group).flatten(0, 1)

    def all_heads(rows: Tensor) -> Tensor:
        blocks = ExchangeBlocks.apply(rows.unflatten(0, (task.size, -1)), task.group)
        return blocks.transpose(0, 1).flatten(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return all_heads(attend_heads(all_tokens(q), all_tokens(k), all_tokens(v)))

    return Contender(attend, tokens_of(shard(task, zigzag=False)))


def torch_ring(task: Task, rotate_method: str, balanced: bool = True) -> Contender:
    """PyTorch's ``context_parallel``: scaled_dot_product_attention of cuDNN, or flash where cuDNN won't, step by step.

    Its balanced sharding, an early and a late piece a rank, is for causal masks only.
    """
    documents = task.case.documents
    if documents is None or not documents.single or documents.window:
        raise NotSupported("full and causal only")
    if not documents.causal and not balanced:
        raise NotSupported("a full mask is never balanced otherwise")
    if task.device.type != "cuda":
        raise NotSupported("its attention of distributed tensors is for GPUs")
    from torch.distributed.tensor.experimental import context_parallel

    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention
    except ImportError:  # up to torch 2.9
        from torch.distributed.tensor.experimental import _attention
    causal, zigzag, mesh = documents.causal, documents.causal and balanced, mesh_of(task.size)

    @contextmanager
    def inside() -> Iterator[None]:
        _attention.set_rotate_method(rotate_method)
        _attention._cp_options.enable_load_balance = zigzag
        something = torch.zeros(1, 1, 2 * task.size, 1, device=task.device)  # it insists on a tensor to shard
        with (
            context_parallel(mesh, buffers=[something], buffer_seq_dims=[2]),
            sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True),
        ):
            yield

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # By its full name: context_parallel puts another function there.
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q[None], k[None], v[None], is_causal=causal, enable_gqa=True)[0]

    return Contender(attend, tokens_of(shard(task, zigzag)), heads_first=True, inside=inside)


@functools.cache
def mesh_of(size: int) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cuda", (size,))


@functools.cache
def nodes_of(size: int, nodes: int, device_type: str) -> DeviceMesh:
    """All ranks, cut into nodes."""
    return init_hierarchical_mesh(size, nodes, size // nodes, device_type)


def len_of(runs: IntArray) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum())


RIVALS: dict[str, Callable[[Task], Contender]] = {
    "torch ring all-gather": functools.partial(torch_ring, rotate_method="allgather"),
    "torch ring all-to-all": functools.partial(torch_ring, rotate_method="alltoall"),
    "torch ring all-gather unbalanced": functools.partial(torch_ring, rotate_method="allgather", balanced=False),
    "torch ring all-to-all unbalanced": functools.partial(torch_ring, rotate_method="alltoall", balanced=False),
    "all-gather FlexAttention": functools.partial(all_gather, kernel="FlexAttention", zigzag=False),
    "all-gather FlexAttention zigzag": functools.partial(all_gather, kernel="FlexAttention", zigzag=True),
    "all-gather dense": functools.partial(all_gather, kernel="dense", zigzag=False),
    "all-gather dense zigzag": functools.partial(all_gather, kernel="dense", zigzag=True),
    "Ulysses flash-attn-4": functools.partial(ulysses, kernel="flash-attn-4"),
    "Ulysses cuDNN": functools.partial(ulysses, kernel="cuDNN"),
    "Ulysses FlexAttention": functools.partial(ulysses, kernel="FlexAttention"),
    "Ulysses dense": functools.partial(ulysses, kernel="dense"),
}
