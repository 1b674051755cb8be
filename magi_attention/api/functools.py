"""Helpers around the interface: padding, and masks in the forms that other libraries describe them in."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from magi_attention.kernels.validate import check_tensor
from magi_attention.mask import AttnMask, AttnMaskType, AttnRange, AttnRanges, builders, from_dense
from magi_attention.mask.integers import as_int, as_length
from magi_attention.mask.slices import MaskTypesLike, parse_mask_types
from magi_attention.planning import compute_pad_size
from magi_attention.runtime.side_groups import is_on_gpus

__all__ = [
    "apply_padding",
    "compute_pad_size",
    "from_mask",
    "full_attention_to_varlen_attention",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "init_hierarchical_mesh",
    "pad_at_dim",
    "squash_batch_dim",
    "unpad_at_dim",
]

Slices = tuple[AttnRanges, AttnRanges, list[AttnMaskType]]


def pad_at_dim(x: torch.Tensor, dim: int, pad_size: int, value: float = 0.0, side: str = "right") -> torch.Tensor:
    """Add ``pad_size`` entries of ``value`` to one dimension.

    Args:
        x: Any tensor.
        dim: The dimension to pad; negative counts from the end.
        pad_size: Entries to add.
        value: What to fill them with.
        side: ``"right"`` to add behind, ``"left"`` to add before.

    Raises:
        TypeError: If ``x`` is not a tensor, or ``pad_size`` not an integer.
        ValueError: If it is negative, ``dim`` is no dimension of ``x``, or ``side`` is unknown.
    """
    pad_size = as_length(pad_size, "pad_size")
    dim = _checked_dim(x, dim)
    _check_side(side)
    shape = list(x.shape)
    shape[dim] = pad_size
    padding = x.new_full(shape, value)
    return torch.cat((x, padding) if side == "right" else (padding, x), dim=dim)


def unpad_at_dim(x: torch.Tensor, dim: int, pad_size: int, side: str = "right") -> torch.Tensor:
    """Drop ``pad_size`` entries of one dimension; the inverse of :func:`pad_at_dim`.

    Raises:
        TypeError: If ``x`` is not a tensor, or ``pad_size`` not an integer.
        ValueError: If it is negative or more than there is, ``dim`` is no dimension of ``x``, or ``side`` is unknown.
    """
    pad_size = as_length(pad_size, "pad_size")
    dim = _checked_dim(x, dim)
    _check_side(side)
    if pad_size > x.shape[dim]:
        raise ValueError(f"pad_size must lie in 0 to {x.shape[dim]}, the size of dimension {dim}, not {pad_size}")
    return x.narrow(dim, 0 if side == "right" else pad_size, x.shape[dim] - pad_size)


def _checked_dim(x: torch.Tensor, dim: int) -> int:
    check_tensor("x", x)
    dim = as_int(dim, "dim")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be one of the {x.ndim} dimensions of x, {tuple(x.shape)}, not {dim}")
    return dim


def _check_side(side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")


def apply_padding(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: MaskTypesLike,
    total_seqlen: int,
    pad_size: int,
) -> Slices:
    """Add a slice for padding rows at the end, which attends nothing, to copies of the slices.

    The key functions pad by themselves; this is for code that pads its input before it makes a key.

    Args:
        q_ranges: Ranges of queries.
        k_ranges: As many ranges of keys.
        attn_mask_type: One mask type for all slices or one each.
        total_seqlen: Rows without padding.
        pad_size: Rows of padding.

    Returns:
        ``(q_ranges, k_ranges, attn_mask_type)`` for ``total_seqlen + pad_size`` rows.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a mask type is unknown, there are not as many as ranges, or a size is negative.
    """
    q, k = AttnRanges.from_ranges(q_ranges), AttnRanges.from_ranges(k_ranges)
    types = [AttnMaskType.from_int_type(code) for code in parse_mask_types(attn_mask_type, len(q))]
    total_seqlen, pad_size = as_length(total_seqlen, "total_seqlen"), as_length(pad_size, "pad_size")
    if pad_size > 0:
        q.append(AttnRange(total_seqlen, total_seqlen + pad_size))
        k.append(AttnRange(0, 0))
        types.append(AttnMaskType.FULL)
    return q, k, types


def squash_batch_dim(x: torch.Tensor) -> torch.Tensor:
    """Pack a batch into one sequence: ``(batch, seqlen, ...)`` to ``(batch * seqlen, ...)``.

    Raises:
        TypeError: If ``x`` is not a tensor.
        ValueError: If ``x`` has fewer than two dimensions.
    """
    check_tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have a batch and a sequence dimension, but its shape is {tuple(x.shape)}")
    return x.flatten(0, 1)


def full_attention_to_varlen_attention(batch_size: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``cu_seqlens_q`` and ``cu_seqlens_k``, int32, of a batch of equally long sequences packed into one.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If one is negative, or both together are more tokens than int32 counts.
    """
    batch_size, seq_len = as_length(batch_size, "batch_size"), as_length(seq_len, "seq_len")
    if batch_size * seq_len >= 1 << 31:
        raise ValueError(f"batch_size * seq_len = {batch_size} * {seq_len} is beyond int32: use smaller batches")
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32) * seq_len
    return cu_seqlens, cu_seqlens.clone()


