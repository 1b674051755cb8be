"""The distributed functions of the API page: make a key for a mask, dispatch, attend, undispatch."""

from typing import get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api.keys import magi_attn_flex_key as magi_attn_flex_key
from magi_attention.api.keys import magi_attn_varlen_key as magi_attn_varlen_key
from magi_attention.api.outside_graphs import outside_graphs
from magi_attention.config import DistAttnConfig
from magi_attention.kernels.engine import choose_engine
from magi_attention.kernels.on_device import on_device
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.validate import check_qkv, check_sink, check_tensor
from magi_attention.mask.builders import SeqlensLike
from magi_attention.mask.ranges import RangesLike
from magi_attention.mask.slices import MaskTypesLike
from magi_attention.planning import AttnPlan, RankPlan
from magi_attention.runtime.cache import runtimes
from magi_attention.runtime.dispatch import GradOfGlobal, dispatch_rows, undispatch_rows
from magi_attention.runtime.dist_attn import DistAttn
from magi_attention.runtime.groups import position_device
from magi_attention.runtime.head_parallel import attend_by_heads, check_heads
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import ready_runtime
from magi_attention.runtime.runtime import Side


@outside_graphs
def magi_attn_varlen_dispatch(
    x: torch.Tensor,
    cu_seqlens_q: SeqlensLike,
    cu_seqlens_k: SeqlensLike,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    causal: bool = False,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    *,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    plan: AttnPlan | RankPlan | None = None,
) -> tuple[torch.Tensor, DistAttnRuntimeKey]:
    """Make the key of a mask of packed documents and dispatch ``x`` with it.

    Args:
        x: The global input of the queries, the same on every rank, shape ``(total_seqlen_q, ...)``.
        cu_seqlens_q: See :func:`magi_attn_varlen_key`, as for all further arguments.
        cu_seqlens_k: Where the documents' keys begin, and their total.
        pad_size: Rows of padding at the end.
        chunk_size: Rows in a chunk.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh.
        causal: Whether documents are causal.
        dist_attn_config: How to balance and to split into stages.
        is_same_source: Whether queries and keys come from the same tokens.
        is_q_permutable: Whether any rank may have any chunk of queries.
        is_k_permutable: Whether any rank may have any chunk of keys.
        plan: A plan made ahead.

    Returns:
        This rank's rows of ``x``, shape ``(local_seqlen_q, ...)``, and the key.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: As :func:`magi_attn_varlen_key` and :func:`dispatch`.
    """
    key = magi_attn_varlen_key(
        cu_seqlens_q,
        cu_seqlens_k,
        pad_size,
        chunk_size,
        cp_group,
        cp_mesh,
        causal,
        dist_attn_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        plan=plan,
    )
    return dispatch(x, key), key


@outside_graphs
def magi_attn_flex_dispatch(
    x: torch.Tensor,
    q_ranges: RangesLike,
    k_ranges: RangesLike,
    attn_mask_type: MaskTypesLike,
    total_seqlen_q: int,
    total_seqlen_k: int,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    *,
    plan: AttnPlan | RankPlan | None = None,
) -> tuple[torch.Tensor, DistAttnRuntimeKey]:
    """Make the key of any mask made of slices and dispatch ``x`` with it.

    Args:
        x: The global input of the queries, the same on every rank, shape ``(total_seqlen_q, ...)``.
        q_ranges: See :func:`magi_attn_flex_key`, as for all further arguments.
        k_ranges: Ranges of keys.
        attn_mask_type: One mask type for all slices or one each.
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        pad_size: Rows of padding at the end.
        chunk_size: Rows in a chunk.
        cp_group: The context-parallel process group. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh.
        dist_attn_config: How to balance and to split into stages.
        is_same_source: Whether queries and keys come from the same tokens.
        is_q_permutable: Whether any rank may have any chunk of queries.
        is_k_permutable: Whether any rank may have any chunk of keys.
        plan: A plan made ahead.

    Returns:
        This rank's rows of ``x``, shape ``(local_seqlen_q, ...)``, and the key.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: As :func:`magi_attn_flex_key` and :func:`dispatch`.
    """
    key = magi_attn_flex_key(
        q_ranges,
        k_ranges,
        attn_mask_type,
        total_seqlen_q,
        total_seqlen_k,
        pad_size,
        chunk_size,
        cp_group,
        cp_mesh,
        dist_attn_config,
        is_same_source,
        is_q_permutable,
        is_k_permutable,
        plan=plan,
    )
    return dispatch(x, key), key


@outside_graphs
def dispatch(
    x: torch.Tensor, key: DistAttnRuntimeKey, *, side: Side = "q", grad: GradOfGlobal = "replicated"
) -> torch.Tensor:
    """Take this rank's rows of a global tensor.

    Args:
        x: The global tensor, the same on every rank, shape ``(total_seqlen, ...)``, any dtype.
        key: The key.
        side: ``"q"`` for rows of queries, ``"k"`` for rows of keys and values. In self-attention they are the same.
        grad: What the gradient of ``x`` becomes on each rank.

            * ``"replicated"``: the whole gradient, on every rank. The backward pass gathers every rank's rows.
            * ``"partial"``: what this rank's rows contribute, and zeros; the ranks' gradients add up to the whole, as
              those of all weights behind the dispatch do. Nothing is sent. For an embedding before the dispatch, when
              all weights' gradients are summed over these ranks alike.

    Returns:
        This rank's rows, shape ``(local_seqlen, ...)``: its chunks in ascending order, padding rows zero.

    Raises:
        TypeError: If ``key`` is no key or ``x`` no tensor.
        ValueError: If ``x`` has another length, ``side`` or ``grad`` is unknown, the key's plan was evicted, or the
            ranks made the key from different masks.
    """
    runtime = ready_runtime(key)
    plan = runtime.dispatch_of(side)
    _check_grad(grad)
    _check_rows("x", x, plan.total_seqlen, f"global {_rows_of(key, side)}, without padding")
    return dispatch_rows(x, runtime.dispatch_program(side, x.device), grad)


@outside_graphs
def undispatch(
    x: torch.Tensor, key: DistAttnRuntimeKey, *, side: Side = "q", grad: GradOfGlobal = "replicated"
) -> torch.Tensor:
    """Gather every rank's rows into the global tensor.

    Args:
        x: This rank's rows, shape ``(local_seqlen, ...)``.
        key: The key.
        side: ``"q"`` for rows of queries, ``"k"`` for rows of keys and values. In self-attention they are the same.
        grad: What the gradient of the global tensor is on each rank.

            * ``"replicated"``: the whole gradient, on every rank: all ranks compute the same loss, and it counts once.
              The backward pass takes this rank's rows.
            * ``"partial"``: a part, and the ranks' parts add up to the whole: each rank computes a loss of its own, and
              the loss is their sum. The backward pass sums each row over the ranks.

    Returns:
        The global tensor on every rank, shape ``(total_seqlen, ...)``, in the original order and without padding.

    Raises:
        TypeError: If ``key`` is no key or ``x`` no tensor.
        ValueError: If ``x`` has another length, ``side`` or ``grad`` is unknown, the key's plan was evicted, or the
            ranks made the key from different masks.
    """
    runtime = ready_runtime(key)
    plan = runtime.dispatch_of(side)
    _check_grad(grad)
    _check_rows("x", x, plan.local_seqlens[runtime.rank], f"local {_rows_of(key, side)}")
    return undispatch_rows(x, runtime.dispatch_program(side, x.device), grad)