def infer_varlen_mask_from_batch(batch_size: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another name of :func:`full_attention_to_varlen_attention`."""
    return full_attention_to_varlen_attention(batch_size, seq_len)


def infer_attn_mask_from_sliding_window(q_range: AttnRange, k_range: AttnRange, window_size: tuple[int, int]) -> Slices:
    """The slices of a sliding window inside one rectangle, aligned at its bottom right as in flash-attention.

    Args:
        q_range: The queries; an :class:`~magi_attention.mask.AttnRange` or a pair.
        k_range: The keys.
        window_size: How many keys each query sees before (left) and behind (right) its own position; -1 for all.

    Returns:
        ``(q_ranges, k_ranges, attn_mask_type)``.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a range is none, or ``window_size`` is no pair of numbers of at least -1.
    """
    q, k = AttnRange.from_range(q_range), AttnRange.from_range(k_range)
    from_zero = builders.sliding_window(q.seqlen, window_size, k.seqlen)
    shift = k.start - q.start
    bands = from_zero.bands + np.array([q.start, q.start, k.start, k.start, shift, shift])
    return AttnMask.from_bands(bands, q.end, k.end).to_ranges()


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: torch.Tensor | Sequence[int],
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    global_window_size: int = 0,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """The slices of packed documents, each with an optional window.

    Args:
        cu_seqlens_q: Where the documents begin, and the total.
        cu_seqlens_k: The same for keys; None for the same as ``cu_seqlens_q``.
        causal: Whether a query sees no key behind its own position.
        window_size: Keys seen before and behind; -1 for all. With ``causal`` the right one counts as 0.
        global_window_size: Keys at each document's start that all its queries see (that causality allows).

    Returns:
        ``(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)``.

    Raises:
        ValueError: If ``cu_seqlens`` are malformed or a size is negative.
    """
    mask = builders.global_sliding_window(cu_seqlens_q, window_size, global_window_size, causal, cu_seqlens_k)
    return *mask.to_ranges(), mask.total_seqlen_q, mask.total_seqlen_k


def from_mask(mask: torch.Tensor | np.ndarray | Sequence[Sequence[bool]]) -> Slices:
    """The slices of a dense boolean mask, for ``magi_attn_flex_key``.

    Args:
        mask: True where a query attends a key, shape ``(total_seqlen_q, total_seqlen_k)``.

    Returns:
        ``(q_ranges, k_ranges, attn_mask_type)``.

    Raises:
        TypeError: If ``mask`` is not boolean.
        ValueError: If it does not have two dimensions, or is made of too many parts.
    """
    return from_dense(mask).to_ranges()


def init_hierarchical_mesh(
    world_size: int, world_size_inter_node: int, world_size_intra_node: int, device_type: str | None = None
) -> DeviceMesh:
    """A device mesh of nodes and the ranks inside them, to pass as ``cp_mesh``. A collective.

    Args:
        world_size: Number of ranks.
        world_size_inter_node: Number of nodes.
        world_size_intra_node: Ranks in a node.
        device_type: ``"cuda"`` or ``"cpu"``; None to follow the default group's backend.

    Returns:
        A mesh of shape ``(world_size_inter_node, world_size_intra_node)`` with axes ``"inter"`` and ``"intra"``.

    Raises:
        ValueError: If the sizes don't multiply to ``world_size``.
    """
    if world_size_inter_node * world_size_intra_node != world_size:
        raise ValueError(
            f"world_size_inter_node * world_size_intra_node = {world_size_inter_node} * {world_size_intra_node} "
            f"must be world_size {world_size}"
        )
    if device_type is None:
        device_type = "cuda" if is_on_gpus(dist.group.WORLD) else "cpu"
    return init_device_mesh(
        device_type, (world_size_inter_node, world_size_intra_node), mesh_dim_names=("inter", "intra")
    )