@outside_graphs
def calc_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key: DistAttnRuntimeKey,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    engine: str | None = None,
    sink: torch.Tensor | None = None,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Attention of this rank's queries over the keys and values of all ranks, as the key's mask says.

    A collective, forward and backward. Each row of k and v goes only to the ranks that attend it; the rows of one stage
    travel while another is computed. With ``DistAttnConfig(intra_node="heads")`` the ranks of a node first exchange
    their rows for those of all of them with some heads, and each row of these heads goes to the nodes that attend it.

    Inputs must be finite, padding rows included, whose queries nobody sees: 0 times NaN is NaN. On GPUs, calls with one
    key belong on one stream, or on streams that wait for each other.

    Args:
        q: Queries of the local rows, shape ``(local_seqlen_q, num_heads_q, head_dim)``, fp32, fp64, bf16 or fp16.
        k: Keys of the local rows, shape ``(local_seqlen_k, num_heads_kv, head_dim)``; ``num_heads_kv`` divides
            ``num_heads_q``. In self-attention there are as many as queries, in cross-attention those that
            ``dispatch(x, key, side="k")`` takes.
        v: Values of the local rows, shape ``(local_seqlen_k, num_heads_kv, head_dim_v)``. Their head_dim may differ
            from that of queries and keys, as in multi-head latent attention.
        key: The key.
        softmax_scale: Factor of the scores, ``head_dim ** -0.5`` by default; the same on every rank, as all options.
        softcap: If not 0, scores ``x`` become ``softcap * tanh(x / softcap)``.
        deterministic: Ask for engines' gradients that are equal bit by bit from run to run, where that costs time.
        sm_margin: How many multiprocessors of a GPU those kernels leave to others that have transfers beside them.
            Without it they leave room as programs end.
        engine: The name of the engine that computes. None chooses one by device, dtype and head_dims, see
            :func:`magi_attention.kernels.explain`.
        sink: An attention sink for each query head, shape ``(num_heads_q,)``, fp32 or of ``q``'s dtype, see
            :func:`~magi_attention.functional.flex_flash_attn.flex_flash_attn_func`. Its gradient on each rank is the
            sum over that rank's rows (with ``intra_node="heads"`` over the rows and heads that it attends with). The
            ranks' gradients add up to the whole, as those of every weight behind the dispatch do: sum them over the
            group.
        return_max_logits: Whether to return ``max_logits``, too, which costs an all-reduce of ``num_heads_q`` numbers.

    Returns:
        ``out`` of ``q``'s dtype, shape ``(local_seqlen_q, num_heads_q, head_dim_v)``, and ``lse``, the natural
        logarithm of the sum of exponentials of each row's scores and its sink, shape
        ``(num_heads_q, local_seqlen_q)``, fp32 (fp64 for fp64 inputs). Rows that attend nothing give ``out = 0``,
        ``lse = -inf`` (or the sink) and zero gradients. Gradients flow through both.

        With ``return_max_logits`` also ``max_logits``, the highest score of each head over the rows of all ranks,
        without the sink, shape ``(num_heads_q,)``, the same on every rank and without a gradient.

    Raises:
        TypeError: If ``key`` is no key, q, k and v are no floating-point tensors of one dtype, or an option has the
            wrong type.
        ValueError: If shapes do not fit together or to the key, an option is out of bounds, no engine computes such
            attention, the ranks of a node cannot share the heads though they should, the key's plan was evicted, or the
            ranks made the key from different masks.
    """
    runtime = ready_runtime(key)
    check_qkv(q, k, v)
    check_sink(sink, q)
    if runtime.splits_heads:
        check_heads(q.shape[1], k.shape[1], runtime.cp_group.intra.size())
    sides: tuple[tuple[str, torch.Tensor, Side], ...] = (("q", q, "q"), ("k", k, "k"), ("v", v, "k"))
    for name, tensor, side in sides:
        rows = runtime.dispatch_of(side).local_seqlens[runtime.rank]
        _check_rows(name, tensor, rows, f"local {_rows_of(key, side)}")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    params = AttnParams(scale, softcap, deterministic, sm_margin, return_max_logits)
    results: tuple[torch.Tensor, ...]
    with on_device(q.device):
        program = runtime.program(choose_engine(q.device, q.dtype, (q.shape[2], v.shape[2]), engine), q.device)
        if runtime.splits_heads:
            results = attend_by_heads(q, k, v, runtime, program, params, sink)
        else:
            results = DistAttn.apply(q, k, v, program, params, sink)
    if return_max_logits:
        dist.all_reduce(results[2], dist.ReduceOp.MAX, group=runtime.group)
    return results


@outside_graphs
def get_position_ids(key: DistAttnRuntimeKey, *, side: Side = "q") -> torch.Tensor:
    """The global position of each of this rank's rows, for RoPE and other work that depends on positions.

    Args:
        key: The key.
        side: ``"q"`` for rows of queries, ``"k"`` for rows of keys and values. In self-attention they are the same.

    Returns:
        int64, shape ``(local_seqlen,)``, on the current CUDA device for NCCL groups, else on the CPU. Padding rows
        repeat the last real position.

    Raises:
        TypeError: If ``key`` is no key.
        ValueError: If ``side`` is unknown, or the key's plan was evicted.
    """
    runtime = runtimes.get(key)
    positions = torch.from_numpy(runtime.dispatch_of(side).position_ids(runtime.rank))
    return positions.to(position_device(runtime.group))


def get_most_recent_key() -> DistAttnRuntimeKey:
    """The key last made or used in this process. Prefer to pass keys along.

    Raises:
        ValueError: If no key has been made yet.
    """
    return runtimes.most_recent()


def set_plan_cache_capacity(capacity: int) -> None:
    """Set how many keys' plans are kept; the least recently used beyond that are dropped.

    128 are kept by default, each some tens of megabytes of host memory for a million tokens under a causal mask. What
    plans take on a device is kept for the 16 used last, and made anew for others when they are used again.

    Raises:
        TypeError: If ``capacity`` is not an integer.
        ValueError: If it is less than 1.
    """
    runtimes.set_capacity(capacity)


def _rows_of(key: DistAttnRuntimeKey, side: Side) -> str:
    if key.sources.is_same_source:
        return "rows"
    return "rows of queries" if side == "q" else "rows of keys"


def _check_grad(grad: str) -> None:
    if grad not in get_args(GradOfGlobal):
        raise ValueError(f"grad must be 'replicated' or 'partial', not {grad!r}")


def _check_rows(name: str, x: torch.Tensor, rows: int, what: str) -> None:
    check_tensor(name, x)
    if x.ndim == 0 or x.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but the key is for {rows} {what}: they come first")
